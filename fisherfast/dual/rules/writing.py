"""Rules of operations that create, draw at random or overwrite tensors in the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherfast.dual.dispatch import Operator, aten, overwrite, rule, with_zero_tangents
from fisherfast.dual.errors import warn_of_randomness
from fisherfast.dual.tensor import DualTensor

# --- Writing -----------------------------------------------------------------------------------


@rule("copy_", "fill_.Scalar", "fill_.Tensor", "zero_")
def _write(func: Operator, x: DualTensor, source: Any = 0, *_: Any) -> DualTensor:
    return overwrite(x, source)


@rule("index_put_", "_index_put_impl_")
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
            func(part, indices, value, accumulate)  # unlike the method, it takes None
        return x
    func(stack[0], indices, values, accumulate)
    if not accumulate:
        for tangent in stack[1:]:
            func(tangent, indices, values.new_zeros(()), False)
    return x


# --- Made inside of the forward pass -----------------------------------------------------------

LIKE_FACTORIES = (
    *(f"{value}_like" for value in ("zeros", "ones", "full", "empty")),
    *(f"new_{value}" for value in ("zeros", "ones", "full", "empty", "empty_strided")),
)


@rule(*LIKE_FACTORIES)
def _make_like(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    return with_zero_tangents(func(x.primal, *args, **kwargs), x)


@rule("rand_like", "randn_like")
def _draw_like(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    warn_of_randomness(func)
    return _make_like(func, x, *args, **kwargs)


@rule("bernoulli_.float", "uniform_", "normal_", "exponential_", "random_")
def _random_fill(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> DualTensor:
    warn_of_randomness(func)
    stack = x.before_writing()
    func(stack[0], *args, **kwargs)
    stack[1:].zero_()
    return x


@rule("dropout")
def _dropout(func: Operator, x: DualTensor, p: float, train: bool) -> DualTensor:
    if not train or p == 0:
        return x
    values: DualTensor = _masked(func, x, p)[0]
    return values


@rule("native_dropout")
def _masked(func: Operator, x: DualTensor, p: float, train: bool | None = True) -> Any:
    """Apply the same mask to the primal and its tangents."""
    warn_of_randomness(aten.bernoulli.default)
    values, mask = torch.native_dropout(x.primal, p, train)
    factor = mask.to(x.dtype) * (1.0 if train is False or p == 1 else 1 / (1 - p))
    return DualTensor(torch.cat([values[None], x.tangents * factor])), mask
