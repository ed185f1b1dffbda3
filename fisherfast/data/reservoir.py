"""`KeptSamples` keeps a bounded number of the samples of a stream for use after its end."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fisherfast.data.dealing import Place

__all__ = ["KeptSamples"]


MOST_CHUNKS = 2
"""Chunks of a condition that are kept before they are joined."""


class KeptSamples:
    """Evenly spaced samples of a stream, at most a given number per condition.

    When there are more, every second one is dropped, and from then on only every second one is
    kept: nothing is drawn at random, and the samples of pairs stay together.

    Args:
        conditions: C.
        capacity: most samples of a condition, including those that another half keeps.
        block: consecutive samples that are kept or dropped together.
        dtype: of the kept samples.
        expected: number of samples of a condition if known, else None.
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
            columns: tensors [n, ...] to keep of each sample, or None.
            samples: number of samples of the batch if these are only a half of it; None otherwise.
        """
        rows = place.kept_rows(self._block, self._stride)
        if len(rows):
            given = [column for column in columns if column is not None]
            chosen = (column[rows.to(column.device)].to(self._dtype) for column in given)
            mark = (place.fold[rows] + 1).to(self._dtype)
            chunks = [*self._kept[condition], (place.numbers[rows], mark, *chosen)]
            if len(chunks) > MOST_CHUNKS:  # small tensors between large ones fragment memory
                chunks = [tuple(torch.cat(column) for column in zip(*chunks, strict=True))]
            self._kept[condition] = chunks
        self.skip(condition, len(place) if samples is None else samples)

    def skip(self, condition: int, samples: int) -> None:
        """Count samples of a condition that another process adds."""
        self._seen[condition] += samples
        while self._count(condition) > self._capacity:
            self._thin()

    def dense(self, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Make room for the samples that all processes keep: for each condition tensors of folds
        and of the columns, zero for samples that this process did not add. They replace the kept
        samples, so that adding them up over processes in place completes these.

        Args:
            like: a tensor [0, ...] for each column, in the dtype of the kept samples.
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
        """Return the number of kept samples of a condition, over all processes."""
        return self._count_of(self._seen[condition])

    def _count_of(self, samples: int) -> int:
        """Return how many of the first `samples` are kept."""
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
        """Return for each condition the numbers [m] of the kept samples, in order, their folds, and
        the columns."""
        return [self._in_order(chunks) for chunks in self._kept if chunks]

    def take(self) -> tuple[torch.Tensor, ...]:
        """Return the kept columns, [n, C, ...] each, with equally many samples of each condition,
        and forget them."""
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
