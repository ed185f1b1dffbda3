"""Batches of all conditions in the order of a measurement, each sample read once.

A batch holds what its samples carry: tangents, or a score. Independent conditions follow each
other; paired ones advance in lockstep, so that the samples which share their noise meet. The first
samples of every condition are read early, for the pilot, and kept until their turn comes, or read
again where memory is bounded.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch

from fisherfast.data import Batch, Data
from fisherfast.data.batch import Gap, Part, Round
from fisherfast.default_device import each_as_outside
from fisherfast.shares import Share

__all__ = ["Streams"]

PILOT_SAMPLES = 2048
"""Samples, over all conditions, that fix the scale of the activations: known to 3 %, plenty."""

PILOT_BYTES = 2**28
"""What the pilot may keep of the input, 256 MB: fewer samples when they are large."""


Head = tuple[Batch, ...]
"""A round that is read on all ranks."""


class Streams:
    """The samples of all conditions: `first`, then `pilot`, then iteration.

    Args:
        data: the conditions.
        batch_size: samples per batch where the source has no batches of its own.
        share: what this process measures of the data; None for all. Other samples are gaps.
        device: where batches go; None leaves them where they are.
        dtype: what batches become; None leaves them as they are.
        copy: hand out copies, so that a network that overwrites its input harms nobody.
        bounded: nothing is kept for the pilot that can be read again.

    Attributes:
        owned: after `first`: batches are made on the way, they are no part of what the user holds.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        *,
        share: Share | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        copy: bool = False,
        bounded: bool = False,
    ) -> None:
        self._data, self._batch_size = data, batch_size
        self._device, self._dtype, self._copy = device, dtype, copy
        self._width = data.conditions if data.paired else 1
        self._largest, self._pilot_bytes = sys.maxsize, PILOT_BYTES
        self._lent = not all(data.repeats(c) for c in range(data.conditions))
        self._again = bounded and not self._lent
        self._share = Share() if share is None else share
        self._reads_all = False
        self._streams = self._rounds()
        self._kept: list[list[Head]] = [[] for _ in self._streams]
        self.owned = True

    @property
    def kept_bytes(self) -> int:
        """Bytes of the batches that are kept of a source which is read once."""
        kept = (batch for rounds in self._kept for batches in rounds for batch in batches)
        return sum(batch.nbytes for batch in kept) if self._lent else 0

    def limit(self, batch_size: int, pilot_bytes: int) -> None:
        """From here on no batch has more samples than batch_size, and the pilot keeps no more than
        about pilot_bytes of a source that is read once."""
        self._batch_size = self._largest = batch_size
        if self._lent:
            self._pilot_bytes = min(PILOT_BYTES, pilot_bytes)
        self._restart()

    def first(self, rows: int) -> list[Batch]:
        """The first samples of each condition, rows of them at most.

        Raises:
            ValueError: the conditions differ in the shape of a sample.
        """
        if self._again:
            firsts = [self._keep(next(stream)) for stream in self._data.rounds(rows)]
        else:
            self._reads_all = True
            for kept, stream in zip(self._kept, self._streams, strict=True):
                if not kept:
                    kept.append(self._keep(next(stream)))
            self._reads_all = False
            firsts = [kept[0] for kept in self._kept]
        batches = [batch for first in firsts for batch in first]
        _check_shapes(batches)
        self.owned = not all(map(_is_view, batches)) and not self._lent
        rows = min(rows, self._pilot_rows(batches[0]))
        return [self._ready(batch.leading(rows)) for batch in batches]

    def pilot(self) -> Iterator[tuple[int, int, Batch]]:
        """Yield (condition, number of the batch, batch) for the first samples of each condition;
        their number does not depend on the batches."""
        for number, (kept, stream) in enumerate(zip(self._kept, self._streams, strict=True)):
            rounds = stream if self._again else self._head(kept, stream)
            yield from self._leading(number * self._width, rounds)
        self._restart()

    def __iter__(self) -> Iterator[tuple[int, int, Part]]:
        """Yield (condition, number of the batch, batch) for every sample; a gap for samples of
        other processes.

        Raises:
            ValueError: a share has not as many samples as it announces.
        """
        for index, (kept, stream) in enumerate(zip(self._kept, self._streams, strict=True)):
            places = range(index * self._width, (index + 1) * self._width)
            yield from _gaps(places, self._share.before)
            samples = 0
            for number, batches in enumerate(itertools.chain(_release(kept), stream)):
                samples += len(batches[0])
                own = [batch for batch in batches if isinstance(batch, Batch)]
                if len(own) < len(batches) or not self._share.mine(index, number):
                    yield from ((c, number, Gap(len(batches[0]))) for c in places)
                    continue
                for parts in zip(*map(self._cut, own), strict=True):
                    for c, part in zip(places, parts, strict=True):
                        yield c, number, self._ready(part)
            self._check_announced(places.start, samples)
            yield from _gaps(places, self._share.after)

    def _rounds(self) -> list[Iterator[Round]]:
        """The streams from their beginning: what other processes measure is not read, but for what
        the pilot needs."""
        everything = self._share.turns == 1
        rounds = self._data.rounds(self._batch_size, None if everything else self._wanted)
        return [each_as_outside(stream) for stream in rounds]

    def _wanted(self, stream: int, number: int) -> bool:
        return self._reads_all or self._share.mine(stream, number)

    def _check_announced(self, condition: int, samples: int) -> None:
        """What lies before the samples of another rank depends on the number announced here."""
        if self._share.own and samples != self._share.own[condition]:
            raise ValueError(
                f"{self._data.condition_name(condition)} must have the"
                f" {self._share.own[condition]} samples that it announces, got {samples}: pass a"
                " function that returns the batches"
            )

    def _restart(self) -> None:
        """Begin anew with what can be read again."""
        if self._again:
            self._streams = self._rounds()

    def _leading(self, condition: int, rounds: Iterator[Round]) -> Iterator[tuple[int, int, Batch]]:
        """The first samples of a stream, which begins with a condition; those of them, over all
        processes, that are here."""
        seen, rows, number = 0, 1, 0
        while seen < rows and (head := self._next(rounds)) is not None:
            rows = self._share.pilot_rows(condition, self._pilot_rows(head[0]))
            for offset, batch in enumerate(head):
                for part in self._cut(batch.leading(max(rows - seen, 0))):
                    yield condition + offset, number, self._ready(part)
            seen, number = seen + len(head[0]), number + 1

    def _next(self, rounds: Iterator[Round]) -> Head | None:
        """The next round, whoever measures it."""
        self._reads_all = True
        parts = next(rounds, ())
        self._reads_all = False
        return tuple(part for part in parts if isinstance(part, Batch)) or None

    def _pilot_rows(self, batch: Batch) -> int:
        samples = min(PILOT_SAMPLES, self._pilot_bytes // max(batch.leading(1).nbytes, 1))
        return max(samples // self._data.conditions, 2)

    def _head(self, kept: list[Head], stream: Iterator[Round]) -> Iterator[Round]:
        """What is kept of a stream, and on from there: all of it is kept."""
        yield from list(kept)
        for batches in stream:
            kept.append(self._keep(batches))
            yield kept[-1]

    def _keep(self, batches: Round) -> Head:
        """Copies, where a source may read the next batch into the same memory."""
        head = tuple(batch for batch in batches if isinstance(batch, Batch))
        return tuple(batch.clone() for batch in head) if self._lent else head

    def _cut(self, batch: Batch) -> Iterator[Batch]:
        """A batch in parts that are not too large."""
        for start in range(0, len(batch), self._largest):
            yield batch.part(start, start + self._largest)

    def _ready(self, batch: Batch) -> Batch:
        return batch.to(self._device, self._dtype, copy=self._copy)


def _gaps(places: range, samples: tuple[int, ...]) -> Iterator[tuple[int, int, Gap]]:
    """Samples of other ranks before or behind those of this one, for conditions side by side."""
    for c in places:
        if samples and samples[c]:
            yield c, 0, Gap(samples[c])


def _check_shapes(batches: list[Batch]) -> None:
    shapes = sorted({tuple(batch.x.shape[1:]) for batch in batches})
    if len(shapes) > 1:
        raise ValueError(f"all conditions must have samples of the same shape, got {shapes}")


def _is_view(batch: Batch) -> bool:
    """Whether a batch lies in a larger tensor."""
    return batch.x.untyped_storage().nbytes() > batch.x.nbytes


def _release(kept: list[Head]) -> Iterator[Round]:
    """Yield what was kept and let go of it."""
    while kept:
        yield kept.pop(0)
