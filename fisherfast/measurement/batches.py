"""`Streams` yields the batches of all conditions in the order of a measurement.

Independent conditions follow each other; paired ones advance in lockstep, so that samples that
share their noise are read together. Some samples of every condition are read early, for the pilot:
from all over the data if samples can be read one by one, else the first ones. Those of loaders and
streams are kept until their turn, or read again if memory is bounded.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from fisherfast.data import Batch, Data
from fisherfast.data.batch import Round
from fisherfast.data.dealing import Dealing, hashed
from fisherfast.data.inputs import check_forms, tensors_of
from fisherfast.model.default_device import each_as_outside
from fisherfast.parallel.share import Share

PILOT_SAMPLES = 2048
"""Samples over all conditions that fix the scale of the activations, to 3 %. A stream that ends
before is dealt like samples of known number."""

PILOT_BYTES = 2**28
"""Most bytes of samples that the pilot keeps, 256 MB."""


class Streams:
    """The samples of all conditions: `first`, then `pilot`, then iteration.

    Args:
        data: the conditions.
        batch_size: samples per batch where the source has no batches of its own.
        folds: F.
        share: the samples that this process measures; None for all.
        device: of the batches; None leaves them where they are.
        dtype: of the batches; None leaves them as they are.
        copy: copy batches that are not sorted, so that in-place layers cannot modify the user's
            data.
        bounded: keep nothing for the pilot that can be read again.

    Attributes:
        dealings: how the samples of each condition are dealt; final after `pilot`.
        owned: after `first`, whether batches are made by the source and are not views of the user's
            tensors.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        *,
        folds: int,
        share: Share | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        copy: bool = False,
        bounded: bool = False,
    ) -> None:
        self._data, self._batch_size = data, batch_size
        self._device, self._dtype, self._copy = device, dtype, copy
        self._width = data.at_each if data.paired else 1
        self._largest, self._pilot_bytes = sys.maxsize, PILOT_BYTES
        self._lent = not data.repeatable
        self._share = Share() if share is None else share
        self._again = not self._lent and (bounded or self._share.turns > 1)
        self._folds = folds
        self.dealings = dealings_of(data, folds, self._share.rank)
        self.restart()
        self._kept: list[list[Round]] = [[] for _ in self._streams]
        self.owned = True

    @property
    def kept_bytes(self) -> int:
        """Bytes of the kept batches of a source that is read once."""
        kept = (batch for rounds in self._kept for _, batches in rounds for batch in batches)
        return sum(batch.nbytes for batch in kept) if self._lent else 0

    def limit(self, batch_size: int, pilot_bytes: int) -> None:
        """Limit the samples of a batch from here on, and the bytes that the pilot keeps of a source
        that is read once."""
        self._batch_size = self._largest = batch_size
        if self._lent:
            self._pilot_bytes = min(PILOT_BYTES, pilot_bytes)

    def first(self, rows: int) -> list[Batch]:
        """Return up to `rows` first samples of each condition.

        Raises:
            ValueError: the conditions differ in the shape of a sample.
        """
        if self._again:
            firsts = [next(stream) for stream in self._rounds(rows, Share())]
        else:
            for kept, stream in zip(self._kept, self._streams, strict=True):
                if not kept:
                    kept.append(self._keep(next(stream)))
            firsts = [kept[0] for kept in self._kept]
        batches = [batch for _, first in firsts for batch in first]
        check_forms(batch.x for batch in batches)
        self.owned = not all(map(_is_view, batches)) and not self._lent
        rows = min(rows, self._pilot_rows(batches[0]))
        return [self._ready(batch.part(0, rows)) for batch in batches]

    def pilot(self) -> Iterator[tuple[int, Tensor, Batch]]:
        """Yield (condition, numbers [n] of the batches that hold these samples, batch) for some
        samples of each condition. Their number does not depend on the batches."""
        for number, (kept, stream) in enumerate(zip(self._kept, self._streams, strict=True)):
            places = range(number * self._width, (number + 1) * self._width)
            picked = [self._data.pick(c, torch.zeros(1, dtype=torch.int64)) for c in places]
            heads = [head for head in picked if head is not None]
            if len(heads) < len(places):
                if self._again:
                    rounds = self._rounds(self._batch_size, Share())[number]
                else:
                    rounds = self._head(kept, stream)
                yield from self._leading(places, rounds)
                continue
            for c, head in zip(places, heads, strict=True):
                yield from self._picked(c, head)
        if self._again:
            self.restart()

    @property
    def samples(self) -> int | None:
        """Approximate number of samples of all conditions measured here; None if unknown."""
        counts = self._share.own or [self._data.samples(c) for c in range(self._data.conditions)]
        known = [n for n in counts if n is not None]
        return None if len(known) < len(counts) else sum(known) // self._share.turns

    def __iter__(self) -> Iterator[tuple[int, int, Batch]]:
        """Yield (condition, number of the batch, batch sorted by its place) for all samples that
        are measured here.

        Raises:
            ValueError: a share does not have as many samples as it announces.
        """
        before = self._share.before or [0] * self._data.conditions
        for index, (kept, stream) in enumerate(zip(self._kept, self._streams, strict=True)):
            places = range(index * self._width, (index + 1) * self._width)
            number, end = self._share.begin(index), 0
            for first, batches in itertools.chain(_release(kept), stream):
                end = first + len(batches[0])
                for parts in zip(*map(self._cut, batches), strict=True):
                    for c, part in zip(places, parts, strict=True):
                        yield c, number, self._dealt(c, before[c] + first, part)
                    first += len(parts[0])
                number += self._share.turns
            self._check_announced(places.start, end)

    def _dealt(self, condition: int, first: int, batch: Batch) -> Batch:
        """Sort a batch by its place; its first sample has number `first`."""
        place, order = self.dealings[condition].place(first, len(batch), self._folds)
        return batch.sorted(place, order).to(self._device, self._dtype)

    def _rounds(self, batch_size: int, share: Share) -> list[Iterator[Round]]:
        """Start the streams of the batches of a share."""
        begins = [share.begin(c) for c in range(self._data.conditions)]
        rounds = self._data.rounds(batch_size, begins, share.turns)
        return [each_as_outside(stream) for stream in rounds]

    def _check_announced(self, condition: int, samples: int) -> None:
        """Check the number of samples, on which the numbers of samples on other ranks depend."""
        if self._share.own and samples != self._share.own[condition]:
            raise ValueError(
                f"{self._data.condition_name(condition)} must have the"
                f" {self._share.own[condition]} samples that it announces, got {samples}: pass a"
                " function that returns the batches"
            )

    def restart(self) -> None:
        """Begin a pass over the samples."""
        self._streams = self._rounds(self._batch_size, self._share)

    def _picked(self, condition: int, head: Batch) -> Iterator[tuple[int, Tensor, Batch]]:
        """Yield samples from all over a condition, as far as they are on this process; `head` is
        one of them."""
        numbers = scattered(self._data.samples(condition) or 0, self._pilot_rows(head))
        numbers = self._share.own_numbers(condition, numbers)
        for chunk in numbers.split(self._batch_size):
            batch = self._data.pick(condition, chunk) if len(chunk) else None
            if batch is not None:
                yield condition, chunk // self._batch_size, batch.to(self._device, self._dtype)

    def _leading(
        self, places: range, rounds: Iterator[Round]
    ) -> Iterator[tuple[int, Tensor, Batch]]:
        """Yield the first samples of conditions side by side, as far as they are on this
        process."""
        seen, rows, number = 0, 1, 0
        while seen < rows and (head := next(rounds, None)) is not None:
            rows = self._share.pilot_rows(places.start, self._pilot_rows(head[1][0]))
            for c, batch in zip(places, head[1], strict=True):
                for part in self._cut(batch.part(0, max(rows - seen, 0))):
                    yield c, torch.full((len(part),), number), self._ready(part)
            seen, number = seen + len(head[1][0]), number + 1
        if seen < rows and not self._data.sharded:  # the stream ended: its length is known
            for c in places:
                self.dealings[c] = Dealing.of(seen, self._folds)

    def _pilot_rows(self, batch: Batch) -> int:
        samples = min(PILOT_SAMPLES, self._pilot_bytes // max(batch.part(0, 1).nbytes, 1))
        return max(samples // self._data.conditions, 2)

    def _head(self, kept: list[Round], stream: Iterator[Round]) -> Iterator[Round]:
        """Yield what is kept of a stream and then its next batches, which are kept too."""
        yield from list(kept)
        for part in stream:
            kept.append(self._keep(part))
            yield kept[-1]

    def _keep(self, part: Round) -> Round:
        """Copy batches if the source may read the next one into the same memory."""
        first, batches = part
        return first, tuple(batch.clone() for batch in batches) if self._lent else batches

    def _cut(self, batch: Batch) -> Iterator[Batch]:
        """Split a batch into parts within the limit."""
        for start in range(0, len(batch), self._largest):
            yield batch.part(start, start + self._largest)

    def _ready(self, batch: Batch) -> Batch:
        return batch.to(self._device, self._dtype, copy=self._copy)


def scattered(samples: int, rows: int) -> Tensor:
    """Return the numbers int64 of `rows` samples from all over the data, in random order: one from
    each of equal parts."""
    rows = min(rows, samples)
    part = torch.arange(rows + 1) * samples // max(rows, 1)
    numbers = part[:-1] + hashed(torch.arange(rows)) % part.diff()
    return numbers[hashed(torch.arange(rows)).argsort()]


def dealings_of(data: Data, folds: int, rank: int) -> list[Dealing]:
    """Deal the samples of each condition."""
    if data.groups is not None:
        same = {id(own): Dealing.of_groups(own, folds) for own in data.groups.numbers}
        return [same[id(own)] for own in data.groups.numbers]
    if (strata := data.strata()) is not None:
        return [Dealing.of_strata(strata, folds)] * data.conditions
    lengths = map(data.length, range(data.conditions))
    return [Dealing.of(length, folds, rank=rank) for length in lengths]


def _is_view(batch: Batch) -> bool:
    """Return whether a batch is a view of a larger tensor."""
    return any(x.untyped_storage().nbytes() > x.nbytes for x in tensors_of(batch.x))


def _release(kept: list[Round]) -> Iterator[Round]:
    """Yield what was kept and drop it."""
    while kept:
        yield kept.pop(0)
