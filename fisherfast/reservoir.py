"""`KeptSamples`: a bounded number of the samples of a stream, to train on once it is over."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["KeptSamples"]


class KeptSamples:
    """Evenly spaced samples of a stream, never more than a stated number per condition.

    When there are more, every second one is dropped, and from then on every second one is kept:
    nothing is drawn, and the samples of pairs stay together.

    Args:
        conditions: C.
        capacity: samples of a condition at most.
    """

    def __init__(self, conditions: int, capacity: int) -> None:
        self._capacity = capacity
        self._stride = 1
        self._seen = [0] * conditions
        # chunks of sample numbers, and of each column
        self._kept: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in range(conditions)]

    def add(self, condition: int, *columns: torch.Tensor | None) -> None:
        """Add samples of a condition: tensors [n, ...] of what is known of each, or None."""
        given = [column for column in columns if column is not None]
        first, n = self._seen[condition], len(given[0])
        rows = slice(-first % self._stride, None, self._stride)
        numbers = torch.arange(first, first + n)[rows]
        chosen = tuple(column[rows].float().clone() for column in given)
        self._kept[condition].append((numbers, *chosen))
        self.skip(condition, n)

    def skip(self, condition: int, samples: int) -> None:
        """Count samples of a condition that another process adds."""
        self._seen[condition] += samples
        while self._count(condition) > self._capacity:
            self._thin()

    def dense(self, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What all processes together keep, in float32: a tensor for each condition and column,
        zero where a sample was added elsewhere. From here on these are what is kept.

        Args:
            like: a tensor [0, ...] for each column.
        """
        tensors: list[torch.Tensor] = []
        for condition, chunks in enumerate(self._kept):
            count = self._count(condition)
            wholes = [empty.new_zeros(count, *empty.shape[1:]) for empty in like]
            for numbers, *columns in chunks:
                for whole, column in zip(wholes, columns, strict=True):
                    whole[(numbers // self._stride).to(whole.device)] = column
            self._kept[condition] = [(torch.arange(count) * self._stride, *wholes)]
            tensors += wholes
        return tensors

    def _count(self, condition: int) -> int:
        """Samples of a condition that are kept, here and elsewhere."""
        return -(-self._seen[condition] // self._stride)

    def _thin(self) -> None:
        self._stride *= 2
        for condition, chunks in enumerate(self._kept):
            if chunks:
                columns = [torch.cat(column) for column in zip(*chunks, strict=True)]
                rows = columns[0] % self._stride == 0
                thinned = (column[rows.to(column.device)] for column in columns)
                self._kept[condition] = [tuple(thinned)]

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
