"""The base of data that are read from tensors, Datasets, loaders and streams of the user."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from fisherfast.data import sources
from fisherfast.data.batch import Batch, Data, Numbered
from fisherfast.data.inputs import Inputs, Samples, form, in_words, tensors_of
from fisherfast.data.sources import Source


class FromSources(Data):
    """Conditions that are read from one source each."""

    _sources: list[Source]
    _first: Samples | None = None  # no rows of the first batch: all others have its entries

    @abstractmethod
    def _batch(self, condition: int, item: Any, rows: slice | torch.Tensor, where: str) -> Batch:
        """Check an item that a source has yielded, and make a batch.

        Args:
            condition: whose source.
            item: what it has yielded.
            rows: numbers of the samples, right for tensors and arrays only.
            where: end of messages.
        """

    def samples(self, condition: int = 0) -> int | None:
        """Return the number of samples of a condition, or None for a stream of unknown length."""
        return sources.count(self._sources[condition])

    def repeats(self, condition: int = 0) -> bool:
        """Return whether each pass over a condition gives the same samples in the same order:
        tensors, arrays, Datasets, and DataLoaders that do not shuffle do."""
        return sources.repeats(self._sources[condition])

    def resident(self) -> bool:
        """Return whether all samples are in memory already, as tensors or arrays."""
        return all(map(sources.resident, self._sources))

    def read(self, condition: int, batch_size: int) -> Iterator[Batch]:
        """Yield the samples of one condition, in order.

        Tensors, arrays and Datasets are cut into batches of batch_size; loaders and iterables keep
        their own.

        Raises:
            TypeError: an item does not hold tensors or arrays.
            ValueError: the source yields no sample, or one of the wrong shape; batches differ in
                their entries.
        """
        name, empty = self.condition_name(condition), True
        for number, item in enumerate(sources.iterate(self._sources[condition], batch_size, name)):
            batch = self._numbered(condition, item, number, batch_size)
            if len(batch):
                empty = False
                yield batch
        if empty:
            raise ValueError(
                f"{name} must yield at least one sample, got an empty source"
                " (an iterator can be read once only: pass a function that returns a new one)"
            )

    def deal(
        self, condition: int, batch_size: int, begin: int = 0, step: int = 1
    ) -> Iterator[Numbered]:
        """Every step-th batch of one condition; the others of tensors, arrays and Datasets are not
        read."""
        source = self._sources[condition]
        if step == 1 or not sources.divisible(source):
            yield from super().deal(condition, batch_size, begin, step)
            return
        for first, item in sources.deal(source, batch_size, begin, step):
            yield first, self._numbered(condition, item, first // batch_size, batch_size)

    def pick(self, condition: int, numbers: torch.Tensor) -> Batch | None:
        """Read some samples of a tensor, an array or a Dataset."""
        source = self._sources[condition]
        if not sources.divisible(source):
            return None
        item = sources.pick(source, numbers)
        return self._read(condition, item, numbers, "among the first samples")

    def _numbered(self, condition: int, item: Any, number: int, batch_size: int) -> Batch:
        """Make the batch with this number."""
        rows = slice(number * batch_size, (number + 1) * batch_size)
        return self._read(condition, item, rows, f"in batch {number}")

    def _read(self, condition: int, item: Any, rows: slice | torch.Tensor, where: str) -> Batch:
        """Make a batch, and check that it has the same entries as the others."""
        batch = self._batch(condition, item, rows, where)
        x, first = batch.x, self._first
        if first is None:
            self._first = first = x[:0].clone()
        elif isinstance(x, Inputs) and isinstance(first, Inputs) and form(x) == form(first):
            batch = replace(batch, x=x.ordered(first.entries))
        elif isinstance(x, Inputs) or isinstance(first, Inputs):
            raise ValueError(
                f"{self.condition_name(condition)} must have the same entries and shapes in every"
                f" batch, got {in_words(x)} {where} after {in_words(first)}"
            )
        self._check_dtypes(condition, batch.x, first, where)
        return batch

    def _check_dtypes(self, condition: int, x: Samples, first: Samples, where: str) -> None:
        """Raise unless the same entries are floating as in the first batch."""
        for entry, other in zip(tensors_of(x), tensors_of(first), strict=True):
            if entry.is_floating_point() != other.is_floating_point():
                raise TypeError(
                    f"{self.condition_name(condition)} must be floating or integers as the first"
                    f" batch is, {other.dtype}, got {entry.dtype} {where}; convert with .float()"
                )
