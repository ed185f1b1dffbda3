"""Rules of non-linear operations along dimensions: norms, softmax, extremes, sorting, max pooling.

Where an operation picks values (a maximum, a sort, a pooling) its tangents are picked at the same
indices; equal values share the derivative of a maximum over all dimensions, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfast import ops
from fisherfast.dual.dispatch import Operator, has_dual, named_arguments, overload, rule
from fisherfast.dual.stacks import shifted
from fisherfast.dual.tensor import KERNEL_DTYPES, DualTensor, apply_softmax
from fisherfast.ops import reference_dual

# --- Normalisation -----------------------------------------------------------------------------


def _normalised(
    x: DualTensor,
    rows: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    **layout: Any,
) -> Any:
    """Normalise a number of rows of equal width; layout as for `ops.dual_norm`."""
    if has_dual(weight, bias) or x.numel() == 0:
        return NotImplemented
    stack = x.stack
    flat = stack.reshape(len(stack), rows, -1)
    weight, bias = (
        None if given is None else given.detach().flatten().to(stack.dtype)
        for given in (weight, bias)
    )
    norm = ops.dual_norm if stack.dtype in KERNEL_DTYPES else reference_dual.dual_norm
    return DualTensor(norm(flat, weight, bias, eps=eps, **layout).reshape(stack.shape))


@rule("layer_norm", "rms_norm")
def _row_norm(func: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
    named = named_arguments(func, args, kwargs)
    rows = x.shape[: x.dim() - len(named["normalized_shape"])].numel()
    eps = torch.finfo(x.dtype).eps if named["eps"] is None else named["eps"]
    centre = func is not overload("rms_norm")
    return _normalised(x, rows, named["weight"], named.get("bias"), eps, centre=centre)


@rule("group_norm")
def _group_norm(func: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
    named = named_arguments(func, args, kwargs)
    return _by_group(x, named["num_groups"], named)


@rule("instance_norm")
def _instance_norm(func: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
    named = named_arguments(func, args, kwargs)
    if named["use_input_stats"] and named["running_mean"] is not None:
        return NotImplemented  # in training mode, which would change the running statistics
    if named["use_input_stats"]:
        return _by_group(x, x.shape[1], named)
    mean, variance = named["running_mean"], named["running_var"]
    weight, bias, eps = named["weight"], named["bias"], named["eps"]
    return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, False)


def _by_group(x: DualTensor, groups: int, named: dict[str, Any]) -> Any:
    rows, inner = x.shape[0] * groups, x.shape[2:].numel()
    weight, bias, eps = named["weight"], named["bias"], named["eps"]
    return _normalised(x, rows, weight, bias, eps, groups=groups, inner=inner)


@rule("softmax.int", "_softmax", "log_softmax.int", "_log_softmax", "_safe_softmax")
def _softmax(
    func: Operator, x: DualTensor, dim: int, dtype: Any = None, **kwargs: Any
) -> DualTensor:
    dtype = kwargs.get("dtype", dtype)
    stack = x.stack.to(dtype) if isinstance(dtype, torch.dtype) else x.stack
    log = "log_softmax" in func._schema.name
    if x.dim() == 0:
        stack = stack[:, None]
    place = shifted(dim, x.dim())
    result = apply_softmax(stack, place, log=log)
    if func is overload("_safe_softmax"):
        result = torch.where((stack[:1] == -torch.inf).all(place, keepdim=True), 0.0, result)
    return DualTensor(result.reshape(x.stack.shape))


# --- Extremes and sorting ------------------------------------------------------------------------


@rule("max.dim", "min.dim", "median.dim", "nanmedian.dim", "mode", "kthvalue")
@rule("sort", "sort.stable", "topk")
def _pick(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    """Combine the values that the primal picks with the tangents at the same indices."""
    values, index = func(x.primal, *args, **kwargs)
    if x.dim() == 0:
        return DualTensor(x.stack.clone()), index
    named = named_arguments(func, args, kwargs)
    dim, keepdim = shifted(named["dim"], x.dim()), named.get("keepdim", True)
    places = index[None] if keepdim else index[None].unsqueeze(dim)
    tangents = x.tangents.gather(dim, places.expand(x.directions, *places.shape[1:]))
    if not keepdim:
        tangents = tangents.squeeze(dim)
    return DualTensor(torch.cat([values[None], tangents])), index


@rule("max", "min", "amax", "amin")
def _extreme_of_all(
    func: Operator, x: DualTensor, dim: Sequence[int] | int = (), keepdim: bool = False
) -> DualTensor:
    dims = _all_or(dim, x)
    function = torch.amax if "max" in func._schema.name else torch.amin
    value = function(x.primal, dims, keepdim=True)
    share = (x.primal == value).to(x.dtype)
    share = share / share.sum(dims, keepdim=True)
    return _weighted(x, value, share, dims, keepdim)


def _all_or(dim: int | Sequence[int] | None, x: DualTensor) -> list[int]:
    """Return dimensions as a list; all of them if none is given."""
    return [dim] if isinstance(dim, int) else list(dim or range(x.dim()))


def _behind(dims: Sequence[int], x: DualTensor) -> list[int]:
    return [shifted(dim, x.dim()) for dim in dims]


def _weighted(
    x: DualTensor, value: Tensor, weights: Tensor, dims: Sequence[int], keepdim: bool
) -> DualTensor:
    """Make a dual tensor of a value (with dimensions kept) whose tangents are weighted sums of
    those of x."""
    places = _behind(dims, x)
    stack = torch.cat([value[None], (weights * x.tangents).sum(places, keepdim=True)])
    return DualTensor(stack if keepdim else stack.squeeze(tuple(places)))


# --- Spread and size -----------------------------------------------------------------------------


@rule("var.correction", "std.correction", "var_mean.correction", "std_mean.correction")
def _spread(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    if x.is_complex():
        return NotImplemented
    named = named_arguments(func, args, kwargs)
    dims = _all_or(named["dim"], x)
    correction = 1 if named["correction"] is None else named["correction"]
    places = _behind(dims, x)
    count = torch.Size([x.shape[dim] for dim in dims]).numel() - correction
    stack = x.stack
    mean = stack.mean(places, keepdim=True)
    centred = stack - mean
    value = centred[:1].square().sum(places, keepdim=True) / count
    tangents = 2 * (centred[:1] * centred[1:]).sum(places, keepdim=True) / count
    if "std" in func._schema.name:
        value = value.sqrt()
        tangents = tangents / (2 * value)
    spread = torch.cat([value, tangents])
    if not named["keepdim"]:
        spread, mean = spread.squeeze(tuple(places)), mean.squeeze(tuple(places))
    if "_mean" in func._schema.name:
        return DualTensor(spread), DualTensor(mean)
    return DualTensor(spread)


@rule("linalg_vector_norm", "norm.ScalarOpt_dim", "norm.Scalar")
def _norm(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    named = named_arguments(func, args, kwargs)
    order = named.get("ord", named.get("p"))
    if order not in (2, None) or not x.is_floating_point():
        return NotImplemented
    dims = _all_or(named.get("dim"), x)
    value = x.primal.square().sum(dims, keepdim=True).sqrt()
    direction = torch.where(value == 0, 0.0, x.primal / value)
    return _weighted(x, value, direction, dims, bool(named.get("keepdim", False)))


@rule("logsumexp")
def _logsumexp(
    func: Operator, x: DualTensor, dim: int | list[int], keepdim: bool = False
) -> DualTensor:
    dims = _all_or(dim, x)
    value = torch.logsumexp(x.primal, dims, keepdim=True)
    return _weighted(x, value, torch.exp(x.primal - value), dims, keepdim)


# --- Max pooling -------------------------------------------------------------------------------


@rule("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    named = named_arguments(func, args, kwargs)
    spatial = int(func._schema.name.removesuffix("d")[-1])
    if x.dim() != spatial + 2 or x.dtype not in KERNEL_DTYPES:
        return NotImplemented
    kernel = _per_dim(named["kernel_size"], spatial)
    stride = _per_dim(named["stride"] or kernel, spatial)
    padding, dilation = (_per_dim(named[name], spatial) for name in ("padding", "dilation"))
    stack = ops.dual_pool(x.stack, kernel, stride, padding, dilation, ceil_mode=named["ceil_mode"])
    return DualTensor(stack)


def _per_dim(value: int | Sequence[int], spatial: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * spatial if len(values) == 1 else values


@rule("max_pool2d_with_indices", "adaptive_max_pool2d", "fractional_max_pool2d")
@rule("max_pool3d_with_indices", "adaptive_max_pool3d", "fractional_max_pool3d")
def _pool_with_indices(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    """Pool and return the indices as PyTorch does, in the flattened spatial dimensions."""
    values, index = func(x.primal, *args, **kwargs)
    spatial = int(func._schema.name.removesuffix("_with_indices").removesuffix("d")[-1])
    places = index.flatten(-spatial)
    picked = x.tangents.flatten(-spatial).gather(-1, places.expand(x.directions, *places.shape))
    tangents = picked.reshape(x.directions, *values.shape)
    return DualTensor(torch.cat([values[None], tangents])), index
