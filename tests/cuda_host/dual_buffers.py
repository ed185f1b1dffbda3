"""Dual buffers [1 + P, ...] for the kernels, and comparison with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from support.closeness import assert_close
from torch import Tensor


def buffer(
    normal: Callable[..., Tensor],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    gap: int = 0,
    offset: int = 0,
) -> Tensor:
    """Draws normal numbers with contiguous slices: `gap` numbers between them, the first of them
    `offset` numbers after an aligned address."""
    slices, size = shape[0], torch.Size(shape[1:]).numel()
    memory = normal(offset + slices * (size + gap), dtype=dtype)
    return memory[offset:].view(slices, size + gap)[:, :size].unflatten(1, shape[1:])


def assert_matches(got: Tensor, truth: Tensor, tolerance: float) -> None:
    """Asserts errors of at most `tolerance` of the truth or of one, whichever is larger."""
    assert_close(got, truth, tolerance, truth.abs().clamp_min(1))
