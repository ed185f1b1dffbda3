"""Shared by the dual ops: checks of a dual buffer [1 + P, ...], and its layout in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast.ops._common import check_real


def check_buffer(x: Tensor, least_dims: int, symbol: str) -> None:
    """Checks that x is [1 + P, ...] of a real dtype with at least `least_dims` dimensions."""
    check_real("x", x)
    if x.dim() < least_dims or x.shape[0] < 1:
        raise ValueError(f"x must have shape {symbol}, got {list(x.shape)}")


def dense(x: Tensor) -> Tensor:
    """Return x itself if each slice x[p] fills one block of memory, in any order of dimensions,
    else a contiguous copy."""
    return x if is_dense(x) else x.clone(memory_format=torch.contiguous_format)


def is_dense(x: Tensor) -> bool:
    """Whether each slice fills one block of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialised buffer with the shape of dense x and the layout of its slices, which
    follow each other."""
    strides = [x[0].numel(), *x.stride()[1:]]
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def with_contiguous_slices(x: Tensor) -> Tensor:
    """Return x itself if each slice x[p] is contiguous, else a contiguous copy."""
    return x if x[0].is_contiguous() else x.contiguous()
