"""Batches of all conditions in the order of a measurement, each sample read once.

Independent conditions follow each other; paired ones advance in lockstep, so that the samples which
share their noise meet. The first samples of every condition are read early, for the pilot, and kept
until their turn comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from fisherfast.data import FiniteDifference, lockstep

__all__ = ["Streams"]

PILOT_SAMPLES = 2048
"""Samples, over all conditions, that fix the scale of the activations: known to 3 %, plenty."""

PILOT_BYTES = 2**28
"""What the pilot may keep of the input, 256 MB: fewer samples when they are large."""

Round = tuple[torch.Tensor, ...]
"""One batch of each condition of a stream: of one when independent, of all when paired."""


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
        data: FiniteDifference,
        batch_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        copy: bool = False,
    ) -> None:
        self._device, self._dtype, self._copy = device, dtype, copy
        self._conditions = data.conditions
        self._streams: list[Iterator[Round]]
        if data.paired:
            self._streams = [lockstep(data, batch_size)]
        else:
            self._streams = [
                ((batch,) for batch in data.batches(c, batch_size)) for c in range(data.conditions)
            ]
        self._kept: list[list[Round]] = []

    def pilot(self) -> list[list[torch.Tensor]]:
        """The first samples of each condition, in batches; their number does not depend on these.

        Raises:
            ValueError: the conditions differ in the shape of a sample.
        """
        firsts = [next(stream) for stream in self._streams]
        _check_shapes([batch for batches in firsts for batch in batches])
        rows = self._pilot_rows(firsts[0][0])
        self._kept = [
            _head(first, stream, rows) for first, stream in zip(firsts, self._streams, strict=True)
        ]
        conditions = [
            [batches[c] for batches in kept] for kept in self._kept for c in range(len(kept[0]))
        ]
        return [[self._ready(batch) for batch in _trim(kept, rows)] for kept in conditions]

    def __iter__(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield (condition, number of the batch, batch) for every sample, after `pilot`."""
        condition = 0
        for kept, stream in zip(self._kept, self._streams, strict=True):
            width = len(kept[0])
            for number, batches in enumerate(itertools.chain(_release(kept), stream)):
                for offset, batch in enumerate(batches):
                    yield condition + offset, number, self._ready(batch)
            condition += width

    def _pilot_rows(self, batch: torch.Tensor) -> int:
        sample_bytes = max(batch[:1].numel() * batch.element_size(), 1)
        samples = min(PILOT_SAMPLES, PILOT_BYTES // sample_bytes)
        return max(samples // self._conditions, 2)

    def _ready(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.to(
            device=self._device or batch.device,
            dtype=self._dtype or batch.dtype,
            copy=self._copy,
        )


def _check_shapes(batches: list[torch.Tensor]) -> None:
    shapes = sorted({tuple(batch.shape[1:]) for batch in batches})
    if len(shapes) > 1:
        raise ValueError(f"all conditions must have samples of the same shape, got {shapes}")


def _head(first: Round, stream: Iterator[Round], rows: int) -> list[Round]:
    """Read on until there are enough rows, or no more."""
    head = [first]
    seen = len(first[0])
    while seen < rows and (batches := next(stream, None)) is not None:
        head.append(batches)
        seen += len(batches[0])
    return head


def _trim(batches: list[torch.Tensor], rows: int) -> Iterator[torch.Tensor]:
    """The first rows of a list of batches."""
    for batch in batches:
        if rows > 0:
            yield batch[:rows]
            rows -= len(batch)


def _release(kept: list[Round]) -> Iterator[Round]:
    """Yield what was kept and let go of it."""
    while kept:
        yield kept.pop(0)
