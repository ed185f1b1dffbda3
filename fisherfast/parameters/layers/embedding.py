"""The rule of `nn.Embedding`, by the rows of the table that occur."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfast.parameters.layers.base import LinearMap


class Embedding(LinearMap):
    """nn.Embedding: x [n, ...] whole numbers, g [n, ..., D]; the padding row has no gradient."""

    folds = True

    def _segments(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sample, row of the table, gradient) of each pair that occurs: [U], [U], [U, D]."""
        rows, dim = self.shapes[0]
        index = x.reshape(len(x), -1)
        values = g.reshape(-1, dim)
        key = (torch.arange(len(x), device=x.device)[:, None] * rows + index).flatten()
        if self.module.padding_idx is not None:
            wanted = index.flatten() != self.module.padding_idx
            key, values = key[wanted], values[wanted]
        pairs, place = key.unique(return_inverse=True)
        sums = values.new_zeros(len(pairs), dim).index_add_(0, place, values)
        return pairs // rows, pairs % rows, sums

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        sample, row, values = self._segments(x, g)
        dense = values.new_zeros(len(x), *self.shapes[0])
        dense[sample, row] = values
        return (dense,)

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        _, row, values = self._segments(x, g)
        return (values.new_zeros(self.shapes[0]).index_add_(0, row, values.square()),)

    def applied(self, x: Tensor, v: Sequence[Tensor]) -> Tensor:
        table, padding = v[0], self.module.padding_idx
        if padding is not None:
            kept = torch.ones(len(table), 1, dtype=table.dtype, device=table.device)
            kept[padding] = 0
            table = table * kept
        return F.embedding(x, table)
