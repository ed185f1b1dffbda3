"""The root J [N, P] of a Fisher matrix F = J^T J / n, by layers and batches; F is not built.

J has a row for each sample and column of the root (`columns.py`). Its products with vectors, its
Gram matrix J J^T and the squares of its columns follow from the rows of each layer
(`layer_rows.py`), without the network: training may go on.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fisherfast._fields import inside
from fisherfast.parameters.backward.columns import Sweep
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layers.frozen import DetachedRule, detached
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.structures.layer_rows import (
    FactorRows,
    LayerRows,
    MatrixRows,
    layer_rows_from_state,
)

Key = tuple[str, ...]

FACTOR_COST = 1.0
"""Keep the factors of rows longer than this, in units of the numbers at the output."""


@dataclass(eq=False)
class Jacobian:
    """J [N, P] of some batches.

    Attributes:
        layout: the parameters.
        pieces: of each batch, the rows of every layer.
    """

    layout: ParameterLayout
    pieces: list[dict[Key, LayerRows]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """N."""
        return sum(_count(piece) for piece in self.pieces)

    @property
    def precision(self) -> float:
        """Relative rounding error of the coarsest numbers that are kept."""
        dtypes = {part.dtype for piece in self.pieces for part in piece.values()}
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def bytes(self) -> int:
        """Memory that its factors take."""
        return sum(part.bytes() for piece in self.pieces for part in piece.values())

    def times(self, v: Tensor) -> Tensor:
        """J v [N, m] of v [P, m] float64."""
        found = []
        for piece in self.pieces:
            products = v.new_zeros(_count(piece), v.shape[1])
            for key, part in piece.items():
                products += part.times(self._take(v, key))
            found.append(products)
        return torch.cat(found)

    def transposed(self, u: Tensor) -> Tensor:
        """J^T u [P, m] of u [N, m] float64."""
        found = u.new_zeros(self.layout.size, u.shape[1])
        if not u.shape[1]:  # a matrix of zero has no directions
            return found
        start = 0
        for piece in self.pieces:
            stop = start + _count(piece)
            for key, part in piece.items():
                self._add(found, key, part.transposed(u[start:stop]))
            start = stop
        return found

    def squares(self) -> Tensor:
        """The squared length of every column, [P]."""
        found = torch.zeros(self.layout.size, 1, dtype=torch.float64, device=self._device)
        for piece in self.pieces:
            for key, part in piece.items():
                self._add(found, key, part.squares()[:, None])
        return found[:, 0]

    def gram(self) -> Tensor:
        """J J^T [N, N], layer by layer."""
        edges = [0, *accumulate(map(_count, self.pieces))]
        found = torch.empty(edges[-1], edges[-1], dtype=torch.float64, device=self._device)
        for first, left in enumerate(self.pieces):
            here = slice(edges[first], edges[first + 1])
            for second, right in enumerate(self.pieces[: first + 1]):
                there = slice(edges[second], edges[second + 1])
                block = found[here, there].zero_()
                alike = [key for key in left if type(left[key]) is type(right.get(key))]
                for key in alike:
                    block += left[key].gram(right[key])
                if len(alike) < len(left):  # inputs of other lengths are kept in another form
                    block += self._rest(left, alike) @ self._rest(right, alike).T
                if second < first:
                    found[there, here] = block.T
                else:
                    block.copy_((block + block.T) / 2)
        return found

    def _rest(self, piece: Mapping[Key, LayerRows], without: Container[Key]) -> Tensor:
        """The rows [N, p] of the layers that are left, parameters in the order of the layout."""
        slices = self.layout.slices()
        parts: dict[str, Tensor] = {}
        for key, part in piece.items():
            if key not in without:
                sizes = [slices[name].stop - slices[name].start for name in key]
                parts |= dict(zip(key, part.dense().split(sizes, dim=1), strict=True))
        return torch.cat([parts[name] for name in self.layout.names if name in parts], dim=1)

    def moment(self) -> Tensor:
        """J^T J [P, P], for networks that are smaller than their data."""
        size = self.layout.size
        found = torch.zeros(size, size, dtype=torch.float64, device=self._device)
        for piece in self.pieces:
            rows = found.new_empty(_count(piece), size)
            for key, part in piece.items():
                self._add(rows.T, key, part.dense().T, add=False)
            found.addmm_(rows.T, rows)
        return found

    @property
    def _device(self) -> torch.device:
        return next(iter(self.pieces[0].values())).device

    def _take(self, v: Tensor, key: Key) -> Tensor:
        slices = self.layout.slices()
        parts = [v[slices[name]] for name in key]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _add(self, total: Tensor, key: Key, values: Tensor, *, add: bool = True) -> None:
        slices, start = self.layout.slices(), 0
        for name in key:
            where = slices[name]
            stop = start + where.stop - where.start
            total[where] = total[where] + values[start:stop] if add else values[start:stop]
            start = stop

    def state(self) -> list[list[dict[str, Any]]]:
        """Tensors and plain numbers."""
        return [[part.state() for part in piece.values()] for piece in self.pieces]

    @classmethod
    def from_state(
        cls, layout: ParameterLayout, state: Sequence[Sequence[Mapping[str, Any]]]
    ) -> Jacobian:
        """The Jacobian whose `state` this is. Raises ValueError for anything else."""
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        pieces = []
        for number, piece in enumerate(state):
            with inside(f"jacobian[{number}]"):
                parts = [layer_rows_from_state(part, shapes) for part in piece]
                names = sorted(name for part in parts for name in part.names)
                if names != sorted(shapes) or len({part.rows for part in parts}) != 1:
                    raise ValueError(
                        f"layers must hold the same rows of {sorted(shapes)}, got"
                        f" {[part.rows for part in parts]} of {names}"
                    )
            pieces.append({part.names: part for part in parts})
        if not pieces:
            raise ValueError("jacobian must hold at least one batch, got none")
        return cls(layout, pieces)


def _count(piece: Mapping[Key, LayerRows]) -> int:
    return next(iter(piece.values())).rows


def collect_rows(
    sweep: Sweep,
    take: Callable[[dict[Key, LayerRows]], None],
    *,
    check: Callable[[int, int], None] | None = None,
    most_rows: int | None = None,
) -> None:
    """Give the rows of one batch to `take`, by the names of each layer's parameters.

    Args:
        sweep: the batch.
        take: called with the rows, once or several times where there are many columns.
        check: called with (rows so far, bytes so far) at each layer; it may raise.
        most_rows: about how many rows at a time; None for all.
    """
    most = None if most_rows is None else max(1, most_rows // sweep.samples)
    kept: dict[Key, _Kept] = {}
    columns: set[int] = set()

    def hand_over() -> None:
        rows = {names: kept.pop(names).rows() for names in list(kept)}
        columns.clear()
        take(rows)

    def see(column: int, rule: Rule, x: Tensor, g: Tensor) -> None:
        if column not in columns and len(columns) == most:
            hand_over()
        columns.add(column)
        if rule.names not in kept:
            kept[rule.names] = _Kept(rule, x, g)
        kept[rule.names].add(rule, x, g)
        if check is not None:
            check(len(columns) * sweep.samples, sum(layer.bytes for layer in kept.values()))

    sweep.visit(see)
    hand_over()


class _Kept:
    """Rows kept for one layer and batch, in whichever form is smaller."""

    def __init__(self, rule: Rule, x: Tensor, g: Tensor) -> None:
        plain = detached(rule)
        numbers = sum(shape.numel() for shape in rule.shapes)
        self._names = rule.names
        self._factors: tuple[DetachedRule, Tensor] | None = None
        if plain is not None and len(g) * numbers > FACTOR_COST * g.numel():
            self._factors = plain, x.clone()
        self._columns: list[Tensor] = []
        self.bytes = self._factors[1].nbytes if self._factors else 0

    def add(self, rule: Rule, x: Tensor, g: Tensor) -> None:
        """Add a column."""
        if self._factors is None:
            g = torch.cat([part.reshape(len(g), -1) for part in rule.gradients(x, g)], dim=1)
        self._columns.append(g)
        self.bytes += g.nbytes

    def rows(self) -> LayerRows:
        """The rows of all columns."""
        rows = torch.stack(self._columns)
        self._columns.clear()
        if self._factors is None:
            return MatrixRows(self._names, rows.flatten(0, 1))
        return FactorRows(*self._factors, rows)
