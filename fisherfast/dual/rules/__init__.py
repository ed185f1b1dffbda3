"""Derivative rules, one module per family of operations. Importing them registers them."""

from fisherfast.dual.rules import (
    activation,
    attention,
    complex_numbers,
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
    "complex_numbers",
    "constant",
    "linear",
    "pointwise",
    "product",
    "recurrent",
    "reduction",
    "view",
    "writing",
]
