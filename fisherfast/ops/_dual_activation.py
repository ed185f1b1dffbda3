"""Activations of a dual buffer, fused with a preceding batch norm in eval mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference_dual
from fisherfast.ops._common import Op, check_like, check_no_grad, register
from fisherfast.ops._dual_common import check_buffer, dense, empty_like

KINDS = {
    "identity": (),
    "relu": (),
    "leaky_relu": ("slope",),
    "prelu": (),
    "hardtanh": ("low", "high"),
    "elu": ("alpha", "scale", "input_scale"),
    "gelu": (),
    "gelu_tanh": (),
    "silu": (),
    "mish": (),
    "softplus": ("beta", "threshold"),
    "sigmoid": (),
    "tanh": (),
    "hardswish": (),
    "hardsigmoid": (),
}
"""Activations and the names of their parameters, in the order of csrc (dual_activation.h)."""


def dual_activation(
    x: Tensor,
    kind: str,
    *parameters: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    slope: Tensor | None = None,
    channel_dim: int = 2,
    out: Tensor | None = None,
) -> Tensor:
    """An activation of a primal and of its P tangents in one pass over the memory.

        z = scale_c x[0] + shift_c,   y[0] = f(z),   y[p] = f'(z) scale_c x[p]

    A batch norm in eval mode is a scale and a shift; kind "identity" applies it alone.

    Args:
        x: [1 + P, ...] float32 or float64, the primal x[0] and its tangents, in any layout.
        kind: "identity", "relu", "leaky_relu" (slope), "prelu", "hardtanh" (low, high; ReLU6 is
            0, 6), "elu" (alpha, scale, input_scale; SELU and CELU too), "gelu", "gelu_tanh",
            "silu", "mish", "softplus" (beta, threshold), "sigmoid", "tanh", "hardswish" or
            "hardsigmoid".
        parameters: of the activation, as many as the kind has.
        scale: [C], dtype and device of ``x``, or None for one.
        shift: [C], or None for zero.
        slope: [C], slope of "prelu" below zero.
        channel_dim: dimension of x with the C channels, for scale, shift and slope.
        out: takes the result: ``x`` itself, or shape, dtype and device of ``x`` without overlapping
            it; None for a new one.

    Returns:
        y [1 + P, ...] in the layout of ``x``, or ``out``.

    Raises:
        TypeError: wrong dtype, or a parameter that is not a number.
        ValueError: wrong kind, shape, device, or number of parameters, or an ``out`` that overlaps
            itself. Nothing is changed then.
        RuntimeError: an input requires grad.

    Cost: reads and writes x once. The derivative at a kink is that of PyTorch's autograd.

    Example:
        >>> x = torch.tensor([[-1.0, 2.0], [10.0, 10.0]])          # primal, one tangent
        >>> dual_activation(x, "leaky_relu", 0.5).tolist()
        [[-0.5, 2.0], [5.0, 10.0]]
        >>> dual_activation(x, "relu", out=x).tolist()             # in place
        [[0.0, 2.0], [0.0, 10.0]]
    """
    check_no_grad("dual_activation", x=x, scale=scale, shift=shift, slope=slope, out=out)
    for value in parameters:
        if not isinstance(value, (int, float)):
            raise TypeError(f"parameters must be numbers, got {type(value).__name__}")
    how = (kind, list(parameters), scale, shift, slope, channel_dim)
    if out is None:
        return torch.ops.fisherfast.dual_activation.default(x, *how)
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(f"out must not overlap itself, got strides {list(out.stride())}")
    torch.ops.fisherfast.dual_activation_out.default(x, *how, out)
    return out


class _How(NamedTuple):
    """The arguments after x, in the order of the schema."""

    kind: str
    parameters: Sequence[float]
    scale: Tensor | None
    shift: Tensor | None
    slope: Tensor | None
    channel_dim: int

    @property
    def vectors(self) -> dict[str, Tensor | None]:
        return {"scale": self.scale, "shift": self.shift, "slope": self.slope}


@register(
    "dual_activation(Tensor x, str kind, float[] parameters, Tensor? scale, Tensor? shift,"
    " Tensor? slope, int channel_dim) -> Tensor"
)
def _dual_activation(x: Tensor, *arguments: Any) -> Op:
    how = _How(*arguments)
    _check(x, how)
    x = dense(x)
    y = empty_like(x)
    return y, lambda: _fill(y, x, how)


@register(
    "dual_activation_out(Tensor x, str kind, float[] parameters, Tensor? scale, Tensor? shift,"
    " Tensor? slope, int channel_dim, Tensor(a!) out) -> ()"
)
def _dual_activation_out(x: Tensor, *arguments: Any) -> Op:
    *options, out = arguments
    how = _How(*options)
    _check(x, how)
    check_like("out", out, "x", x, "[1 + P, ...]", list(x.shape))

    def run() -> None:
        _fill(out, x, how)

    return None, run


def _fill(out: Tensor, x: Tensor, how: _How) -> Tensor:
    """Write the result to out, which may be x; by way of a buffer where their layouts differ."""
    if not _native.serves(x):
        return out.copy_(reference_dual.dual_activation(x, *how))
    x = dense(x)
    y = out if out.stride()[1:] == x.stride()[1:] else empty_like(x)
    vectors = {n: None if v is None else v.contiguous() for n, v in how.vectors.items()}
    slice_size = x[0].numel()
    channels, inner = 1, max(slice_size, 1)
    if any(vector is not None for vector in vectors.values()):
        channels = x.shape[how.channel_dim]
        inner = x.stride(how.channel_dim) if channels > 1 else inner
    a, b, c = (*how.parameters, 0.0, 0.0, 0.0)[:3]
    _native.call(
        "dual_activation",
        x,
        x=x,
        y=y,
        **vectors,
        slice_stride=x.stride(0),
        output_stride=y.stride(0),
        tangents=x.shape[0] - 1,
        outer=slice_size // max(channels * inner, 1),
        channels=channels,
        inner=inner,
        kind=list(KINDS).index(how.kind),
        a=a,
        b=b,
        c=c,
    )
    return out if y is out else out.copy_(y)


def _check(x: Tensor, how: _How) -> None:
    kind, parameters = how.kind, how.parameters
    check_buffer(x, 1, "[1 + P, ...]")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    names = KINDS[kind]
    if len(parameters) != len(names):
        raise ValueError(
            f"parameters must be ({', '.join(names)}) for {kind}, got {len(parameters)} numbers"
        )
    infinite = kind == "hardtanh"  # an end without effect
    if not all(math.isfinite(value) or (infinite and math.isinf(value)) for value in parameters):
        raise ValueError(f"parameters must be finite, got {list(parameters)}")
    if (how.slope is not None) != (kind == "prelu"):
        raise ValueError(f"slope must be given for prelu and for it alone, got kind {kind!r}")
    for name, vector in how.vectors.items():
        if vector is None:
            continue
        if not 1 <= how.channel_dim < x.dim():
            raise ValueError(f"channel_dim must lie in [1, {x.dim()}), got {how.channel_dim}")
        check_like(name, vector, "x", x, "[C]", [x.shape[how.channel_dim]])
