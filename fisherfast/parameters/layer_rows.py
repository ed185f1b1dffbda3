"""The rows of the Jacobian that belong to one layer and one batch, in the smallest form they have.

Row (r, i) is the gradient of column r's number of sample i with respect to the layer's parameters
(`sweeps.py`), as G_i = sum_t g_it a_it^T has it (`rules.py`). Either the rows themselves are kept,
[R n, p], or what they are products of: the layer's inputs x [n, ...], shared by all R columns, and
the gradients g [R, n, ...] at its output. A row of a fully connected layer [M, D] then takes M
numbers instead of M D.

All contractions are sums of float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fisherfast.parameters.detached_rules import DetachedRule, rule_from_settings, settings_of
from fisherfast.parameters.layer_rules import Embedding, Linear

__all__ = ["FactorRows", "LayerRows", "MatrixRows", "layer_rows_from_state"]

TILE_NUMBERS = 2**23
"""Numbers of a temporary block, 64 MB of float64."""

REDUCE_COST = 10
"""Multiply-adds that reading, weighting and adding up one number of a block takes, about."""


class LayerRows(Protocol):
    """N = R n rows over the p parameters of one layer.

    Attributes:
        names: of its parameters, which lie side by side in a row.
        rows: N.
        dtype: of the numbers kept.
        device: where they are.
    """

    names: tuple[str, ...]
    rows: int
    dtype: torch.dtype
    device: torch.device

    def times(self, v: Tensor) -> Tensor:
        """J v [N, m] of v [p, m]."""

    def transposed(self, u: Tensor) -> Tensor:
        """J^T u [p, m] of u [N, m]."""

    def squares(self) -> Tensor:
        """Sums of squares [p] over the rows."""

    def dense(self) -> Tensor:
        """J [N, p]."""

    def gram(self, other: LayerRows) -> Tensor:
        """J J'^T [N, N'] with rows of the same layer in the same form."""

    def bytes(self) -> int:
        """Of the memory that they take."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain numbers."""


class MatrixRows:
    """The rows as they are, [N, p]."""

    def __init__(self, names: tuple[str, ...], values: Tensor) -> None:
        self.names, self.rows, self.values = names, len(values), values
        self.dtype, self.device = values.dtype, values.device

    def times(self, v: Tensor) -> Tensor:
        return self.values.double() @ v

    def transposed(self, u: Tensor) -> Tensor:
        return self.values.double().T @ u

    def squares(self) -> Tensor:
        return self.values.double().square().sum(0)

    def dense(self) -> Tensor:
        return self.values.double()

    def gram(self, other: LayerRows) -> Tensor:
        assert isinstance(other, MatrixRows)
        found = self.values.new_zeros(self.rows, other.rows, dtype=torch.float64)
        width = max(1, TILE_NUMBERS // max(self.rows, other.rows, 1))
        for start in range(0, self.values.shape[1], width):
            part = slice(start, start + width)
            left = self.values[:, part].double()
            right = left if other is self else other.values[:, part].double()
            found.addmm_(left, right.T)
        return found

    def bytes(self) -> int:
        return self.values.numel() * self.values.element_size()

    def state(self) -> dict[str, Any]:
        return {"names": list(self.names), "values": self.values}


class FactorRows:
    """x [n, ...] and g [R, n, ...] of a layer whose rule needs no more than its sizes."""

    def __init__(self, rule: DetachedRule, x: Tensor, g: Tensor) -> None:
        self.rule, self.x, self.g = rule, x, g
        self.names, self.dtype, self.device = rule.names, g.dtype, g.device
        self.columns, self.samples = g.shape[:2]
        self.rows = self.columns * self.samples

    def times(self, v: Tensor) -> Tensor:
        x, g = self._inputs(self.x), self.g.double().flatten(2)
        sizes = [shape.numel() for shape in self.rule.shapes]
        found = g.new_empty(self.columns, self.samples, v.shape[1])
        for number, one in enumerate(v.T):
            parts = [
                part.reshape(shape)
                for part, shape in zip(one.split(sizes), self.rule.shapes, strict=True)
            ]
            output = self.rule.applied(x, parts).reshape(self.samples, -1)
            found[:, :, number] = torch.einsum("rnk,nk->rn", g, output)
        return found.flatten(0, 1)

    def transposed(self, u: Tensor) -> Tensor:
        x, g = self._inputs(self.x), self.g.double()
        weights = u.reshape(self.columns, self.samples, -1)
        ones = torch.ones(self.samples, dtype=torch.float64, device=g.device)
        found = []
        for number in range(weights.shape[2]):
            joint = torch.einsum("rn,rnk->nk", weights[:, :, number], g.flatten(2))
            parts = self.rule.weighted_sum(x, joint.reshape(g.shape[1:]), ones)
            found.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(found, dim=1)

    def squares(self) -> Tensor:
        x, g = self._inputs(self.x), self.g.double()
        if isinstance(self.rule, Linear) and x.dim() == 2:  # sum_r (g_r x)^2 = (sum_r g_r^2) x^2
            g = g.square().sum(0, keepdim=True).sqrt()
        found = torch.zeros(sum(s.numel() for s in self.rule.shapes), dtype=g.dtype).to(g.device)
        for column in g:
            parts = self.rule.squares(x, column)
            found += torch.cat([part.flatten().double() for part in parts])
        return found

    def dense(self) -> Tensor:
        x = self._inputs(self.x)
        parts = [
            torch.cat([part.flatten(1) for part in self.rule.gradients(x, column)], dim=1)
            for column in self.g.double()
        ]
        return torch.cat(parts)

    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.x, self.g))

    def state(self) -> dict[str, Any]:
        return {"rule": settings_of(self.rule), "x": self.x, "g": self.g}

    def gram(self, other: LayerRows) -> Tensor:
        assert isinstance(other, FactorRows)
        shape = (self.columns, self.samples, other.columns, other.samples)
        found = self.g.new_empty(shape, dtype=torch.float64)
        for here, left in self._chunks():
            for there, right in other._chunks():
                found[:, here, :, there] = _gram(left, right, "bias" in self.rule.attributes)
        return found.reshape(self.rows, other.rows)

    def _inputs(self, x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    def _chunks(self) -> Any:
        """(samples, their factors) in chunks of bounded size."""
        length = self._numbers_per_sample()
        count = max(1, TILE_NUMBERS // max(1, length))
        for start in range(0, self.samples, count):
            where = slice(start, start + count)
            yield where, self._factors(where)

    def _numbers_per_sample(self) -> int:
        patches = self.rule.shapes[0][1:].numel() * self.g[0, 0, 0].numel()
        return max(patches, self.x[0].numel()) + self.g[:, 0].numel()

    def _factors(self, where: slice) -> _Factors:
        g = self.g[:, where].double()
        if isinstance(self.rule, Embedding):
            tokens = self.x[where].reshape(g.shape[1], -1)
            b = g.reshape(*g.shape[:2], 1, tokens.shape[1], -1)
            module = self.rule.module
            assert isinstance(module, nn.Embedding)
            if module.padding_idx is not None:
                padding = tokens == module.padding_idx
                b = b.masked_fill(padding[None, :, None, :, None], 0)
            return _Factors(tokens, b)
        x = self._inputs(self.x[where])
        a = self.rule.matrices(x, g[0])[0]
        b = torch.stack([self.rule.matrices(x, column)[1] for column in g])
        if "weight" not in self.rule.attributes:
            a = torch.zeros_like(a[..., :1])
        return _Factors(a, b)


class _Factors:
    """a [n, G, T, D], or tokens [n, T] that stand for rows of the identity; b [R, n, G, T, M]."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        self.columns, self.samples, self.groups, self.positions, self.outputs = b.shape
        self.tokens = a.dim() == 2

    def products(self, other: _Factors, group: int, bias: bool) -> Tensor:
        """<a_it, a'_js> (+ 1 for a bias): [n T, n' T']."""
        if self.tokens:
            return (self.a.reshape(-1, 1) == other.a.reshape(1, -1)).double()
        left, right = (part.a[:, group].flatten(0, 1) for part in (self, other))
        found = left @ right.T
        return found.add_(1) if bias else found

    def part(self, where: slice) -> _Factors:
        """Some of the samples."""
        return _Factors(self.a[where], self.b[:, where])


def _gram(left: _Factors, right: _Factors, bias: bool) -> Tensor:
    """sum_ts <a_it, a'_js> <b_rit, b'_qjs>: [R, n, R', n'], by the cheaper of two ways."""
    pairs = left.positions * right.positions * (left.outputs + REDUCE_COST)
    rows = left.outputs * left.a.shape[-1]
    if left.tokens or pairs <= rows:
        return _gram_by_pairs(left, right, bias)
    return _gram_by_rows(left, right, bias)


def _gram_by_pairs(left: _Factors, right: _Factors, bias: bool) -> Tensor:
    """Pairs of positions: N N' T T' M operations, in tiles of samples."""
    found = left.b.new_zeros(left.columns, left.samples, right.columns, right.samples)
    pair = left.columns * left.positions * right.columns * right.positions
    count = max(1, int((TILE_NUMBERS / max(1, pair)) ** 0.5))  # a tile has count^2 pairs of samples
    for start in range(0, left.samples, count):
        here = slice(start, start + count)
        for other_start in range(0, right.samples, count):
            there = slice(other_start, other_start + count)
            found[:, here, :, there] = _tile(left.part(here), right.part(there), bias)
    return found


def _tile(left: _Factors, right: _Factors, bias: bool) -> Tensor:
    found = left.b.new_zeros(left.columns, left.samples, right.columns, right.samples)
    for group in range(left.groups):
        weights = left.products(right, group, bias)
        b, other = left.b[:, :, group], right.b[:, :, group]
        products = b.reshape(-1, left.outputs) @ other.reshape(-1, right.outputs).T
        tile = products.reshape(*b.shape[:3], *other.shape[:3])
        tile *= weights.reshape(1, *b.shape[1:3], 1, *other.shape[1:3])
        found += tile.sum((2, 5))
    return found


def _gram_by_rows(left: _Factors, right: _Factors, bias: bool) -> Tensor:
    """Rows of the Jacobian, a few outputs at a time: N N' D M operations."""
    shape = (left.columns, left.samples, right.columns, right.samples)
    N, other_N = left.columns * left.samples, right.columns * right.samples
    found = left.b.new_zeros(N, other_N)
    width = left.a.shape[-1] + bias
    count = max(1, TILE_NUMBERS // max(1, max(N, other_N) * width))
    for group in range(left.groups):
        for start in range(0, left.outputs, count):
            outputs = slice(start, start + count)
            first, second = (_rows(part, group, outputs, bias) for part in (left, right))
            found.addmm_(first, second.T)
    return found.reshape(shape)


def _rows(factors: _Factors, group: int, outputs: slice, bias: bool) -> Tensor:
    """sum_t b_t a_t^T (and sum_t b_t for a bias) of some outputs: [R n, outputs (D + 1)]."""
    b = factors.b[:, :, group, :, outputs].transpose(-1, -2)
    rows = b @ factors.a[:, group]
    if bias:
        rows = torch.cat([rows, b.sum(-1, keepdim=True)], dim=-1)
    return rows.flatten(0, 1).flatten(1)


def layer_rows_from_state(state: Mapping[str, Any]) -> LayerRows:
    """The rows whose `state` this is."""
    if "values" in state:
        return MatrixRows(tuple(state["names"]), state["values"])
    return FactorRows(rule_from_settings(state["rule"]), state["x"], state["g"])
