"""Keep data in memory, up to a limit, after they are drawn or read once."""

from __future__ import annotations

from collections.abc import Iterator

from fisherfast.data.batch import Batch, Data, Wrapper


class KeptData(Wrapper):
    """Batches of a source, kept when they are first read: the same samples at every pass.

    A simulator draws nothing twice, a folder of files is read once, and a loader that shuffles
    gives the same samples at every measurement, so that measurements differ because of the network
    only. Conditions that exceed the limit are read from the source every time.

    Args:
        source: any data.
        limit: bytes that may be kept.
    """

    def __init__(self, source: Data, limit: int) -> None:
        super().__init__(source)
        self.sharded = source.sharded
        self._limit = limit
        self._kept: dict[int, list[Batch]] = {}
        self._held = 0
        self._too_large: set[int] = set()

    def read(self, condition: int, batch_size: int) -> Iterator[Batch]:
        """Yield the samples of one condition, in order; batches keep the sizes that they were first
        read with."""
        if condition in self._kept:
            yield from self._kept[condition]
            return
        batches: list[Batch] | None = None if condition in self._too_large else []
        size, kept = 0, False
        try:
            for batch in self._data.read(condition, batch_size):
                more = batch.nbytes
                if batches is not None and self._held + more > self._limit:
                    self._too_large.add(condition)
                    self._held, size, batches = self._held - size, 0, None
                if batches is not None:
                    batches.append(batch.clone())
                    size, self._held = size + more, self._held + more
                yield batch
            if batches is not None and condition not in self._kept:
                self._kept[condition], kept = batches, True
        finally:
            if not kept:  # not read to its end
                self._held -= size

    def samples(self, condition: int) -> int | None:
        """Return the number of samples of a condition, or None for a stream of unknown length."""
        if condition in self._kept:
            return sum(map(len, self._kept[condition]))
        return self._data.samples(condition)

    def repeats(self, condition: int) -> bool:
        """Return whether the next pass gives the same samples in the same order."""
        return condition in self._kept or self._data.repeats(condition)

    def __repr__(self) -> str:
        return repr(self._data)
