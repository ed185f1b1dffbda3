"""Batches of all conditions in the order of a measurement, each sample read once.

A batch holds what its samples carry: tangents, or a score. Independent conditions follow each
other; paired ones advance in lockstep, so that the samples which share their noise meet. The first
samples of every condition are read early, for the pilot, and kept until their turn comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from fisherfast.data import Batch, Data
from fisherfast.data.batch import Gap, Part, Round
from fisherfast.shares import Share

__all__ = ["Streams"]

PILOT_SAMPLES = 2048
"""Samples, over all conditions, that fix the scale of the activations: known to 3 %, plenty."""

PILOT_BYTES = 2**28
"""What the pilot may keep of the input, 256 MB: fewer samples when they are large."""


Head = tuple[Batch, ...]
"""A round that is read on all ranks."""


class Streams:
    """The samples of all conditions.

    Args:
        data: the conditions.
        batch_size: samples per batch where the source has no batches of its own.
        share: what this process measures of the data; None for all. Other samples are gaps.
        device: where batches go; None leaves them where they are.
        dtype: what batches become; None leaves them as they are.
        copy: hand out copies, so that a network that overwrites its input harms nobody.
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
    ) -> None:
        self._device, self._dtype, self._copy = device, dtype, copy
        self._conditions = data.conditions
        self._share = Share() if share is None else share
        self._heading = True  # what the pilot needs is read by all
        self._streams = data.rounds(batch_size, None if share is None else self._wanted)
        self._name = data.condition_name
        self._lent = not all(data.repeats(c) for c in range(data.conditions))
        self._kept: list[list[Head]] = []

    def pilot(self) -> list[list[Batch]]:
        """The first samples of each condition, in batches; their number does not depend on these.

        Raises:
            ValueError: the conditions differ in the shape of a sample.
        """
        firsts = [self._keep(next(stream)) for stream in self._streams]
        _check_shapes([batch for batches in firsts for batch in batches])
        rows = self._pilot_rows(firsts[0][0])
        own = [self._share.pilot_rows(c, rows) for c in range(self._conditions)]
        first_of = range(0, self._conditions, len(firsts[0]))
        self._kept = [
            [first, *self._rest_of_head(first, stream, own[c])]
            for c, first, stream in zip(first_of, firsts, self._streams, strict=True)
        ]
        self._heading = False
        conditions = [
            [batches[c] for batches in kept] for kept in self._kept for c in range(len(kept[0]))
        ]
        self._heads = [next(_trim(kept, rows)) for kept in conditions]
        return [
            [self._ready(batch) for batch in _trim(kept, own[c])]
            for c, kept in enumerate(conditions)
        ]

    def heads(self, samples: int) -> list[Batch]:
        """A few samples of each condition that this process has, after `pilot`."""
        return [self._ready(head.leading(samples)) for head in self._heads]

    def __iter__(self) -> Iterator[tuple[int, int, Part]]:
        """Yield (condition, number of the batch, batch) for every sample, after `pilot`; a gap for
        samples of other processes.

        Raises:
            ValueError: a share has not as many samples as it announces.
        """
        self._heads = []
        condition = 0
        for index, (kept, stream) in enumerate(zip(self._kept, self._streams, strict=True)):
            places = range(condition, condition + len(kept[0]))
            yield from _gaps(places, self._share.before)
            samples = 0
            for number, parts in enumerate(itertools.chain(_release(kept), stream)):
                mine = self._share.mine(index, number)
                samples += len(parts[0])
                for c, part in zip(places, parts, strict=True):
                    if mine and isinstance(part, Batch):
                        yield c, number, self._ready(part)
                    else:
                        yield c, number, Gap(len(part))
            self._check_announced(condition, samples)
            yield from _gaps(places, self._share.after)
            condition = places.stop

    def _wanted(self, stream: int, number: int) -> bool:
        return self._heading or self._share.mine(stream, number)

    def _check_announced(self, condition: int, samples: int) -> None:
        """What lies before the samples of another rank depends on the number announced here."""
        if self._share.own and samples != self._share.own[condition]:
            raise ValueError(
                f"{self._name(condition)} must have the {self._share.own[condition]} samples that"
                f" it announces, got {samples}: pass a function that returns the batches"
            )

    def _pilot_rows(self, batch: Batch) -> int:
        carried = 1 if batch.tangents is None else 1 + len(batch.tangents)
        sample_bytes = max(batch.x[:1].numel() * batch.x.element_size() * carried, 1)
        samples = min(PILOT_SAMPLES, PILOT_BYTES // sample_bytes)
        return max(samples // self._conditions, 2)

    def _rest_of_head(self, first: Head, stream: Iterator[Round], rows: int) -> Iterator[Head]:
        """Read on until there are enough rows, or no more."""
        seen = len(first[0])
        while seen < rows and (batches := next(stream, None)) is not None:
            yield self._keep(batches)
            seen += len(batches[0])

    def _keep(self, batches: Round) -> Head:
        """Copies, where a source may read the next batch into the same memory."""
        head = tuple(batch for batch in batches if isinstance(batch, Batch))
        return tuple(batch.clone() for batch in head) if self._lent else head

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


def _trim(batches: list[Batch], rows: int) -> Iterator[Batch]:
    """The first rows of a list of batches."""
    for batch in batches:
        if rows > 0:
            yield batch.leading(rows)
            rows -= len(batch)


def _release(kept: list[Head]) -> Iterator[Round]:
    """Yield what was kept and let go of it."""
    while kept:
        yield kept.pop(0)
