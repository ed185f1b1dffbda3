"""Derivative rules, one module per family of operations. Importing them registers them."""

from fisherfast.dual.rules import (
    activation,
    attention,
    constant,
    linear,
    pointwise,
    product,
    recurrent,
    reduction,
    view,
    writing,
)

__all__ = [
    "activation",
    "attention",
    "constant",
    "linear",
    "pointwise",
    "product",
    "recurrent",
    "reduction",
    "view",
    "writing",
]
