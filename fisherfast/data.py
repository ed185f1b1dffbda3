"""How the samples at theta are given: the conditions, their batches and their contrast.

A *condition* is one set of samples, all drawn at the same theta. `FiniteDifference` holds 2 P of
them, one below and one above theta for each of the P parameters, and says by `contrast` how the
derivative of a mean follows from the means of the conditions. Nothing is loaded or copied before it
is asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["FiniteDifference"]

Source = Any
"""A tensor or array [n, ...], a Dataset, a DataLoader, an iterable of batches, or a function that
returns one."""


class FiniteDifference:
    r"""Samples at theta - dtheta/2 and at theta + dtheta/2.

    The derivative of a mean is :math:`(\mu_+ - \mu_-) / d\theta`. **dtheta is the full separation
    of the two conditions**; codes that use half steps must double theirs.

    Args:
        minus: samples at theta - dtheta/2: a tensor or array [n, ...] of floating dtype, a
            ``Dataset``, a ``DataLoader``, an iterable of batches [n_batch, ...], or a function
            without arguments that returns such an iterable (for streams that can be replayed).
            Batches may be tuples: the first entry is used. For P parameters a list of P of these.
        plus: samples at theta + dtheta/2, in the same form.
        dtheta: full separation in the unit of theta, positive; a sequence of P numbers for P
            parameters.
        paired: the i-th sample of both conditions was drawn with the same noise (a simulator with a
            common seed). The derivative is then far less noisy; measured data are never paired.

    Raises:
        ValueError: dtheta is not positive and finite; the lists differ in length; tensors differ in
            sample shape; paired tensors differ in their number of samples.
        TypeError: integer, boolean or complex samples, or a source that cannot be read.

    Example:
        >>> import torch, fisherfast as ff
        >>> data = ff.FiniteDifference(torch.randn(100, 3) - 0.1, torch.randn(100, 3) + 0.1,
        dtheta=0.2)
        >>> data.parameters
        1
    """

    def __init__(
        self,
        minus: Source | Sequence[Source],
        plus: Source | Sequence[Source],
        dtheta: float | Sequence[float],
        *,
        paired: bool = False,
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
        self.dtheta = _check_dtheta(dtheta, len(minus_list))
        self.paired = bool(paired)
        self._sources: list[Source] = []
        for p, pair in enumerate(zip(minus_list, plus_list, strict=True)):
            for name, source in zip(("minus", "plus"), pair, strict=True):
                label = name if len(minus_list) == 1 else f"{name}[{p}]"
                self._sources.append(_check_source(source, label))
                if self.paired:
                    _check_order(source, label)
        _check_shapes(self._sources, self.paired)

    @property
    def parameters(self) -> int:
        """P, the number of parameters."""
        return len(self.dtheta)

    @property
    def conditions(self) -> int:
        """Number of conditions, 2 P: minus and plus of the first parameter, of the second, ..."""
        return len(self._sources)

    def contrast(self) -> torch.Tensor:
        """Weights [conditions, P] float64: derivative of the mean = sum over conditions of weight *
        mean. In 1/theta."""
        weights = torch.zeros(self.conditions, self.parameters, dtype=torch.float64)
        for p, step in enumerate(self.dtheta):
            weights[2 * p, p] = -1.0 / step
            weights[2 * p + 1, p] = 1.0 / step
        return weights

    def condition_name(self, condition: int) -> str:
        """How messages call a condition: "minus", "plus", or "plus[1]" for the second of several
        parameters."""
        name = "plus" if condition % 2 else "minus"
        return name if self.parameters == 1 else f"{name}[{condition // 2}]"

    def samples(self, condition: int) -> int | None:
        """Number of samples of a condition, or None for a stream of unknown length."""
        source = self._sources[condition]
        if isinstance(source, torch.Tensor | np.ndarray):
            return len(source)
        sized: Any = getattr(source, "dataset", source)
        try:
            return len(sized)
        except TypeError:
            return None

    def batches(self, condition: int, batch_size: int) -> Iterator[torch.Tensor]:
        """Yield the samples of one condition as tensors [n_batch, ...], in order.

        Tensors, arrays and Datasets are cut into batches of batch_size; loaders and iterables keep
        their own.

        Raises:
            TypeError: a batch is not a tensor or array of floating dtype.
            ValueError: the source yields no sample.
        """
        name = self.condition_name(condition)
        empty = True
        for item in _iterate(self._sources[condition], batch_size, name):
            batch = _as_batch(item, name)
            if len(batch):
                empty = False
                yield batch
        if empty:
            raise ValueError(
                f"{name} must yield at least one sample, got an empty source"
                " (an iterator can be read once only: pass a function that returns a new one)"
            )

    def repeats(self, condition: int) -> bool:
        """Whether each pass over a condition surely gives the same samples in the same order:
        tensors, arrays, Datasets, and DataLoaders that do not shuffle."""
        source = self._sources[condition]
        if isinstance(source, torch.utils.data.DataLoader):
            return isinstance(source.sampler, torch.utils.data.SequentialSampler)
        if isinstance(source, torch.utils.data.IterableDataset):
            return False
        return isinstance(source, torch.Tensor | np.ndarray | torch.utils.data.Dataset)

    def __repr__(self) -> str:
        kind = "paired" if self.paired else "independent"
        counts = [self.samples(c) for c in range(self.conditions)]
        return f"FiniteDifference({kind}, dtheta={list(self.dtheta)}, samples={counts})"


def lockstep(data: FiniteDifference, batch_size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield one batch of every condition at a time; row i of each belongs together (paired data).

    Raises:
        ValueError: the conditions do not yield batches of the same sizes.
    """
    streams = [data.batches(c, batch_size) for c in range(data.conditions)]
    for batches in itertools.zip_longest(*streams):
        sizes = [0 if batch is None else len(batch) for batch in batches]
        if len(set(sizes)) != 1:
            raise ValueError(f"paired conditions must yield batches of the same sizes, got {sizes}")
        yield batches


def _as_list(source: Source | Sequence[Source]) -> list[Source]:
    return list(source) if isinstance(source, list | tuple) else [source]


def _check_dtheta(dtheta: float | Sequence[float], parameters: int) -> tuple[float, ...]:
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


def _check_source(source: Source, name: str) -> Source:
    if isinstance(source, torch.Tensor | np.ndarray):
        _check_floating(source, name)
        if source.ndim < 1:
            raise ValueError(f"{name} must have shape [n, ...], got a single number")
        return source
    readable = isinstance(source, Iterable | Callable) or hasattr(source, "__getitem__")
    if not readable or isinstance(source, str | bytes | dict | np.generic):
        raise TypeError(
            f"{name} must be a tensor, an array, a Dataset, a DataLoader, an iterable of batches"
            f" or a function that returns one, got {type(source).__name__}"
        )
    return source


def _check_floating(batch: torch.Tensor | np.ndarray, name: str) -> None:
    floating = (
        batch.is_floating_point()
        if isinstance(batch, torch.Tensor)
        else np.issubdtype(batch.dtype, np.floating)
    )
    if not floating:
        raise TypeError(
            f"{name} must have a floating dtype, got {batch.dtype}; convert with .float(),"
            " or split complex numbers into real and imaginary part"
        )
    if isinstance(batch, torch.Tensor) and batch.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got {batch.layout}; convert with .to_dense()")


def _check_shapes(sources: list[Source], paired: bool) -> None:
    sized = [s for s in sources if isinstance(s, torch.Tensor | np.ndarray)]
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
    """A shuffled loader tears pairs apart, silently."""
    sampler = getattr(source, "sampler", None)
    if isinstance(sampler, torch.utils.data.RandomSampler):
        raise ValueError(f"{name} must keep its order when paired, got a shuffled DataLoader")


def _iterate(source: Source, batch_size: int, name: str) -> Iterator[Any]:
    if isinstance(source, torch.Tensor | np.ndarray):
        for start in range(0, len(source), batch_size):
            yield source[start : start + batch_size]
    elif isinstance(source, torch.utils.data.DataLoader):
        yield from source
    elif isinstance(source, torch.utils.data.Dataset):
        yield from torch.utils.data.DataLoader(source, batch_size=batch_size)
    elif isinstance(source, Iterable):
        yield from source
    elif callable(source):
        yield from _iterate(_check_source(source(), name), batch_size, name)
    else:
        yield from torch.utils.data.DataLoader(source, batch_size=batch_size)


def _from_array(array: np.ndarray) -> torch.Tensor:
    """A tensor of an array, without a copy where torch can read it as it is."""
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=["C", "W"]))


def _as_batch(item: Any, name: str) -> torch.Tensor:
    if isinstance(item, list | tuple) and item:
        item = item[0]
    if isinstance(item, np.ndarray):
        _check_floating(item, name)
        item = _from_array(item)
    if not isinstance(item, torch.Tensor):
        raise TypeError(
            f"{name} must yield tensors or arrays [n, ...] (or tuples that start with one),"
            f" got {type(item).__name__}"
        )
    _check_floating(item, name)
    if item.ndim < 1:
        raise ValueError(f"{name} must yield batches of shape [n, ...], got a single number")
    return item.detach()
