"""Rules of linear operations: primal and tangents go through together, as more samples.

Three forms: the dimension arguments shift by one behind the stack's own; operations on [n, C, ...]
see the stack as (1 + P) n samples; the rest runs slice by slice. Constants that are added (a bias,
a number) meet the primal alone.
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
    overload,
    overloads,
    overwrite,
    plain_rule,
    primals,
    rule,
    with_zero_tangents,
)
from fisherfast.dual.errors import no_derivative, warn_of_randomness
from fisherfast.dual.tensor import DualTensor, Memory


def shifted(dim: int, ndim: int) -> int:
    """A dimension of the primal as one of the stack."""
    return dim % max(ndim, 1) + 1


def aligned(dual: DualTensor, ndim: int) -> Tensor:
    """The stack of a dual tensor with dimensions of size 1 behind its first, as if the primal had
    ndim of them."""
    stack = dual.stack
    missing = ndim - dual.dim()
    if missing <= 0:
        return stack
    return stack.reshape(stack.shape[:1] + (1,) * missing + stack.shape[1:])


def lifted(tensor: Any, directions: int) -> Tensor:
    """The stack of a dual tensor, or of a plain one with tangents of zero."""
    if isinstance(tensor, DualTensor):
        return tensor.stack
    return DualTensor.constant(tensor, directions).stack


def merged(stack: Tensor) -> Tensor:
    """[1 + P, n, ...] as [(1 + P) n, ...]."""
    return stack.flatten(0, 1)


def view_of(dual: DualTensor, stack: Tensor) -> DualTensor:
    """A dual tensor that shares memory with another."""
    return DualTensor(stack, dual.memory)


# --- Views -------------------------------------------------------------------------------------


@rule(*overloads("view", "_unsafe_view", "reshape", "_reshape_alias"))
def _view(func: Operator, x: DualTensor, size: Sequence[int], *_: Any) -> DualTensor:
    size = _resolved(size, x.numel())
    try:
        return view_of(x, x.stack.view(len(x.stack), *size))
    except RuntimeError:
        if func is not aten.view.default:
            return view_of(x, x.stack.reshape(len(x.stack), *size))
    x.settle(x.stack.contiguous())  # a convolution may have laid it out as channels-last
    return view_of(x, x.stack.view(len(x.stack), *size))


def _resolved(size: Sequence[int], numel: int) -> list[int]:
    """A shape without -1, which is ambiguous for an empty stack."""
    known = 1
    for entry in size:
        known *= entry if entry != -1 else 1
    return [entry if entry != -1 else numel // max(known, 1) for entry in size]


@rule(*overloads("flatten.using_ints"))
def _flatten(func: Operator, x: DualTensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    if x.dim() == 0:
        return view_of(x, x.stack.reshape(-1, 1))
    stack = x.stack.flatten(shifted(start_dim, x.dim()), shifted(end_dim, x.dim()))
    return view_of(x, stack)


@rule(*overloads("expand"))
def _expand(func: Operator, x: DualTensor, size: Sequence[int], *, implicit: bool = False) -> Any:
    return view_of(x, aligned(x, len(size)).expand(len(x.stack), *size))


@rule(*overloads("permute"))
def _permute(func: Operator, x: DualTensor, dims: Sequence[int]) -> DualTensor:
    return view_of(x, x.stack.permute(0, *(shifted(dim, x.dim()) for dim in dims)))


@rule(*overloads("transpose.int"))
def _transpose(func: Operator, x: DualTensor, dim0: int, dim1: int) -> DualTensor:
    return view_of(x, x.stack.transpose(shifted(dim0, x.dim()), shifted(dim1, x.dim())))


@rule(*overloads("t", "numpy_T", "mT"))
def _matrix_transpose(func: Operator, x: DualTensor) -> Any:
    if x.dim() < 2:
        return view_of(x, x.stack)
    if x.dim() > 2 and func is not overload("mT"):
        return NotImplemented
    return view_of(x, x.stack.transpose(-2, -1))


@rule(*overloads("unsqueeze"))
def _unsqueeze(func: Operator, x: DualTensor, dim: int) -> DualTensor:
    return view_of(x, x.stack.unsqueeze(shifted(dim, x.dim() + 1)))


@rule(*overloads("squeeze"))
def _squeeze(func: Operator, x: DualTensor) -> DualTensor:
    return view_of(x, x.stack.reshape(x.stack.shape[:1] + tuple(s for s in x.shape if s != 1)))


@rule(*overloads("squeeze.dim", "squeeze.dims"))
def _squeeze_dims(func: Operator, x: DualTensor, dim: int | Sequence[int]) -> DualTensor:
    if x.dim() == 0:
        return view_of(x, x.stack)
    dims = [dim] if isinstance(dim, int) else dim
    return view_of(x, x.stack.squeeze(tuple(shifted(d, x.dim()) for d in dims)))


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


def _along_one_dim(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    """Shift every argument called dim, dims, dim0, ... behind the stack's first dimension."""
    named = dict(zip((a.name for a in func._schema.arguments[1:]), args, strict=False)) | kwargs
    for argument in func._schema.arguments[1:]:
        name = argument.name
        if name not in DIM_NAMES:
            continue
        value = named.get(name, argument.default_value)
        if value is None or (isinstance(value, list | tuple) and not value):
            return NotImplemented  # over the flattened tensor
        named[name] = (
            shifted(value, x.dim())
            if isinstance(value, int)
            else [shifted(v, x.dim()) for v in value]
        )
    if any(isinstance(value, DualTensor) for value in named.values()):
        return NotImplemented
    result = func(x.stack, **named)
    if isinstance(result, Tensor):
        return view_of(x, result)
    return type(result)(view_of(x, item) for item in result)


DIM_NAMES = frozenset({"dim", "dims", "dim0", "dim1", "dim2", "dimension", "axis0", "axis1"}) | {
    "source",
    "destination",
}


rule(*ONE_DIM)(_along_one_dim)


@rule(*overloads("unflatten.int"))
def _unflatten(func: Operator, x: DualTensor, dim: int, sizes: Sequence[int]) -> DualTensor:
    return view_of(x, x.stack.unflatten(shifted(dim, x.dim()), sizes))


@rule(*overloads("as_strided"))
def _as_strided(
    func: Operator,
    x: DualTensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> DualTensor:
    stack = x.stack
    first = stack.storage_offset() + (storage_offset or 0)
    return view_of(x, stack.as_strided([len(stack), *size], [stack.stride(0), *stride], first))


@rule(*overloads("repeat"))
def _repeat(func: Operator, x: DualTensor, repeats: Sequence[int]) -> DualTensor:
    return DualTensor(aligned(x, len(repeats)).repeat(1, *repeats))


@rule(*overloads("constant_pad_nd", "pad"))
def _pad(func: Operator, x: DualTensor, pad: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    mode = kwargs.get("mode", "constant")
    value = kwargs.get("value", args[-1] if args else 0) or 0
    if func is not aten.constant_pad_nd.default:
        mode = args[0] if args else mode
        value = (args[1] if len(args) > 1 else kwargs.get("value")) or 0
    if mode != "constant":
        return NotImplemented
    stack = torch.constant_pad_nd(x.stack, pad, 0)
    if value != 0:
        stack[0] = torch.constant_pad_nd(x.primal, pad, value)
    return DualTensor(stack)


# --- Sums --------------------------------------------------------------------------------------


@rule(*overloads("sum", "mean"))
def _reduce_all(func: Operator, x: DualTensor, *, dtype: torch.dtype | None = None) -> DualTensor:
    function = torch.sum if func is aten.sum.default else torch.mean
    return DualTensor(function(x.stack.flatten(1), 1, dtype=dtype))


@rule(*overloads("sum.dim_IntList", "mean.dim"))
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


@rule(*overloads("neg", "positive", "real", "resolve_conj", "resolve_neg"))
def _linear_unary(func: Operator, x: DualTensor) -> DualTensor:
    return DualTensor(func(x.stack))


@rule(*overloads("clone", "contiguous", "lift_fresh", "lift_fresh_copy"))
def _clone(func: Operator, x: DualTensor, **kwargs: Any) -> DualTensor:
    memory_format = kwargs.get("memory_format", torch.preserve_format)
    stack = x.stack
    if func is aten.contiguous.default:
        memory_format = kwargs.get("memory_format", torch.contiguous_format)
        if x.is_contiguous(memory_format=memory_format):
            return x
    if memory_format in (torch.preserve_format, torch.contiguous_format):
        return DualTensor(stack.clone(memory_format=memory_format))
    samples = merged(stack).clone(memory_format=memory_format)  # channels-last
    return DualTensor(samples.unflatten(0, stack.shape[:2]))


@rule(*overloads("_to_copy", "to.dtype", "to.device", "to.dtype_layout", "to.other", "type_as"))
def _to(func: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = primals(args), primals(kwargs)
    if not isinstance(x, DualTensor):
        return func(x, *args, **kwargs)
    primal = func(x.primal, *args, **kwargs)
    if not (primal.is_floating_point() or primal.is_complex()):
        return primal
    if primal.device != x.device:
        raise no_derivative(
            str(func), f"a move from {x.device} to {primal.device}: keep the model on one device"
        )
    if primal.dtype == x.dtype and primal.data_ptr() == x.primal.data_ptr():
        return x
    stack = x.stack.to(primal.dtype, copy=True)
    return DualTensor(stack, Memory(constant=x.memory.constant))


@rule(*overloads("detach", "alias", "detach_copy"))
def _detach(func: Operator, x: DualTensor) -> DualTensor:
    if func is overload("alias"):
        return view_of(x, x.stack)
    detached = DualTensor.constant(x.primal, x.directions)
    detached.memory = Memory(detached=True)
    return detached


def _result_stack(x: DualTensor, other: Tensor | float, dtype: torch.dtype) -> Tensor:
    """A fresh stack of x that is broadcast against a plain operand."""
    shape = x.shape
    if isinstance(other, Tensor) and other.dim() > 0:
        shape = torch.broadcast_shapes(x.shape, other.shape)
    stack = aligned(x, len(shape))
    if shape != x.shape:
        stack = stack.expand(len(stack), *shape)
    return stack.to(dtype, copy=True)


@rule(*overloads("add.Tensor", "sub.Tensor", "rsub.Scalar", "rsub.Tensor", "add.Scalar"))
@rule(*overloads("sub.Scalar", "subtract.Tensor", "subtract.Scalar"))
def _add(func: Operator, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
    alpha = kwargs.get("alpha", args[0] if args else 1)
    name = func._schema.name
    if name == "aten::rsub":
        a, b = b, a
    sign = 1 if name == "aten::add" else -1
    if isinstance(a, DualTensor) and isinstance(b, DualTensor):
        ndim = max(a.dim(), b.dim())
        return DualTensor(torch.add(aligned(a, ndim), aligned(b, ndim), alpha=sign * alpha))
    dtype = torch.result_type(_plain(a), _plain(b))
    if isinstance(a, DualTensor):
        stack = _result_stack(a, b, dtype)
        stack[0].add_(b, alpha=sign * alpha)
        return DualTensor(stack)
    stack = _result_stack(b, a, dtype).mul_(sign * alpha)
    stack[0].add_(a)
    return DualTensor(stack)


def _plain(item: Any) -> Any:
    return item.primal if isinstance(item, DualTensor) else item


@rule(*overloads("add_.Tensor", "sub_.Tensor", "add_.Scalar", "sub_.Scalar"))
def _add_in_place(func: Operator, x: DualTensor, other: Any, alpha: float = 1) -> Any:
    stack = x.before_writing()
    if func._schema.name == "aten::sub_":
        alpha = -alpha
    if isinstance(other, DualTensor):
        stack.add_(aligned(other, x.dim()), alpha=alpha)
    else:
        stack[0].add_(other, alpha=alpha)
    return x


# --- Joining and choosing ----------------------------------------------------------------------


@rule(*overloads("cat", "concat", "concatenate"))
def _cat(func: Operator, tensors: Sequence[Tensor], dim: int = 0) -> DualTensor:
    directions = directions_of(tensors)
    ndim = max(tensor.dim() for tensor in tensors)
    legacy = [t for t in tensors if t.dim() == ndim]  # PyTorch skips empty vectors
    return DualTensor(torch.cat([lifted(t, directions) for t in legacy], shifted(dim, ndim)))


@rule(*overloads("stack"))
def _stack(func: Operator, tensors: Sequence[Tensor], dim: int = 0) -> DualTensor:
    directions = directions_of(tensors)
    stacks = [lifted(tensor, directions) for tensor in tensors]
    return DualTensor(torch.stack(stacks, shifted(dim, tensors[0].dim() + 1)))


@rule(*overloads("where.self", "where.ScalarOther", "where.ScalarSelf"))
def _where(func: Operator, condition: Tensor, a: Any, b: Any) -> DualTensor:
    reference = a if isinstance(a, DualTensor) else b
    directions = directions_of([a, b])
    dtype = torch.result_type(_plain(a), _plain(b))
    ndim = max(t.dim() for t in (condition, a, b) if isinstance(t, Tensor))
    stacks = []
    for item in (a, b):
        if not isinstance(item, Tensor):
            item = torch.tensor(item, dtype=dtype, device=reference.device)
        dual = item if isinstance(item, DualTensor) else DualTensor.constant(item, directions)
        stacks.append(aligned(dual, ndim).to(dtype))
    return DualTensor(torch.where(condition, stacks[0], stacks[1]))


@rule(*overloads("masked_fill.Scalar", "masked_fill.Tensor"))
def _masked_fill(func: Operator, x: DualTensor, mask: Tensor, value: Any) -> Any:
    if isinstance(value, DualTensor) or not isinstance(x, DualTensor):
        return NotImplemented
    ndim = max(x.dim(), mask.dim())
    stack = aligned(x, ndim).masked_fill(mask, 0)
    stack[0].masked_fill_(mask, value)
    return DualTensor(stack)


@rule(*overloads("gather"))
def _gather(
    func: Operator, x: DualTensor, dim: int, index: Tensor, *, sparse_grad: bool = False
) -> DualTensor:
    stack = x.stack
    return DualTensor(stack.gather(shifted(dim, x.dim()), index.expand(len(stack), *index.shape)))


@rule(*overloads("index_select"))
def _index_select(func: Operator, x: DualTensor, dim: int, index: Tensor) -> DualTensor:
    return DualTensor(x.stack.index_select(shifted(dim, x.dim()), index))


@rule(*overloads("tril", "triu"))
def _triangle(func: Operator, x: DualTensor, diagonal: int = 0) -> DualTensor:
    return DualTensor(func(x.stack, diagonal))


# --- Slice by slice: linear, whatever the arguments -----------------------------------------------


def slice_by_slice(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    """A linear operation on each slice of the stack."""
    if not isinstance(x, DualTensor) or any(
        isinstance(item, DualTensor) for item in (*args, *kwargs.values())
    ):
        return NotImplemented
    return DualTensor(torch.stack([func(part, *args, **kwargs) for part in x.stack.unbind(0)]))


# --- Operations on samples [n, C, ...] ------------------------------------------------------------


def as_more_samples(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    """A linear operation on [n, C, ...] that treats samples alike."""
    if not isinstance(x, DualTensor) or any(
        isinstance(item, DualTensor) for item in (*args, *kwargs.values())
    ):
        return NotImplemented
    stack = x.stack
    result = func(merged(stack), *args, **kwargs)
    return DualTensor(result.unflatten(0, stack.shape[:2]))


SAMPLE_WISE = overloads(
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "mkldnn_adaptive_avg_pool2d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "upsample_nearest1d.vec",
    "upsample_nearest2d.vec",
    "upsample_nearest3d.vec",
    "_upsample_nearest_exact1d.vec",
    "_upsample_nearest_exact2d.vec",
    "_upsample_nearest_exact3d.vec",
    "upsample_linear1d.vec",
    "upsample_bilinear2d.vec",
    "upsample_trilinear3d.vec",
    "upsample_bicubic2d.vec",
    "_upsample_bilinear2d_aa.vec",
    "_upsample_bicubic2d_aa.vec",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "native_channel_shuffle",
    "im2col",
    "col2im",
)
rule(*SAMPLE_WISE)(as_more_samples)

SLICE_WISE = overloads(
    "index.Tensor",
    "masked_select",
    "take",
    "take_along_dim",
    "trace",
    "diag_embed",
    "diag",
    "diagonal_scatter",
    "select_backward",
    "slice_backward",
    "_fft_r2c",
    "_fft_c2c",
    "_fft_c2r",
    "view_as_real",
    "view_as_complex",
    "fft_fftshift",
    "fft_ifftshift",
    "grid_sampler",
    "grid_sampler_2d",
    "grid_sampler_3d",
    "flipud",
    "fliplr",
    "cumulative_trapezoid",
)
rule(*SLICE_WISE)(slice_by_slice)


# --- Writing -----------------------------------------------------------------------------------


@rule(*overloads("copy_"))
def _copy(func: Operator, x: DualTensor, source: Any, non_blocking: bool = False) -> DualTensor:
    stack = x.before_writing()
    if isinstance(source, DualTensor):
        stack.copy_(aligned(source, x.dim()), non_blocking)
    else:
        stack[0].copy_(source, non_blocking)
        stack[1:].zero_()
    return x


@rule(*overloads("fill_.Scalar", "fill_.Tensor", "zero_"))
def _fill(func: Operator, x: DualTensor, value: Any = 0) -> Any:
    if isinstance(value, DualTensor):
        return overwrite(x, DualTensor(aligned(value, x.dim()).expand_as(x.stack)))
    stack = x.before_writing()
    stack[0].fill_(value)
    stack[1:].zero_()
    return x


@rule(*overloads("masked_fill_.Scalar", "masked_fill_.Tensor"))
def _masked_fill_in_place(func: Operator, x: DualTensor, mask: Tensor, value: Any) -> Any:
    if isinstance(value, DualTensor):
        return NotImplemented
    stack = x.before_writing()
    stack[0].masked_fill_(mask, value)
    stack[1:].masked_fill_(mask, 0)
    return x


@rule(*overloads("index_put_", "_index_put_impl_"))
def _index_put(
    func: Operator,
    x: DualTensor,
    indices: list[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
    *_: Any,
) -> DualTensor:
    stack = x.before_writing()
    if isinstance(values, DualTensor):
        for part, value in zip(stack, values.stack, strict=True):
            part.index_put_(indices, value, accumulate)
        return x
    stack[0].index_put_(indices, values, accumulate)
    if not accumulate:
        for tangent in stack[1:]:
            tangent.index_put_(indices, values.new_zeros(()), False)
    return x


# --- Made inside of the forward pass -----------------------------------------------------------

LIKE_FACTORIES = overloads(
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "new_empty_strided",
)


@rule(*LIKE_FACTORIES)
def _make_like(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    return with_zero_tangents(func(x.primal, *args, **kwargs), x)


@rule(*overloads("rand_like", "randn_like"))
def _draw_like(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    warn_of_randomness(func)
    return _make_like(func, x, *args, **kwargs)


RANDOM_FILLS = overloads("bernoulli_.float", "uniform_", "normal_", "exponential_", "random_")


@rule(*RANDOM_FILLS)
def _random_fill(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> DualTensor:
    warn_of_randomness(func)
    stack = x.before_writing()
    func(stack[0], *args, **kwargs)
    stack[1:].zero_()
    return x


@rule(*overloads("dropout"))
def _dropout(func: Operator, x: DualTensor, p: float, train: bool) -> DualTensor:
    if not train or p == 0:
        return x
    values: DualTensor = _masked(func, x, p)[0]
    return values


@rule(*overloads("native_dropout"))
def _masked(func: Operator, x: DualTensor, p: float, train: bool | None = True) -> Any:
    """One mask for the primal and its tangents."""
    warn_of_randomness(aten.bernoulli.default)
    values, mask = torch.native_dropout(x.primal, p, train)
    factor = mask.to(x.dtype) * (1.0 if train is False or p == 1 else 1 / (1 - p))
    return DualTensor(torch.cat([values[None], x.tangents * factor])), mask


# --- No derivative: counts, comparisons, places ------------------------------------------------

WITHOUT_DERIVATIVE = [
    "argmax",
    "argmin",
    "argsort",
    "argsort.stable",
    "isnan",
    "isinf",
    "isfinite",
    "isposinf",
    "isneginf",
    "any",
    "any.dim",
    "all",
    "all.dim",
    "nonzero",
    "count_nonzero",
    "count_nonzero.dim_IntList",
    "logical_not",
    "logical_and",
    "logical_or",
    "logical_xor",
    "signbit",
    "equal",
    "allclose",
    "isclose",
    "is_same_size",
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "bucketize.Tensor",
    "searchsorted.Tensor",
    "size.int",
    "stride.int",
    "sym_size.int",
    "is_floating_point",
    "is_complex",
    "result_type.Tensor",
    "can_cast",
    "histc",
    "bincount",
    "multinomial",
    "heaviside",
    "floor_divide",
    "floor_divide.Scalar",
]
for comparison in ("eq", "ne", "lt", "le", "gt", "ge", "greater", "less", "not_equal"):
    WITHOUT_DERIVATIVE += [f"{comparison}.Tensor", f"{comparison}.Scalar"]
plain_rule(operator for operator in overloads(*WITHOUT_DERIVATIVE) if operator is not None)
