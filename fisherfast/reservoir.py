"""`KeptSamples`: a bounded number of the samples of a stream, for when it is over."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

__all__ = ["KeptSamples"]


MOST_CHUNKS = 2
"""Pieces that are kept of a condition before they are joined."""


class KeptSamples:
    """Evenly spaced samples of a stream, never more than a stated number per condition.

    When there are more, every second one is dropped, and from then on every second one is kept:
    nothing is drawn, and the samples of pairs stay together.

    Args:
        conditions: C.
        capacity: samples of a condition at most.
        block: neighbours that are kept or dropped together: the number of folds, where all folds
            are to be among what is kept.
        dtype: of what is kept.
        expected: samples of a condition where their number is known; None where it is not.
    """

    def __init__(
        self,
        conditions: int,
        capacity: int,
        *,
        block: int = 1,
        dtype: torch.dtype = torch.float32,
        expected: int | None = None,
    ) -> None:
        self._dtype = dtype
        self._capacity = max(capacity, block)
        self._block = block
        self._stride = 1
        while expected is not None and self._count_of(expected) > self._capacity:
            self._stride *= 2
        self._seen = [0] * conditions
        # chunks of sample numbers, and of each column
        self._kept: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in range(conditions)]

    def add(self, condition: int, *columns: torch.Tensor | None) -> None:
        """Add samples of a condition: tensors [n, ...] of what is known of each, or None."""
        given = [column for column in columns if column is not None]
        first, n = self._seen[condition], len(given[0])
        rows = _kept_rows(first % (self._block * self._stride), n, self._block, self._stride)
        numbers = first + rows
        if len(rows):
            chosen = (column[rows.to(column.device)].to(self._dtype) for column in given)
            chunks = [*self._kept[condition], (numbers, *chosen)]
            if len(chunks) > MOST_CHUNKS:  # small tensors between large ones keep memory in pieces
                chunks = [tuple(torch.cat(column) for column in zip(*chunks, strict=True))]
            self._kept[condition] = chunks
        self.skip(condition, n)

    def skip(self, condition: int, samples: int) -> None:
        """Count samples of a condition that another process adds."""
        self._seen[condition] += samples
        while self._count(condition) > self._capacity:
            self._thin()

    def dense(self, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What all processes together keep: a tensor for each condition and column,
        zero where a sample was added elsewhere. From here on these are what is kept.

        Args:
            like: a tensor [0, ...] for each column, in the dtype of what is kept.
        """
        tensors: list[torch.Tensor] = []
        for condition, chunks in enumerate(self._kept):
            count = self._count(condition)
            wholes = [empty.new_zeros(count, *empty.shape[1:]) for empty in like]
            for numbers, *columns in chunks:
                for whole, column in zip(wholes, columns, strict=True):
                    place = numbers // self._block // self._stride * self._block
                    whole[(place + numbers % self._block).to(whole.device)] = column
            numbers = torch.arange(self._seen[condition])
            self._kept[condition] = [(numbers[self._is_kept(numbers)], *wholes)]
            tensors += wholes
        return tensors

    def _count(self, condition: int) -> int:
        """Samples of a condition that are kept, here and elsewhere."""
        return self._count_of(self._seen[condition])

    def _count_of(self, samples: int) -> int:
        """How many of the first samples are kept."""
        blocks, rest = divmod(samples, self._block)
        whole = -(-blocks // self._stride) * self._block
        return whole + (rest if blocks % self._stride == 0 else 0)

    def _is_kept(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers // self._block % self._stride == 0

    def _thin(self) -> None:
        self._stride *= 2
        for condition, chunks in enumerate(self._kept):
            if chunks:
                columns = [torch.cat(column) for column in zip(*chunks, strict=True)]
                rows = self._is_kept(columns[0])
                thinned = (column[rows.to(column.device)] for column in columns)
                self._kept[condition] = [tuple(thinned)]

    def kept(self) -> list[tuple[torch.Tensor, ...]]:
        """Of each condition the numbers [m] of the samples that are kept, and the columns."""
        return [
            tuple(torch.cat(column) for column in zip(*chunks, strict=True))
            for chunks in self._kept
        ]

    def take(self) -> tuple[torch.Tensor, ...]:
        """What was kept, [n, C, ...] each, as many samples of each condition; nothing stays."""
        kept = self._kept
        count = min(self._count(condition) for condition in range(len(kept)))
        self._kept = [[] for _ in kept]
        whole = [
            [torch.cat(column)[:count] for column in list(zip(*chunks, strict=True))[1:]]
            for chunks in kept
        ]
        return tuple(torch.stack(columns, 1) for columns in zip(*whole, strict=True))


@lru_cache(maxsize=64)
def _kept_rows(offset: int, count: int, block: int, stride: int) -> torch.Tensor:
    """Rows of a batch, the first of which is so far behind the start of a kept block, that are
    kept: the same for all layers."""
    starts = torch.arange(-offset, count, block * stride)
    rows = (starts[:, None] + torch.arange(block)).flatten()
    return rows[(rows >= 0) & (rows < count)]
