"""Shared by the tests of the dual ops: layouts of a buffer [1 + P, ...], comparisons by slice."""

import warnings

import pytest
import torch

from fisherfast import _native


def _gap(x):
    """Copy x into contiguous slices with gaps between them, from an unaligned address."""
    size = x[0].numel()
    storage = torch.empty(len(x) * (size + 3) + 1, dtype=x.dtype, device=x.device)
    strides = [size + 3, *torch.empty(x.shape[1:]).stride()]
    return storage.as_strided(x.shape, strides, 1).copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "apart": _gap,
    "every second slice": lambda x: x.repeat_interleave(2, 0)[::2],
    "slice first": lambda x: x.movedim(0, 1).contiguous().movedim(1, 0),
    "rows cut": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "columns cut": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}
"""Buffers of equal numbers; the ops read the first three in place."""


def skip_without_kernel(device, reason):
    """Skip a test of a promise that only the kernel makes."""
    if not _native.serves(torch.empty(0, device=device)):
        pytest.skip(f"plain torch runs the op: {reason}")


def expanded(x):
    """Return the primal as its own tangents: slices in the same memory."""
    return x[:1].expand(x.shape)


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
