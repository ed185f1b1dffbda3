"""Inputs and labels, batch by batch, from whatever holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

__all__ = ["Data", "batches"]

Data = Any
"""Inputs x [n, ...], a pair (x, y), a Dataset or a DataLoader of x or (x, y), or an iterable of
batches."""


def batches(
    data: Data, model: nn.Module, batch_size: int, *, labels: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (x [n, ...], y [n, ...] or None) on the model's device; empty batches are left out.

    Args:
        data: see `Data`.
        model: whose device is used.
        batch_size: samples per batch, of tensors and Datasets.
        labels: whether y is needed.

    Raises:
        TypeError: data of a kind that cannot be read.
        ValueError: no sample at all, labels that are missing, or not as many as inputs.
    """
    place = next(model.parameters()).device
    found = False
    for item in _items(data, batch_size):
        x, y = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
        if isinstance(x, tuple | list) and len(x) == 1:
            x = x[0]
        x, y = _tensor(x, "data"), None if y is None else _tensor(y, "labels")
        if labels and y is None:
            raise ValueError(
                "data must hold labels, got inputs alone: pass (x, y), or take a fisher_type that"
                ' draws them from the network ("exact", "mc")'
            )
        if y is not None and len(y) != len(x):
            raise ValueError(f"labels must be as many as inputs ({len(x)}), got {len(y)}")
        if len(x):
            found = True
            yield x.to(place), y.to(place) if labels and y is not None else None
    if not found:
        raise ValueError("data must hold at least one sample, got none")


def _items(data: Data, batch_size: int) -> Iterator[Any]:
    if isinstance(data, Tensor | np.ndarray):
        data = (data,)
    if isinstance(data, tuple) and all(isinstance(part, Tensor | np.ndarray) for part in data):
        tensors = [_tensor(part, "data") for part in data]
        if len({len(part) for part in tensors}) > 1:
            lengths = [len(part) for part in tensors]
            raise ValueError(f"labels must be as many as inputs, got {lengths}")
        for start in range(0, len(tensors[0]), batch_size):
            part = tuple(tensor[start : start + batch_size] for tensor in tensors)
            yield part if len(part) > 1 else part[0]
    elif isinstance(data, DataLoader):
        yield from data
    elif isinstance(data, Dataset):
        yield from DataLoader(data, batch_size=batch_size)
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes | dict):
        yield from data
    else:
        raise TypeError(
            "data must be a tensor, a pair (x, y), a Dataset, a DataLoader or an iterable of"
            f" batches, got {type(data).__name__}"
        )


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be tensors or arrays, got {type(value).__name__}")
    if value.dim() < 1:
        raise ValueError(f"{name} must have shape [n, ...], got a single number")
    return value.detach()
