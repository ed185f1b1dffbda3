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
from fisherfast.data.batch import Round

__all__ = ["Streams"]

PILOT_SAMPLES = 2048
"""Samples, over all conditions, that fix the scale of the activations: known to 3 %, plenty."""

PILOT_BYTES = 2**28
"""What the pilot may keep of the input, 256 MB: fewer samples when they are large."""


class Streams:
    """The samples of all conditions.

    Args:
        data: the conditions.
        batch_size: samples per batch where the source has no batches of its own.
        device: where batches go; None leaves them where they are.
        dtype: what batches become; None leaves them as they are.
        copy: hand out copies, so that a network that overwrites its input harms nobody.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        copy: bool = False,
    ) -> None:
        self._device, self._dtype, self._copy = device, dtype, copy
        self._conditions = data.conditions
        self._streams = data.rounds(batch_size)
        self._lent = not all(data.repeats(c) for c in range(data.conditions))
        self._kept: list[list[Round]] = []

    def pilot(self) -> list[list[Batch]]:
        """The first samples of each condition, in batches; their number does not depend on these.

        Raises:
            ValueError: the conditions differ in the shape of a sample.
        """
        firsts = [self._keep(next(stream)) for stream in self._streams]
        _check_shapes([batch for batches in firsts for batch in batches])
        rows = self._pilot_rows(firsts[0][0])
        self._kept = [
            [first, *self._rest_of_head(first, stream, rows)]
            for first, stream in zip(firsts, self._streams, strict=True)
        ]
        conditions = [
            [batches[c] for batches in kept] for kept in self._kept for c in range(len(kept[0]))
        ]
        return [[self._ready(batch) for batch in _trim(kept, rows)] for kept in conditions]

    def __iter__(self) -> Iterator[tuple[int, int, Batch]]:
        """Yield (condition, number of the batch, batch) for every sample, after `pilot`."""
        condition = 0
        for kept, stream in zip(self._kept, self._streams, strict=True):
            width = len(kept[0])
            for number, batches in enumerate(itertools.chain(_release(kept), stream)):
                for offset, batch in enumerate(batches):
                    yield condition + offset, number, self._ready(batch)
            condition += width

    def _pilot_rows(self, batch: Batch) -> int:
        carried = 1 if batch.tangents is None else 1 + len(batch.tangents)
        sample_bytes = max(batch.x[:1].numel() * batch.x.element_size() * carried, 1)
        samples = min(PILOT_SAMPLES, PILOT_BYTES // sample_bytes)
        return max(samples // self._conditions, 2)

    def _rest_of_head(self, first: Round, stream: Iterator[Round], rows: int) -> Iterator[Round]:
        """Read on until there are enough rows, or no more."""
        seen = len(first[0])
        while seen < rows and (batches := next(stream, None)) is not None:
            yield self._keep(batches)
            seen += len(batches[0])

    def _keep(self, batches: Round) -> Round:
        """Copies, where a source may read the next batch into the same memory."""
        return tuple(batch.clone() for batch in batches) if self._lent else batches

    def _ready(self, batch: Batch) -> Batch:
        return batch.to(self._device, self._dtype, copy=self._copy)


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


def _release(kept: list[Round]) -> Iterator[Round]:
    """Yield what was kept and let go of it."""
    while kept:
        yield kept.pop(0)
