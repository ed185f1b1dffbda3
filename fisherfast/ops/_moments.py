"""Moments of rows, of positions of a feature map, and of the patches of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference
from fisherfast.ops._common import (
    Op,
    Window,
    check_at_least,
    check_groups,
    check_index,
    check_input,
    check_like,
    check_no_grad,
    check_window,
    contiguous,
    register,
    window_counts,
    with_unit_column_stride,
)


def moments(
    x: Tensor, group: Tensor | None = None, num_groups: int = 1, *, pilot: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, sum and cross-products of the rows of every group, about a pilot m.

        count_g = #{n : group_n = g},   sums_g = sum_n (x_n - m),
        cross_g = sum_n (x_n - m)(x_n - m)^T      (both over group_n = g)

    Sums over batches are sums of the results. A pilot near the mean avoids cancellation.

    Args:
        x: [N, d] float32 or float64; rows may be strided.
        group: [N] int64 in [0, num_groups), or None for a single group.
        num_groups: G >= 1.
        pilot: m [d], dtype and device of ``x``; None for zero.

    Returns:
        count: [G] int64.
        sums: [G, d] float64, unit of x.
        cross: [G, d, d] float64, symmetric, unit of x squared.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device, or a group out of range.
        RuntimeError: an input requires grad.

    Cost: N d (d + 1) / 2 multiply-adds. Float32 products are summed in float32 over at most
    256 rows, then in float64: off by at most 2e-5 of sum |x_i x_j|, 1e-6 typically. The bits do not
    depend on the number of threads.
    On CUDA the check of ``group`` waits for the device.

    Example:
        >>> count, sums, cross = moments(torch.tensor([[1.0], [2.0], [4.0]]),
        ...                              torch.tensor([0, 1, 1]), 2)
        >>> count.tolist(), sums.flatten().tolist(), cross.flatten().tolist()
        ([1, 2], [1.0, 6.0], [1.0, 20.0])
    """
    check_no_grad("moments", x=x, pilot=pilot)
    return torch.ops.fisherfast.moments.default(x, group, num_groups, pilot)


@register(
    "moments(Tensor x, Tensor? group, SymInt num_groups, Tensor? pilot)"
    " -> (Tensor count, Tensor sums, Tensor cross)"
)
def _moments(x: Tensor, group: Tensor | None, num_groups: int, pilot: Tensor | None) -> Op:
    check_input("x", x, "[N, d]")
    check_at_least("num_groups", num_groups, 1)
    rows, dim = x.shape
    if group is not None:
        check_index("group", group, "x", x, "[N]", [rows])
    elif num_groups != 1:
        raise ValueError(f"num_groups must be 1 when group is None, got {num_groups}")
    check_like("pilot", pilot, "x", x, "[d]", [dim])
    count = x.new_empty((num_groups,), dtype=torch.int64)
    sums = x.new_empty((num_groups, dim), dtype=torch.float64)
    cross = x.new_empty((num_groups, dim, dim), dtype=torch.float64)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        if group is not None and rows > 0:
            for bound in torch.stack(group.aminmax()).tolist():
                if not 0 <= bound < num_groups:
                    raise ValueError(f"group must lie in [0, {num_groups}), got {bound}")
        if not _native.serves(x):
            return reference.moments(x, group, num_groups, pilot)
        dense = with_unit_column_stride(x)
        _native.call(
            "moments",
            x,
            x=dense,
            row_stride=dense.stride(0),
            group=contiguous(group),
            pilot=contiguous(pilot),
            count=count,
            sums=sums,
            cross=cross,
            workspace=None,
            rows=rows,
            dim=dim,
            groups=num_groups,
        )
        return count, sums, cross

    return (count, sums, cross), run


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


@register("spatial_moments(Tensor x, Tensor? pilot) -> (Tensor sums, Tensor cross)")
def _spatial_moments(x: Tensor, pilot: Tensor | None) -> Op:
    check_input("x", x, "[n, C, H, W]")
    rows, channels, height, width = x.shape
    check_like("pilot", pilot, "x", x, "[C, H, W]", [channels, height, width])
    sums = x.new_empty((height, width, channels), dtype=torch.float64)
    cross = x.new_empty((height, width, channels, channels), dtype=torch.float64)

    def run() -> tuple[Tensor, Tensor]:
        if not _native.serves(x):
            return reference.spatial_moments(x, pilot)
        _native.call(
            "spatial_moments",
            x,
            x=x,
            strides=x.stride(),
            pilot=contiguous(pilot),
            sums=sums,
            cross=cross,
            rows=rows,
            channels=channels,
            height=height,
            width=width,
        )
        return sums, cross

    return (sums, cross), run


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


@register(
    "patch_moments(Tensor x, SymInt[] kernel, SymInt[] stride, SymInt[] padding,"
    " SymInt[] dilation, SymInt groups) -> (Tensor sums, Tensor cross)"
)
def _patch_moments(x: Tensor, *settings: Any) -> Op:
    *window_settings, groups = settings
    window = Window(*window_settings)
    check_input("x", x, "[n, C, H, W]")
    check_window(2, window)
    check_groups(groups, x=x.shape[1])
    out = window_counts(x.shape[2:], window)
    channels = x.shape[1] // groups
    width = channels * window.kernel[0] * window.kernel[1]
    sums = x.new_empty((groups, width), dtype=torch.float64)
    cross = x.new_empty((groups, width, width), dtype=torch.float64)

    def run() -> tuple[Tensor, Tensor]:
        if x.numel() == 0:
            return sums.zero_(), cross.zero_()
        if not _native.serves(x):
            return reference.patch_moments(x, *window, groups)
        _native.call(
            "patch_moments",
            x,
            x=x,
            strides=x.stride(),
            size=x.shape[2:],
            **window._asdict(),
            out=out,
            sums=sums,
            cross=cross,
            workspace=None,
            samples=x.shape[0],
            channels=channels,
            groups=groups,
            width=width,
        )
        return sums, cross

    return (sums, cross), run
