"""`KeptSamples`: a bounded number of the samples of a stream, for when it is over."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fisherfast.data.dealing import Place

__all__ = ["KeptSamples"]


MOST_CHUNKS = 2
"""Pieces that are kept of a condition before they are joined."""


class KeptSamples:
    """Evenly spaced samples of a stream, never more than a stated number per condition.

    When there are more, every second one is dropped, and from then on every second one is kept:
    nothing is drawn, and the samples of pairs stay together.

    Args:
        conditions: C.
        capacity: samples of a condition at most, those included that another half keeps.
        block: neighbours that are kept or dropped together.
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
        # chunks of sample numbers, of folds from 1 on, and of each column
        self._kept: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in range(conditions)]

    def add(
        self,
        condition: int,
        place: Place,
        *columns: torch.Tensor | None,
        samples: int | None = None,
    ) -> None:
        """Add samples of a condition.

        Args:
            condition: theirs.
            place: of these samples.
            columns: tensors [n, ...] of what is known of each, or None.
            samples: of the batch, where these are a half of it; None for all.
        """
        rows = place.kept_rows(self._block, self._stride)
        if len(rows):
            given = [column for column in columns if column is not None]
            chosen = (column[rows.to(column.device)].to(self._dtype) for column in given)
            mark = (place.fold[rows] + 1).to(self._dtype)
            chunks = [*self._kept[condition], (place.numbers[rows], mark, *chosen)]
            if len(chunks) > MOST_CHUNKS:  # small tensors between large ones keep memory in pieces
                chunks = [tuple(torch.cat(column) for column in zip(*chunks, strict=True))]
            self._kept[condition] = chunks
        self.skip(condition, len(place) if samples is None else samples)

    def skip(self, condition: int, samples: int) -> None:
        """Count samples of a condition that another process adds."""
        self._seen[condition] += samples
        while self._count(condition) > self._capacity:
            self._thin()

    def dense(self, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What all processes together keep: for each condition tensors of folds and of the columns,
        zero where a sample was added elsewhere or nowhere. From here on these are what is kept.

        Args:
            like: a tensor [0, ...] for each column, in the dtype of what is kept.
        """
        tensors: list[torch.Tensor] = []
        like = [like[0].new_empty(0), *like]
        for condition, chunks in enumerate(self._kept):
            count = self._count(condition)
            wholes = [empty.new_zeros(count, *empty.shape[1:]) for empty in like]
            for numbers, *columns in chunks:
                row = numbers // self._block // self._stride * self._block + numbers % self._block
                for whole, column in zip(wholes, columns, strict=True):
                    whole[row.to(whole.device)] = column.to(whole.device)
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
        """Of each condition the numbers [m] of the samples that are kept, in order, their folds,
        and the columns."""
        return [self._in_order(chunks) for chunks in self._kept if chunks]

    def take(self) -> tuple[torch.Tensor, ...]:
        """What was kept, [n, C, ...] each, as many samples of each condition; nothing stays."""
        whole = [columns for _, _, *columns in self.kept()]
        self._kept = [[] for _ in self._kept]
        count = min(len(columns[0]) for columns in whole)
        return tuple(
            torch.stack([column[:count] for column in columns], 1)
            for columns in zip(*whole, strict=True)
        )

    def _in_order(self, chunks: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        numbers, mark, *columns = (torch.cat(column) for column in zip(*chunks, strict=True))
        fold = mark.cpu().long() - 1
        here = (fold >= 0).nonzero()[:, 0]
        order = here[numbers[here].argsort()]
        return numbers[order], fold[order], *(column[order.to(column.device)] for column in columns)
