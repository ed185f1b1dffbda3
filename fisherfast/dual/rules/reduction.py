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
from fisherfast.dual.dispatch import (
    Operator,
    has_dual,
    named_arguments,
    overload,
    overloads,
    rule,
)
from fisherfast.dual.stacks import shifted
from fisherfast.dual.tensor import KERNEL_DTYPES, DualTensor, apply_softmax
from fisherfast.ops import reference_dual

# --- Normalisation -----------------------------------------------------------------------------


def _normalised(
    stack: Tensor,
    rows: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    groups: int = 1,
    inner: int = 1,
    centre: bool = True,
) -> Tensor:
    """Normalise rows [rows, width] of each slice of a stack; the result has the stack's shape."""
    flat = stack.reshape(len(stack), *rows)
    if weight is not None:
        weight = weight.detach().flatten().to(stack.dtype)
    if bias is not None:
        bias = bias.detach().flatten().to(stack.dtype)
    settings = {"eps": eps, "groups": groups, "inner": inner, "centre": centre}
    if stack.dtype in KERNEL_DTYPES:
        result = ops.dual_norm(flat, weight, bias, **settings)  # type: ignore[arg-type]
    else:
        result = reference_dual.dual_norm(flat, weight, bias, **settings)  # type: ignore[arg-type]
    return result.reshape(stack.shape)


@rule(*overloads("layer_norm"))
def _layer_norm(func: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
    named = named_arguments(func, args, kwargs)
    weight, bias = named["weight"], named["bias"]
    if has_dual(weight, bias) or x.numel() == 0:
        return NotImplemented
    width = torch.Size(named["normalized_shape"]).numel()
    rows = (x.numel() // width, width)
    return DualTensor(_normalised(x.stack, rows, weight, bias, named["eps"]))


@rule(*overloads("rms_norm"))
def _rms_norm(func: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
    named = named_arguments(func, args, kwargs)
    weight, eps = named["weight"], named["eps"]
    if has_dual(weight) or x.numel() == 0:
        return NotImplemented
    width = torch.Size(named["normalized_shape"]).numel()
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    rows = (x.numel() // width, width)
    return DualTensor(_normalised(x.stack, rows, weight, None, eps, centre=False))


@rule(*overloads("group_norm"))
def _group_norm(func: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
    named = named_arguments(func, args, kwargs)
    return _by_group(x, named["num_groups"], named["weight"], named["bias"], named["eps"])


@rule(*overloads("instance_norm"))
def _instance_norm(func: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
    named = named_arguments(func, args, kwargs)
    if not named["use_input_stats"]:
        return torch.batch_norm(
            x,
            named["weight"],
            named["bias"],
            named["running_mean"],
            named["running_var"],
            False,
            0.0,
            named["eps"],
            False,
        )
    if named["running_mean"] is not None:
        return NotImplemented  # in training mode, which would change the running statistics
    return _by_group(x, x.shape[1], named["weight"], named["bias"], named["eps"])


def _by_group(
    x: DualTensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    if has_dual(weight, bias) or x.numel() == 0:
        return NotImplemented
    rows = (x.shape[0] * groups, x.numel() // (x.shape[0] * groups))
    inner = x.shape[2:].numel()
    return DualTensor(_normalised(x.stack, rows, weight, bias, eps, groups=groups, inner=inner))


@rule(*overloads("softmax.int", "_softmax", "log_softmax.int", "_log_softmax", "_safe_softmax"))
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


def _picked(x: DualTensor, values: Tensor, index: Tensor, dim: int, keepdim: bool) -> DualTensor:
    """Combine picked values of the primal with the tangents at the same indices."""
    if x.dim() == 0:
        return DualTensor(x.stack.clone())
    places = index if keepdim else index.unsqueeze(dim)
    tangents = x.tangents.gather(shifted(dim, x.dim()), places.expand(x.directions, *places.shape))
    if not keepdim:
        tangents = tangents.squeeze(shifted(dim, x.dim()))
    return DualTensor(torch.cat([values[None], tangents]))


@rule(*overloads("max.dim", "min.dim", "median.dim", "nanmedian.dim", "mode"))
def _extreme(func: Operator, x: DualTensor, dim: int = -1, keepdim: bool = False) -> Any:
    values, index = func(x.primal, dim, keepdim)
    return _picked(x, values, index, dim, keepdim), index


@rule(*overloads("kthvalue"))
def _kth(func: Operator, x: DualTensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    values, index = func(x.primal, k, dim, keepdim)
    return _picked(x, values, index, dim, keepdim), index


@rule(*overloads("sort", "sort.stable", "topk"))
def _sort(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    dim = named_arguments(func, args, kwargs)["dim"]
    values, index = func(x.primal, *args, **kwargs)
    return _picked(x, values, index, dim, True), index


@rule(*overloads("max", "min", "amax", "amin"))
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


@rule(*overloads("var.correction", "std.correction", "var_mean.correction", "std_mean.correction"))
@rule(*overloads("var", "std", "var.dim", "std.dim"))
def _spread(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    named = named_arguments(func, args, kwargs)
    dims = named.get("dim") or list(range(x.dim()))
    correction = named.get("correction", 1 if named.get("unbiased", True) else 0)
    correction = 1 if correction is None else correction
    keepdim = named.get("keepdim", False)
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
    if not keepdim:
        spread, mean = spread.squeeze(tuple(places)), mean.squeeze(tuple(places))
    return (
        (DualTensor(spread), DualTensor(mean))
        if "_mean" in func._schema.name
        else DualTensor(spread)
    )


@rule(*overloads("linalg_vector_norm", "norm.ScalarOpt_dim", "norm.Scalar"))
def _norm(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    named = named_arguments(func, args, kwargs)
    order = named.get("ord", named.get("p"))
    if order not in (2, None) or not x.is_floating_point():
        return NotImplemented
    dims = _all_or(named.get("dim"), x)
    value = x.primal.square().sum(dims, keepdim=True).sqrt()
    direction = torch.where(value == 0, 0.0, x.primal / value)
    return _weighted(x, value, direction, dims, bool(named.get("keepdim", False)))


@rule(*overloads("logsumexp"))
def _logsumexp(
    func: Operator, x: DualTensor, dim: int | list[int], keepdim: bool = False
) -> DualTensor:
    dims = _all_or(dim, x)
    value = torch.logsumexp(x.primal, dims, keepdim=True)
    return _weighted(x, value, torch.exp(x.primal - value), dims, keepdim)


# --- Max pooling -------------------------------------------------------------------------------


@rule(*overloads("max_pool1d", "max_pool2d", "max_pool3d"))
def _max_pool(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    named = named_arguments(func, args, kwargs)
    spatial = int(func._schema.name.removesuffix("d")[-1])
    if x.dim() != spatial + 2 or x.dtype not in KERNEL_DTYPES:
        return NotImplemented
    kernel = _per_dim(named["kernel_size"], spatial)
    return DualTensor(
        ops.dual_pool(
            x.stack,
            kernel,
            _per_dim(named["stride"] or kernel, spatial),
            _per_dim(named["padding"], spatial),
            _per_dim(named["dilation"], spatial),
            ceil_mode=named["ceil_mode"],
        )
    )


def _per_dim(value: int | Sequence[int], spatial: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * spatial if len(values) == 1 else values


POOLS_WITH_INDICES = overloads(
    "max_pool1d_with_indices",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "fractional_max_pool2d",
    "fractional_max_pool3d",
)


@rule(*POOLS_WITH_INDICES)
def _pool_with_indices(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    """Pool and return the indices as PyTorch does, in the flattened spatial dimensions."""
    values, index = func(x.primal, *args, **kwargs)
    spatial = int(func._schema.name.removesuffix("_with_indices").removesuffix("d")[-1])
    places = index.flatten(-spatial)
    picked = x.tangents.flatten(-spatial).gather(-1, places.expand(x.directions, *places.shape))
    tangents = picked.reshape(x.directions, *values.shape)
    return DualTensor(torch.cat([values[None], tangents])), index
