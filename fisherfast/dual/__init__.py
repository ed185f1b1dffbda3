"""Exact derivatives through any network: a batch and its P tangents in one forward pass.

    y, dy = ff.jvp(model, x, dx)                        # dy [P, n, ...]
    acts = ff.propagate(model, x, dx)                   # {layer: (activations, tangents)}
    print(ff.dual.coverage(model, x))                   # which operations have a rule

A `DualTensor` passes through the model in place of the batch. `dispatch` finds the rule of each
operation in `rules/`; `fallback` handles operations without one.
"""

from fisherfast.dual import rules
from fisherfast.dual.coverage import Coverage
from fisherfast.dual.errors import DerivativeError
from fisherfast.dual.memory import release_memory
from fisherfast.dual.propagation import coverage, jvp, propagate, propagation
from fisherfast.dual.tensor import DualTensor

__all__ = [
    "Coverage",
    "DerivativeError",
    "DualTensor",
    "coverage",
    "jvp",
    "propagate",
    "propagation",
    "release_memory",
    "rules",
]
