"""Max pooling of a dual buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference_dual
from fisherfast.ops._common import (
    Op,
    Window,
    check_no_grad,
    check_window,
    register,
    window_counts,
)
from fisherfast.ops._dual_common import check_buffer, with_contiguous_slices

MAX_SPATIAL = 3
"""The largest number of dimensions of a window."""


def dual_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] | None = None,
    padding: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    *,
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling: the largest primal of each window, and the tangents at its place.

        i(o) = argmax of x[0] over window o (the first of equals; of NaN the last)
        y[:, o] = x[:, i(o)]

    Args:
        x: [1 + P, n, C, *spatial] float32 or float64 with one to three spatial dimensions, the
            primal x[0] and its tangents; contiguous or channels-last slices are read in place.
        kernel: size of the window, one number per spatial dimension.
        stride: None for the kernel.
        padding: -inf on both sides, at most half the kernel; every window must reach beyond it;
            None for zero.
        dilation: None for one.
        ceil_mode: windows may begin inside and end outside.

    Returns:
        y [1 + P, n, C, *pooled] in the layout of ``x``.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, kernel, stride, padding or dilation, or no window fits.
        RuntimeError: x requires grad.

    Cost: reads x once from memory and writes y. Same bits for any number of threads.

    Example:
        >>> x = torch.tensor([[1.0, 5.0, 2.0, 0.0], [10.0, 20.0, 30.0, 40.0]])[:, None, None]
        >>> dual_pool(x, [2]).flatten(1).tolist()                  # one sample, one channel
        [[5.0, 2.0], [20.0, 30.0]]
    """
    check_no_grad("dual_pool", x=x)
    spatial = len(kernel)
    op = torch.ops.fisherfast.dual_pool.default
    return op(
        x,
        list(kernel),
        list(kernel if stride is None else stride),
        [0] * spatial if padding is None else list(padding),
        [1] * spatial if dilation is None else list(dilation),
        ceil_mode,
    )


@register(
    "dual_pool(Tensor x, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation,"
    " bool ceil_mode) -> Tensor"
)
def _dual_pool(x: Tensor, *settings: Any) -> Op:
    *window_settings, ceil_mode = settings
    window = Window(*window_settings)
    check_buffer(x, 4, "[1 + P, n, C, *spatial]")
    slices, n, channels, *size = x.shape
    if len(size) > MAX_SPATIAL:
        raise ValueError(f"x must have one to three spatial dimensions, got {list(x.shape)}")
    check_window(len(size), window)
    kernel, padding = list(window.kernel), list(window.padding)
    if any(2 * pad > length for pad, length in zip(padding, kernel, strict=True)):
        raise ValueError(f"padding must be at most half the kernel {kernel}, got {padding}")
    pooled = window_counts(size, window, ceil_mode=ceil_mode)
    for numbers in zip(size, pooled, *window[1:], strict=True):
        _check_no_empty_window(*numbers)
    last = _is_channels_last(x)
    y = x.new_empty([slices, n, *pooled, channels] if last else [slices, n, channels, *pooled])
    y = y.movedim(-1, 2) if last else y

    def run() -> Tensor:
        if y.numel() == 0:
            return y  # max_pool2d refuses zero channels
        if not _native.serves(x):
            return y.copy_(reference_dual.dual_pool(x, *window, ceil_mode))
        source = x if last else with_contiguous_slices(x)
        ones, zeros = ([number] * (MAX_SPATIAL - len(size)) for number in (1, 0))
        _native.call(
            "dual_pool",
            x,
            x=source,
            y=y,
            slice_stride=source.stride(0),
            tangents=slices - 1,
            outer=n if last else n * channels,
            inner=channels if last else 1,
            **{"in": [*ones, *size]},
            out=[*ones, *pooled],
            kernel=[*ones, *window.kernel],
            stride=[*ones, *window.stride],
            padding=[*zeros, *window.padding],
            dilation=[*ones, *window.dilation],
        )
        return y

    return y, run


def _check_no_empty_window(
    size: int, windows: int, stride: int, padding: int, dilation: int
) -> None:
    """Refuse windows that begin in the padding and step over all of the input, for which PyTorch
    returns -inf and an index outside the input."""
    for start in range(-padding, min(0, windows * stride - padding), stride):
        if start % dilation >= size:
            raise ValueError(
                f"dilation must be at most {size}, the numbers of x along that dimension, where a "
                f"window begins in the padding, got {dilation}"
            )


def _is_channels_last(x: Tensor) -> bool:
    """Whether each slice [n, C, *spatial] is [n, *spatial, C] in memory, not [n, C, *spatial]."""
    one = x[0]
    order = (0, *range(2, one.dim()), 1)
    return not one.is_contiguous() and one.permute(order).is_contiguous()
