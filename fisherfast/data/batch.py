"""The interface of all sources: conditions, their batches, and the derivative of a mean.

A *condition* is one set of samples, all drawn at the same theta. The derivative of a mean is the
`contrast` of the conditions' means, or follows from the tangents or score of each sample.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from fisherfast.data.dealing import Place, Tally
from fisherfast.data.groups import Groups

__all__ = ["Batch", "Data", "Gap", "Round", "abreast", "dealt"]


@dataclass(frozen=True)
class Batch:
    """Samples of one condition, with their tangents or score.

    Attributes:
        x: [n, ...].
        tangents: [P, n, ...] dx/dtheta of each sample, or None.
        score: [n, P] float64 d log p(x | theta) / d theta of each sample, or None.
        place: folds of the samples, which are sorted by them; None before sorting.
    """

    x: torch.Tensor
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

    def leading(self, rows: int) -> Batch:
        """Return the first samples."""
        return self.part(0, rows)

    def part(self, start: int, stop: int) -> Batch:
        """Return samples start to stop."""
        return Batch(
            self.x[start:stop],
            None if self.tangents is None else self.tangents[:, start:stop],
            None if self.score is None else self.score[start:stop],
        )

    def sorted(self, place: Place, order: torch.Tensor) -> Batch:
        """Copy the batch with its rows in an order int64 [n], which have that place."""
        order = order.to(self.x.device)
        return Batch(
            self.x[order],
            None if self.tangents is None else self.tangents[:, order],
            None if self.score is None else self.score[order.to(self.score.device)],
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
        """Move to another device, samples and tangents also to another dtype; None keeps either.

        Args:
            copy: always copy x, so that in-place layers cannot modify the user's data.
        """
        device, dtype = device or self.x.device, dtype or self.x.dtype
        return Batch(
            self.x.to(device=device, dtype=dtype, copy=copy),
            None if self.tangents is None else self.tangents.to(device=device, dtype=dtype),
            None if self.score is None else self.score.to(device),
            self.place,
        )


@dataclass(frozen=True)
class Gap:
    """Samples that another process measures, at their position in the order of a measurement.

    Attributes:
        samples: how many.
        tally: their number in each cell; empty before they are dealt.
    """

    samples: int
    tally: Tally = field(default_factory=Tally.none)

    def __len__(self) -> int:
        return self.samples


Part = Batch | Gap
"""The next part of a condition: a batch to measure, or a gap."""

Round = tuple[Part, ...]
"""One batch of each condition of a stream: one condition if independent, all if paired."""

Mine = Callable[[int], bool]
"""Tells whether this process measures the batch with a given number."""


class Data(ABC):
    """Samples at theta, whatever their source.

    Attributes:
        source: "independent", "paired", "pathwise" or "score".
        parameters: P, entries of theta.
        conditions: number of conditions.
        dtheta: [P] full separation of the conditions; empty without a finite step.
        paired: the i-th samples of all conditions share their noise.
        sharded: these are the samples of this process alone, see `Shard`.
        groups: which samples depend on each other; None if all are independent.
    """

    source: str
    parameters: int
    conditions: int
    dtheta: tuple[float, ...] = ()
    paired: bool = False
    sharded: bool = False
    groups: Groups | None = None

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

    def deal(self, condition: int, batch_size: int, mine: Mine) -> Iterator[Part]:
        """Yield the batches of one condition in order, with a `Gap` in place of those that are not
        mine. Sources that can skip samples do not read these.

        Args:
            condition: which one.
            batch_size: samples per batch, as for `read`.
            mine: whether to read the batch with a given number.
        """
        yield from dealt(self.read(condition, batch_size), mine)

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
        several parameters, or "x" if there is only one condition."""
        if self.conditions == 1:
            return "x"
        name = "plus" if condition % 2 else "minus"
        return name if self.parameters == 1 else f"{name}[{condition // 2}]"

    def rounds(
        self, batch_size: int, mine: Callable[[int, int], bool] | None = None
    ) -> list[Iterator[Round]]:
        """Return the streams of a measurement: one per condition, or one of all if paired.

        Args:
            batch_size: samples per batch, as for `read`.
            mine: whether to read a round, given its stream and number; None for all.

        Raises:
            ValueError: paired conditions do not yield batches of the same sizes.
        """
        streams: list[Iterator[Part]] = []
        for c in range(self.conditions):
            if mine is None:
                streams.append(self.read(c, batch_size))
            else:
                streams.append(self.deal(c, batch_size, partial(mine, 0 if self.paired else c)))
        if self.paired:
            return [abreast(streams)]
        return [((part,) for part in stream) for stream in streams]


def dealt(batches: Iterator[Batch], mine: Mine) -> Iterator[Part]:
    """Read all batches, and replace those that are not mine by gaps."""
    for number, batch in enumerate(batches):
        yield batch if mine(number) else Gap(len(batch))


def abreast(streams: Sequence[Iterator[Part]]) -> Iterator[Round]:
    """Yield one batch of every stream at a time; row i of each belongs together.

    Raises:
        ValueError: the streams do not yield batches of the same sizes.
    """
    for batches in itertools.zip_longest(*streams):
        sizes = [0 if batch is None else len(batch) for batch in batches]
        if len(set(sizes)) != 1:
            raise ValueError(f"paired conditions must yield batches of the same sizes, got {sizes}")
        yield batches
