"""Read samples from tensors, arrays, Datasets, loaders and streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from fisherfast.data.inputs import Inputs, Samples, is_constant, is_samples, rows_of

Source = Any
"""A tensor or array [n, ...], several in a tuple or dict, a Dataset, a DataLoader, an iterable of
batches, or a function that returns one."""

KINDS = (
    "a tensor, an array, a tuple or dict of these, a Dataset, a DataLoader, an iterable of batches"
    " or a function that returns one"
)


def check_source(source: Source, name: str) -> Source:
    """Check that a source can be read, and return it; a tuple or dict as `Inputs`.

    Raises:
        TypeError: it is not a source, or holds complex numbers, sparse tensors, or something else
            than tensors, arrays and constants.
        ValueError: it is a tensor without dimensions, or entries differ in their number of samples.
    """
    if isinstance(source, torch.Tensor | np.ndarray):
        check_dense(source, name)
        if source.ndim < 1:
            raise ValueError(f"{name} must have shape [n, ...], got a single number")
        return source
    if isinstance(source, tuple | Mapping):
        return check_entries(Inputs.of(source), name, check_dense)
    readable = isinstance(source, Iterable | Callable) or hasattr(source, "__getitem__")
    if not readable or isinstance(source, str | bytes | np.generic):
        raise TypeError(f"{name} must be {KINDS}, got {type(source).__name__}")
    return source


def check_dense(batch: torch.Tensor | np.ndarray, name: str) -> None:
    """Raise TypeError unless a tensor or array is dense and holds real numbers."""
    real = not batch.is_complex() if isinstance(batch, torch.Tensor) else batch.dtype.kind in "biuf"
    if not real:
        raise TypeError(
            f"{name} must have a floating dtype, got {batch.dtype}; convert with .float(), or split"
            " complex numbers into real and imaginary part"
        )
    if isinstance(batch, torch.Tensor) and batch.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got {batch.layout}; convert with .to_dense()")


def check_entries(inputs: Inputs, name: str, check: Callable[[Any, str], Any]) -> Samples:
    """Check several inputs, and return them; a tuple of one as that one.

    Args:
        inputs: with tensors or arrays.
        name: in messages.
        check: gets each entry that holds samples, and its name.

    Raises:
        TypeError: an entry is neither samples nor a constant, or none holds samples.
        ValueError: the entries differ in their number of samples.
    """
    first = None
    only = not inputs.named and len(inputs.entries) == 1
    for key, entry in inputs.entries.items():
        own = name if only else f"{name}[{key!r}]"
        if is_samples(entry):
            check(entry, own)
            first = (own, len(entry)) if first is None else first
            if len(entry) != first[1]:
                raise ValueError(
                    f"{own} must have {first[1]} rows as {first[0]} has, got {len(entry)}: one per"
                    " sample; what all samples share belongs into the model, or is repeated with"
                    " .expand(n, ...)"
                )
        elif not is_constant(entry):
            raise TypeError(
                f"{own} must be a tensor or array [n, ...] or a constant (a number, a string,"
                f" None), got {type(entry).__name__}; a Dataset, DataLoader or stream of several"
                " inputs yields tuples or dicts itself"
            )
    if first is None:
        raise TypeError(f"{name} must hold tensors or arrays [n, ...], got constants")
    return inputs.entries[0] if only else inputs


def iterate(source: Source, batch_size: int, name: str) -> Iterator[Any]:
    """Yield the samples of a source in batches: of batch_size samples, or the batches that it
    yields itself (loaders, iterables)."""
    if resident(source):
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
    if resident(source):
        return rows_of(source, numbers)
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


def as_batch(item: Any, name: str) -> Samples:
    """Convert an item of a source to samples without gradient: a tensor or array [n, ...] to a
    tensor, several of them in a tuple, list or dict to `Inputs`.

    Raises:
        TypeError: it is none of these, or holds complex numbers or sparse tensors.
        ValueError: it is a tensor without dimensions, or entries differ in their number of samples.
    """
    inputs = item if isinstance(item, Inputs) else Inputs.of(item)
    if isinstance(inputs, Inputs) and inputs.entries:
        checked = check_entries(inputs, name, check_dense)
        return checked.map(_as_tensor) if isinstance(checked, Inputs) else _as_tensor(checked)
    if not isinstance(item, torch.Tensor | np.ndarray):
        raise TypeError(f"{name} must yield tensors or arrays [n, ...], got {type(item).__name__}")
    check_dense(item, name)
    if item.ndim < 1:
        raise ValueError(f"{name} must yield batches of shape [n, ...], got a single number")
    return _as_tensor(item)


def _as_tensor(value: torch.Tensor | np.ndarray) -> torch.Tensor:
    return (_from_array(value) if isinstance(value, np.ndarray) else value).detach()


def count(source: Source) -> int | None:
    """Return the number of samples of a source, or None for a stream of unknown length."""
    if resident(source):
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
    return isinstance(source, torch.Tensor | np.ndarray | Inputs)


def repeats(source: Source) -> bool:
    """Return whether each pass over a source gives the same samples in the same order: true for
    tensors, arrays, Datasets, and DataLoaders that do not shuffle."""
    if isinstance(source, torch.utils.data.DataLoader):
        return isinstance(source.sampler, torch.utils.data.SequentialSampler)
    if isinstance(source, torch.utils.data.IterableDataset):
        return False
    return resident(source) or isinstance(source, torch.utils.data.Dataset)
