"""The rule of a layer that multiplies by a matrix, and `nn.Linear`, the plainest of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfast import ops
from fisherfast.parameters.layers.column_gram import column_gram
from fisherfast.parameters.layers.linear_map import (
    LinearMap,
    as_kernels_read,
    kernel_squares,
    some_samples,
    sum_of_squares,
)

__all__ = ["Linear", "MatrixRule", "Sharing", "bordered"]

Sharing = Literal["expand", "reduce"]
"""What Kronecker factors do with shared positions: see `KroneckerFisher`."""

PORTION_BYTES = 32 * 2**20
"""Of the rows a that are in memory at a time, where they are a copy of x."""
IN_MEMORY = 1 << 22
"""Numbers of patches and per-sample gradients at a time, where no kernel does without: 32 MB."""


class MatrixRule(LinearMap):
    """A layer that multiplies by a matrix: at each of T positions, in each of G groups, rows
    a [n, G, T, D] meet gradients b [n, G, T, M], and the weights' gradient is sum_t b_t a_t^T."""

    def matrices(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """a [n, G, T, D] and b [n, G, T, M]."""
        raise NotImplementedError

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        a, b = self.matrices(x, g)
        parts = {}
        if "weight" in self.attributes:
            parts["weight"] = b.transpose(-1, -2) @ a
        if "bias" in self.attributes:
            parts["bias"] = b.sum(2)
        return self._ordered(**parts)

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See `Rule.squares`; a few samples at a time."""
        sums = [torch.zeros(shape, dtype=torch.float64, device=g.device) for shape in self.shapes]
        a, b = self.matrices(x[:1], g[:1])
        numbers = a.numel() + b.numel() + sum(shape.numel() for shape in self.shapes)
        for part in some_samples(len(x), numbers, IN_MEMORY):
            for total, rows in zip(sums, self.gradients(x[part], g[part]), strict=True):
                total += sum_of_squares(rows)
        return tuple(sums)

    def gram(self, x: Tensor, g: Tensor, other_x: Tensor, other_g: Tensor) -> Tensor:
        same = x is other_x and g is other_g
        columns = g[None]
        others = columns if same else other_g[None]
        return self.columns_gram(x, columns, other_x, others)[0, :, 0]

    def columns_gram(self, x: Tensor, g: Tensor, other_x: Tensor, other_g: Tensor) -> Tensor:
        """`gram` of several columns at a time, whose products of x are computed once.

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
        """(samples, a, b [R, n, G, T, M]) of some samples after the others."""
        start = 0
        for a, _ in self._portions(x, g[0]):
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
        for a, _ in self._portions(x, g):
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

    def output_rows(self, g: Tensor) -> Tensor:
        """b of `matrices`."""
        raise NotImplementedError

    def _portions(self, x: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """`matrices` of some samples after the others, so that they take bounded memory."""
        first = self.matrices(x[:1], g[:1])[0]
        step = max(1, PORTION_BYTES // max(first.numel() * first.element_size(), 1))
        for start in range(0, len(x), step):
            yield self.matrices(x[start : start + step], g[start : start + step])


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

    def matrices(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return (
            x.reshape(len(x), 1, -1, x.shape[-1]),
            self.output_rows(g),
        )

    def applied(self, x: Tensor, v: Sequence[Tensor]) -> Tensor:
        parts = dict(zip(self.attributes, v, strict=True))
        if "weight" in parts:
            return F.linear(x, parts["weight"], parts.get("bias"))
        return parts["bias"].expand(*x.shape[:-1], -1)

    def output_rows(self, g: Tensor) -> Tensor:
        return g.reshape(len(g), 1, -1, g.shape[-1])

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See `Rule.squares`; where there is one position, it is a product of matrices."""
        x, g = (rows.reshape(len(rows), -1, rows.shape[-1]) for rows in (x, g))
        parts = {}
        if "weight" in self.attributes and x.shape[1] > 1:
            parts["weight"] = kernel_squares(x.mT, g.mT)
        elif "weight" in self.attributes:
            # float64: a reduced precision of products, which the user may have set, ends at float32
            parts["weight"] = g.sum(1).double().square().T @ x.sum(1).double().square()
        if "bias" in self.attributes:
            parts["bias"] = sum_of_squares(g.sum(1))
        return self._shaped(**parts)
