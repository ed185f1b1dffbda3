"""The whole Fisher matrix of a small network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherfast.parameters.backward.columns import FisherType, Sweep
from fisherfast.parameters.checks import check_damping
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.structures.base import DENSE_BYTES, ParameterFisher
from fisherfast.parameters.structures.block import BlockSums, check_memory
from fisherfast.parameters.structures.dense import PositiveMatrix, singular

__all__ = ["FullAccumulator", "FullFisher"]


class FullFisher(ParameterFisher):
    """F [P, P] as it is, for a few thousand parameters.

    ``fisher(..., structure="full", memory_budget="8 GiB")``: bytes that the matrix may take, as a
    number or like "8 GiB"; None for no bound. It is checked before anything runs.

    Cost: 8 P^2 bytes, the per-sample gradients of one batch and column [n, P], and P^2 operations
    per sample and column; `solve` and `logdet` P^3 / 3, `eigenvalues` about 4 P^3.

    Example:
        >>> import torch, fisherfast as ff
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
        >>> F = ff.parameters.fisher(model, ff.parameters.Gaussian(), x, structure="full")
        >>> F.to_dense()
        tensor([[5.0000, 1.5000],
                [1.5000, 0.5000]], dtype=torch.float64)
        >>> round(F.logdet(), 4) == round(torch.logdet(F.to_dense()).item(), 4)
        True
    """

    structure = "full"

    def __init__(
        self,
        layout: ParameterLayout,
        samples: int,
        fisher_type: FisherType,
        matrix: Tensor,
        rounding: float,
    ) -> None:
        """matrix: [P, P] float64; rounding: of the gradients' dtype."""
        super().__init__(layout, samples, fisher_type)
        self._positive = PositiveMatrix(matrix, rounding)

    def to_dense(self) -> Tensor:
        return self._positive.matrix.clone()

    def diag(self) -> Tensor:
        return self._positive.matrix.diagonal().clone()

    def _matmul(self, columns: Tensor) -> Tensor:
        return self._positive.matrix @ columns

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        solved = self._positive.solve(columns, damping)
        if solved is None:
            raise singular("the matrix cannot be told from singular", damping)
        return solved

    def eigenvalues(self) -> Tensor:
        """All P, ascending; what rounding made negative is 0."""
        return self._positive.eigenvalues()

    def logdet(self, *, damping: float = 0.0) -> float:
        check_damping(damping)
        return self._positive.logdet(damping)

    def _device(self) -> torch.device:
        return self._positive.matrix.device

    def _state(self) -> dict[str, Any]:
        return {"matrix": self._positive.matrix, "rounding": self._positive.rounding}

    @classmethod
    def _from_state(
        cls,
        layout: ParameterLayout,
        samples: int,
        fisher_type: FisherType,
        state: Mapping[str, Any],
    ) -> FullFisher:
        return cls(layout, samples, fisher_type, state["matrix"], state["rounding"])


WHOLE = "model"
"""Name of the only block."""


class FullAccumulator:
    """Sums the whole matrix over batches; keeps the per-sample gradients of one vector at a time
    for one batch, [n, P]."""

    def __init__(
        self,
        layout: ParameterLayout,
        fisher_type: FisherType,
        *,
        memory_budget: int | str | None = DENSE_BYTES,
    ) -> None:
        """memory_budget: bytes that the matrix may take, or like "8 GiB"; None for no bound."""
        blocks = {WHOLE: layout.names}
        way = 'structure="gram", "block", "kfac" or "diag" takes less'
        check_memory(layout, blocks, memory_budget, way)
        self._layout, self._fisher_type = layout, fisher_type
        self._sums = BlockSums(layout, blocks)

    def add(self, sweep: Sweep) -> None:
        sweep.visit(self._sums.take)

    def result(self, samples: int) -> FullFisher:
        matrix = self._sums.means(samples)[WHOLE]
        return FullFisher(self._layout, samples, self._fisher_type, matrix, self._sums.rounding)
