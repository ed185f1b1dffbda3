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
from fisherfast.data.batch import Round

__all__ = ["Streams"]

PILOT_SAMPLES = 2048
"""Samples, over all conditions, that fix the scale of the activations: known to 3 %, plenty."""

PILOT_BYTES = 2**28
"""What the pilot may keep of the input, 256 MB: fewer samples when they are large."""


class Streams:
    """The samples of all conditions: `first`, then `pilot`, then iteration.

    Args:
        data: the conditions.
        batch_size: samples per batch where the source has no batches of its own.
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
        self._streams = data.rounds(batch_size)
        self._kept: list[list[Round]] = [[] for _ in self._streams]
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
            firsts = [next(stream) for stream in self._data.rounds(rows)]
        else:
            for kept, stream in zip(self._kept, self._streams, strict=True):
                if not kept:
                    kept.append(self._keep(next(stream)))
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

    def __iter__(self) -> Iterator[tuple[int, int, Batch]]:
        """Yield (condition, number of the batch, batch) for every sample."""
        for first, (kept, stream) in enumerate(zip(self._kept, self._streams, strict=True)):
            for number, batches in enumerate(itertools.chain(_release(kept), stream)):
                for parts in zip(*map(self._cut, batches), strict=True):
                    for offset, batch in enumerate(parts):
                        yield first * self._width + offset, number, self._ready(batch)

    def _restart(self) -> None:
        """Begin anew with what can be read again."""
        if self._again:
            self._streams = self._data.rounds(self._batch_size)

    def _leading(self, condition: int, rounds: Iterator[Round]) -> Iterator[tuple[int, int, Batch]]:
        """The first samples of a stream, which begins with a condition."""
        seen, rows, number = 0, 1, 0
        while seen < rows and (batches := next(rounds, None)) is not None:
            rows = self._pilot_rows(batches[0])
            for offset, batch in enumerate(batches):
                for part in self._cut(batch.leading(rows - seen)):
                    yield condition + offset, number, self._ready(part)
            seen, number = seen + len(batches[0]), number + 1

    def _pilot_rows(self, batch: Batch) -> int:
        samples = min(PILOT_SAMPLES, self._pilot_bytes // max(batch.leading(1).nbytes, 1))
        return max(samples // self._data.conditions, 2)

    def _head(self, kept: list[Round], stream: Iterator[Round]) -> Iterator[Round]:
        """What is kept of a stream, and on from there: all of it is kept."""
        yield from list(kept)
        for batches in stream:
            kept.append(self._keep(batches))
            yield kept[-1]

    def _keep(self, batches: Round) -> Round:
        """Copies, where a source may read the next batch into the same memory."""
        return tuple(batch.clone() for batch in batches) if self._lent else batches

    def _cut(self, batch: Batch) -> Iterator[Batch]:
        """A batch in parts that are not too large."""
        for start in range(0, len(batch), self._largest):
            yield batch.part(start, start + self._largest)

    def _ready(self, batch: Batch) -> Batch:
        return batch.to(self._device, self._dtype, copy=self._copy)


def _check_shapes(batches: list[Batch]) -> None:
    shapes = sorted({tuple(batch.x.shape[1:]) for batch in batches})
    if len(shapes) > 1:
        raise ValueError(f"all conditions must have samples of the same shape, got {shapes}")


def _is_view(batch: Batch) -> bool:
    """Whether a batch lies in a larger tensor."""
    return batch.x.untyped_storage().nbytes() > batch.x.nbytes


def _release(kept: list[Round]) -> Iterator[Round]:
    """Yield what was kept and let go of it."""
    while kept:
        yield kept.pop(0)
