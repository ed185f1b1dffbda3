"""Rules of operations whose results do not vary with theta: counts, comparisons, indices.

They run on the primals and return plain tensors.
"""

from __future__ import annotations

from fisherfast.dual.dispatch import overloads, plain_rule

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
    "result_type.Tensor",
    "histc",
    "multinomial",
    "heaviside",
    "floor_divide",
    "floor_divide.Scalar",
]
for comparison in ("eq", "ne", "lt", "le", "gt", "ge", "greater", "less", "not_equal"):
    WITHOUT_DERIVATIVE += [f"{comparison}.Tensor", f"{comparison}.Scalar"]
plain_rule(overloads(*WITHOUT_DERIVATIVE))
