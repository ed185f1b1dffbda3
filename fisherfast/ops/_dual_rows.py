"""Normalisation and softmax of the rows of a dual buffer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference_dual
from fisherfast.ops._common import (
    Op,
    check_at_least,
    check_like,
    check_no_grad,
    contiguous,
    register,
)
from fisherfast.ops._dual_common import check_buffer, with_contiguous_slices


def dual_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    inner: int = 1,
    centre: bool = True,
) -> Tensor:
    """Normalised rows of a primal and of its P tangents: layer, group, instance and RMS norm.

        m = mean(u) (0 unless centred),   r = 1 / sqrt(mean((u - m)^2) + eps),   h = r (u - m)
        y[0] = w h + b,   y[p] = w r (v - mean(v) - h mean(h v)),   u = x[0], v = x[p]

    with mean(v) left out unless centred.

    Args:
        x: [1 + P, rows, width] float32 or float64, the primal x[0] and its tangents.
        weight: [K], dtype and device of ``x``, K = groups * width / inner; None for one. Entry j
            of row i uses weight[((i mod groups) * width + j) // inner].
        bias: [K], or None for zero.
        eps: added to the variance, not negative.
        groups: rows that follow each other with weights of their own: 1 for a layer norm, G for a
            group norm of [n, C, ...] seen as [n G, C / G * positions].
        inner: neighbours that share a weight: 1 for a layer norm, the positions of a channel for a
            group norm.
        centre: subtract the mean; False for an RMS norm.

    Returns:
        y [1 + P, rows, width], contiguous.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device, a negative eps.
        RuntimeError: an input requires grad.

    Cost: reads and writes x once from memory when a row and its tangents fit into the caches. Same
    bits for any number of threads.

    Example:
        >>> x = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])         # one row, one tangent
        >>> y = dual_norm(x, eps=0.0, centre=False)                # h = [3, 4] / sqrt(12.5)
        >>> y[0].square().mean().item(), abs(round((y[0] * y[1]).sum().item(), 6))
        (1.0, 0.0)
    """
    check_no_grad("dual_norm", x=x, weight=weight, bias=bias)
    op = torch.ops.fisherfast.dual_norm.default
    return op(x, weight, bias, eps, groups, inner, centre)


@register(
    "dual_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, SymInt groups, SymInt inner,"
    " bool centre) -> Tensor"
)
def _dual_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: int,
    inner: int,
    centre: bool,
) -> Op:
    check_buffer(x, 3, "[1 + P, rows, width]")
    if x.dim() != 3:
        raise ValueError(f"x must have shape [1 + P, rows, width], got {list(x.shape)}")
    slices, rows, width = x.shape
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    check_at_least("groups", groups, 1)
    check_at_least("inner", inner, 1)
    size = groups * width
    if size % inner:
        raise ValueError(f"inner must divide groups * width = {size}, got {inner}")
    check_like("weight", weight, "x", x, "[groups * width / inner]", [size // inner])
    check_like("bias", bias, "x", x, "[groups * width / inner]", [size // inner])
    y = x.new_empty(x.shape)

    def run() -> Tensor:
        if not _native.serves(x):
            return y.copy_(reference_dual.dual_norm(x, weight, bias, eps, groups, inner, centre))
        source = with_contiguous_slices(x)
        _native.call(
            "dual_norm",
            x,
            x=source,
            y=y,
            weight=contiguous(weight),
            bias=contiguous(bias),
            slice_stride=source.stride(0),
            tangents=slices - 1,
            rows=rows,
            width=width,
            groups=groups,
            inner=inner,
            eps=eps,
            centre=centre,
        )
        return y

    return y, run


def dual_softmax(x: Tensor, dim: int = -1, *, log: bool = False) -> Tensor:
    """Softmax or log-softmax of a primal and of its P tangents along one dimension.

        s = softmax(x[0]);   y[0] = s,       y[p] = s (x[p] - sum(s x[p]))
        log:                 y[0] = log s,   y[p] = x[p] - sum(s x[p])

    Args:
        x: [1 + P, ...] float32 or float64, the primal x[0] and its tangents.
        dim: dimension that is summed over, not the first.
        log: log-softmax.

    Returns:
        y [1 + P, ...], contiguous. A primal row of -inf alone gives NaN, as in PyTorch.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or dimension.
        RuntimeError: x requires grad.

    Cost: reads and writes x once from memory when a row and its tangents fit into the caches. Same
    bits for any number of threads.

    Example:
        >>> dual_softmax(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist()
        [[0.5, 0.5], [0.25, -0.25]]
    """
    check_no_grad("dual_softmax", x=x)
    return torch.ops.fisherfast.dual_softmax.default(x, dim, log)


@register("dual_softmax(Tensor x, int dim, bool log) -> Tensor")
def _dual_softmax(x: Tensor, dim: int, log: bool) -> Op:
    check_buffer(x, 2, "[1 + P, ...]")
    if not -x.dim() < dim < x.dim() or dim == 0:
        raise ValueError(
            f"dim must be a dimension of x but the first, 1 to {x.dim() - 1}, got {dim}"
        )
    dim %= x.dim()
    y = x.new_empty(x.shape)

    def run() -> Tensor:
        if not _native.serves(x):
            return y.copy_(reference_dual.dual_softmax(x, dim, log))
        source = with_contiguous_slices(x)
        _native.call(
            "dual_softmax",
            x,
            x=source,
            y=y,
            slice_stride=source.stride(0),
            tangents=x.shape[0] - 1,
            outer=math.prod(x.shape[1:dim]),
            width=x.shape[dim],
            inner=math.prod(x.shape[dim + 1 :]),
            log=log,
        )
        return y

    return y, run
