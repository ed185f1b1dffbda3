"""Comparison of results with a truth, relative to a stated scale."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(got: Tensor, truth: Tensor, tolerance: float, scale: Tensor | None = None) -> None:
    """Asserts |got - truth| <= tolerance * scale for every number, and NaN and infinity where the
    truth has them.

    Args:
        got, truth: of equal shape.
        tolerance: relative to the scale.
        scale: broadcasts to the truth; None for its largest finite magnitude.
    """
    assert got.shape == truth.shape
    if got.numel() == 0:
        return
    got, truth = got.double(), truth.double()
    assert torch.equal(got.isnan(), truth.isnan())
    if scale is None:
        scale = truth.abs().where(truth.isfinite(), 0.0).max()
    same = (got == truth) | truth.isnan()
    excess = torch.where(same, 0.0, (got - truth).abs() - tolerance * scale).max().item()
    assert excess <= 0, (
        f"error must be at most {tolerance} of the scale, exceeds it by {excess:.3g}"
    )
