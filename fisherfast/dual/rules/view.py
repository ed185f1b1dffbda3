"""Rules of views and other rearrangements: dimensions shift by one because of the stack's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfast.dual.dispatch import (
    Operator,
    aten,
    named_arguments,
    overload,
    overloads,
    rule,
)
from fisherfast.dual.errors import no_derivative
from fisherfast.dual.stacks import aligned, shifted, view_of
from fisherfast.dual.tensor import DualTensor


@rule(*overloads("view", "_unsafe_view", "reshape", "_reshape_alias"))
def _view(func: Operator, x: DualTensor, size: Sequence[int], *_: Any) -> DualTensor:
    size = _resolved(size, x.numel())
    stack = x.laid_out()
    try:
        return view_of(x, stack.view(len(stack), *size))
    except RuntimeError:
        if func is not aten.view.default:
            return view_of(x, stack.reshape(len(stack), *size))
    x.settle(stack.contiguous())  # a convolution may have stored it channels-last
    return view_of(x, x.laid_out().view(len(stack), *size))


def _resolved(size: Sequence[int], numel: int) -> list[int]:
    """Replace -1 in a shape, which is ambiguous for an empty stack."""
    known = 1
    for entry in size:
        known *= entry if entry != -1 else 1
    return [entry if entry != -1 else numel // max(known, 1) for entry in size]


@rule(*overloads("flatten.using_ints"))
def _flatten(func: Operator, x: DualTensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    if x.dim() == 0:
        return view_of(x, x.laid_out().reshape(-1, 1))
    stack = x.laid_out().flatten(shifted(start_dim, x.dim()), shifted(end_dim, x.dim()))
    return view_of(x, stack)


@rule(*overloads("expand"))
def _expand(func: Operator, x: DualTensor, size: Sequence[int], *, implicit: bool = False) -> Any:
    stack = aligned(x, len(size), laid_out=True)
    return view_of(x, stack.expand(len(stack), *size))


@rule(*overloads("permute"))
def _permute(func: Operator, x: DualTensor, dims: Sequence[int]) -> DualTensor:
    return view_of(x, x.laid_out().permute(0, *(shifted(dim, x.dim()) for dim in dims)))


@rule(*overloads("transpose.int"))
def _transpose(func: Operator, x: DualTensor, dim0: int, dim1: int) -> DualTensor:
    return view_of(x, x.laid_out().transpose(shifted(dim0, x.dim()), shifted(dim1, x.dim())))


@rule(*overloads("t", "numpy_T", "mT"))
def _matrix_transpose(func: Operator, x: DualTensor) -> Any:
    if x.dim() < 2:
        return view_of(x, x.laid_out())
    if x.dim() > 2 and func is not overload("mT"):
        return NotImplemented
    return view_of(x, x.laid_out().transpose(-2, -1))


@rule(*overloads("unsqueeze"))
def _unsqueeze(func: Operator, x: DualTensor, dim: int) -> DualTensor:
    return view_of(x, x.laid_out().unsqueeze(shifted(dim, x.dim() + 1)))


@rule(*overloads("squeeze"))
def _squeeze(func: Operator, x: DualTensor) -> DualTensor:
    stack = x.laid_out()
    return view_of(x, stack.reshape(stack.shape[:1] + tuple(s for s in x.shape if s != 1)))


@rule(*overloads("squeeze.dim", "squeeze.dims"))
def _squeeze_dims(func: Operator, x: DualTensor, dim: int | Sequence[int]) -> DualTensor:
    if x.dim() == 0:
        return view_of(x, x.laid_out())
    dims = [dim] if isinstance(dim, int) else dim
    return view_of(x, x.laid_out().squeeze(tuple(shifted(d, x.dim()) for d in dims)))


# --- Operations with dimension arguments in second place: func(x, dim, ...) ----------------------

ONE_DIM = overloads(
    "select.int",
    "slice.Tensor",
    "narrow",
    "unbind.int",
    "split.Tensor",
    "split_with_sizes",
    "chunk",
    "tensor_split.sections",
    "unfold",
    "diagonal",
    "flip",
    "roll",
    "cumsum",
    "repeat_interleave.self_int",
    "rot90",
    "diff",
    "movedim.int",
    "swapaxes",
)

DIM_NAMES = frozenset(
    ("dim", "dims", "dim0", "dim1", "dim2", "dimension", "axis0", "axis1", "source", "destination")
)
"""ATen's names of arguments that are one or several dimensions."""


def _along_one_dim(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    """Shift every dimension argument by one, past the stack's first dimension."""
    named = named_arguments(func, args, kwargs)
    for name, value in named.items():
        if name not in DIM_NAMES:
            continue
        if value is None or (isinstance(value, list | tuple) and not value):
            return NotImplemented  # over the flattened tensor
        named[name] = (
            shifted(value, x.dim())
            if isinstance(value, int)
            else [shifted(v, x.dim()) for v in value]
        )
    if any(isinstance(value, Tensor) for value in named.values()):
        return NotImplemented  # the appended values have tangents of their own, or zero
    result = func(x.laid_out(), **named)
    if isinstance(result, Tensor):
        return view_of(x, result)
    return type(result)(view_of(x, item) for item in result)


rule(*ONE_DIM)(_along_one_dim)


@rule(*overloads("unflatten.int"))
def _unflatten(func: Operator, x: DualTensor, dim: int, sizes: Sequence[int]) -> DualTensor:
    return view_of(x, x.laid_out().unflatten(shifted(dim, x.dim()), sizes))


@rule(*overloads("as_strided"))
def _as_strided(
    func: Operator,
    x: DualTensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> DualTensor:
    stack = x.laid_out()
    if storage_offset is not None and stack.numel() * stack.itemsize != (
        stack.untyped_storage().nbytes()
    ):
        raise no_derivative(
            str(func), "an offset into the memory of a view: leave storage_offset out"
        )
    first = stack.storage_offset() + (storage_offset or 0)
    return view_of(x, stack.as_strided([len(stack), *size], [stack.stride(0), *stride], first))


@rule(*overloads("repeat"))
def _repeat(func: Operator, x: DualTensor, repeats: Sequence[int]) -> DualTensor:
    return DualTensor(aligned(x, len(repeats)).repeat(1, *repeats))


@rule(*overloads("constant_pad_nd", "pad"))
def _pad(func: Operator, x: DualTensor, pad: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    named = named_arguments(func, (pad, *args), kwargs)
    if named.get("mode", "constant") != "constant":
        return NotImplemented
    value = named["value"] or 0
    stack = torch.constant_pad_nd(x.stack, pad, 0)
    if value != 0:
        stack[0] = torch.constant_pad_nd(x.primal, pad, value)
    return DualTensor(stack)
