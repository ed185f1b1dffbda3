"""The Fisher matrix as products with vectors, which read the data again each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from fisherfast.parameters.backward.columns import Sweep
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.structures.base import ParameterFisher
from fisherfast.parameters.structures.dense import singular
from fisherfast.parameters.structures.jacobian import Jacobian, collect_rows

ROWS_AT_ONCE = 1024
"""Rows of the root that are in memory at a time."""

SOLVED = 1e-10
"""Residual of `solve`, relative to the vector."""


@dataclass(eq=False, repr=False)
class StreamedFisher(ParameterFisher):
    """F for data of any size: only its diagonal is stored, and ``F @ v`` reads the data again.

    Network and data must stay as they are; data must be readable more than once (a tensor, a
    Dataset, a DataLoader). ``spectrum(count)`` gives the largest eigenvalues, ``solve`` takes
    conjugate gradients (with a damping); all eigenvalues, ``logdet`` and ``state_dict`` need a
    structure that stores F.

    Attributes:
        rows: N = samples x columns, at least the rank of F.

    Cost: 8 P bytes. A product is a pass over the data with a backward pass for each column, and a
    forward and a backward pass of each layer for each vector.

    Example:
        >>> import torch, fisherfast as ff
        >>> model, x = torch.nn.Linear(9, 3), torch.randn(200, 9)
        >>> F = ff.parameters.fisher(model, "categorical", x, structure="streamed")
        >>> F.spectrum(2).eigenvalues.shape
        torch.Size([2])
    """

    structure = "streamed"

    _values: Tensor
    rows: int
    _precision: float

    @property
    def precision(self) -> float:
        return self._precision

    def diag(self) -> Tensor:
        return self._values.clone()

    def _matmul(self, columns: Tensor) -> Tensor:
        total = torch.zeros_like(columns)

        def add(rows: Jacobian) -> None:
            total.add_(rows.transposed(rows.times(columns)))

        source = self._source_again()
        source.read_again(lambda sweep: _take_rows(sweep, self.layout, add), self.samples)
        return total / self.samples

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        if damping == 0:
            raise singular("F of this structure is not known to be regular")
        from scipy.sparse.linalg import LinearOperator, cg

        fisher = self.to_scipy()
        damped = LinearOperator(self.shape, matvec=lambda v: fisher @ v + damping * v, dtype=float)
        solved = []
        for column in columns.T:
            solution, failed = cg(damped, column.cpu().numpy(), rtol=SOLVED, atol=0.0)
            if failed:
                raise ValueError(
                    f"damping must be larger for conjugate gradients to converge, got {damping:g}"
                )
            solved.append(torch.from_numpy(solution).to(columns))
        return torch.stack(solved, dim=1)

    def eigenvalues(self) -> NoReturn:
        """Not available: `spectrum(count)` gives the largest ones."""
        raise ValueError(
            'structure must be one that stores F for all eigenvalues, got "streamed": ask for'
            ' spectrum(count), or measure with structure="gram"'
        )

    def _rank_at_most(self) -> int:
        return min(self.rows, self.layout.size)

    def _state(self) -> NoReturn:
        raise ValueError(
            'structure must be one that stores F for state_dict, got "streamed", which is its'
            " network and data"
        )


def _take_rows(sweep: Sweep, layout: ParameterLayout, take: Callable[[Jacobian], None]) -> None:
    """Give the rows of a batch to `take`, `ROWS_AT_ONCE` at a time."""
    collect_rows(sweep, lambda piece: take(Jacobian(layout, [piece])), most_rows=ROWS_AT_ONCE)


class StreamedAccumulator:
    """The pass at the measurement: diagonal, number of rows, dtype; it checks data and network."""

    kind = StreamedFisher

    def __init__(self, layout: ParameterLayout) -> None:
        self._layout = layout
        self._squares: Tensor | None = None
        self._count, self._precision = 0, torch.finfo(torch.float64).eps

    def add(self, sweep: Sweep) -> None:
        _take_rows(sweep, self._layout, self._take)

    def _take(self, rows: Jacobian) -> None:
        squares = rows.squares()
        self._squares = squares if self._squares is None else self._squares + squares
        self._count += rows.rows
        self._precision = max(self._precision, rows.precision)

    def means(self, samples: int) -> tuple[Tensor, int, float]:
        assert self._squares is not None
        return self._squares / samples, self._count, self._precision
