"""Samples of two conditions per parameter, a finite step apart.

`FiniteDifference` holds 2 P conditions, one below and one above theta for each of the P parameters.
Nothing is loaded or copied before it is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fisherfast.data import sources
from fisherfast.data.batch import Batch, Data, Numbered
from fisherfast.data.groups import check_groups
from fisherfast.data.sources import Source

__all__ = ["FiniteDifference", "check_dtheta"]


class FiniteDifference(Data):
    r"""Samples at theta - dtheta/2 and at theta + dtheta/2.

    The derivative of a mean is :math:`(\mu_+ - \mu_-) / d\theta`. **dtheta is the full separation
    of the two conditions**; codes that use half steps must double theirs.

    Args:
        minus: samples at theta - dtheta/2: a tensor or array [n, ...] of floating dtype, a
            ``Dataset``, a ``DataLoader``, an iterable of batches [n_batch, ...], or a function
            without arguments that returns such an iterable (for streams that can be replayed).
            For P parameters a **list** of P of these. A tuple means one sample of several inputs,
            which is not supported yet. Batches of more than one entry are refused as well: leave
            out labels.
        plus: samples at theta + dtheta/2, in the same form.
        dtheta: full separation in the unit of theta, positive; a sequence of P numbers for P
            parameters.
        paired: the i-th samples of both conditions were drawn with the same noise (a simulator with
            a common seed). The derivative is then far less noisy; measured data are never paired.
        groups: labels [n] of samples that depend on each other, as a tensor, array or sequence of
            whole numbers or strings: pictures of one object, repeated measurements, pieces of a
            time series. Samples with the same label are one group, which counts as one independent
            sample. One array for all conditions, or a **list** with one for each of them (minus and
            plus of the first parameter, then of the second); a label means the same group in all
            conditions.

    Raises:
        ValueError: dtheta is not positive and finite; the lists differ in length; tensors differ in
            sample shape; paired tensors differ in their number of samples; groups differ in their
            number of samples, or the samples have no fixed order.
        TypeError: integer, boolean or complex samples, a source that cannot be read, or a tuple.

    Example:
        >>> import torch, fisherfast as ff
        >>> x = torch.randn(2, 100, 3)
        >>> data = ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2)
        >>> data.parameters
        1
        >>> objects = torch.arange(100) // 4                       # four pictures of each object
        >>> data = ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2, groups=objects)
    """

    def __init__(
        self,
        minus: Source | list[Source],
        plus: Source | list[Source],
        dtheta: float | Sequence[float],
        *,
        paired: bool = False,
        groups: Any = None,
    ) -> None:
        minus_list = _as_list(minus)
        plus_list = _as_list(plus)
        if not minus_list:
            raise ValueError("minus must hold at least one condition, got an empty list")
        if len(minus_list) != len(plus_list):
            raise ValueError(
                f"plus must hold as many conditions as minus,"
                f" got {len(plus_list)} and {len(minus_list)}"
            )
        self.dtheta = check_dtheta(dtheta, len(minus_list))
        self.parameters = len(minus_list)
        self.conditions = 2 * self.parameters
        self.paired = bool(paired)
        self.source = "paired" if self.paired else "independent"
        self._sources: list[Source] = []
        labels = []
        for p, pair in enumerate(zip(minus_list, plus_list, strict=True)):
            for name, source in zip(("minus", "plus"), pair, strict=True):
                label = name if len(minus_list) == 1 else f"{name}[{p}]"
                self._sources.append(sources.check_source(source, label))
                labels.append(label)
                if self.paired:
                    _check_order(source, label)
        _check_shapes(self._sources, self.paired)
        self.groups = check_groups(groups, self._sources, labels, paired=self.paired)

    def samples(self, condition: int) -> int | None:
        """Number of samples of a condition, or None for a stream of unknown length."""
        return sources.count(self._sources[condition])

    def batches(self, condition: int, batch_size: int) -> Iterator[torch.Tensor]:
        """Yield the samples of one condition as tensors [n_batch, ...], in order.

        Tensors, arrays and Datasets are cut into batches of batch_size; loaders and iterables keep
        their own.

        Raises:
            TypeError: a batch is not a tensor or array of floating dtype, or not alone.
            ValueError: the source yields no sample.
        """
        name = self.condition_name(condition)
        empty = True
        for item in sources.iterate(self._sources[condition], batch_size, name):
            batch = sources.as_batch(item, name)
            if len(batch):
                empty = False
                yield batch
        if empty:
            raise ValueError(
                f"{name} must yield at least one sample, got an empty source"
                " (an iterator can be read once only: pass a function that returns a new one)"
            )

    def read(self, condition: int, batch_size: int) -> Iterator[Batch]:
        """Yield the samples of one condition, in order."""
        return map(Batch, self.batches(condition, batch_size))

    def deal(
        self, condition: int, batch_size: int, begin: int = 0, step: int = 1
    ) -> Iterator[Numbered]:
        """Every step-th batch of one condition; the others of tensors, arrays and Datasets are not
        read."""
        source, name = self._sources[condition], self.condition_name(condition)
        if step == 1 or not sources.divisible(source):
            yield from super().deal(condition, batch_size, begin, step)
            return
        for first, item in sources.deal(source, batch_size, begin, step):
            yield first, Batch(sources.as_batch(item, name))

    def pick(self, condition: int, numbers: torch.Tensor) -> Batch | None:
        """Read some samples of a tensor, an array or a Dataset."""
        source = self._sources[condition]
        if not sources.divisible(source):
            return None
        item = sources.pick(source, numbers)
        return Batch(sources.as_batch(item, self.condition_name(condition)))

    def repeats(self, condition: int) -> bool:
        """Return whether each pass over a condition gives the same samples in the same order:
        tensors, arrays, Datasets, and DataLoaders that do not shuffle do."""
        return sources.repeats(self._sources[condition])

    def resident(self) -> bool:
        """Return whether all samples are in memory already, as tensors or arrays."""
        return all(map(sources.resident, self._sources))

    def __repr__(self) -> str:
        counts = [self.samples(c) for c in range(self.conditions)]
        return f"FiniteDifference({self.source}, dtheta={list(self.dtheta)}, samples={counts})"


def _as_list(source: Source | list[Source]) -> list[Source]:
    return source if isinstance(source, list) else [source]


def check_dtheta(dtheta: float | Sequence[float], parameters: int) -> tuple[float, ...]:
    """Return P positive full separations, given one number or P of them."""
    values = np.atleast_1d(np.asarray(dtheta))
    if values.dtype.kind not in "iuf":
        raise TypeError(f"dtheta must be a number or a sequence of numbers, got {dtheta!r}")
    steps = [float(value) for value in values.ravel()]
    if len(steps) == 1:
        steps *= parameters
    if len(steps) != parameters:
        raise ValueError(
            f"dtheta must hold one step or one per parameter ({parameters}), got {len(steps)}"
        )
    if not all(math.isfinite(step) and step > 0 for step in steps):
        raise ValueError(f"dtheta must be positive and finite, got {dtheta}")
    return tuple(steps)


def _check_shapes(conditions: list[Source], paired: bool) -> None:
    sized = [s for s in conditions if isinstance(s, torch.Tensor | np.ndarray)]
    shapes = {tuple(s.shape[1:]) for s in sized}
    if len(shapes) > 1:
        raise ValueError(
            f"all conditions must have samples of the same shape, got {sorted(shapes)}"
        )
    counts = {len(s) for s in sized}
    if paired and len(counts) > 1:
        raise ValueError(
            f"paired conditions must have the same number of samples, got {sorted(counts)}"
        )


def _check_order(source: Source, name: str) -> None:
    """Raise for a shuffled loader, which would silently mix up pairs."""
    sampler = getattr(source, "sampler", None)
    if isinstance(sampler, torch.utils.data.RandomSampler):
        raise ValueError(f"{name} must keep its order when paired, got a shuffled DataLoader")
