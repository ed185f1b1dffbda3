"""The largest eigenvalues of the Fisher matrix and their directions, of any amount of data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from fisherfast._fields import AtLeast, Shape
from fisherfast._validation import check_whole
from fisherfast.measurement.settings import bytes_of
from fisherfast.parameters.analysis.spectrum import numerical_rank
from fisherfast.parameters.backward.columns import Sweep
from fisherfast.parameters.checks import check_damping, check_fits
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.structures.base import ParameterFisher
from fisherfast.parameters.structures.dense import singular
from fisherfast.parameters.structures.jacobian import Jacobian, collect_rows
from fisherfast.parameters.structures.layer_rows import LayerRows

ROWS_AT_ONCE = 4096
"""Rows of the root for each eigendecomposition, 10 s on one core; data with fewer rows are
decomposed exactly."""

SPARE = 2
"""Directions kept between batches, in units of those wanted: a direction that is dropped early is
lost, even if later samples would have made it large."""

BASIS_COPIES = 3
"""Matrices [P, k] float64 that exist at a time."""


@dataclass(eq=False, repr=False)
class LowRankFisher(ParameterFisher):
    r"""The part of F in its largest directions: F_k = U diag(s) U^T, with F_k <= F.

    What is left out, F - F_k, is positive semi-definite; its trace is `missing_trace`, and none of
    its eigenvalues is larger than `error_bound`. With no more rows (samples x columns) than fit
    into one Gram matrix (4096), these are the eigenpairs of F; with more, batches are merged as
    they come, one eigendecomposition for each 4096 rows, and the bound adds up what each cut off.

    ``fisher(..., structure="lowrank", rank=50, memory_budget="8 GiB")``: k at most, and bytes that
    the directions and the rows that wait for the next decomposition may take.

    Attributes:
        values: s [k] descending.
        directions: U [P, k], orthonormal.
        missing_trace: trace(F) - trace(F_k).
        error_bound: at least the largest eigenvalue of F - F_k.

    Cost: 48 k P bytes at work, 8 k P kept; for each 4096 rows (N of them) the Gram matrix
    of N + 2 k rows and its eigendecomposition, about 10 (N + 2 k)^3 operations.

    Reference: one eigendecomposition for each block of rows as in Levy and Lindenbaum (2000),
    "Sequential Karhunen-Loeve basis extraction", IEEE Transactions on Image Processing 9.

    Example:
        >>> import torch, fisherfast as ff
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> F = ff.parameters.fisher(
        ...     model, ff.parameters.Gaussian(), x, structure="lowrank", rank=1
        ... )
        >>> F.values, round(F.missing_trace, 6)
        (tensor([2.], dtype=torch.float64), 0.5)
    """

    structure = "lowrank"

    values: Annotated[Tensor, Shape(("k",)), AtLeast(0)]
    directions: Annotated[Tensor, Shape(("P", "k"))]
    missing_trace: Annotated[float, AtLeast(0)]
    error_bound: Annotated[float, AtLeast(0)]

    def _matmul(self, columns: Tensor) -> Tensor:
        return self.directions @ (self.values[:, None] * (self.directions.T @ columns))

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        inside = self.directions.T @ columns
        if damping == 0:
            if len(self.values) < self.layout.size:
                raise singular(f"F has rank {len(self.values)} of {self.layout.size} here")
            return self.directions @ (inside / self.values[:, None])
        share = self.values / (self.values + damping)
        return (columns - self.directions @ (share[:, None] * inside)) / damping

    def diag(self) -> Tensor:
        return self.directions.square() @ self.values

    def trace(self) -> float:
        """The sum of the eigenvalues kept; that of F is larger by `missing_trace`."""
        return float(self.values.sum())

    def eigenvalues(self) -> Tensor:
        """Those kept, ascending; the others of F_k are zero."""
        return self.values.flip(0)

    def logdet(self, *, damping: float = 0.0) -> float:
        """log det(F_k + damping), at most that of F."""
        check_damping(damping)
        return self._logdet(self.values, damping)

    def _left_out(self) -> tuple[float, float]:
        return self.missing_trace, self.error_bound

    def _directions(self, chosen: Sequence[int]) -> Tensor:
        return self.directions[:, list(chosen)]


class LowRankAccumulator:
    """A basis W [P, k] with W W^T nearly J^T J of all rows so far, and rows that wait."""

    kind = LowRankFisher

    def __init__(
        self,
        layout: ParameterLayout,
        *,
        rank: int = 50,
        memory_budget: int | str | None = "8 GiB",
    ) -> None:
        """rank: k, eigenpairs kept at most; memory_budget: bytes that it may take."""
        self._layout, self._rank = layout, check_whole("rank", rank, least=1)
        self._budget = bytes_of(memory_budget) or math.inf
        carried = min(SPARE * self._rank, layout.size)
        self._fixed = 8 * (BASIS_COPIES * carried * layout.size)
        self._check(0, 0)
        self._waiting = Jacobian(layout)
        self._basis: Tensor | None = None
        self._trace = self._cut = 0.0
        self._precision = torch.finfo(torch.float64).eps

    def _check(self, rows: int, more: int) -> None:
        check_fits(
            f"{self._rank} directions of {self._layout.size} parameters and a batch",
            self._fixed + more,
            self._budget,
            "pass a smaller rank=, a smaller batch_size=, a larger memory_budget=, or parameters="
            " to choose some",
        )

    def add(self, sweep: Sweep) -> None:
        collect_rows(sweep, self._wait, check=self._check, most_rows=ROWS_AT_ONCE)

    def _wait(self, piece: dict[tuple[str, ...], LayerRows]) -> None:
        coming = Jacobian(self._layout, [piece])
        together = self._waiting.rows + coming.rows
        if self._waiting.rows and (
            together > ROWS_AT_ONCE
            or self._fixed + self._waiting.bytes() + coming.bytes() > self._budget
        ):
            self._merge(SPARE * self._rank)
        self._waiting.pieces.append(piece)

    def _merge(self, rank: int) -> None:
        """Merge the waiting rows and keep the largest directions."""
        rows = self._waiting
        self._precision = max(self._precision, rows.precision)
        new = rows.gram()
        self._trace += float(new.trace())
        basis = new.new_zeros(self._layout.size, 0) if self._basis is None else self._basis
        across = rows.times(basis)
        above = torch.cat([basis.T @ basis, across.T], dim=1)
        gram = torch.cat([above, torch.cat([across, new], dim=1)])
        values, vectors = torch.linalg.eigh(gram)
        kept = min(rank, numerical_rank(values.clamp_min(0), self._precision))
        if kept < len(values):
            self._cut += max(0.0, float(values[len(values) - kept - 1]))
        vectors = vectors.flip(1)[:, :kept]
        old = basis.shape[1]
        self._basis = rows.transposed(vectors[old:]).addmm_(basis, vectors[:old])
        self._waiting = Jacobian(self._layout)

    def means(self, samples: int) -> tuple[Tensor, Tensor, float, float]:
        self._merge(self._rank)
        assert self._basis is not None
        values = self._basis.square().sum(0)
        missing = max(0.0, self._trace - float(values.sum()))
        bound = min(self._cut, missing)
        return values / samples, self._basis / values.sqrt(), missing / samples, bound / samples
