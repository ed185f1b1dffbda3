"""Deal samples to folds and halves.

Samples are dealt in the order of a hash of their number, so that neither the order of a file nor a
period in it decides which samples share a fold: round-robin if the number of samples is known, by
the hash itself in streams of unknown length. A sample's number is its position within its
condition, counted over all ranks; the samples of a pair have the same number and share a fold.

The *deal* r of a sample gives its fold r mod F, its half r mod 2, and its fold among G in a
measurement of that half alone, (r // 2) mod G. Stored is the *cell*: r modulo a multiple of all
these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch

RANK_STRIDE = 2**44
"""Distance between the numbers hashed by two ranks with streams of unknown length."""

CACHED_PLACES = 4
"""Batches whose places are cached: the conditions of a pair are read in turn."""


def folds_of_half(folds: int) -> int:
    """Return the folds of a half that is measured alone in a compressed layer: an even number."""
    return max(4, folds // 4 * 2)


def cells_of(folds: int) -> int:
    """Return the number of cells M: a multiple of the folds, and of twice the folds of each half,
    which are F (probes) or `folds_of_half`."""
    return math.lcm(2 * folds, 2 * folds_of_half(folds))


@dataclass(frozen=True, eq=False)
class Dealing:
    """The cells of all samples of a condition.

    Args:
        cells: number of cells M.
        known: [N] integers, the cells of N samples; empty for a stream of unknown length.
        rank: of the process, if each deals its own samples by the hash of their numbers.
    """

    cells: int
    known: torch.Tensor
    rank: int = 0

    @staticmethod
    @lru_cache(maxsize=8)
    def of(length: int | None, folds: int, *, rank: int = 0) -> Dealing:
        """Deal a condition of known or unknown length: the same way for every condition of that
        length, on any number of ranks."""
        cells = cells_of(folds)
        if length is None:
            return Dealing(cells, torch.zeros(0, dtype=torch.uint8), rank)
        return Dealing(cells, _dealt(length, cells))

    @staticmethod
    def of_groups(groups: torch.Tensor, folds: int) -> Dealing:
        """Deal samples so that those of one group share a cell.

        Args:
            groups: int64 [N], numbers of the groups from 0 on.
            folds: F.
        """
        cells = cells_of(folds)
        of_group = _dealt(int(groups.max()) + 1 if len(groups) else 0, cells)
        return Dealing(cells, of_group[groups])

    @staticmethod
    def of_strata(strata: torch.Tensor, folds: int) -> Dealing:
        """Deal samples so that those of each stratum, int64 [N], are evenly dealt."""
        cells = cells_of(folds)
        order = hashed(torch.arange(len(strata))).argsort()
        return Dealing(cells, _in_turn(order[strata[order].argsort(stable=True)], cells))

    def cells_from(self, first: int, count: int) -> torch.Tensor:
        """Return the cells of `count` samples from number `first` on, int64 [count]."""
        known = self.known[first : first + count].long()
        if len(known) == count:
            return known
        numbers = torch.arange(first + len(known), first + count)
        return torch.cat([known, hashed(numbers + self.rank * RANK_STRIDE) % self.cells])

    def place(self, first: int, count: int, folds: int) -> tuple[Place, torch.Tensor]:
        """Return the place of such a batch in F folds, and the order int64 [n] that sorts its
        rows."""
        return _place(self, first, count, folds)


def groups_by_fold(
    count: int,
    folds: int,
    half: int | None = None,
    own: int | None = None,
    among: torch.Tensor | None = None,
) -> torch.Tensor:
    """Count how many of a number of groups, which are dealt like samples, are in each of F folds,
    int64 [F]; or those of a half in each of its own folds. Only `among` int64 are counted if they
    are given."""
    cells = _dealt(count, cells_of(folds)).long()
    cells = cells if among is None else cells[among]
    if half is None or own is None:
        return torch.bincount(cells % folds, minlength=folds)
    return torch.bincount(cells % (2 * own), minlength=2 * own)[half::2]


@dataclass(frozen=True, eq=False)
class Place:
    """The numbers and folds of the rows of a batch, sorted by half and fold with even folds first,
    so that halves and folds are segments of rows.

    Attributes:
        numbers: int64 [n] of the samples, on the CPU.
        folds: F.
        fold: int64 [n] of each row, ascending in the order 0, 2, 4, ..., 1, 3, ...
        cells: int64 [n] of each row.
        end: the number after the last of the batch; for a half, of the whole batch.
    """

    numbers: torch.Tensor
    folds: int
    fold: torch.Tensor
    cells: torch.Tensor
    end: int
    _moved: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    _kept: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    _halves: dict[tuple[int, int], tuple[Place, torch.Tensor]] = field(default_factory=dict)

    @staticmethod
    def sort(numbers: torch.Tensor, cells: torch.Tensor, folds: int) -> tuple[Place, torch.Tensor]:
        """Return the place of samples of given cells, and the order int64 [n] that sorts their
        rows."""
        fold = cells % folds
        order = (fold % 2 * folds + fold).argsort(stable=True)
        end = int(numbers.max()) + 1 if len(numbers) else 0
        return Place(numbers[order], folds, fold[order], cells[order], end), order

    @staticmethod
    def in_turn(first: int, count: int, folds: int) -> tuple[Place, torch.Tensor]:
        """As `sort`, for samples that are dealt in turn: number i is in fold i mod F."""
        numbers = torch.arange(first, first + count)
        return Place.sort(numbers, numbers, folds)

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def counts(self) -> torch.Tensor:
        """Rows of each fold, int64 [F]."""
        return torch.bincount(self.fold, minlength=self.folds)

    @cached_property
    def offsets(self) -> torch.Tensor:
        """Rows at which the segments start and the last one ends, int64 [F + 1]."""
        counts = torch.cat([self.counts[::2], self.counts[1::2]])
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def rows(self, rows: torch.Tensor, first: int | None = None) -> Place:
        """Return the place of some of the rows, int64 [m] ascending; their numbers count from a
        first one on, if it is given."""
        numbers = self.numbers[rows] - (first or 0)
        end = self.end if first is None else int(numbers.max()) + 1
        return Place(numbers, self.folds, self.fold[rows], self.cells[rows], end)

    def offsets_on(self, device: torch.device) -> torch.Tensor:
        """Return `offsets` on a device."""
        if device not in self._moved:
            self._moved[device] = self.offsets.to(device)
        return self._moved[device]

    @cached_property
    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """Fold, first row and end of each segment that has rows."""
        offsets, folds = self.offsets.tolist(), [*range(0, self.folds, 2), *range(1, self.folds, 2)]
        spans = zip(folds, offsets[:-1], offsets[1:], strict=True)
        return tuple((fold, begin, end) for fold, begin, end in spans if end > begin)

    def within(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """Yield the segments of the rows from start to stop: fold, and rows counted from start."""
        for fold, begin, end in self.segments:
            begin, end = max(begin, start), min(end, stop)
            if begin < end:
                yield fold, slice(begin - start, end - start)

    def kept_rows(self, block: int, stride: int) -> torch.Tensor:
        """Return the rows, int64, whose numbers lie in every stride-th block of `block` numbers."""
        key = block, stride
        if key not in self._kept:
            kept = self.numbers // block % stride == 0
            self._kept[key] = kept.nonzero()[:, 0]
        return self._kept[key]

    @cached_property
    def halves(self) -> tuple[slice, slice]:
        """The rows of even folds, and those of odd folds."""
        split = int(self.offsets[(self.folds + 1) // 2])
        return slice(0, split), slice(split, len(self))

    @cached_property
    def sides(self) -> tuple[Place, ...]:
        """The places of the two halves of the rows, in the folds of all samples."""
        return tuple(
            Place(self.numbers[rows], self.folds, self.fold[rows], self.cells[rows], self.end)
            for rows in self.halves
        )

    def half(self, half: int, folds: int) -> tuple[Place, torch.Tensor]:
        """Return the place of the rows of a half in its own folds, and the order int64 [m] that
        sorts them."""
        key = half, folds
        if key not in self._halves:
            rows = self.halves[half]
            own, order = Place.sort(self.numbers[rows], self.cells[rows] // 2, folds)
            self._halves[key] = replace(own, end=self.end), order
        return self._halves[key]


@lru_cache(maxsize=CACHED_PLACES)
def _place(dealing: Dealing, first: int, count: int, folds: int) -> tuple[Place, torch.Tensor]:
    numbers = torch.arange(first, first + count)
    return Place.sort(numbers, dealing.cells_from(first, count), folds)


def _dealt(length: int, cells: int) -> torch.Tensor:
    """Deal N samples round-robin in the order of their hashes: their cells [N]."""
    return _in_turn(hashed(torch.arange(length)).argsort(), cells)


def _in_turn(order: torch.Tensor, cells: int) -> torch.Tensor:
    """Deal samples int64 [N] one after the other: the cells [N] by number."""
    small = next(d for d in (torch.uint8, torch.int16, torch.int64) if cells <= torch.iinfo(d).max)
    dealt = torch.empty(len(order), dtype=small)
    dealt[order] = (torch.arange(len(order)) % cells).to(small)
    return dealt


def hashed(numbers: torch.Tensor) -> torch.Tensor:
    """Hash whole numbers to int64 from 0 on: splitmix64 (Steele, Lea and Flood 2014)."""
    z = numbers * _signed(0x9E3779B97F4A7C15) + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return (z ^ _shifted(z, 31)) & (2**63 - 1)


def _signed(number: int) -> int:
    """Read the 64 bits of a number as a signed one; int64 products wrap the same way."""
    return number - 2**64 if number >= 2**63 else number


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift z right, filling with zeros."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
