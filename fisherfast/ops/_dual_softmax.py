"""Softmax of a dual buffer along one dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference_dual
from fisherfast.ops._common import check_no_grad, register
from fisherfast.ops._dual_common import check_buffer, with_contiguous_slices


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


def _dual_softmax(x: Tensor, dim: int, log: bool) -> Tensor:
    y = _dual_softmax_fake(x, dim, log)
    dim %= x.dim()
    if not _native.serves(x):
        return y.copy_(reference_dual.dual_softmax(x, dim, log))
    x = with_contiguous_slices(x)
    _native.call(
        "dual_softmax",
        x,
        x=x,
        y=y,
        slice_stride=x.stride(0),
        tangents=x.shape[0] - 1,
        outer=x.shape[1:dim].numel(),
        width=x.shape[dim],
        inner=x.shape[dim + 1 :].numel(),
        log=log,
    )
    return y


def _dual_softmax_fake(x: Tensor, dim: int, log: bool) -> Tensor:
    check_buffer(x, 2, "[1 + P, ...]")
    if not -x.dim() < dim < x.dim() or dim == 0:
        raise ValueError(
            f"dim must be a dimension of x but the first, 1 to {x.dim() - 1}, got {dim}"
        )
    return x.new_empty(x.shape)


register("dual_softmax(Tensor x, int dim, bool log) -> Tensor", _dual_softmax, _dual_softmax_fake)
