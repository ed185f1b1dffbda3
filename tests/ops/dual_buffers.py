"""Shared by the tests of the dual ops: comparisons by slice, derivatives by PyTorch."""

import warnings

import pytest
import torch

from fisherfast import _native


def skip_without_kernel(device, reason):
    """Skip a test of a promise that only the kernel makes."""
    if not _native.serves(torch.empty(0, device=device)):
        pytest.skip(f"plain torch runs the op: {reason}")


def largest_error(got, truth, scale=None):
    """Largest over the slices of max |got - truth| / max |scale|; the scale is the truth itself
    unless the truth is a difference of larger numbers."""
    assert got.shape == truth.shape
    if got.numel() == 0:
        return 0.0
    error = (got.double() - truth).abs().flatten(1).amax(1)
    size = (truth if scale is None else scale).abs().flatten(1).amax(1)
    return (error / size.clamp(min=torch.finfo(torch.float64).tiny)).max().item()


def jvp_of(function, x):
    """Value and tangents [1 + P, ...] by PyTorch's forward mode."""
    with warnings.catch_warnings():  # it builds some rules with torch.jit.script, which is old
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        slices = [torch.func.jvp(function, (x[0],), (tangent,)) for tangent in x[1:]]
    return torch.stack([slices[0][0], *(tangent for _, tangent in slices)])
