"""A Kronecker product of two symmetric matrices, as one block of a Fisher matrix."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["KroneckerBlock"]


class KroneckerBlock:
    """One layer's block B (x) A in each of G groups: entry ((m, d), (m', d')) is B[m, m'] A[d, d'].

    The weights of a group are a matrix [M, D] in the order of their parameter, row by row; a bias
    that is measured with them is one more column, the last.

    Attributes:
        inputs: A [G, D, D] float64, of what multiplies the weights.
        gradients: B [G, M, M] float64, of the gradients at the layer's output.
        weight, bias: where the two lie in a vector of all parameters; None what is not measured.
    """

    def __init__(
        self, inputs: Tensor, gradients: Tensor, weight: slice | None, bias: slice | None
    ) -> None:
        self.inputs, self.gradients = inputs, gradients
        self.weight, self.bias = weight, bias

    def take(self, columns: Tensor) -> Tensor:
        """This layer's part of vectors [P, m] as matrices [G, M, D, m]."""
        groups, rows = self.gradients.shape[:2]
        parts = []
        if self.weight is not None:
            parts.append(columns[self.weight].reshape(groups, rows, -1, columns.shape[1]))
        if self.bias is not None:
            parts.append(columns[self.bias].reshape(groups, rows, 1, columns.shape[1]))
        return torch.cat(parts, 2)

    def put(self, matrices: Tensor, columns: Tensor) -> None:
        """Write matrices [G, M, D, m] to their place in vectors [P, m]."""
        if self.weight is not None:
            end = matrices.shape[2] - (self.bias is not None)
            columns[self.weight] = matrices[:, :, :end].reshape(-1, columns.shape[1])
        if self.bias is not None:
            columns[self.bias] = matrices[:, :, -1].reshape(-1, columns.shape[1])

    def product(self, matrices: Tensor) -> Tensor:
        """(B (x) A) V of V [G, M, D, m]: the matrices B V A."""
        return _both_sides(self.gradients, matrices, self.inputs)

    def solution(self, matrices: Tensor, damping: float) -> Tensor:
        """(B (x) A + damping)^-1 V of V [G, M, D, m], in the basis of the eigenvectors."""
        (_, left), (_, right) = self._eigen
        rotated = _both_sides(left.mT, matrices, right)
        rotated = rotated / (self.spectrum + damping).unsqueeze(-1)
        return _both_sides(left, rotated, right.mT)

    @cached_property
    def _eigen(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return _eigen(self.gradients), _eigen(self.inputs)

    @property
    def spectrum(self) -> Tensor:
        """All eigenvalues [G, M, D]: products of those of B and of A, which are zero where they
        cannot be told from it."""
        (left, _), (right, _) = self._eigen
        return left.unsqueeze(-1) * right.unsqueeze(-2)

    def diag(self) -> Tensor:
        """The diagonal as matrices [G, M, D]."""
        left, right = (part.diagonal(dim1=-2, dim2=-1) for part in (self.gradients, self.inputs))
        return left.unsqueeze(-1) * right.unsqueeze(-2)

    def state(self) -> dict[str, Any]:
        """All of it, as tensors and plain numbers."""
        return {
            "inputs": self.inputs,
            "gradients": self.gradients,
            "weight": _ends(self.weight),
            "bias": _ends(self.bias),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> KroneckerBlock:
        """The block whose `state` this is."""
        places = [None if state[k] is None else slice(*state[k]) for k in ("weight", "bias")]
        return cls(state["inputs"], state["gradients"], *places)


def _both_sides(left: Tensor, matrices: Tensor, right: Tensor) -> Tensor:
    """L V R of V [G, M, D, m], for each of the m."""
    moved = matrices.movedim(-1, 1)
    return (left.unsqueeze(1) @ moved @ right.unsqueeze(1)).movedim(1, -1)


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [G, D] and eigenvectors; those within rounding of zero are zero.

    The rounding error of an eigenvalue is at most about D eps times the largest.
    """
    values, vectors = torch.linalg.eigh(matrix)
    size = max(matrix.shape[-1], 1)
    floor = size * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    return torch.where(values > floor, values, 0.0), vectors


def _ends(place: slice | None) -> list[int] | None:
    return None if place is None else [place.start, place.stop]
