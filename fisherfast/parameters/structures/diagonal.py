"""The diagonal of the Fisher matrix: one number per parameter."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from fisherfast._fields import AtLeast, Shape
from fisherfast.parameters.backward.columns import Sweep
from fisherfast.parameters.checks import check_damping
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.structures.base import ParameterFisher
from fisherfast.parameters.structures.dense import singular


@dataclass(eq=False, repr=False)
class DiagonalFisher(ParameterFisher):
    """diag(F): the expected square of every parameter's score, sample by sample.

    Correlations between parameters are left out: `solve` divides each entry by its own number.

    Attributes:
        values: the diagonal [P].

    Cost: 8 P bytes; for a layer with D inputs of a weight, M outputs and T positions T D M
    operations per sample and column, and no per-sample gradient in memory where the layer has a
    rule.

    Reference: LeCun, Denker, Solla (1990), NIPS 2, 598 (the diagonal of the curvature).

    Example:
        >>> import torch, fisherfast as ff
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
        >>> F = ff.parameters.fisher(model, ff.parameters.Gaussian(), x, structure="diag")
        >>> F.diag()
        tensor([5.0000, 0.5000], dtype=torch.float64)
        >>> F.solve(torch.ones(2))
        tensor([0.2000, 2.0000], dtype=torch.float64)
    """

    structure = "diag"

    values: Annotated[Tensor, Shape(("P",)), AtLeast(0)]

    def diag(self) -> Tensor:
        return self.values.clone()

    def _matmul(self, columns: Tensor) -> Tensor:
        return self.values[:, None] * columns

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        if damping == 0 and bool((self.values == 0).any()):
            raise singular("some parameters have no Fisher information")
        return columns / (self.values + damping)[:, None]

    def eigenvalues(self) -> Tensor:
        """All P, ascending."""
        return self.values.sort().values

    def logdet(self, *, damping: float = 0.0) -> float:
        check_damping(damping)
        return self._logdet(self.values, damping)


class DiagonalAccumulator:
    """Sums of squares, layer by layer, while the gradients pass."""

    kind = DiagonalFisher

    def __init__(self, layout: ParameterLayout) -> None:
        self._layout = layout
        self._sums: dict[str, Any] = defaultdict(float)

    def add(self, sweep: Sweep) -> None:
        sweep.visit(self._take)

    def _take(self, column: int, rule: Rule, x: Tensor, g: Tensor) -> None:
        for name, squares in zip(rule.names, rule.squares(x, g), strict=True):
            self._sums[name] += squares.double()

    def means(self, samples: int) -> tuple[Tensor]:
        return (self._layout.flatten(self._sums) / samples,)
