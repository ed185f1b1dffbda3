"""Rules of views and other rearrangements: dimensions shift by one because of the stack's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fisherfast.dual.dispatch import Operator, aten, named_arguments, rule
from fisherfast.dual.errors import no_derivative
from fisherfast.dual.stacks import aligned, shifted, view_of
from fisherfast.dual.tensor import DualTensor


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
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
    known = math.prod(entry for entry in size if entry != -1)
    return [entry if entry != -1 else numel // max(known, 1) for entry in size]


@rule("expand")
def _expand(func: Operator, x: DualTensor, size: Sequence[int], *, implicit: bool = False) -> Any:
    stack = aligned(x, len(size), laid_out=True)
    return view_of(x, stack.expand(len(stack), *size))


@rule("permute")
def _permute(func: Operator, x: DualTensor, dims: Sequence[int]) -> DualTensor:
    return view_of(x, x.laid_out().permute(0, *(shifted(dim, x.dim()) for dim in dims)))


@rule("t")
def _matrix_transpose(func: Operator, x: DualTensor) -> DualTensor:
    stack = x.laid_out()
    return view_of(x, stack if x.dim() < 2 else stack.transpose(-2, -1))


@rule("unsqueeze")
def _unsqueeze(func: Operator, x: DualTensor, dim: int) -> DualTensor:
    return view_of(x, x.laid_out().unsqueeze(shifted(dim, x.dim() + 1)))


@rule("squeeze", "squeeze.dim", "squeeze.dims")
def _squeeze(func: Operator, x: DualTensor, dim: int | Sequence[int] | None = None) -> DualTensor:
    dims = range(x.dim()) if dim is None or x.dim() == 0 else [dim] if isinstance(dim, int) else dim
    return view_of(x, x.laid_out().squeeze(tuple(shifted(d, x.dim()) for d in dims)))


# --- Operations with dimensions among their arguments --------------------------------------------

DIM_NAMES = frozenset(("dim", "dims", "dim0", "dim1", "dim2", "dimension"))
"""ATen's names of arguments that are one or several dimensions."""


@rule("select.int", "slice.Tensor", "unbind.int", "diagonal", "transpose.int", "unfold")
@rule("split.Tensor", "split_with_sizes", "chunk")
@rule("flip", "roll", "rot90", "cumsum", "repeat_interleave.self_int")
def _along_dims(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    """Shift every dimension argument by one, past the stack's first dimension."""
    named = named_arguments(func, args, kwargs)
    for name in DIM_NAMES & named.keys():
        dims = named[name]
        if dims is None or dims == []:
            return NotImplemented  # over the flattened tensor
        named[name] = (
            shifted(dims, x.dim())
            if isinstance(dims, int)
            else [shifted(dim, x.dim()) for dim in dims]
        )
    result = func(x.laid_out(), **named)
    if isinstance(result, Tensor):
        return view_of(x, result)
    return type(result)(view_of(x, item) for item in result)


@rule("as_strided")
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


@rule("repeat")
def _repeat(func: Operator, x: DualTensor, repeats: Sequence[int]) -> DualTensor:
    return DualTensor(aligned(x, len(repeats)).repeat(1, *repeats))


@rule("constant_pad_nd")
def _pad(func: Operator, x: DualTensor, pad: Sequence[int], value: float = 0) -> DualTensor:
    stack = func(x.stack, pad, 0)
    if value != 0:
        stack[0] = func(x.primal, pad, value)
    return DualTensor(stack)
