"""The Fisher matrix through the Gram matrix of its root: exact, and never P x P."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisherfast._fields import inside, read_fields
from fisherfast.measurement.settings import bytes_of
from fisherfast.parameters.analysis.spectrum import numerical_rank, rounding_noise
from fisherfast.parameters.backward.columns import Sweep
from fisherfast.parameters.checks import check_damping, check_fits
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.structures.base import ParameterFisher
from fisherfast.parameters.structures.dense import cholesky, singular
from fisherfast.parameters.structures.jacobian import Jacobian, collect_rows

NEGLIGIBLE = 1e-3
"""Most that a zero eigenvalue made positive by rounding may add to log det(1 + c F) by a Cholesky
factor; each of the others adds several. Otherwise eigenvalues are computed, ten times slower."""

GRAM_COPIES = 3
"""Matrices [N, N] float64 that exist at a time: K, its factor, a work space."""


@dataclass(eq=False, repr=False)
class GramFisher(ParameterFisher):
    r"""F = S^T S with S = J / sqrt(n) [N, P], through K = S S^T [N, N].

    J has a row for each sample and column of the root of the outputs' Fisher matrix; it is kept as
    the input of each layer and the gradient at its output. K has the eigenvalues of F that are not
    zero, and with K = V diag(l) V^T the eigenvectors are u = S^T v / sqrt(l). By Woodbury's
    identity and Sylvester's

    .. math:: (F + \lambda)^{-1} v = (v - S^T (K + \lambda)^{-1} S v) / \lambda, \qquad
              \log\det(F + \lambda) = \log\det(K + \lambda) + (P - N) \log \lambda

    Cost: K takes N^2 p operations for p numbers that a row keeps, its eigenvalues N^3; a product
    with a vector is one forward and one backward pass of each layer. Where P < N, eigenvalues are
    those of F [P, P], which is then the smaller.

    ``fisher(..., structure="gram", memory_budget="8 GiB")``: bytes that the factors of the layers
    and the matrices [N, N] may take.

    Example:
        >>> import torch, fisherfast as ff
        >>> model, x = torch.nn.Linear(20, 1, bias=False), torch.eye(20)[:2]
        >>> F = ff.parameters.fisher(model, ff.parameters.Gaussian(), x, structure="gram")
        >>> F.rows, F.layout.size
        (2, 20)
        >>> F.eigenvalues()  # the other 18 are zero
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    structure = "gram"

    _jacobian: Jacobian

    @property
    def rows(self) -> int:
        """N, at least the rank of F."""
        return self._jacobian.rows

    def gram(self) -> Tensor:
        """K = J J^T / n [N, N], N = samples x columns: its eigenvalues are those of F."""
        return self._gram.clone()

    @property
    def precision(self) -> float:
        return self._jacobian.precision

    @cached_property
    def _gram(self) -> Tensor:
        return self._jacobian.gram() / self.samples

    def _smaller(self) -> Tensor:
        """K, or F where that is smaller; callers must not write to it."""
        if self.rows <= self.layout.size:
            return self._gram
        return self._jacobian.moment() / self.samples

    def times_root(self, columns: Tensor) -> Tensor:
        """S V [N, m] of V [P, m] float64."""
        return self._jacobian.times(columns) / math.sqrt(self.samples)

    def transposed_root(self, columns: Tensor) -> Tensor:
        """S^T U [P, m] of U [N, m] float64."""
        return self._jacobian.transposed(columns) / math.sqrt(self.samples)

    def diag(self) -> Tensor:
        return self._jacobian.squares() / self.samples

    def trace(self) -> float:
        return float(self._gram.trace()) if "_gram" in vars(self) else super().trace()

    def _matmul(self, columns: Tensor) -> Tensor:
        return self.transposed_root(self.times_root(columns))

    def eigenvalues(self) -> Tensor:
        """The min(N, P) largest, ascending; the others are zero. Rounding leaves those that should
        be zero at about 1e-15 of the largest, never below 0."""
        return self._values.clone()

    @cached_property
    def _values(self) -> Tensor:
        return torch.linalg.eigvalsh(self._smaller()).clamp_min(0)

    @cached_property
    def _eigenvectors(self) -> Tensor:
        """Eigenvectors of the smaller one of F and K, that of the largest eigenvalue first."""
        return torch.linalg.eigh(self._smaller()).eigenvectors.flip(1)

    def rank(self) -> int:
        """Eigenvalues that are larger than rounding."""
        return numerical_rank(self.eigenvalues(), self._jacobian.precision)

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        if damping == 0:
            if self.rank() < self.layout.size:
                raise singular(f"F has rank {self.rank()} of {self.layout.size}")
            vectors = self._directions(range(self.layout.size))
            return vectors @ ((vectors.T @ columns) / self.eigenvalues().flip(0)[:, None])
        if self.rows > self.layout.size:
            factor = _damped_factor(self._smaller(), damping)
            return torch.cholesky_solve(columns, factor)
        factor = _damped_factor(self._gram, damping)
        inner = torch.cholesky_solve(self.times_root(columns), factor)
        return (columns - self.transposed_root(inner)) / damping

    def logdet(self, *, damping: float = 0.0) -> float:
        """log det(F + damping); -inf without damping where the rank is below P."""
        check_damping(damping)
        if damping == 0 and self.rank() < self.layout.size:
            return -math.inf
        return self._logdet(self.eigenvalues(), damping)

    def _rank_at_most(self) -> int:
        return min(self.rows, self.layout.size)

    def _directions(self, chosen: Sequence[int]) -> Tensor:
        found = super()._directions(chosen)
        if self.rows <= self.layout.size:
            found = self.transposed_root(found)
        return found / found.norm(dim=0)

    def _log_det_one_plus(self, scale: float) -> float:
        """log det(1 + scale F), through the smaller one of F and its Gram matrix."""
        smaller = self._smaller()
        length = float(smaller.norm())  # at least the largest eigenvalue
        noise = rounding_noise(len(smaller), length, self.precision)
        if scale * noise < NEGLIGIBLE:
            factor = cholesky(scale * smaller, 1.0)
            if factor is not None:
                return 2 * float(factor.diagonal().log().sum())
        values = torch.linalg.eigvalsh(smaller)
        noise = rounding_noise(len(values), float(values.max()), self.precision)
        return float((scale * values[values > noise]).log1p().sum())

    def _state(self) -> dict[str, Any]:
        return {"jacobian": self._jacobian.state()}

    @classmethod
    def _from_state(cls, layout: ParameterLayout, state: Mapping[str, Any]) -> dict[str, Any]:
        pieces = read_fields({"jacobian": list[list[dict[str, object]]]}, state, "state")
        with inside("state"):
            return {"_jacobian": Jacobian.from_state(layout, pieces["jacobian"])}

    def check_fields(self) -> None:
        if self.rows % self.samples:
            raise ValueError(f"rows must be a multiple of {self.samples} samples, got {self.rows}")


def _damped_factor(matrix: Tensor, damping: float) -> Tensor:
    """The factor of matrix + damping.

    Raises:
        ValueError: damping is lost in the rounding of the matrix.
    """
    least = torch.finfo(torch.float64).eps * float(matrix.norm())
    factor = cholesky(matrix, damping)
    if factor is None or damping < least:
        raise ValueError(
            f"damping must be more than rounding, about {least:.1e} for this F, got {damping}"
        )
    return factor


class GramAccumulator:
    """Keeps the inputs of each layer and the gradients at its output, for all samples."""

    kind = GramFisher

    def __init__(
        self, layout: ParameterLayout, *, memory_budget: int | str | None = "8 GiB"
    ) -> None:
        """memory_budget: bytes that the factors and the Gram matrix may take together."""
        self._jacobian = Jacobian(layout)
        self._bytes = 0
        self._budget = bytes_of(memory_budget) or math.inf

    def add(self, sweep: Sweep) -> None:
        before = self._jacobian.rows

        def check(rows: int, more: int) -> None:
            rows += before
            size = min(rows, self._jacobian.layout.size)
            check_fits(
                f"the Gram matrix of {rows} rows (samples x columns) and its factors",
                self._bytes + more + GRAM_COPIES * 8 * size**2,
                self._budget,
                'pass fewer samples, fisher_type="mc" (one column for each draw), a larger'
                ' memory_budget=, or structure="lowrank" or "diag"',
            )

        collect_rows(sweep, self._jacobian.pieces.append, check=check)
        self._bytes = self._jacobian.bytes()

    def means(self, samples: int) -> tuple[Jacobian]:
        return (self._jacobian,)
