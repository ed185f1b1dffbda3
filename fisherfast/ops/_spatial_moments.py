"""Moments over samples at every position of a feature map."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference
from fisherfast.ops._common import check_like, check_no_grad, check_real, check_shape, register


def spatial_moments(x: Tensor, *, pilot: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums and cross-products over samples at every position of a feature map, about a pilot m.

        sums_hw = sum_n (x[n, :, h, w] - m[:, h, w]),
        cross_hw = sum_n (x[n, :, h, w] - m[:, h, w])(x[n, :, h, w] - m[:, h, w])^T

    The same as `moments` of x[:, :, h, w] for each position, read in place: x is neither permuted
    nor copied, contiguous or channels-last or any other strides.

    Args:
        x: [n, C, H, W] float32 or float64.
        pilot: m [C, H, W], dtype and device of ``x``; None for zero.

    Returns:
        sums: [H, W, C] float64, unit of x.
        cross: [H, W, C, C] float64, symmetric, unit of x squared.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device.
        RuntimeError: an input requires grad.

    Cost: n H W C (C + 1) / 2 multiply-adds; x is read once, with a few MB of scratch. Float32
    products are summed in float32 over at most 64 samples, then in float64. The bits do not depend
    on the number of threads.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])[:, :, None, None]  # two samples, C = 2
        >>> sums, cross = spatial_moments(x)
        >>> sums.flatten().tolist(), cross.flatten().tolist()
        ([4.0, 7.0], [10.0, 17.0, 17.0, 29.0])
    """
    check_no_grad("spatial_moments", x=x, pilot=pilot)
    return torch.ops.fisherfast.spatial_moments.default(x, pilot)


def _spatial_moments(x: Tensor, pilot: Tensor | None) -> tuple[Tensor, Tensor]:
    sums, cross = results = _spatial_moments_fake(x, pilot)
    if not _native.serves(x):
        return reference.spatial_moments(x, pilot)
    pilot = None if pilot is None else pilot.contiguous()
    _native.call(
        "spatial_moments",
        x,
        x=x,
        strides=x.stride(),
        pilot=pilot,
        sums=sums,
        cross=cross,
        rows=x.shape[0],
        channels=x.shape[1],
        height=x.shape[2],
        width=x.shape[3],
    )
    return results


def _spatial_moments_fake(x: Tensor, pilot: Tensor | None) -> tuple[Tensor, Tensor]:
    check_real("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must have shape [n, C, H, W], got {list(x.shape)}")
    _, channels, height, width = x.shape
    if pilot is not None:
        check_like("pilot", pilot, "x", x)
        check_shape("pilot", pilot, "[C, H, W]", [channels, height, width])
    return (
        x.new_empty((height, width, channels), dtype=torch.float64),
        x.new_empty((height, width, channels, channels), dtype=torch.float64),
    )


register(
    "spatial_moments(Tensor x, Tensor? pilot) -> (Tensor sums, Tensor cross)",
    _spatial_moments,
    _spatial_moments_fake,
)
