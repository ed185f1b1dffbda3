"""`KeptSamples` keeps a bounded number of the samples of a stream for use after its end."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fisherfast.data.dealing import Place

MOST_CHUNKS = 2
"""Chunks of a condition that are kept before they are joined."""

Chunks = list[tuple[torch.Tensor, ...]]

State = tuple[list[int], list[Chunks]]


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

    Attributes:
        forgotten: nothing is kept, because each process has numbered its samples from 0.
    """

    forgotten = False

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
        self._seen = [0] * conditions  # over all processes, as far as sample numbers tell
        # chunks of sample numbers, of folds, and of each column
        self._kept: list[Chunks] = [[] for _ in range(conditions)]
        self._fit(expected or 0)

    def add(self, condition: int, place: Place, *columns: torch.Tensor | None) -> None:
        """Add samples of a condition.

        Args:
            condition: theirs.
            place: of these samples.
            columns: tensors [n, ...] to keep of each sample, or None.
        """
        rows = place.kept_rows(self._block, self._stride)
        if len(rows):
            given = [column for column in columns if column is not None]
            chosen = (column[rows.to(column.device)].to(self._dtype) for column in given)
            chunks = [*self._kept[condition], (place.numbers[rows], place.fold[rows], *chosen)]
            if len(chunks) > MOST_CHUNKS:  # small tensors between large ones fragment memory
                chunks = [tuple(torch.cat(column) for column in zip(*chunks, strict=True))]
            self._kept[condition] = chunks
        self._seen[condition] = max(self._seen[condition], place.end)
        self._fit(self._seen[condition])

    def state(self) -> State:
        """The kept samples on the CPU, for `join` on other processes."""
        chunks = [[tuple(c.cpu() for c in chunk) for chunk in chunks] for chunks in self._kept]
        return self._seen, chunks

    def join(self, states: Iterable[State], device: torch.device) -> None:
        """Keep on a device what one process would have kept of the samples of all, from the `state`
        of each."""
        kept: list[Chunks] = [[] for _ in self._kept]
        seen = list(self._seen)
        for counts, state in states:
            seen = list(map(max, seen, counts))
            for chunks, more in zip(kept, state, strict=True):
                chunks += [(*chunk[:2], *(c.to(device) for c in chunk[2:])) for chunk in more]
        self._kept, self._seen, self._stride = kept, seen, 1
        self._fit(max(seen))

    def forget(self) -> None:
        """Let go of everything that is kept."""
        self.forgotten, self._kept = True, [[] for _ in self._kept]

    def _fit(self, samples: int) -> None:
        """Drop so many that of this number of samples no more than the capacity is kept."""
        while self._count_of(samples) > self._capacity:
            self._thin()

    def _count_of(self, samples: int) -> int:
        """Return how many of the first `samples` are kept."""
        blocks, rest = divmod(samples, self._block)
        whole = -(-blocks // self._stride) * self._block
        return whole + (rest if blocks % self._stride == 0 else 0)

    def _thin(self) -> None:
        self._stride *= 2
        for condition, chunks in enumerate(self._kept):
            if chunks:
                columns = [torch.cat(column) for column in zip(*chunks, strict=True)]
                rows = columns[0] // self._block % self._stride == 0
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
        numbers, fold, *columns = (torch.cat(column) for column in zip(*chunks, strict=True))
        order = numbers.argsort()
        return numbers[order], fold[order], *(column[order.to(column.device)] for column in columns)
