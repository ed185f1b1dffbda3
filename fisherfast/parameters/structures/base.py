"""The methods that every structure of the Fisher matrix has."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from fisherfast._fields import Scope, kinds_of, read_fields
from fisherfast._validation import check_seed, check_whole
from fisherfast.parameters.analysis.effective_dimension import (
    EffectiveDimension,
    effective_dimension,
)
from fisherfast.parameters.analysis.eigenpairs import largest_eigenpairs
from fisherfast.parameters.analysis.importance import Importance, Per, importance
from fisherfast.parameters.analysis.spectrum import Spectrum, all_eigenvalues, largest_eigenvalues
from fisherfast.parameters.backward.columns import FisherType, Source
from fisherfast.parameters.checks import check_choice, check_damping
from fisherfast.parameters.layout import ParameterLayout

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Vector = Tensor | Mapping[str, Tensor]
"""[P] or [P, m], or one tensor per parameter by name."""

DENSE_BYTES = 8 * 2**30
"""Largest matrix that `to_dense` builds: 32 768 parameters in float64."""


Self = TypeVar("Self", bound="ParameterFisher")

Columns = Callable[[Tensor], Tensor]
"""A map of V [P, m] float64 to V's shape."""


@dataclass(eq=False, repr=False)
class ParameterFisher(ABC):
    """The Fisher matrix F [P, P] of a network's parameters in one structure, averaged over samples:

        F = 1/n sum_i E_{y ~ p(y | x_i, w)}[ d log p(y | x_i, w)/dw  (d log p(y | x_i, w)/dw)^T ]

    Attributes:
        layout: the parameters and their order.
        samples: n.
        fisher_type: "exact", "mc" or "empirical".
        structure: how it is stored.
        name: the kind of matrix, in words; "empirical" is named as not the Fisher matrix.

    Numbers are float64, in the unit 1 / w^2; vectors go over parameters as `layout` orders them.
    """

    structure: ClassVar[str]

    layout: ParameterLayout
    samples: int
    fisher_type: FisherType
    _source: Source | None = field(default=None, init=False)
    """The network and data that it was measured from, for analyses that read them again."""

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.layout.size, self.layout.size

    @property
    def name(self) -> str:
        """The kind of matrix, in words."""
        what = {
            "exact": "Fisher matrix",
            "mc": "Fisher matrix, Monte Carlo",
            "empirical": "second moment of the labels' gradients, not the Fisher matrix",
        }[self.fisher_type]
        return f"{what} ({self.structure})"

    def __repr__(self) -> str:
        return f"<{self.name}: {self.layout.size} parameters, {self.samples} samples>"

    def __matmul__(self, vector: Vector) -> Any:
        """F v in the form of v: [P], [P, m], or by name; float64, differentiable in v.

        Raises:
            TypeError: v is complex, or neither tensors nor a mapping of them.
            ValueError: v is of another shape, or lacks a parameter.
        """
        return self._apply(self._matmul, vector)

    def solve(self, vector: Vector, *, damping: float = 0.0) -> Any:
        """(F + damping)^-1 v, in the form of v, like ``F @ v``.

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
        """All P eigenvalues in ascending order, or those that may differ from zero (see each
        structure)."""

    def logdet(self, *, damping: float = 0.0) -> float:
        """log det(F + damping); -inf where that is singular."""
        check_damping(damping)
        return self._logdet(self.eigenvalues(), damping)

    def _logdet(self, values: Tensor, damping: float) -> float:
        """log det(F + damping) from eigenvalues in any order; the others are zero."""
        rest = self.layout.size - len(values)
        if damping == 0 and rest:
            return -math.inf
        found = float((values + damping).log().sum())
        return found + rest * math.log(damping) if rest else found

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
        return self @ torch.eye(size, dtype=torch.float64, device=self._device)

    def to_scipy(self) -> LinearOperator:
        """F as a SciPy linear operator, for its eigenvalue and linear solvers.

        Returns:
            A ``scipy.sparse.linalg.LinearOperator`` of shape (P, P), float64, whose products are
            those of ``F @ v``, with NumPy arrays on the CPU.

        Example:
            >>> import torch, fisherfast as ff
            >>> from scipy.sparse.linalg import eigsh
            >>> model, x = torch.nn.Linear(4, 3), torch.randn(50, 4)
            >>> F = ff.parameters.fisher(model, "categorical", x, structure="gram")
            >>> values, directions = eigsh(F.to_scipy(), k=2)
            >>> bool(abs(values[-1] / F.eigenvalues()[-1] - 1) < 1e-9)
            True
        """
        from scipy.sparse.linalg import LinearOperator

        def product(v: np.ndarray) -> np.ndarray:
            given = torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64))
            found = self._matmul(given.reshape(len(given), -1).to(self._device))
            return found.reshape(given.shape).cpu().numpy()

        return LinearOperator(
            self.shape,
            matvec=product,
            rmatvec=product,
            matmat=product,
            rmatmat=product,
            dtype=np.float64,
        )

    def spectrum(
        self, count: int | None = None, *, seed: int = 0, memory_budget: int | str | None = "8 GiB"
    ) -> Spectrum:
        """The eigenvalues of F and their directions, and how many parameters are in use.

        Args:
            count: None for all eigenvalues that the structure has; a number for so many of the
                largest, from products ``F @ v`` alone.
            seed: of the start vectors, where count is given; in [-2^63, 2^63).
            memory_budget: bytes for the vectors, where count is given: a number or like "8 GiB";
                None for no bound.

        Returns:
            `Spectrum`.

        Raises:
            TypeError: a count that is not a whole number.
            ValueError: a count that is not positive; F is zero.
            MemoryError: the vectors do not fit.

        Cost: that of ``eigenvalues()``; for "gram" N^3 operations for N = samples x columns, 4 s
        for N = 4500 on two cores. With count that of `largest_eigenpairs`: two or three products
        ``F @ v`` for each eigenvalue, and about 20 to see that none is missing.

        Example:
            >>> import torch, fisherfast as ff
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(9, 30), nn.Tanh(), nn.Linear(30, 3))
            >>> F = ff.parameters.fisher(model, "categorical", torch.randn(20, 9), structure="gram")
            >>> found = F.spectrum()
            >>> found.parameters, found.rank
            (393, 40)
        """
        known: dict[str, Any] = {"layout": self.layout, "samples": self.samples}
        known["most"] = self._rank_at_most()
        missing, rest = self._left_out()
        if count is None:
            values = self.eigenvalues().flip(0).clamp_min(0)
            known |= {"trace": self.trace() + missing, "directions": self._directions}
            return all_eigenvalues(values, rest, self.precision, **known)
        count, seed = check_whole("count", count, least=1), check_seed(seed)
        trace = self.trace()
        found = largest_eigenpairs(
            self._matmul,
            self.layout.size,
            count,
            trace=trace,
            seed=seed,
            device=self._device,
            memory_budget=memory_budget,
        )
        return largest_eigenvalues(found, rest, self.precision, trace=trace + missing, **known)

    def effective_dimension(
        self, n: float, gamma: float = 1.0, *, others: Sequence[ParameterFisher] = ()
    ) -> EffectiveDimension:
        """The number of parameters that n samples can tell apart, see `EffectiveDimension`.

        Args:
            n: samples that the network would be trained on; kappa must be above 1.
            gamma: in (0, 1].
            others: Fisher matrices of the same network at other parameters, drawn at random.

        Returns:
            `EffectiveDimension`.

        Raises:
            ValueError: n or gamma out of range, matrices of different networks, F is zero.

        Cost: eigenvalues of each matrix; for "gram", the structure to take, a Cholesky factor of
        its N x N or P x P side. "lowrank" gives a lower bound, "diag" and "kfac" that of theirs.

        Example:
            >>> import torch, fisherfast as ff
            >>> x = torch.randn(50, 4)
            >>> drawn = [
            ...     ff.parameters.fisher(torch.nn.Linear(4, 3), "categorical", x, structure="gram")
            ...     for _ in range(3)
            ... ]
            >>> 0 < drawn[0].effective_dimension(1000, others=drawn[1:]).value < 15
            True
        """
        matrices = [self, *others]
        for other in others:
            check_fisher(other)
            self.layout.check_same(other.layout, "others")
        return effective_dimension(
            [matrix.trace() for matrix in matrices],
            [matrix._log_det_one_plus for matrix in matrices],
            parameters=self.layout.size,
            n=n,
            gamma=gamma,
        )

    def importance(self, *, per: Per = "parameter") -> Importance:
        """The rise of the loss expected when parameters, units or layers are set to zero.

        See `Importance` for the formulas and what a unit is. Per unit and layer the pairs of
        parameters inside count exactly, whatever the structure: network and data are read again.

        Args:
            per: "parameter", "unit" or "layer".

        Returns:
            `Importance`, float64.

        Raises:
            TypeError: per unit or layer, data that can be read once only.
            ValueError: an unknown ``per``; parameters that have changed since F was measured; a
                matrix without its network and data (loaded, or `released`).

        Cost: per parameter none; per unit and layer a pass over the data, with one product of each
        layer's outputs and gradients for layers that apply their parameters linearly.

        Example:
            >>> import torch, fisherfast as ff
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            >>> F = ff.parameters.fisher(model, "categorical", torch.randn(9, 4))
            >>> units = F.importance(per="unit")
            >>> units["0"].shape
            torch.Size([8])
            >>> int(units.least(0.25)["0"].sum() + units.least(0.25)["2"].sum())  # of 8 + 3 units
            3
        """
        check_choice("per", per, ("parameter", "unit", "layer"))
        return importance(self._source_again(), per, self.diag(), self.samples)

    def released(self: Self) -> Self:
        """This matrix without the references to its network and data."""
        alone = copy.copy(self)
        alone._source = None
        return alone

    def _source_again(self) -> Source:
        if self._source is None:
            raise ValueError(
                "F must have its network and data for this, got a matrix that was loaded or"
                " released: measure it again"
            )
        return self._source

    @property
    def precision(self) -> float:
        """Relative rounding error of the numbers that it is made of."""
        return torch.finfo(torch.float64).eps

    def _rank_at_most(self) -> int:
        return self.layout.size

    def _left_out(self) -> tuple[float, float]:
        """Trace, and at least the largest eigenvalue, of what the structure leaves out of F."""
        return 0.0, 0.0

    def _directions(self, chosen: Sequence[int]) -> Tensor:
        """Directions [P, k] of some eigenvalues, number 0 that of the largest."""
        return self._eigenvectors[:, list(chosen)]

    @cached_property
    def _eigenvectors(self) -> Tensor:
        return torch.linalg.eigh(self.to_dense()).eigenvectors.flip(1)

    def _log_det_one_plus(self, scale: float) -> float:
        """log det(1 + scale F)."""
        return float((scale * self.eigenvalues()).log1p().sum())

    @cached_property
    def _device(self) -> torch.device:
        """The device of its numbers."""
        return self.diag().device

    def state_dict(self) -> dict[str, Any]:
        """All of it, for `from_state_dict`: tensors and plain numbers, for ``torch.save``."""
        return {
            "structure": self.structure,
            "layout": self.layout.state_dict(),
            "samples": self.samples,
            "fisher_type": self.fisher_type,
            **self._state(),
        }

    def _state(self) -> dict[str, Any]:
        """The structure's own fields."""
        return {name: getattr(self, name) for name in self._own_names()}

    @classmethod
    def _from_state(cls, layout: ParameterLayout, state: Mapping[str, Any]) -> dict[str, Any]:
        """The structure's own fields of a state, checked."""
        kinds = kinds_of(cls)
        own = {name: kinds[name] for name in cls._own_names()}
        return read_fields(own, state, "state", scope=Scope({"P": layout.size}))

    @classmethod
    def _own_names(cls) -> list[str]:
        return [part.name for part in fields(cls)[len(fields(ParameterFisher)) :]]


class _Symmetric(torch.autograd.Function):
    """A symmetric matrix times V, which is its own derivative however it is computed."""

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
