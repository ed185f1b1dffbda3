"""Rules of complex numbers: their parts, their size and angle, and Fourier transforms.

The tangents of a complex value are complex: d(a + ib) = da + i db.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfast.dual.dispatch import Operator, directions_of, rule
from fisherfast.dual.stacks import aligned, lifted, shifted, view_of
from fisherfast.dual.tensor import DualTensor, Memory

# --- Parts ---------------------------------------------------------------------------------------


@rule("view_as_real")
def _view_as_real(func: Operator, x: DualTensor) -> DualTensor:
    return view_of(x, torch.view_as_real(x.laid_out()))


@rule("view_as_complex")
def _view_as_complex(func: Operator, x: DualTensor) -> DualTensor:
    return view_of(x, torch.view_as_complex(x.laid_out()))


@rule("_conj")
def _conjugate(func: Operator, x: DualTensor) -> DualTensor:
    """Copy the conjugate: inside a dispatched operation PyTorch ignores the mark of a stack that is
    conjugated when it is read."""
    return DualTensor(torch.conj_physical(x.stack), Memory(read_only="conj"))


@rule("resolve_conj")
def _resolve(func: Operator, x: DualTensor) -> DualTensor:
    return DualTensor(x.stack.clone()) if x.memory.read_only == "conj" else x


@rule("complex")
def _from_parts(func: Operator, real: Any, imaginary: Any) -> DualTensor:
    directions, ndim = directions_of([real, imaginary]), max(real.dim(), imaginary.dim())
    parts = (DualTensor(lifted(part, directions)) for part in (real, imaginary))
    return DualTensor(torch.complex(*(aligned(part, ndim) for part in parts)))


@rule("polar")
def _from_size_and_angle(func: Operator, size: Any, angle: Any) -> Any:
    return torch.complex(size * angle.cos(), size * angle.sin())


# --- Size and angle ------------------------------------------------------------------------------


def size_of(func: Operator, x: DualTensor) -> DualTensor:
    """Compute |z|, whose derivative is Re(conj(z) dz) / |z|, and 0 at z = 0 as in PyTorch."""
    value = x.primal.abs()
    tangents = _inner(torch.where(value == 0, 0.0, x.primal / value), x.tangents)
    return DualTensor(torch.cat([value[None], tangents]))


@rule("angle")
def _angle(func: Operator, x: DualTensor) -> Any:
    """Compute arg z, whose derivative is Im(conj(z) dz) / |z|^2, and 0 at z = 0 as in PyTorch."""
    if not x.is_complex():
        return NotImplemented
    square = x.primal.abs().square()
    turned = torch.where(square == 0, 0.0, 1j * x.primal / square)
    return DualTensor(torch.cat([x.primal.angle()[None], _inner(turned, x.tangents)]))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Compute Re(conj(a) b) elementwise."""
    return a.real * b.real + a.imag * b.imag


# --- Fourier transforms --------------------------------------------------------------------------


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def _transform(func: Operator, x: DualTensor, dim: Sequence[int], *args: Any) -> DualTensor:
    return DualTensor(func(x.stack, [shifted(d, x.dim()) for d in dim], *args))
