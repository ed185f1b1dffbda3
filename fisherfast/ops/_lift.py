"""Moments of a batch with its random features, without storing them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference
from fisherfast.ops._common import (
    Op,
    check_device,
    check_index,
    check_input,
    check_like,
    check_no_grad,
    dtype_name,
    register,
    with_unit_column_stride,
)


def lift_moments_(
    sums: Tensor,
    cross: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    pilot: Tensor,
    *,
    offsets: Tensor | None = None,
    slope: float = 0.7,
    start: int = 0,
) -> None:
    """Adds the moments of raw and lifted features of a batch, without storing the features.

        f_i = [z_i | leaky_relu(weight z_i + bias) - pilot],      K = d + k features
        sums_g += sum of f_i over the rows i of fold g
        cross_h += sum of f_i f_i^T over the rows i of half h (folds g = h mod H), lower triangle

    The rows are sorted by fold, even folds first: 0, 2, 4, ..., 1, 3, ..., so that a half is one
    run of rows.

    Projection, bias, activation, centring, sums and products run over tiles that stay in the
    caches. The dictionary grows at the cost of its new columns: with ``start`` the first features
    count as known, and only what is new is added. On the CPU growing over the same rows gives the
    same bits as having all features from the beginning.

    Args:
        sums: [F, K'] float64, contiguous; changed in place. K' may be larger than K: features after
            the first K are not touched, here and in ``cross``.
        cross: [H, K', K'] float64, contiguous, H = 1 or 2 (all rows, or even and odd folds); its
            lower triangle is changed in place, the upper one is not touched.
        z: [n, d] float32 or float64 raw features; rows may be strided.
        weight: [k, d], dtype and device of ``z``, as bias and pilot.
        bias: [k].
        pilot: [k], roughly the mean of the lifted features.
        offsets: [F + 1] int64 on the device of ``z``: the row at which each fold's segment begins,
            in this order of folds, and n last; None for all rows in fold 0.
        slope: factor of the leaky ReLU below zero.
        start: number of leading features that are known, 0 to K.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device, strides, offsets (their numbers are checked on the CPU
            alone), slope or start. Nothing is changed then.
        RuntimeError: an input requires grad.

    Cost: n ((K - start)(K + start) / 2 + k d) multiply-adds and about 1 MB of scratch. Float32
    products are summed in float32 over at most 512 rows, then in float64. The bits do not depend on
    the number of threads.

    Example:
        >>> sums, cross = torch.zeros(1, 2).double(), torch.zeros(1, 2, 2).double()
        >>> one, zero = torch.ones(1, 1), torch.zeros(1)
        >>> lift_moments_(sums, cross, torch.tensor([[-1.0], [3.0]]), one, zero, zero, slope=-1.0)
        >>> sums.tolist(), cross[0].tril().tolist()                # features z and |z|
        ([[2.0, 4.0]], [[10.0, 0.0], [8.0, 10.0]])
    """
    check_no_grad(
        "lift_moments_", sums=sums, cross=cross, z=z, weight=weight, bias=bias, pilot=pilot
    )
    if offsets is None:
        offsets = torch.full((len(sums) + 1,), len(z), dtype=torch.int64, device=z.device)
        offsets[0] = 0
    op = torch.ops.fisherfast.lift_moments_.default
    op(sums, cross, z, weight, bias, pilot, offsets, slope, start)


@register(
    "lift_moments_(Tensor(a!) sums, Tensor(b!) cross, Tensor z, Tensor weight, Tensor bias,"
    " Tensor pilot, Tensor offsets, float slope, SymInt start) -> ()"
)
def _lift_moments_(
    sums: Tensor,
    cross: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    pilot: Tensor,
    offsets: Tensor,
    slope: float,
    start: int,
) -> Op:
    check_input("z", z, "[n, d]")
    rows, dim = z.shape
    check_like("weight", weight, "z", z)
    if weight.dim() != 2 or weight.shape[1] != dim:
        raise ValueError(f"weight must have shape [k, d] with d = {dim}, got {list(weight.shape)}")
    lifted = weight.shape[0]
    check_like("bias", bias, "z", z, "[k]", [lifted])
    check_like("pilot", pilot, "z", z, "[k]", [lifted])
    if not math.isfinite(slope):
        raise ValueError(f"slope must be finite, got {slope}")
    size = dim + lifted
    _check_accumulators(sums, cross, z, size)
    check_index("offsets", offsets, "z", z, "[F + 1]", [sums.shape[0] + 1])
    if not 0 <= start <= size:
        raise ValueError(f"start must lie in [0, K] = [0, {size}], got {start}")

    def run() -> None:
        if offsets.device.type == "cpu":
            _check_segments(offsets.tolist(), rows)
        if not _native.serves(z):
            reference.lift_moments_(sums, cross, z, weight, bias, pilot, offsets, slope, start)
            return
        dense = with_unit_column_stride(z)
        _native.call(
            "lift_moments",
            z,
            z=dense,
            row_stride=dense.stride(0),
            weight=weight.contiguous(),
            bias=bias.contiguous(),
            pilot=pilot.contiguous(),
            offsets=offsets.contiguous(),
            sums=sums,
            cross=cross,
            workspace=None,
            rows=rows,
            dim=dim,
            lifted=lifted,
            folds=len(sums),
            halves=len(cross),
            start=start,
            size=sums.shape[1],
            slope=slope,
        )

    return None, run


def _check_segments(offsets: list[int], rows: int) -> None:
    if offsets != sorted(offsets) or offsets[0] != 0 or offsets[-1] != rows:
        raise ValueError(f"offsets must rise from 0 to n = {rows}, got {offsets}")


def _check_accumulators(sums: Tensor, cross: Tensor, z: Tensor, size: int) -> None:
    room = sums.shape[-1] if sums.dim() == 2 else size
    if room < size:
        raise ValueError(
            f"sums must have shape [F, K] with K at least {size}, got {list(sums.shape)}"
        )
    named = (("sums", sums, "[F, K]", [room]), ("cross", cross, "[H, K, K]", [room, room]))
    for name, tensor, symbol, shape in named:
        if tensor.dtype != torch.float64:
            raise TypeError(f"{name} must be float64, got {dtype_name(tensor.dtype)}")
        check_device(name, tensor, "z", z)
        if tensor.dim() != len(shape) + 1 or list(tensor.shape[1:]) != shape:
            raise ValueError(
                f"{name} must have shape {symbol} with K = {room}, got {list(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    if sums.shape[0] < 1:
        raise ValueError(f"sums must have shape [F, K] with F at least 1, got {list(sums.shape)}")
    if cross.shape[0] not in (1, 2):
        raise ValueError(
            f"cross must have shape [H, K, K] with H = 1 or 2, got {list(cross.shape)}"
        )
