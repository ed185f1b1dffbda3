"""The samples of one process of several."""

from __future__ import annotations

from collections.abc import Iterator

from fisherfast.data.batch import Data, Numbered, Wrapper
from fisherfast.data.labelled import Labelled


class Shard(Wrapper):
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
        ValueError: the bins of labelled data follow from the labels of this rank alone, or they
            have groups.

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
                "data must be a FiniteDifference, Pathwise, Score, Labelled or Simulator,"
                f" got {type(data).__name__}"
            )
        if isinstance(data, Labelled):
            _check_labelled(data)
        super().__init__(data)

    def strata(self) -> None:
        """Return None: other ranks have samples, too."""

    def samples_at(self, point: int, condition: int) -> int | None:
        """Return None for labelled samples: other ranks have some in the same bin."""
        return None if self.source == "labelled" else super().samples_at(point, condition)

    def first_at(self, point: int) -> int | None:
        """Return None for labelled samples."""
        return None if self.source == "labelled" else super().first_at(point)

    def deal(
        self, condition: int, batch_size: int, begin: int = 0, step: int = 1
    ) -> Iterator[Numbered]:
        """As the data do."""
        return self._data.deal(condition, batch_size, begin, step)

    def resident(self) -> bool:
        """Whether all samples are in memory already."""
        return self._data.resident()

    def __repr__(self) -> str:
        return f"Shard({self._data!r})"


def _check_labelled(data: Labelled) -> None:
    if data.chosen_bins:
        raise ValueError(
            "data must have the same bins on all ranks, got bins from the labels of this one: pass"
            " edges= or at= to ff.Labelled"
        )
    if data.groups is not None:
        raise ValueError(
            "groups must be left out of the shares of labelled data, got some: pass all data to"
            " every rank"
        )
