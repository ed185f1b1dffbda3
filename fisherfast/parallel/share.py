"""Which samples of a measurement are this process's, and where they stand among those of all.

Folds and halves go by the number of a sample (`fisherfast.data.dealing`), so a process must know
how many samples the ranks before it have. Data that all ranks have are dealt in whole batches, so
every batch is the same product of matrices as in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fisherfast.data import Data, Shard
from fisherfast.data.groups import Groups

__all__ = ["Share", "WholeData", "shares_of"]


@dataclass(frozen=True)
class Share:
    """What one process measures; by default everything.

    Attributes:
        rank: of this process.
        turns: processes that take batches in turn; 1 where each has its own samples.
        before: samples of each condition on the ranks before this one; empty for none.
        own: samples of each condition on this rank, where they were announced; empty otherwise.
    """

    rank: int = 0
    turns: int = 1
    before: tuple[int, ...] = ()
    own: tuple[int, ...] = ()

    def begin(self, stream: int) -> int:
        """Number of the first batch to measure of a stream. Streams begin with different ranks, so
        that two conditions of one batch each keep two ranks busy."""
        return (self.rank - stream) % self.turns

    def pilot_rows(self, condition: int, rows: int) -> int:
        """How many of the first samples of a condition, over all ranks, are on this one."""
        if not self.own:
            return rows
        return max(min(rows - self.before[condition], self.own[condition]), 0)

    def own_numbers(self, condition: int, numbers: torch.Tensor) -> torch.Tensor:
        """Those of some numbers over all ranks that are on this one, counted from its first on."""
        if not self.own:
            return numbers
        local = numbers - self.before[condition]
        return local[(local >= 0) & (local < self.own[condition])]


def shares_of(
    counts: Sequence[Sequence[int | None]], rank: int
) -> tuple[Share, tuple[int, ...] | None]:
    """The share of a rank that has its own samples, and the samples of each condition on all ranks;
    None where a rank does not know its own.

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
    """The share of this rank, which knows how many samples there are on all ranks together.

    Args:
        data: the share.
        counts: samples of each condition on all ranks; None where that is not known.
        groups: of all of them; None where they are independent.
    """

    def __init__(
        self, data: Data, counts: Sequence[int] | None, groups: Groups | None = None
    ) -> None:
        super().__init__(data)
        self._counts = counts
        self.groups = groups

    def samples(self, condition: int) -> int | None:
        """Number of samples on all ranks, or None for streams of unknown length."""
        return None if self._counts is None else self._counts[condition]

    def length(self, condition: int) -> int | None:
        """As `samples`."""
        return self.samples(condition)
