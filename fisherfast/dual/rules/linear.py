"""Rules of linear operations, which act on primal and tangents alike.

Operations on [n, C, ...] run on the stack as on (1 + P) n samples; others run on the stack as it
is, or slice by slice. Added constants (a bias, a number) apply to the primal only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfast.dual.dispatch import (
    Operator,
    aten,
    directions_of,
    has_dual,
    overload,
    primals,
    rule,
)
from fisherfast.dual.errors import no_derivative
from fisherfast.dual.stacks import aligned, in_one_dtype, lifted, merged, shifted, view_of
from fisherfast.dual.tensor import DualTensor, Memory

# --- Sums --------------------------------------------------------------------------------------


@rule("sum", "mean")
def _reduce_all(func: Operator, x: DualTensor, *, dtype: torch.dtype | None = None) -> DualTensor:
    function = torch.sum if func is aten.sum.default else torch.mean
    return DualTensor(function(x.stack.flatten(1), 1, dtype=dtype))


@rule("sum.dim_IntList", "mean.dim")
def _reduce(
    func: Operator,
    x: DualTensor,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    dims = dim or list(range(x.dim()))
    if not dims:
        return DualTensor(x.stack.clone())
    stack = func(x.stack, [shifted(d, x.dim()) for d in dims], keepdim, dtype=dtype)
    return DualTensor(stack)


# --- Elementwise -------------------------------------------------------------------------------


@rule("neg", "tril", "triu", "conj_physical")
def _on_stack(func: Operator, x: DualTensor, *args: Any) -> DualTensor:
    return DualTensor(func(x.stack, *args))


@rule("clone")
def _clone(
    func: Operator, x: DualTensor, *, memory_format: torch.memory_format = torch.preserve_format
) -> DualTensor:
    stack = x.stack
    if memory_format in (torch.preserve_format, torch.contiguous_format):
        return DualTensor(stack.clone(memory_format=memory_format))
    samples = merged(stack).clone(memory_format=memory_format)  # channels-last
    return DualTensor(samples.unflatten(0, stack.shape[:2]))


@rule("_to_copy")
def _to(func: Operator, x: DualTensor, **kwargs: Any) -> Any:
    primal = func(x.primal, **kwargs)
    if not (primal.is_floating_point() or primal.is_complex()):
        return primal
    if primal.device != x.device:
        raise no_derivative(
            str(func), f"a move from {x.device} to {primal.device}: keep the model on one device"
        )
    stack = x.stack.to(primal.dtype, copy=True)
    return DualTensor(stack, Memory(constant=x.memory.constant))


@rule("detach", "alias", "detach_copy")
def _detach(func: Operator, x: DualTensor) -> DualTensor:
    if func is overload("alias"):
        return view_of(x, x.laid_out())
    detached = DualTensor.constant(x.primal, x.directions)
    detached.memory = Memory(read_only="detach")
    return detached


def _result_stack(x: DualTensor, other: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Make a new stack of x, broadcast against a plain operand."""
    shape = x.shape
    if isinstance(other, Tensor) and other.dim() > 0:
        shape = torch.broadcast_shapes(x.shape, other.shape)
    stack = aligned(x, len(shape))
    if shape != x.shape:
        stack = stack.expand(len(stack), *shape)
    return stack.to(dtype, copy=True)


@rule("add.Tensor", "sub.Tensor", "rsub.Scalar", "rsub.Tensor", "add.Scalar")
@rule("sub.Scalar")
def _add(func: Operator, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
    alpha = kwargs.get("alpha", args[0] if args else 1)
    name = func._schema.name
    if name == "aten::rsub":
        a, b = b, a
    sign = 1 if name == "aten::add" else -1
    if isinstance(a, DualTensor) and isinstance(b, DualTensor):
        a, b = in_one_dtype(a, b)
        ndim = max(a.dim(), b.dim())
        return DualTensor(torch.add(aligned(a, ndim), aligned(b, ndim), alpha=sign * alpha))
    dtype = torch.result_type(primals(a), primals(b))
    if isinstance(a, DualTensor):
        stack = _result_stack(a, b, dtype)
        stack[0].add_(b, alpha=sign * alpha)
        return DualTensor(stack)
    stack = _result_stack(b, a, dtype).mul_(sign * alpha)
    stack[0].add_(a)
    return DualTensor(stack)


@rule("add_.Tensor", "sub_.Tensor", "add_.Scalar", "sub_.Scalar")
def _add_in_place(func: Operator, x: DualTensor, other: Any, alpha: float = 1) -> Any:
    stack = x.before_writing()
    if func._schema.name == "aten::sub_":
        alpha = -alpha
    if isinstance(other, DualTensor):
        stack.add_(aligned(other, x.dim()), alpha=alpha)
    else:
        stack[0].add_(other, alpha=alpha)
    return x


@rule("bincount")
def _count_weights(func: Operator, index: Any, weights: Any = None, minlength: int = 0) -> Any:
    """Sum weights by index: linear, although PyTorch has no derivative."""
    if not isinstance(weights, DualTensor):
        return func(*primals([index, weights]), minlength)
    return DualTensor(torch.stack([func(index, part, minlength) for part in weights.stack]))


# --- Joining and choosing ----------------------------------------------------------------------


@rule("cat")
def _cat(func: Operator, tensors: Sequence[Tensor], dim: int = 0) -> DualTensor:
    directions = directions_of(tensors)
    ndim = max(tensor.dim() for tensor in tensors)
    legacy = [t for t in tensors if t.dim() == ndim]  # PyTorch skips empty vectors
    return DualTensor(torch.cat([lifted(t, directions) for t in legacy], shifted(dim, ndim)))


@rule("stack")
def _stack(func: Operator, tensors: Sequence[Tensor], dim: int = 0) -> DualTensor:
    directions = directions_of(tensors)
    stacks = [lifted(tensor, directions) for tensor in tensors]
    return DualTensor(torch.stack(stacks, shifted(dim, tensors[0].dim() + 1)))


@rule("where.self")
def _where(func: Operator, condition: Tensor, a: Tensor, b: Tensor) -> DualTensor:
    directions = directions_of([a, b])
    dtype = torch.result_type(primals(a), primals(b))
    ndim = max(condition.dim(), a.dim(), b.dim())
    duals = (t if isinstance(t, DualTensor) else DualTensor.constant(t, directions) for t in (a, b))
    first, second = (aligned(dual, ndim).to(dtype) for dual in duals)
    return DualTensor(torch.where(condition, first, second))


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(func: Operator, x: DualTensor, mask: Tensor, value: Any) -> Any:
    if isinstance(value, DualTensor) or not isinstance(x, DualTensor):
        return NotImplemented
    ndim = max(x.dim(), mask.dim())
    stack = aligned(x, ndim).masked_fill(mask, 0)
    stack[0].masked_fill_(mask, value)
    return DualTensor(stack)


@rule("gather")
def _gather(
    func: Operator, x: DualTensor, dim: int, index: Tensor, *, sparse_grad: bool = False
) -> DualTensor:
    stack = x.stack
    return DualTensor(stack.gather(shifted(dim, x.dim()), index.expand(len(stack), *index.shape)))


@rule("index_select")
def _index_select(func: Operator, x: DualTensor, dim: int, index: Tensor) -> DualTensor:
    return DualTensor(x.stack.index_select(shifted(dim, x.dim()), index))


# --- Slice by slice: linear, whatever the arguments -----------------------------------------------


@rule("index.Tensor", "masked_select", "take", "trace", "diag_embed", "diagonal_scatter")
@rule("grid_sampler_2d", "grid_sampler_3d")
def slice_by_slice(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    """Apply a linear operation to each slice of the stack."""
    if not isinstance(x, DualTensor) or has_dual(args, kwargs):
        return NotImplemented
    return DualTensor(torch.stack([func(part, *args, **kwargs) for part in x.stack.unbind(0)]))


# --- Operations on samples [n, C, ...] ------------------------------------------------------------

POOLS = [f"{kind}_pool{d}d" for d in "123" for kind in ("avg", "adaptive_avg")]

PADS = [f"{kind}_pad{d}d" for d in "123" for kind in ("reflection", "replication")]

UPSAMPLES = [
    f"{kind}{variant}"
    for kind in (
        *(f"{kind}{d}d" for d in "123" for kind in ("upsample_nearest", "_upsample_nearest_exact")),
        *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
        *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    )
    for variant in ("", ".vec")
]


@rule(*POOLS, "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", *PADS, *UPSAMPLES)
@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col", "col2im")
def as_more_samples(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    """Apply a linear operation on [n, C, ...] to the stack as (1 + P) n samples."""
    if not isinstance(x, DualTensor) or has_dual(args, kwargs):
        return NotImplemented
    stack = x.stack
    result = func(merged(stack), *args, **kwargs)
    return DualTensor(result.unflatten(0, stack.shape[:2]))
