"""The rule of a layer that multiplies by a matrix, and `nn.Linear`, the plainest of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfast import ops
from fisherfast.parameters.layers.base import (
    LinearMap,
    as_kernels_read,
    kernel_squares,
    sum_of_squares,
)

Sharing = Literal["expand", "reduce"]
"""The treatment of shared positions in Kronecker factors: see `KroneckerFisher`."""

PORTION_BYTES = 32 * 2**20
"""Bytes of the rows a in memory at a time, where they are a copy of x."""
IN_MEMORY = 1 << 22
"""Numbers of patches and per-sample gradients at a time where no kernel avoids them: 32 MB."""


class MatrixRule(LinearMap):
    """A layer that multiplies by a matrix: at each of T positions, in each of G groups, rows
    a [n, G, T, D] meet gradients b [n, G, T, M], and the weights' gradient is sum_t b_t a_t^T."""

    def input_rows(self, x: Tensor) -> Tensor:
        """a [n, G, T, D]."""
        raise NotImplementedError

    def output_rows(self, g: Tensor) -> Tensor:
        """b [n, G, T, M]."""
        raise NotImplementedError

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        a, b = self.input_rows(x), self.output_rows(g)
        return self._shaped(len(g), weight=lambda: b.mT @ a, bias=lambda: b.sum(2))

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See `Rule.squares`; a few samples at a time."""
        a, b = self.input_rows(x[:1]), self.output_rows(g[:1])
        numbers = a.numel() + b.numel() + sum(shape.numel() for shape in self.shapes)
        return self._summed_squares(x, g, numbers, IN_MEMORY)

    def columns_gram(self, x: Tensor, g: Tensor, other_x: Tensor, other_g: Tensor) -> Tensor:
        """<G_ri, G'_qj> of every pair of samples, summed over the parameters, of several columns at
        a time, whose products of x are computed once.

        Args:
            x, other_x: [n, ...] and [n', ...].
            g, other_g: [R, n, ...] and [R', n', ...].

        Returns:
            [R, n, R', n'] float64.
        """
        weight, bias = "weight" in self.attributes, "bias" in self.attributes
        same = x is other_x and g is other_g
        gram = g.new_empty((*g.shape[:2], *other_g.shape[:2]), dtype=torch.float64)
        for here, a, b in self._column_portions(x, g):
            for there, other_a, other_b in self._column_portions(other_x, other_g):
                if same and there.start < here.start:
                    continue
                others = (None, None) if same and there == here else (other_a, other_b)
                gram[:, here, :, there] = column_gram(a, b, *others, weight=weight, bias=bias)
                if same and there != here:
                    gram[:, there, :, here] = gram[:, here, :, there].permute(2, 3, 0, 1)
        return gram

    def _column_portions(self, x: Tensor, g: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(samples, a, b [R, n, G, T, M]) of some samples at a time."""
        start = 0
        for a in self._portions(x):
            where = slice(start, start + len(a))
            columns = g[:, where]
            b = self.output_rows(columns.flatten(0, 1))
            yield where, a, b.unflatten(0, columns.shape[:2])
            start += len(a)

    def input_factor(self, x: Tensor, g: Tensor, sharing: Sharing) -> Tensor:
        """The sum over samples of the inputs' Kronecker factor [G, D, D] (`KroneckerFisher`), with
        a last row and column for the bias."""
        bias = "bias" in self.attributes
        total: Tensor | None = None
        for a in self._portions(x):
            if "weight" not in self.attributes:
                a = a[..., :0]
            positions = a.shape[2]
            rows = a if sharing == "expand" else a.mean(2, keepdim=True)
            part = _second_moment(rows, with_one=bias) / (positions if sharing == "expand" else 1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def gradient_factor(self, x: Tensor, g: Tensor, sharing: Sharing) -> Tensor:
        """The sum over samples of the gradients' Kronecker factor [G, M, M]."""
        b = self.output_rows(g)
        return _second_moment(b if sharing == "expand" else b.sum(2, keepdim=True))

    def _portions(self, x: Tensor) -> Iterator[Tensor]:
        """`input_rows` of some samples at a time, in bounded memory."""
        step = max(1, PORTION_BYTES // max(self.input_rows(x[:1]).nbytes, 1))
        return map(self.input_rows, x.split(step))


def _second_moment(rows: Tensor, *, with_one: bool = False) -> Tensor:
    """sum over n and T of rows rows^T, rows [n, G, T, D] with a 1 at their end if wanted:
    [G, D, D] float64."""
    n, groups, positions, width = rows.shape
    if groups == 1:
        _, sums, cross = ops.moments(as_kernels_read(rows.reshape(n * positions, width)))
    else:
        wide = rows.transpose(0, 1).reshape(groups, n * positions, width).double()
        sums, cross = wide.sum(1), wide.mT @ wide
    return bordered(sums, cross, n * positions) if with_one else cross


def bordered(sums: Tensor, cross: Tensor, count: int) -> Tensor:
    """The second moment [G, D + 1, D + 1] of rows with a 1 at their end."""
    right = torch.cat([sums, sums.new_full((len(sums), 1), count)], 1)
    return torch.cat([torch.cat([cross, sums.unsqueeze(1)], 1), right.unsqueeze(2)], 2)


class Linear(MatrixRule):
    """nn.Linear: x [n, ..., D], g [n, ..., M]; the dimensions between are shared positions."""

    folds = True

    def input_rows(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), 1, -1, x.shape[-1])

    def applied(self, x: Tensor, v: Sequence[Tensor]) -> Tensor:
        parts = dict(zip(self.attributes, v, strict=True))
        if "weight" in parts:
            return F.linear(x, parts["weight"], parts.get("bias"))
        return parts["bias"].expand(*x.shape[:-1], -1)

    def output_rows(self, g: Tensor) -> Tensor:
        return g.reshape(len(g), 1, -1, g.shape[-1])

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See `Rule.squares`; with one position it is a product of matrices."""
        x, g = (rows.reshape(len(rows), -1, rows.shape[-1]) for rows in (x, g))

        def weight() -> Tensor:
            if x.shape[1] > 1:
                return kernel_squares(x.mT, g.mT)
            # float64: the user may have reduced the precision of float32 products
            return g.sum(1).double().square().T @ x.sum(1).double().square()

        return self._shaped(weight=weight, bias=lambda: sum_of_squares(g.sum(1)))


TILE_NUMBERS = 2**22
"""Numbers of gradients that are in memory at a time: 32 MB in float64."""

LINES, LANES = 8, 16
"""`ops.gradient_gram` rounds its positions up to multiples of these."""

PRODUCT_COST = {torch.float32: 0.5, torch.float64: 1.0}
"""Cost of a multiply-add of that op, in those of a float64 matrix product: measured on one core of
an AVX-512 processor: 50 and 30 to 39 GFLOP/s, and 31."""


def column_gram(
    a: Tensor,
    b: Tensor,
    other_a: Tensor | None = None,
    other_b: Tensor | None = None,
    *,
    weight: bool = True,
    bias: bool = False,
) -> Tensor:
    """<G_ri, G'_qj> of gradients G_ri = sum_t b_rit a_it^T, and of the bias sum_t b_rit.

    Args:
        a: [n, G, T, D], what multiplies the weights in each of G groups at T positions.
        b: [R, n, G, T, M], gradients at the output, of R columns.
        other_a, other_b: the other samples; None for the products of the samples with each other.
        weight, bias: which of the two are measured.

    Returns:
        [R, n, R', n'] float64.

    Cost: n n' times the least of R R' M D (with the gradients, some of their numbers at a time) and
    T T' (D + R' M) + R R' T M (without); one product of D and one of M numbers where T = 1.
    """
    right_a, right_b = (a, b) if other_a is None or other_b is None else (other_a, other_b)
    gram = a.new_zeros((*b.shape[:2], *right_b.shape[:2]), dtype=torch.float64)
    for group in range(a.shape[1]):
        left = a[:, group], b[:, :, group]
        right = left if other_a is None else (right_a[:, group], right_b[:, :, group])
        if bias:
            gram += _inner(left[1].double().sum(2), right[1].double().sum(2))
        if not weight:
            continue
        if left[0].shape[1] == right[0].shape[1] == 1:
            gram += _of_single_positions(left, right)
        elif _cheaper_without_gradients(left, right):
            gram += _without_gradients(left, None if other_a is None else right)
        else:
            gram += _with_gradients(left, right)
    return gram


Side = tuple[Tensor, Tensor]
"""a [n, T, D] and b [R, n, T, M]."""


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """[R, n, R', n'] of rows [R, n, k] and [R', n', k]."""
    return (left.flatten(0, 1) @ right.flatten(0, 1).T).reshape(*left.shape[:2], *right.shape[:2])


def _of_single_positions(left: Side, right: Side) -> Tensor:
    """(a_i . a'_j) (b_ri . b'_qj)."""
    inputs = left[0][:, 0].double() @ right[0][:, 0].double().T
    gram = _inner(left[1][:, :, 0].double(), right[1][:, :, 0].double())
    return gram.mul_(inputs[None, :, None, :])


def _cheaper_without_gradients(left: Side, right: Side) -> bool:
    (_, positions, inputs), (columns, _, _, outputs) = left[0].shape, left[1].shape
    rows = -(-positions // LANES) * LANES
    others = -(-right[0].shape[1] // LINES) * LINES
    pairs = columns * right[1].shape[0]
    without = rows * others * (inputs + right[1].shape[0] * outputs) + pairs * rows * outputs
    return without * PRODUCT_COST[left[0].dtype] < pairs * outputs * inputs


def _without_gradients(left: Side, right: Side | None) -> Tensor:
    sides = [side for side in (left, right) if side is not None]
    given = [part for a, b in sides for part in (a, b.transpose(0, 1))]
    gram: Tensor = ops.gradient_gram(*given)
    return gram.permute(1, 0, 3, 2)


def _with_gradients(left: Side, right: Side) -> Tensor:
    """Products of gradients, some of their entries at a time."""
    gram = left[0].new_zeros((*left[1].shape[:2], *right[1].shape[:2]), dtype=torch.float64)
    rows = max(b.shape[0] * b.shape[1] for _, b in (left, right))
    entries = max(1, TILE_NUMBERS // max(1, rows))
    outputs, inputs = left[1].shape[-1], left[0].shape[-1]
    wide = min(inputs, entries)
    high = max(1, entries // max(1, wide))
    for m in range(0, outputs, high):
        for d in range(0, inputs, max(1, wide)):
            block = slice(m, m + high), slice(d, d + wide)
            here = _gradients(left, *block)
            gram += _inner(here, here if right is left else _gradients(right, *block))
    return gram


def _gradients(side: Side, outputs: slice, inputs: slice) -> Tensor:
    """Some entries of the gradients: [R, n, entries]."""
    a, b = side[0][..., inputs].double(), side[1][..., outputs].double()
    return (b.mT @ a).flatten(2)
