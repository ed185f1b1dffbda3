"""The rule of operations whose results do not vary with theta: counts, comparisons, indices.

They run on the primals and return plain tensors.
"""

from __future__ import annotations

from typing import Any

from fisherfast.dual.dispatch import Operator, primals, rule

COMPARISONS = [
    f"{name}.{operand}"
    for name in ("eq", "ne", "lt", "le", "gt", "ge")
    for operand in ("Tensor", "Scalar")
]


@rule(*COMPARISONS)
@rule("logical_not", "logical_and", "logical_or", "logical_xor")
@rule("isnan", "isinf", "isfinite", "isposinf", "isneginf", "signbit")
@rule("any", "any.dim", "all", "all.dim", "equal", "allclose", "isclose", "is_same_size")
@rule("nonzero", "count_nonzero", "count_nonzero.dim_IntList")
@rule("argmax", "argmin", "argsort", "argsort.stable")
@rule("bucketize.Tensor", "searchsorted.Tensor", "histc", "multinomial")
@rule("heaviside", "floor_divide", "floor_divide.Scalar")
@rule("_local_scalar_dense", "result_type.Tensor")
def _on_primals(func: Operator, *args: Any, **kwargs: Any) -> Any:
    return func(*primals(args), **primals(kwargs))
