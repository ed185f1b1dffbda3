"""What every structure of the Fisher matrix can be asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fisherfast.parameters.backward.columns import FisherType, Sweep
from fisherfast.parameters.checks import check_number
from fisherfast.parameters.layout import ParameterLayout

__all__ = ["Accumulator", "ParameterFisher"]

Vector = Tensor | Mapping[str, Tensor]
"""[P] or [P, m], or one tensor per parameter by name."""

DENSE_BYTES = 8 * 2**30
"""Largest dense matrix that `to_dense` builds unasked: 32 768 parameters in float64."""


Columns = Callable[[Tensor], Tensor]
"""A map of V [P, m] float64 to V's shape."""


class Accumulator(Protocol):
    """How one structure is summed over batches."""

    def add(self, sweep: Sweep) -> None:
        """Take one batch in."""

    def result(self, samples: int) -> ParameterFisher:
        """The structure, averaged over the samples seen."""


class ParameterFisher(ABC):
    """The Fisher matrix F [P, P] of a network's parameters in one structure, averaged over samples:

        F = 1/n sum_i E_{y ~ p(y | x_i, w)}[ d log p(y | x_i, w)/dw  (d log p(y | x_i, w)/dw)^T ]

    Attributes:
        layout: the parameters and their order.
        samples: n.
        fisher_type: "exact", "mc" or "empirical".
        structure: how it is stored.
        name: what it is, in words; of "empirical" that it is not the Fisher matrix.

    Numbers are float64, in the unit 1 / w^2; vectors go over parameters as `layout` orders them.
    """

    structure: ClassVar[str]

    def __init__(self, layout: ParameterLayout, samples: int, fisher_type: FisherType) -> None:
        self.layout, self.samples, self.fisher_type = layout, samples, fisher_type

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.layout.size, self.layout.size

    @property
    def name(self) -> str:
        """What this matrix is, in words."""
        what = {
            "exact": "Fisher matrix",
            "mc": "Fisher matrix, Monte Carlo",
            "empirical": "second moment of the labels' gradients, not the Fisher matrix",
        }[self.fisher_type]
        return f"{what} ({self.structure})"

    def __repr__(self) -> str:
        return f"<{self.name}: {self.layout.size} parameters, {self.samples} samples>"

    def __matmul__(self, vector: Vector) -> Any:
        """F v, as v was given: [P], [P, m], or by name; float64, differentiable in v.

        Raises:
            TypeError: v is complex, or neither tensors nor a mapping of them.
            ValueError: v is of another shape, or lacks a parameter.
        """
        return self._apply(self._matmul, vector)

    def solve(self, vector: Vector, *, damping: float = 0.0) -> Any:
        """(F + damping)^-1 v, as v was given, like ``F @ v``.

        Raises:
            TypeError: v is complex, or neither tensors nor a mapping of them; damping is no number.
            ValueError: v is of another shape, or lacks a parameter; damping is negative, or not
                positive where F is singular.
        """
        check_damping(damping)
        return self._apply(lambda v: self._solve(v, damping), vector)

    def _apply(self, function: Columns, vector: Vector) -> Any:
        if isinstance(vector, Mapping):
            return self.layout.unflatten(self._apply(function, self.layout.flatten(vector)))
        if not isinstance(vector, Tensor):
            raise TypeError(f"vector must be a tensor or a mapping, got {type(vector).__name__}")
        if vector.dim() not in (1, 2) or len(vector) != self.layout.size:
            raise ValueError(
                f"vector must have shape [P] or [P, m] with P = {self.layout.size}, got"
                f" {list(vector.shape)}"
            )
        if vector.is_complex():
            raise TypeError(f"vector must be real, got {vector.dtype}")
        columns = vector.reshape(len(vector), -1).double()
        if not columns.numel():
            return columns.clone()
        product: Tensor = _Symmetric.apply(columns, function)
        return product.reshape(vector.shape)

    @abstractmethod
    def _matmul(self, columns: Tensor) -> Tensor:
        """F V of V [P, m] float64."""

    @abstractmethod
    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        """(F + damping)^-1 V of V [P, m] float64."""

    @abstractmethod
    def diag(self) -> Tensor:
        """The diagonal [P]."""

    def trace(self) -> float:
        """The sum of the diagonal."""
        return float(self.diag().sum())

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """All P eigenvalues in ascending order, or those that are not surely zero (each structure
        says which)."""

    @abstractmethod
    def logdet(self, *, damping: float = 0.0) -> float:
        """log det(F + damping); -inf where that is singular."""

    def to_dense(self) -> Tensor:
        """The whole matrix [P, P].

        Raises:
            MemoryError: it would take more than 8 GiB.
        """
        size = self.layout.size
        if 8 * size * size > DENSE_BYTES:
            raise MemoryError(
                f"to_dense must fit into 8 GiB, got P = {size}: use @, solve, diag or eigenvalues"
            )
        return self @ torch.eye(size, dtype=torch.float64, device=self._device())

    @abstractmethod
    def _device(self) -> torch.device:
        """Where its numbers are."""

    def state_dict(self) -> dict[str, Any]:
        """All of it, for `from_state_dict`: tensors and plain numbers, for ``torch.save``."""
        return {
            "structure": self.structure,
            "layout": self.layout.state_dict(),
            "samples": self.samples,
            "fisher_type": self.fisher_type,
            **self._state(),
        }

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What the structure adds to the state."""

    @classmethod
    @abstractmethod
    def _from_state(
        cls,
        layout: ParameterLayout,
        samples: int,
        fisher_type: FisherType,
        state: Mapping[str, Any],
    ) -> ParameterFisher:
        """The structure whose `_state` this is."""


class _Symmetric(torch.autograd.Function):
    """A symmetric matrix times V: its own derivative, whatever the product is computed with."""

    @staticmethod
    def forward(columns: Tensor, matrix: Columns) -> Tensor:
        return matrix(columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Columns], output: Tensor) -> None:
        ctx.matrix = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Symmetric.apply(g, ctx.matrix), None


def check_fisher(fisher: Any) -> None:
    """Raise TypeError unless it is a Fisher matrix."""
    if not isinstance(fisher, ParameterFisher):
        raise TypeError(
            f"fisher must be a matrix of ff.parameters.fisher, got {type(fisher).__name__}"
        )


def check_damping(damping: float) -> None:
    """Raise unless damping is a finite number of at least 0."""
    check_number("damping", damping)
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be finite and at least 0, got {damping}")


def singular(what: str, damping: float = 0.0) -> ValueError:
    """The error of `solve` where the matrix is singular, and the damping does not help."""
    if damping > 0:
        return ValueError(
            f"damping must be larger than the rounding of F, got {damping:g}: {what}; pass more"
        )
    return ValueError(
        f"damping must be positive, got 0: {what}, so that F has no inverse; pass damping="
    )
