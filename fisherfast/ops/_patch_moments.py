"""Moments of the patches of a convolution, without storing the patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference
from fisherfast.ops._common import (
    check_at_least,
    check_no_grad,
    check_real,
    check_window,
    register,
    window_counts,
)


def patch_moments(
    x: Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Sums and cross-products of the patches of a convolution.

        sums_g = sum_{n, position} patch_g,   cross_g = sum_{n, position} patch_g patch_g^T

    A patch has one entry for each weight of an output channel, K = C / G kh kw in their order;
    ``cross / n`` over the number of positions is the inputs' Kronecker factor of the layer. The
    same as `moments` of ``torch.nn.functional.unfold``, whose patches are never all in memory.

    Args:
        x: [n, C, H, W] float32 or float64; any strides.
        kernel: kh, kw.
        stride, padding, dilation: of the convolution, two numbers each; the padding is zeros.
        groups: G, which divides C.

    Returns:
        sums: [G, K] float64, unit of x.
        cross: [G, K, K] float64, symmetric, unit of x squared.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, sizes that are not pairs or too small, groups that do not divide C,
            or no position.
        RuntimeError: an input requires grad.

    Cost: n positions K (K + 1) / 2 multiply-adds a group. Float32 products are summed in float32
    over at most 256 patches, then in float64: off by at most 2e-5 of sum |x_i x_j|, 1e-6 typically.
    The bits do not depend on the number of threads.

    Reference: Grosse and Martens 2016 (arXiv 1602.01407), section 3, for the factor.

    Example:
        >>> x = torch.tensor([[[[1.0, 2.0, 3.0]]]])  # two patches of a kernel of 1 by 2
        >>> sums, cross = patch_moments(x, (1, 2))
        >>> sums.tolist(), cross.tolist()
        ([[3.0, 5.0]], [[[5.0, 8.0], [8.0, 13.0]]])
    """
    check_no_grad("patch_moments", x=x)
    sums, cross = torch.ops.fisherfast.patch_moments.default(
        x, list(kernel), list(stride), list(padding), list(dilation), groups
    )
    return sums, cross


def _patch_moments(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    sums, cross = results = _patch_moments_fake(x, kernel, stride, padding, dilation, groups)
    if x.numel() == 0:
        return sums.zero_(), cross.zero_()
    if not _native.serves(x):
        return reference.patch_moments(x, kernel, stride, padding, dilation, groups)
    _native.call(
        "patch_moments",
        x,
        x=x,
        strides=x.stride(),
        size=x.shape[2:],
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        out=window_counts(x.shape[2:], kernel, stride, padding, dilation),
        sums=sums,
        cross=cross,
        workspace=None,
        samples=x.shape[0],
        channels=x.shape[1] // groups,
        groups=groups,
        width=sums.shape[1],
    )
    return results


def _patch_moments_fake(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    check_real("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must have shape [n, C, H, W], got {list(x.shape)}")
    window = (kernel, stride, padding, dilation)
    check_window(2, *window)
    check_at_least("groups", groups, 1)
    channels = x.shape[1]
    if channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")
    window_counts(x.shape[2:], *window)
    width = channels // groups * kernel[0] * kernel[1]
    return (
        x.new_empty((groups, width), dtype=torch.float64),
        x.new_empty((groups, width, width), dtype=torch.float64),
    )


register(
    "patch_moments(Tensor x, SymInt[] kernel, SymInt[] stride, SymInt[] padding,"
    " SymInt[] dilation, SymInt groups) -> (Tensor sums, Tensor cross)",
    _patch_moments,
    _patch_moments_fake,
)
