"""Recognise operations that are an invertible affine map, which leaves the information as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

COPIES = {"clone", "neg", "_unsafe_view", "view_copy", "pixel_shuffle", "pixel_unshuffle"}
"""Operations that keep all numbers: copies of any order and shape, and a change of sign. A view is
no operation here, because it is the same memory."""

NORMALISATIONS = {
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
}

SHIFT_ROUNDING = 1e-4
"""Largest rounding of a shift in units of the range of the activations: noise of 1e-4 of them costs
1e-8 of the information of independent activations."""


def keeps_information(name: str, given: Mapping[str, Any], x: Tensor, result: Tensor) -> bool:
    """Return whether an operation is an invertible affine map of x, and its numbers carry it.

    Args:
        name: of the operation, without underscores at its end.
        given: its arguments by name; all but x are constants.
        x: the activations [n, ...], or the result if the operation overwrites them.
        result: its result.
    """
    if result.numel() != x.numel() or result.dtype != x.dtype or not x.is_floating_point():
        return False
    if name in COPIES:
        return True
    if name in NORMALISATIONS:
        return _normalises(given, x)
    first, other = given.get("self"), given.get("other")
    constant = other if first is x else first
    if name == "mul" or (name == "div" and first is x and given.get("rounding_mode") is None):
        return _scales(constant)
    if name in ("add", "sub") and result.data_ptr() != x.data_ptr():
        shift = torch.as_tensor(constant) * (given.get("alpha", 1) if first is x else 1)
        return _carried(shift, x.amax(0) - x.amin(0), x)
    return False


def _normalises(given: Mapping[str, Any], x: Tensor) -> bool:
    """Judge (x - mean) / sqrt(var + eps) * weight + bias by channel."""
    mean, variance = given.get("running_mean"), given.get("running_var")
    if given.get("training", False) or mean is None or variance is None:
        return False
    eps = next(float(given[name]) for name in ("eps", "epsilon") if name in given)
    scale = (variance.double() + eps).rsqrt()
    if given.get("weight") is not None:
        scale = scale * given["weight"].double()
    if not _scales(scale):
        return False
    bias = 0.0 if given.get("bias") is None else given["bias"].double()
    rows = x.transpose(0, 1).flatten(1)
    return _carried(bias / scale - mean.double(), rows.amax(1) - rows.amin(1), x)


def _scales(scale: Any) -> bool:
    """Return whether a factor is finite and not zero anywhere."""
    size = torch.as_tensor(scale).abs().double()
    return bool(((size > torch.finfo(torch.float32).tiny) & torch.isfinite(size)).all())


def _carried(shift: Tensor, extent: Tensor, x: Tensor) -> bool:
    """Return whether a shift rounds activations x by little, where their range is not zero."""
    largest = SHIFT_ROUNDING / torch.finfo(x.dtype).eps
    small = shift.abs().to(extent.device) <= largest * extent.double()
    return bool(torch.isfinite(shift).all() and (small | (extent == 0)).all())
