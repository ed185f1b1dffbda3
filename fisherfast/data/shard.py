"""The samples of one process of several."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fisherfast.data.batch import Batch, Data, Numbered

__all__ = ["Shard"]


class Shard(Data):
    """This process's own share of the samples, for a measurement by many processes.

    Each rank reads its own files, or has a loader with a ``DistributedSampler``. The measurement is
    that of the shares one after the other in rank order: they may differ in length, and so may
    their last batches. (A ``DistributedSampler`` that pads its shares repeats up to one sample per
    rank: ``drop_last=True`` leaves them out instead.) In a measurement by this process alone a
    share is all there is.

    The samples are dealt to folds and halves as in one process where the length of every share is
    known beforehand: tensors, arrays, Datasets, loaders whose sampler has a length. With streams of
    unknown length each share deals its own, anew from its first sample.

    Args:
        data: any source of samples; on all ranks of the same kind, with the same dtheta.

    Raises:
        TypeError: data are no source of samples.

    Example:
        >>> import torch, fisherfast as ff
        >>> x = torch.randn(2, 2000, 3)                     # what this process has measured
        >>> share = ff.Shard(ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2))
        >>> abs(ff.fisher_information(share, process_group="world").value - 3) < 2
        True
    """

    sharded = True

    def __init__(self, data: Data) -> None:
        if not isinstance(data, Data):
            raise TypeError(
                "data must be a FiniteDifference, Pathwise, Score or Simulator,"
                f" got {type(data).__name__}"
            )
        self._data = data
        self.source = data.source
        self.parameters = data.parameters
        self.conditions = data.conditions
        self.dtheta = data.dtheta
        self.paired = data.paired
        self.groups = data.groups

    def read(self, condition: int, batch_size: int) -> Iterator[Batch]:
        """Yield the samples of one condition, in order."""
        return self._data.read(condition, batch_size)

    def deal(
        self, condition: int, batch_size: int, begin: int = 0, step: int = 1
    ) -> Iterator[Numbered]:
        """As the data do."""
        return self._data.deal(condition, batch_size, begin, step)

    def samples(self, condition: int) -> int | None:
        """Number of samples in this share, or None for a stream of unknown length."""
        return self._data.samples(condition)

    def length(self, condition: int) -> int | None:
        """As the data know it."""
        return self._data.length(condition)

    def pick(self, condition: int, numbers: torch.Tensor) -> Batch | None:
        """Samples of this share."""
        return self._data.pick(condition, numbers)

    def repeats(self, condition: int) -> bool:
        """Whether each pass surely gives the same samples in the same order."""
        return self._data.repeats(condition)

    def resident(self) -> bool:
        """Whether all samples are in memory already."""
        return self._data.resident()

    def contrast(self) -> torch.Tensor:
        """Weights of the conditions, those of the data."""
        return self._data.contrast()

    def condition_name(self, condition: int) -> str:
        """As the data call it."""
        return self._data.condition_name(condition)

    def __repr__(self) -> str:
        return f"Shard({self._data!r})"
