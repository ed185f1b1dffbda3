"""The root J [N, P] of a Fisher matrix F = J^T J / n, by layers and batches; F is not built.

J has a row for each sample and column of the root (`columns.py`). Its products with vectors, its
Gram matrix J J^T and the squares of its columns follow from the rows of each layer
(`layer_rows.py`), without the network: training may go on.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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

__all__ = ["Jacobian", "jacobian_of"]

Key = tuple[str, ...]

FACTOR_COST = 1.0
"""Keep the factors of rows longer than this, in units of the numbers at the output."""


class Jacobian:
    """J [N, P] of some batches.

    Attributes:
        layout: the parameters.
        pieces: of each batch, the rows of every layer.
        rows: N.
    """

    def __init__(
        self, layout: ParameterLayout, pieces: Sequence[Mapping[Key, LayerRows]] = ()
    ) -> None:
        self.layout, self.pieces = layout, list(pieces)

    def add(self, piece: Mapping[Key, LayerRows]) -> None:
        """Append the rows of a batch."""
        self.pieces.append(piece)

    @property
    def rows(self) -> int:
        return sum(_count(piece) for piece in self.pieces)

    @property
    def device(self) -> torch.device:
        return next(iter(self.pieces[0].values())).device

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
        found = None
        for piece in self.pieces:
            for key, part in piece.items():
                squares = part.squares()[:, None]
                if found is None:
                    found = squares.new_zeros(self.layout.size, 1)
                self._add(found, key, squares)
        assert found is not None
        return found[:, 0]

    def gram(self) -> Tensor:
        """J J^T [N, N], layer by layer."""
        edges = [0]
        for piece in self.pieces:
            edges.append(edges[-1] + _count(piece))
        found = torch.empty(edges[-1], edges[-1], dtype=torch.float64, device=self.device)
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
        found = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        for piece in self.pieces:
            rows = found.new_empty(_count(piece), size)
            for key, part in piece.items():
                self._add(rows.T, key, part.dense().T, add=False)
            found.addmm_(rows.T, rows)
        return found

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
        """The Jacobian whose `state` this is."""
        pieces = []
        for piece in state:
            parts = [layer_rows_from_state(part) for part in piece]
            pieces.append({part.names: part for part in parts})
        return cls(layout, pieces)


def _count(piece: Mapping[Key, LayerRows]) -> int:
    return next(iter(piece.values())).rows


def jacobian_of(
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
        check: called with (rows so far, bytes so far) before more is kept; it may raise.
        most_rows: about how many rows at a time; None for all.
    """
    collector = _Collector(sweep.samples, take, check, most_rows)
    sweep.visit(collector.see)
    collector.finish()


class _Collector:
    """Collects copies of the inputs and gradients of one batch."""

    def __init__(
        self,
        samples: int,
        take: Callable[[dict[Key, LayerRows]], None],
        check: Callable[[int, int], None] | None,
        most_rows: int | None,
    ) -> None:
        self._take, self._check = take, check
        self._samples = samples
        self._most = None if most_rows is None else max(1, most_rows // samples)
        self._first = self._column = 0
        self._clear()

    def _clear(self) -> None:
        self._bytes = 0
        self._rules: dict[Key, DetachedRule] = {}
        self._x: dict[Key, Tensor] = {}
        self._columns: dict[Key, list[Tensor]] = {}

    def see(self, column: int, rule: Rule, x: Tensor, g: Tensor) -> None:
        """A visitor of the sweep."""
        if column != self._column:
            self._column = column
            if self._most is not None and column - self._first >= self._most:
                self.finish()
                self._first = column
        if rule.names not in self._columns:
            self._columns[rule.names] = []
            self._begin(rule, x, g)
        if rule.names in self._rules:
            kept = g
        else:
            parts = rule.gradients(x, g)
            kept = torch.cat([part.reshape(len(g), -1) for part in parts], dim=1)
        self._bytes += kept.numel() * kept.element_size()
        if self._check is not None:
            self._check((column - self._first + 1) * self._samples, self._bytes)
        self._columns[rule.names].append(kept)

    def _begin(self, rule: Rule, x: Tensor, g: Tensor) -> None:
        """Choose the form of a layer's rows, the smaller one."""
        plain = detached(rule)
        numbers = sum(shape.numel() for shape in rule.shapes)
        if plain is not None and len(g) * numbers > FACTOR_COST * g.numel():
            self._rules[rule.names] = plain
            self._x[rule.names] = x.clone()
            self._bytes += x.numel() * x.element_size()

    def finish(self) -> None:
        """Give the collected rows to `take`."""
        found: dict[Key, LayerRows] = {}
        for names, columns in self._columns.items():
            rows = torch.stack(columns)
            columns.clear()
            if names in self._rules:
                found[names] = FactorRows(self._rules[names], self._x[names], rows)
            else:
                found[names] = MatrixRows(names, rows.flatten(0, 1))
        self._clear()
        self._take(found)
