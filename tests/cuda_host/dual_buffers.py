"""Dual buffers [1 + P, ...] for the kernels, and the comparison with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def buffer(
    normal: Callable[..., Tensor],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    gap: int = 0,
    offset: int = 0,
) -> Tensor:
    """Normal numbers with contiguous slices: `gap` numbers between them, the first of them `offset`
    numbers behind an aligned address."""
    slices, size = shape[0], torch.Size(shape[1:]).numel()
    memory = normal(offset + slices * (size + gap), dtype=dtype)
    return memory[offset:].view(slices, size + gap)[:, :size].unflatten(1, shape[1:])


def assert_matches(got: Tensor, truth: Tensor, tolerance: float) -> None:
    """Equal to `tolerance` of the truth or of one, whichever is larger; NaN and infinity where the
    truth has them."""
    got = got.double()
    assert torch.equal(got.isnan(), truth.isnan())
    same = (got == truth) | truth.isnan()
    error = torch.where(same, 0.0, (got - truth).abs() / truth.abs().clamp_min(1))
    assert error.numel() == 0 or error.max() <= tolerance, (
        f"error must be at most {tolerance}, got {error.max().item():.3g}"
    )
