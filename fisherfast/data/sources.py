"""Read samples from tensors, arrays, Datasets, loaders and streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

Source = Any
"""A tensor or array [n, ...], a Dataset, a DataLoader, an iterable of batches, or a function that
returns one."""

SEVERAL = (
    "samples of several inputs are not supported yet, join them in one tensor that the model splits"
)
"""End of the error messages about tuples and dicts."""


def check_source(source: Source, name: str) -> Source:
    """Check that a source can be read, and return it.

    Raises:
        TypeError: it is not a source, a tensor or array of integers or complex numbers, sparse, or
            a tuple or dict, which means samples of several inputs.
        ValueError: it is a tensor without dimensions.
    """
    if isinstance(source, torch.Tensor | np.ndarray):
        check_floating(source, name)
        if source.ndim < 1:
            raise ValueError(f"{name} must have shape [n, ...], got a single number")
        return source
    readable = isinstance(source, Iterable | Callable) or hasattr(source, "__getitem__")
    if not readable or isinstance(source, str | bytes | tuple | dict | np.generic):
        hint = "; several parameters or batches are a list" if isinstance(source, tuple) else ""
        raise TypeError(
            f"{name} must be a tensor, an array, a Dataset, a DataLoader, an iterable of batches"
            f" or a function that returns one, got {_kind(source)}{hint}"
        )
    return source


def check_floating(batch: torch.Tensor | np.ndarray, name: str) -> None:
    """Raise TypeError unless a tensor or array is dense and of floating dtype."""
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


def iterate(source: Source, batch_size: int, name: str) -> Iterator[Any]:
    """Yield the samples of a source in batches: of batch_size samples, or the batches that it
    yields itself (loaders, iterables)."""
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
        batches = source()  # may be a tuple of batches, as from `Tensor.split`
        batches = list(batches) if isinstance(batches, tuple) else check_source(batches, name)
        yield from iterate(batches, batch_size, name)
    else:
        yield from torch.utils.data.DataLoader(source, batch_size=batch_size)


def divisible(source: Source) -> bool:
    """Return whether any batch of a source can be read without the others: true for tensors, arrays
    and Datasets that are not empty."""
    if isinstance(source, torch.utils.data.DataLoader) or not repeats(source):
        return False
    return bool(count(source))


def pick(source: Source, numbers: torch.Tensor) -> Any:
    """Return the samples with these numbers, int64 [n], of a divisible source, as a new batch."""
    if isinstance(source, torch.Tensor):
        return source[numbers.to(source.device)]
    if isinstance(source, np.ndarray):
        return source[numbers.numpy()]
    loader = torch.utils.data.DataLoader(source, batch_sampler=[numbers.tolist()])
    return next(iter(loader))


def deal(source: Source, batch_size: int, begin: int, step: int) -> Iterator[tuple[int, Any]]:
    """Yield (number of its first sample, batch) for every step-th batch of a divisible source, from
    number `begin` on; the others are not read."""
    starts = range(begin * batch_size, len(source), step * batch_size)
    rows = [range(start, min(start + batch_size, len(source))) for start in starts]
    if resident(source):
        yield from ((own.start, source[own.start : own.stop]) for own in rows)
        return
    loader = torch.utils.data.DataLoader(source, batch_sampler=map(list, rows))
    for own, item in zip(rows, loader, strict=True):
        yield own.start, item


def _from_array(array: np.ndarray) -> torch.Tensor:
    """Make a tensor of an array, without a copy if torch can use its memory."""
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=["C", "W"]))


def as_batch(item: Any, name: str) -> torch.Tensor:
    """Convert an item of a source, alone or as the only entry of a tuple or list, to a tensor
    [n, ...] without gradient.

    Raises:
        TypeError: it is not a tensor or array of floating dtype, or has more than one entry.
        ValueError: it is a tensor without dimensions.
    """
    if isinstance(item, list | tuple) and len(item) > 1:
        kinds = ", ".join(type(entry).__name__ for entry in item)
        raise TypeError(
            f"{name} must yield samples [n, ...] alone, got {len(item)} entries ({kinds}): leave"
            f" labels out; {SEVERAL}"
        )
    if isinstance(item, list | tuple) and item:
        item = item[0]
    if isinstance(item, np.ndarray):
        check_floating(item, name)
        item = _from_array(item)
    if not isinstance(item, torch.Tensor):
        raise TypeError(f"{name} must yield tensors or arrays [n, ...], got {_kind(item)}")
    check_floating(item, name)
    if item.ndim < 1:
        raise ValueError(f"{name} must yield batches of shape [n, ...], got a single number")
    return item.detach()


def _kind(value: Any) -> str:
    """Name the class of a value for a message, and for tuples and dicts what they mean."""
    name = type(value).__name__
    return f"{name}: {SEVERAL}" if isinstance(value, tuple | dict) and value else name


def count(source: Source) -> int | None:
    """Return the number of samples of a source, or None for a stream of unknown length."""
    if isinstance(source, torch.Tensor | np.ndarray):
        return len(source)
    if isinstance(source, torch.utils.data.DataLoader):
        return _count_of_loader(source)
    sized: Any = getattr(source, "dataset", source)
    if isinstance(sized, Iterable) and not isinstance(sized, torch.utils.data.Dataset):
        return None  # the length of a list of batches is the number of batches
    try:
        return len(sized)
    except TypeError:
        return None


def _count_of_loader(loader: torch.utils.data.DataLoader[Any]) -> int | None:
    """Return how many samples a loader's sampler draws (of a Dataset, or of one process's share of
    it), without those dropped; None if items are batches, or a batch sampler makes them."""
    if loader.batch_size is None:
        return None
    iterable = isinstance(loader.dataset, torch.utils.data.IterableDataset)
    counted: Any = loader.dataset if iterable else loader.sampler
    try:
        samples = len(counted)
    except TypeError:
        return None
    return samples - samples % loader.batch_size if loader.drop_last else samples


def resident(source: Source) -> bool:
    """Return whether all samples of a source are in memory already."""
    return isinstance(source, torch.Tensor | np.ndarray)


def repeats(source: Source) -> bool:
    """Return whether each pass over a source gives the same samples in the same order: true for
    tensors, arrays, Datasets, and DataLoaders that do not shuffle."""
    if isinstance(source, torch.utils.data.DataLoader):
        return isinstance(source.sampler, torch.utils.data.SequentialSampler)
    if isinstance(source, torch.utils.data.IterableDataset):
        return False
    return isinstance(source, torch.Tensor | np.ndarray | torch.utils.data.Dataset)
