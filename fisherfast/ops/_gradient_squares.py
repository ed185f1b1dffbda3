"""The diagonal of the Fisher matrix of a convolution's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference
from fisherfast.ops._common import (
    check_at_least,
    check_like,
    check_no_grad,
    check_real,
    check_shape,
    check_window,
    register,
    window_counts,
)


def gradient_squares(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int] = (1, 1),
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Sums over samples of the squared gradients of a convolution's weights.

        squares[m, c, u] = sum_i ( sum_t g[i, m, t] x[i, c, t stride - padding + u dilation] )^2

    u are the places of the kernel. The sum over positions t is inside the square: it is the
    gradient of one sample. Neither patches of x nor gradients of samples are stored, and x and g
    are read in place whatever their strides. A linear layer with positions x [n, T, D],
    g [n, T, M] is the case ``x.mT[..., None], g.mT[..., None]``; a transposed convolution that
    with x and g exchanged.

    Args:
        x: [n, C, H, W] float32 or float64, the input of the convolution; zero outside.
        g: [n, M, Ho, Wo], dtype and device of ``x``: gradients at its output.
        kernel: (kh, kw).
        stride: of the windows.
        padding: zeros on both sides.
        dilation: between the numbers of a window.
        groups: a divisor of C and M; channels of g are paired with those of x in their group.

    Returns:
        squares: [M, C / groups, kh, kw] float64, unit of x g squared.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device, or a setting that a convolution cannot have.
        RuntimeError: an input requires grad.

    Cost: n M (C / groups) kh kw Ho Wo multiply-adds. In float32 the products are summed in float32
    over the positions, in blocks of 256 (in groups of at most 4 outputs: of all positions, spread
    over the lanes of a vector), their squares in float32 over at most 64 samples and then in
    float64. The bits do not depend on the number of threads.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])[:, None, None]  # one sample, one channel, H = 1
        >>> g = torch.tensor([[1.0, 10.0]])[:, None, None]
        >>> gradient_squares(x, g, (1, 2)).flatten().tolist()  # (1 + 20)^2, (2 + 30)^2
        [441.0, 1024.0]
    """
    check_no_grad("gradient_squares", x=x, g=g)
    op = torch.ops.fisherfast.gradient_squares.default
    return op(x, g, list(kernel), list(stride), list(padding), list(dilation), groups)


def _gradient_squares(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    squares = _gradient_squares_fake(x, g, kernel, stride, padding, dilation, groups)
    if not _native.serves(x):
        return reference.gradient_squares(x, g, kernel, stride, padding, dilation, groups)
    _native.call(
        "gradient_squares",
        x,
        x=x,
        g=g,
        x_strides=x.stride(),
        g_strides=g.stride(),
        squares=squares,
        workspace=None,
        samples=x.shape[0],
        groups=groups,
        inputs=x.shape[1] // groups,
        outputs=g.shape[1] // groups,
        **{"in": x.shape[2:]},
        out=g.shape[2:],
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
    )
    return squares


def _gradient_squares_fake(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    check_real("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must have shape [n, C, H, W], got {list(x.shape)}")
    check_like("g", g, "x", x)
    window = (kernel, stride, padding, dilation)
    check_window(2, *window)
    if g.dim() != 4:
        raise ValueError(f"g must have shape [n, M, Ho, Wo], got {list(g.shape)}")
    check_at_least("groups", groups, 1)
    samples, channels, *size = x.shape
    for name, count in (("channels of x", channels), ("channels of g", g.shape[1])):
        if count % groups:
            raise ValueError(f"{name} must be a multiple of groups = {groups}, got {count}")
    out = window_counts(size, *window)
    check_shape("g", g, "[n, M, Ho, Wo]", [samples, g.shape[1], *out])
    return x.new_empty((g.shape[1], channels // groups, *kernel), dtype=torch.float64)


register(
    "gradient_squares(Tensor x, Tensor g, SymInt[] kernel, SymInt[] stride, SymInt[] padding,"
    " SymInt[] dilation, SymInt groups) -> Tensor",
    _gradient_squares,
    _gradient_squares_fake,
)
