"""What one layer knows of its own per-sample gradients.

A layer that applies its parameters linearly has, for sample i with input x_i and gradient g_i of
the log-likelihood with respect to its output, the per-sample gradient

    G_i = sum_t g_it a_it^T          (t: positions that share the parameters)

where a_it is what multiplies the weights at position t: the input of a linear layer, a patch of a
convolution's, the normalised activation of a norm. Every structure of the Fisher matrix asks for
some contraction of these G_i; a rule answers without building them where it can. A rule for a kind
of layer is one class; `rule_for` finds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Rows", "Rule"]


class Rule:
    """Contractions of the per-sample gradients of one layer.

    x and g are what the layer was given and the gradient at its output, with samples first; `names`
    and `shapes` are those of the parameters measured, and every tuple returned has their order.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    folds = False  # whether x may be [n, positions, ...] where the layer saw [n positions, ...]

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """G_i of every sample: one [n, *shape] per parameter."""
        raise NotImplementedError

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """sum_i G_i^2, entry by entry: one [*shape] per parameter."""
        return tuple(rows.square().sum(0) for rows in self.gradients(x, g))

    def products(self, x: Tensor, g: Tensor, v: Sequence[Tensor]) -> Tensor:
        """<G_i, v> of every sample, summed over the parameters: [n]."""
        rows = self.gradients(x, g)
        return sum(
            (
                row.reshape(len(row), -1) @ part.flatten().to(row.dtype)
                for row, part in zip(rows, v, strict=True)
            ),
            start=torch.zeros(len(g), dtype=g.dtype, device=g.device),
        )

    def weighted_sum(self, x: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        """sum_i u_i G_i, u [n]: one [*shape] per parameter."""
        return tuple(torch.tensordot(u, rows, dims=1) for rows in self.gradients(x, g))

    def gram(self, x: Tensor, g: Tensor, other_x: Tensor, other_g: Tensor) -> Tensor:
        """<G_i, G'_j> of every pair of samples, summed over the parameters: [n, n']."""
        left, right = self.gradients(x, g), self.gradients(other_x, other_g)
        return sum(
            (
                a.reshape(len(a), -1) @ b.reshape(len(b), -1).T
                for a, b in zip(left, right, strict=True)
            ),
            start=torch.zeros(len(g), len(other_g), dtype=g.dtype, device=g.device),
        )


class Rows(Rule):
    """Per-sample gradients that had to be computed one by one: x is not used, g is [n, p], the
    gradients of all its parameters side by side."""

    def __init__(self, names: Sequence[str], shapes: Sequence[torch.Size]) -> None:
        self.names, self.shapes = tuple(names), tuple(shapes)

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        parts = g.split([shape.numel() for shape in self.shapes], dim=1)
        return tuple(
            part.reshape(len(g), *shape) for part, shape in zip(parts, self.shapes, strict=True)
        )
