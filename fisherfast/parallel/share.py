"""`Share`: the samples that one process measures, and their numbers among those of all processes.

Samples are dealt to folds and halves by their numbers (`fisherfast.data.dealing`), so a process
must know how many samples the ranks before it have. Data that all ranks have are dealt in whole
batches, so every batch is the same matrix product as in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fisherfast.data import Data, Shard
from fisherfast.data.groups import Groups


@dataclass(frozen=True)
class Share:
    """The samples that one process measures; by default all.

    Attributes:
        rank: of this process.
        turns: number of processes that take batches in turn; 1 if each has its own samples.
        before: samples of each condition on the ranks before this one; empty for none.
        own: samples of each condition on this rank if it announced them; empty otherwise.
    """

    rank: int = 0
    turns: int = 1
    before: tuple[int, ...] = ()
    own: tuple[int, ...] = ()

    def begin(self, stream: int) -> int:
        """Return the number of the first batch of a stream to measure. Streams begin with different
        ranks, so that two conditions of one batch each keep two ranks busy."""
        return (self.rank - stream) % self.turns

    def pilot_rows(self, condition: int, rows: int) -> int:
        """Return how many of the first samples of a condition, over all ranks, are on this one."""
        if not self.own:
            return rows
        return max(min(rows - self.before[condition], self.own[condition]), 0)

    def own_numbers(self, condition: int, numbers: torch.Tensor) -> torch.Tensor:
        """Select the numbers of samples on this rank, and count them from its first one."""
        if not self.own:
            return numbers
        local = numbers - self.before[condition]
        return local[(local >= 0) & (local < self.own[condition])]


def shares_of(
    counts: Sequence[Sequence[int | None]], rank: int
) -> tuple[Share, tuple[int, ...] | None]:
    """Return the share of a rank that has its own samples, and the samples of each condition on all
    ranks; None if a rank does not know its number.

    Args:
        counts: samples on each rank, of each condition.
        rank: of this process.
    """
    known = [[n for n in of_rank if n is not None] for of_rank in counts]
    if any(len(some) < len(every) for some, every in zip(known, counts, strict=True)):
        return Share(rank), None
    columns = list(zip(*known, strict=True))
    share = Share(
        rank,
        before=tuple(sum(column[:rank]) for column in columns),
        own=tuple(column[rank] for column in columns),
    )
    return share, tuple(map(sum, columns))


class WholeData(Shard):
    """The samples of this rank, with the number of samples on all ranks together.

    Args:
        data: the samples of this rank.
        counts: samples of each condition on all ranks; None if unknown.
        groups: of the samples on all ranks; None if they are independent.
    """

    def __init__(
        self, data: Data, counts: Sequence[int] | None, groups: Groups | None = None
    ) -> None:
        super().__init__(data)
        self._counts = counts
        self.groups = groups

    def samples(self, condition: int) -> int | None:
        """Return the number of samples on all ranks, or None for streams of unknown length."""
        return None if self._counts is None else self._counts[condition]

    def length(self, condition: int) -> int | None:
        """As `samples`."""
        return self.samples(condition)
