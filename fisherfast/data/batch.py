"""The interface of all sources: conditions, their batches, and the derivative of a mean.

A *condition* is one set of samples, all drawn at the same theta. The derivative of a mean is the
`contrast` of the conditions' means, or follows from the tangents or score of each sample.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fisherfast.data.dealing import Place
from fisherfast.data.groups import Groups
from fisherfast.data.inputs import moved


@dataclass(frozen=True)
class Batch:
    """Samples of one condition, with their tangents or score.

    Attributes:
        x: `Samples`; of a layer its activations, a tensor [n, ...].
        tangents: [P, n, ...] dx/dtheta of each sample, or None; of several inputs that of `joined`.
        score: [n, P] float64 d log p(x | theta) / d theta of each sample, or its labels theta, or
            None.
        place: folds of the samples, which are sorted by them; None before sorting.
    """

    x: Any
    tangents: torch.Tensor | None = None
    score: torch.Tensor | None = None
    place: Place | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def nbytes(self) -> int:
        """Bytes of the samples with their tangents and score."""
        parts = (self.x, self.tangents, self.score)
        return sum(part.nbytes for part in parts if part is not None)

    def part(self, start: int, stop: int) -> Batch:
        """Return samples start to stop."""
        return self._rows(slice(start, stop))

    def sorted(self, place: Place, order: torch.Tensor) -> Batch:
        """Copy the batch with its rows in an order int64 [n] on the CPU, which have that place."""
        return self._rows(order, place)

    def _rows(self, rows: slice | torch.Tensor, place: Place | None = None) -> Batch:
        return Batch(
            self.x[rows],
            None if self.tangents is None else self.tangents[:, rows],
            None if self.score is None else self.score[rows],
            place,
        )

    def clone(self) -> Batch:
        """Copy all tensors."""
        return Batch(
            self.x.clone(),
            None if self.tangents is None else self.tangents.clone(),
            None if self.score is None else self.score.clone(),
        )

    def to(
        self, device: torch.device | None, dtype: torch.dtype | None, *, copy: bool = False
    ) -> Batch:
        """Move to another device, floating samples and tangents also to another dtype; None keeps
        either.

        Args:
            copy: always copy x, so that in-place layers cannot modify the user's data.
        """
        tangents, score = self.tangents, self.score
        return Batch(
            moved(self.x, device, dtype, copy=copy),
            None if tangents is None else tangents.to(device or tangents.device, dtype),
            None if score is None else score.to(device),
            self.place,
        )


Numbered = tuple[int, Batch]
"""A batch, after the number of its first sample within the condition."""

Round = tuple[int, tuple[Batch, ...]]
"""One batch of each condition of a stream, of one when independent, of all when paired; after the
number of their first samples."""


Rounds = Iterator[Round]


class Data(ABC):
    """Samples at theta, whatever their source.

    Attributes:
        source: "independent", "paired", "pathwise", "score" or "labelled".
        parameters: P, entries of theta.
        conditions: number of conditions.
        dtheta: [P] full separation of the conditions; empty without a finite step.
        paired: the i-th samples of all conditions share their noise.
        sharded: these are the samples of this process alone, see `Shard`.
        groups: which samples depend on each other; None if all are independent.
        points: Q, the number of theta at which the information is measured; 0 for one theta without
            a profile. Conditions are ordered point by point; labelled samples have one condition,
            whose labels decide.
        spread: how far apart the samples of one point are; 1 if they follow each other.
        siblings: points that share the memory and time of a measurement; 1 if there is one.
        centres: [Q, P] float64 theta of each point; about the middle of a bin.
        names: of the parameters; empty if they have none.
    """

    source: str
    parameters: int
    conditions: int
    dtheta: tuple[float, ...] = ()
    paired: bool = False
    sharded: bool = False
    groups: Groups | None = None
    points: int = 0
    siblings: int = 1
    spread: int = 1
    centres: torch.Tensor = torch.empty(0, 0, dtype=torch.float64)
    names: tuple[str, ...] = ()

    @property
    def at_each(self) -> int:
        """Conditions at each point of theta."""
        return max(self.conditions // max(self.points, 1), 1)

    def point_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the point of each of these labels [n, P], int64 [n]; -1 for none."""
        raise NotImplementedError

    def samples_at(self, point: int, condition: int) -> int | None:
        """Return the number of samples of a condition at a point, or None if it is unknown."""
        return self.samples(point * self.at_each + condition)

    def first_at(self, point: int) -> int | None:
        """Return the number of the first sample at a point, where these follow each other; else
        None."""
        return 0

    def groups_at(self, point: int) -> Groups | None:
        """Return the groups of the samples at a point."""
        return self.groups

    def strata(self) -> torch.Tensor | None:
        """Return the point of each sample of a condition by its number, int64 [n], if samples of
        each are to be dealt to folds evenly; else None."""
        return None

    def notes(self) -> tuple[str, ...]:
        """Return remarks on the data for the reader of a result."""
        return ()

    @abstractmethod
    def read(self, condition: int, batch_size: int) -> Iterator[Batch]:
        """Yield the samples of one condition, in order."""

    @abstractmethod
    def samples(self, condition: int) -> int | None:
        """Return the number of samples of a condition, or None for a stream of unknown length."""

    def length(self, condition: int) -> int | None:
        """Return the number of samples of a condition if it is known before any is read, else None.
        It decides how samples are dealt to folds, so it is the same at every measurement."""
        return self.samples(condition)

    def units(self, condition: int) -> int | None:
        """Return the number of independent samples of a condition: that of groups, if any."""
        return self.samples(condition) if self.groups is None else len(self.groups)

    @abstractmethod
    def repeats(self, condition: int) -> bool:
        """Return whether each pass over a condition gives the same samples in the same order."""

    @property
    def repeatable(self) -> bool:
        """Whether each pass over every condition gives the same samples in the same order."""
        return all(self.repeats(c) for c in range(self.conditions))

    def deal(
        self, condition: int, batch_size: int, begin: int = 0, step: int = 1
    ) -> Iterator[Numbered]:
        """Every step-th batch of one condition, in order. The others are not read where the source
        allows it.

        Args:
            condition: which one.
            batch_size: samples per batch, as for `read`.
            begin: number of the first batch.
            step: from one batch to the next.
        """
        first = 0
        for number, batch in enumerate(self.read(condition, batch_size)):
            if number % step == begin:
                yield first, batch
            first += len(batch)

    def pick(self, condition: int, numbers: torch.Tensor) -> Batch | None:
        """Copy the samples with these numbers, int64 [n]; None if samples cannot be read one by
        one."""
        return None

    def resident(self) -> bool:
        """Return whether all samples are in memory already, as tensors or arrays."""
        return False

    def contrast(self) -> torch.Tensor:
        """Return weights [conditions, P] float64, in 1/theta: the derivative of the mean is the sum
        over conditions of weight * mean. Zero if the samples carry tangents or a score."""
        weights = torch.zeros(self.conditions, self.parameters, dtype=torch.float64)
        for p, step in enumerate(self.dtheta):
            weights[2 * p, p] = -1.0 / step
            weights[2 * p + 1, p] = 1.0 / step
        return weights

    def condition_name(self, condition: int) -> str:
        """Return the name of a condition in messages: "minus", "plus", "plus[1]" for the second of
        several parameters, or "x" if there is only one condition; with the number of the point if
        there are several."""
        point, condition = divmod(condition, self.at_each)
        where = f" at point {point}" if self.points and self.conditions > 1 else ""
        if self.at_each == 1:
            return f"x{where}"
        name = "plus" if condition % 2 else "minus"
        return f"{name}{where}" if self.parameters == 1 else f"{name}[{condition // 2}]{where}"

    def rounds(self, batch_size: int, begins: Sequence[int] = (), step: int = 1) -> list[Rounds]:
        """The streams of a measurement: one per condition, or when they are paired one of all at
        each point.

        Args:
            batch_size: samples per batch, as for `read`.
            begins: number of the first batch of each stream; empty for 0.
            step: from one batch to the next.

        Raises:
            ValueError: paired conditions do not yield batches of the same sizes.
        """
        begins = begins or [0] * self.conditions
        width = self.at_each if self.paired else 1
        streams = [
            self.deal(c, batch_size, begins[c // width], step) for c in range(self.conditions)
        ]
        if self.paired:
            starts = range(0, self.conditions, width)
            return [abreast(streams[start : start + width]) for start in starts]
        return [((first, (batch,)) for first, batch in stream) for stream in streams]


class Wrapper(Data):
    """Other data, some of whose answers a subclass changes.

    Args:
        data: the other data.
    """

    def __init__(self, data: Data) -> None:
        self._data = data
        self.source = data.source
        self.parameters = data.parameters
        self.conditions = data.conditions
        self.dtheta = data.dtheta
        self.paired = data.paired
        self.groups = data.groups
        self.points, self.centres, self.names = data.points, data.centres, data.names

    def read(self, condition: int, batch_size: int) -> Iterator[Batch]:
        """Yield the samples of one condition, in order."""
        return self._data.read(condition, batch_size)

    def samples(self, condition: int) -> int | None:
        """Return the number of samples of a condition, or None for a stream of unknown length."""
        return self._data.samples(condition)

    def length(self, condition: int) -> int | None:
        """Return the length that the data know."""
        return self._data.length(condition)

    def point_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the point of each of these labels."""
        return self._data.point_of(labels)

    def samples_at(self, point: int, condition: int) -> int | None:
        """Return the number of samples of a condition at a point, or None if it is unknown."""
        return self._data.samples_at(point, condition)

    def first_at(self, point: int) -> int | None:
        """Return the number of the first sample at a point, if they follow each other."""
        return self._data.first_at(point)

    def groups_at(self, point: int) -> Groups | None:
        """Return the groups of the samples at a point."""
        return self._data.groups_at(point)

    def strata(self) -> torch.Tensor | None:
        """Return the point of each sample, if it is known."""
        return self._data.strata()

    def notes(self) -> tuple[str, ...]:
        """Return the remarks on the data."""
        return self._data.notes()

    def pick(self, condition: int, numbers: torch.Tensor) -> Batch | None:
        """Copy samples of the data."""
        return self._data.pick(condition, numbers)

    def repeats(self, condition: int) -> bool:
        """Return whether each pass gives the same samples in the same order."""
        return self._data.repeats(condition)


def abreast(streams: Sequence[Iterator[Numbered]]) -> Rounds:
    """Yield one batch of every stream at a time; row i of each belongs together.

    Raises:
        ValueError: the streams do not yield batches of the same sizes.
    """
    for parts in itertools.zip_longest(*streams, fillvalue=(0, ())):
        firsts, batches = zip(*parts, strict=True)
        sizes = [len(batch) for batch in batches]
        if len(set(sizes)) != 1 or len(set(firsts)) != 1:
            raise ValueError(f"paired conditions must yield batches of the same sizes, got {sizes}")
        yield firsts[0], batches
