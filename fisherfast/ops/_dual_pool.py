"""Max pooling of a dual buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference_dual
from fisherfast.ops._common import check_no_grad, check_window, register, window_counts
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


def _dual_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    y = _dual_pool_fake(x, kernel, stride, padding, dilation, ceil_mode)
    if y.numel() == 0:
        return y  # max_pool2d refuses zero channels
    if not _native.serves(x):
        return y.copy_(reference_dual.dual_pool(x, kernel, stride, padding, dilation, ceil_mode))
    last = _is_channels_last(x)
    if not last:
        x = with_contiguous_slices(x)
    n, channels = x.shape[1:3]
    missing = MAX_SPATIAL - len(kernel)
    ones, zeros = [1] * missing, [0] * missing
    _native.call(
        "dual_pool",
        x,
        x=x,
        y=y,
        slice_stride=x.stride(0),
        tangents=x.shape[0] - 1,
        outer=n if last else n * channels,
        inner=channels if last else 1,
        **{"in": [*ones, *x.shape[3:]]},
        out=[*ones, *y.shape[3:]],
        kernel=[*ones, *kernel],
        stride=[*ones, *stride],
        padding=[*zeros, *padding],
        dilation=[*ones, *dilation],
    )
    return y


def _dual_pool_fake(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    check_buffer(x, 4, "[1 + P, n, C, *spatial]")
    spatial = x.dim() - 3
    if not 1 <= spatial <= MAX_SPATIAL:
        raise ValueError(f"x must have one to three spatial dimensions, got {list(x.shape)}")
    window = (kernel, stride, padding, dilation)
    check_window(spatial, *window)
    if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
        raise ValueError(
            f"padding must be at most half the kernel {list(kernel)}, got {list(padding)}"
        )
    pooled = window_counts(x.shape[3:], *window, ceil_mode=ceil_mode)
    for numbers in zip(x.shape[3:], pooled, stride, padding, dilation, strict=True):
        _check_no_empty_window(*numbers)
    shape = [*x.shape[:3], *pooled]
    if not _is_channels_last(x):
        return x.new_empty(shape)
    places = range(3, x.dim())
    y = x.new_empty([x.shape[0], x.shape[1], *pooled, x.shape[2]])
    return y.permute(0, 1, x.dim() - 1, *(place - 1 for place in places))


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


register(
    "dual_pool(Tensor x, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation,"
    " bool ceil_mode) -> Tensor",
    _dual_pool,
    _dual_pool_fake,
)
