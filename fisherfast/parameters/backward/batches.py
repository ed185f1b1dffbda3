"""Inputs and labels, batch by batch, from tensors, Datasets, loaders and iterables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fisherfast.data import sources
from fisherfast.data.inputs import Inputs, Samples, moved
from fisherfast.data.sources import check_entries

Data = Any
"""Inputs x [n, ...], a pair (x, y), a Dataset or a DataLoader of x or (x, y), or an iterable of
batches. Several inputs of a model are a dict, or a tuple inside a pair: ((x1, x2), y)."""


def batches(
    data: Data, model: nn.Module, batch_size: int, *, labels: bool
) -> Iterator[tuple[Samples, Tensor | None]]:
    """Yield (x [n, ...], y [n, ...] or None); empty batches are left out.

    Inputs come to the model's device, and floating ones in its dtype. Labels stay where they are,
    so that those in host memory can be checked without waiting for a device.

    Args:
        data: see `Data`.
        model: whose device and dtype are used.
        batch_size: samples per batch, of tensors and Datasets.
        labels: whether y is needed.

    Raises:
        TypeError: data of a kind that cannot be read, or a list of two tensors.
        ValueError: no sample at all, labels that are missing, or not as many as inputs.
    """
    place = next(model.parameters()).device
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    found = False
    for item in _items(data, batch_size):
        x, y = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
        if x is item and isinstance(x, tuple | list):
            if len(x) != 1:
                raise ValueError(
                    f"data must be batches of x or (x, y), got one of {len(x)} entries; several"
                    " inputs are ((x1, x2), y)"
                )
            x = x[0]
        x, y = _samples(x, "data"), None if y is None else _tensor(y, "labels")
        if labels and y is None:
            raise ValueError(
                "data must hold labels, got inputs alone: pass (x, y), or take a fisher_type that"
                ' draws them from the network ("exact", "mc")'
            )
        if y is not None and len(y) != len(x):
            raise ValueError(f"labels must be as many as inputs ({len(x)}), got {len(y)}")
        if len(x):
            found = True
            yield moved(x, place, dtype), y if labels else None
    if not found:
        raise ValueError("data must hold at least one sample, got none")


def _items(data: Data, batch_size: int) -> Iterator[Any]:
    if _is_tensor(data) or isinstance(data, Mapping):
        data = (data,)
    if isinstance(data, tuple) and data and (_is_tensor(data[0]) or _is_pair(data)):
        parts = _pair(data)
        for start in range(0, len(parts[0]), batch_size):
            yield tuple(part[start : start + batch_size] for part in parts)
    elif isinstance(data, DataLoader):
        yield from data
    elif isinstance(data, Dataset):
        # a loader without its own generator draws a seed from the global one
        own = torch.Generator("cpu")
        yield from DataLoader(data, batch_size=batch_size, generator=own)
    elif isinstance(data, list) and list(map(_is_tensor, data)) == [True, True]:
        raise TypeError(
            "data must be a tuple for a pair (x, y), got a list of two, which may be two batches as"
            " well: pass (x, y), or iter([first, second])"
        )
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes | dict):
        yield from data
    else:
        raise TypeError(
            "data must be a tensor, a pair (x, y), a Dataset, a DataLoader or an iterable of"
            f" batches, got {type(data).__name__}"
        )


def _pair(data: tuple[Any, ...]) -> list[Samples]:
    """[x] or [x, y] of a tuple that begins with inputs."""
    if len(data) > 2:
        raise ValueError(f"data must be a pair (x, y), got {len(data)} entries")
    found = [_samples(data[0], "data")]
    found += [_tensor(value, "labels") for value in data[1:] if value is not None]
    if len(found) == 2 and len(found[0]) != len(found[1]):
        raise ValueError(f"labels must be as many as inputs ({len(found[0])}), got {len(found[1])}")
    return found


def count(data: Data) -> int | None:
    """Samples in the data, or None where only reading them gives the number."""
    inputs = data[0] if isinstance(data, tuple) and data else data
    if isinstance(data, Mapping) or (isinstance(data, tuple) and data and _is_pair(data)):
        inputs = Inputs.of(inputs)
    return None if getattr(inputs, "ndim", 1) == 0 else sources.count(inputs)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _is_pair(data: Any) -> bool:
    """True for ((x1, x2), y); a tuple of batches (x, y) is none."""
    if isinstance(data[0], Mapping):
        return True
    return isinstance(data[0], tuple) and len(data) == 2 and _is_tensor(data[1])


def _samples(value: Any, name: str) -> Samples:
    """Check inputs, of one tensor or several, and return them as tensors."""
    inputs = value if isinstance(value, Inputs) else Inputs.of(value)
    if not isinstance(inputs, Inputs):
        return _tensor(value, name)
    checked = check_entries(inputs, name, lambda entry, own: _tensor(entry, own))
    if isinstance(checked, Inputs):
        return checked.map(lambda entry: _tensor(entry, name))
    return _tensor(checked, name)


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":
            raise TypeError(f"{name} must hold numbers, got an array of {value.dtype}")
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be tensors or arrays, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be dense, got {value.layout}: batch by batch, to_dense()")
    if value.dim() < 1:
        raise ValueError(f"{name} must have shape [n, ...], got a single number")
    return value.detach()
