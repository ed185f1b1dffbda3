"""The rows of the Jacobian that belong to one layer and one batch, in their smallest form.

Row (r, i) is the gradient of column r's number of sample i with respect to the layer's parameters
(`columns.py`), with G_i = sum_t g_it a_it^T (`layers/base.py`). Either the rows [R n, p] themselves
are kept, or their factors: the layer's inputs x [n, ...], shared by all R columns, and the
gradients g [R, n, ...] at its output. A row of a fully connected layer [M, D] then takes M
numbers instead of M D.

All contractions are sums of float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherfast._fields import read_fields, wrong
from fisherfast.parameters.layers.embedding import Embedding
from fisherfast.parameters.layers.frozen import DetachedRule, rule_from_settings, settings_of
from fisherfast.parameters.layers.linear import Linear

TILE_NUMBERS = 2**23
"""Numbers of a temporary block, 64 MB of float64."""


class MatrixRows:
    """The rows as they are, [N, p].

    Attributes:
        names: of the parameters, which lie side by side in a row.
        rows: N.
        dtype, device: of the numbers kept.
    """

    def __init__(self, names: tuple[str, ...], values: Tensor) -> None:
        self.names, self.rows, self.values = names, len(values), values
        self.dtype, self.device = values.dtype, values.device

    def times(self, v: Tensor) -> Tensor:
        """J v [N, m] of v [p, m]."""
        return self.values.double() @ v

    def transposed(self, u: Tensor) -> Tensor:
        """J^T u [p, m] of u [N, m]."""
        return self.values.double().T @ u

    def squares(self) -> Tensor:
        """Sums of squares [p] over the rows."""
        return self.values.double().square().sum(0)

    def dense(self) -> Tensor:
        """J [N, p]."""
        return self.values.double()

    def gram(self, other: LayerRows) -> Tensor:
        """J J'^T [N, N'] with rows of the same layer in the same form."""
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
        """Bytes of memory."""
        return self.values.nbytes

    def state(self) -> dict[str, Any]:
        """Tensors and plain numbers."""
        return {"names": list(self.names), "values": self.values}


class FactorRows:
    """x [n, ...] and g [R, n, ...] of a layer whose rule needs no more than its sizes; the same
    attributes and methods as `MatrixRows`."""

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
        if not found:  # of a matrix of rank 0
            return g.new_zeros(sum(shape.numel() for shape in self.rule.shapes), 0)
        return torch.stack(found, dim=1)

    def squares(self) -> Tensor:
        x, g = self._inputs(self.x), self.g.double()
        if isinstance(self.rule, Linear) and x.dim() == 2:  # sum_r (g_r x)^2 = (sum_r g_r^2) x^2
            g = g.square().sum(0, keepdim=True).sqrt()
        numbers = sum(shape.numel() for shape in self.rule.shapes)
        found = torch.zeros(numbers, dtype=g.dtype, device=g.device)
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
        return self.x.nbytes + self.g.nbytes

    def state(self) -> dict[str, Any]:
        return {"rule": settings_of(self.rule), "x": self.x, "g": self.g}

    def gram(self, other: LayerRows) -> Tensor:
        """J J'^T from x and g in float64, so that the zero eigenvalues of a float32 network stay
        small."""
        assert isinstance(other, FactorRows)
        left = self._inputs(self.x), self.g.double()
        right = left if other is self else (self._inputs(other.x), other.g.double())
        if isinstance(self.rule, Embedding):
            found = _table_gram(self.rule, *left, *right)
        else:
            found = self.rule.columns_gram(*left, *right)
        return found.reshape(self.rows, other.rows)

    def _inputs(self, x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x


LayerRows = MatrixRows | FactorRows
"""N = R n rows over the p parameters of one layer."""


def _table_gram(rule: Embedding, x: Tensor, g: Tensor, other_x: Tensor, other_g: Tensor) -> Tensor:
    """[R, n, R', n'] of an embedding: the sum of <g_t, g'_s> over positions with the same token."""
    padding = rule.module.padding_idx
    tokens, others = (part.reshape(len(part), -1) for part in (x, other_x))
    if padding is not None:
        others = others.masked_fill(others == padding, -1)
    b, other_b = (
        part.reshape(*part.shape[:2], t.shape[1], -1)
        for part, t in ((g, tokens), (other_g, others))
    )
    found = g.new_zeros(*b.shape[:2], *other_b.shape[:2])
    pair = b[:, 0, :, 0].numel() * other_b[:, 0, :, 0].numel()
    count = max(1, math.isqrt(TILE_NUMBERS // max(1, pair)))  # a tile has count^2 pairs of samples
    for start in range(0, len(tokens), count):
        here = slice(start, start + count)
        for other_start in range(0, len(others), count):
            there = slice(other_start, other_start + count)
            left, right = b[:, here], other_b[:, there]
            same = tokens[here, :, None, None] == others[None, None, there]
            tile = left.flatten(0, 2) @ right.flatten(0, 2).T
            tile = tile.reshape(*left.shape[:3], *right.shape[:3]) * same[None, :, :, None]
            found[:, here, :, there] = tile.sum((2, 5))
    return found


def layer_rows_from_state(state: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> LayerRows:
    """The rows whose `state` this is.

    Raises:
        ValueError: it is none, or not of parameters of these shapes.
    """
    if "values" in state:
        values = read_fields({"names": tuple[str, ...], "values": Tensor}, state, "layer")
        names, rows = values["names"], values["values"]
        size = sum(shapes[name].numel() for name in names if name in shapes)
        if rows.dim() != 2 or rows.shape[1] != size or not rows.is_floating_point():
            raise wrong("layer.values", f"be floating numbers [N, {size}]", rows)
        return MatrixRows(names, rows)
    values = read_fields({"rule": dict[str, object], "x": Tensor, "g": Tensor}, state, "layer")
    rule, x, g = rule_from_settings(values["rule"]), values["x"], values["g"]
    if rule.shapes != tuple(shapes.get(name) for name in rule.names):
        raise ValueError(
            f"layer.rule must be of the parameters {dict(shapes)}, got"
            f" {dict(zip(rule.names, rule.shapes, strict=True))}"
        )
    shape = [len(x), *_output_shape(rule, x)] if x.dim() else []
    if not g.is_floating_point() or list(g.shape[1:]) != shape:
        raise wrong("layer.g", f"be floating numbers [R, *{shape}]", g)
    return FactorRows(rule, x, g)


def _output_shape(rule: DetachedRule, x: Tensor) -> list[int]:
    """The shape of a layer's output for one sample.

    Raises:
        ValueError: the layer does not take it.
    """
    tokens, dtype = isinstance(rule, Embedding), torch.float32
    if tokens:
        numbers = rule.module.num_embeddings
        whole = x.dtype in (torch.int32, torch.int64)
        if not whole or bool(((x < 0) | (x >= numbers)).any()):
            raise wrong("layer.x", f"be tokens below {numbers}", x)
    elif not x.is_floating_point():
        raise wrong("layer.x", "be floating numbers", x)
    parts = [x.new_zeros(shape, dtype=dtype) for shape in rule.shapes]
    try:
        return list(rule.applied(x[:0].to(x.dtype if tokens else dtype), parts).shape[1:])
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"layer.x must fit the layer, got {list(x.shape)}: {error}") from None
