"""Random features: one batch of them, and their moments without ever having them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference
from fisherfast.ops._common import (
    address,
    check_at_least,
    check_device,
    check_like,
    check_no_grad,
    check_real,
    check_shape,
    dtype_name,
    register,
    with_unit_column_stride,
)


def lift(
    projected: Tensor,
    bias: Tensor,
    pilot: Tensor,
    *,
    slope: float = 0.7,
    num_groups: int = 1,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Random features from their projections, and their sums by fold, in one pass.

        features_ij = leaky_relu(projected_ij + bias_j) - pilot_j
        sums_gj = sum of features_ij over rows i with (first + i) mod num_groups = g

    Args:
        projected: [n, k] float32 or float64, the product of samples and random weights; rows may
            be strided.
        bias: [k], dtype and device of ``projected``.
        pilot: [k], dtype and device of ``projected``: roughly the mean feature.
        slope: factor of the leaky ReLU below zero.
        num_groups: G >= 1, the number of folds.
        first: number of samples dealt to folds before these, >= 0.

    Returns:
        features: [n, k], dtype of ``projected``.
        sums: [G, k] float64.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device, slope, num_groups or first.
        RuntimeError: an input requires grad.

    Cost: reads and writes n k numbers. The bits do not depend on the number of threads.

    Example:
        >>> zero = torch.zeros(1)
        >>> features, sums = lift(torch.tensor([[-1.0], [2.0], [3.0]]), zero, zero, slope=0.5,
        ...                       num_groups=2)
        >>> features.flatten().tolist(), sums.flatten().tolist()
        ([-0.5, 2.0, 3.0], [2.5, 2.0])
    """
    check_no_grad("lift", projected=projected, bias=bias, pilot=pilot)
    op = torch.ops.fisherfast.lift.default
    return op(projected, bias, pilot, slope, num_groups, first)


def _lift(
    projected: Tensor, bias: Tensor, pilot: Tensor, slope: float, num_groups: int, first: int
) -> tuple[Tensor, Tensor]:
    features, sums = results = _lift_fake(projected, bias, pilot, slope, num_groups, first)
    if not _native.serves(projected):
        return reference.lift(projected, bias, pilot, slope, num_groups, first)
    projected = with_unit_column_stride(projected)
    bias, pilot = bias.contiguous(), pilot.contiguous()
    _native.call(
        "lift",
        projected,
        projected.data_ptr(),
        projected.stride(0),
        bias.data_ptr(),
        pilot.data_ptr(),
        features.data_ptr(),
        sums.data_ptr(),
        *projected.shape,
        num_groups,
        first,
        slope,
    )
    return results


def _lift_fake(
    projected: Tensor, bias: Tensor, pilot: Tensor, slope: float, num_groups: int, first: int
) -> tuple[Tensor, Tensor]:
    _check_lift(projected, bias, pilot, slope, num_groups, first)
    features = projected.new_empty(projected.shape)
    return features, projected.new_empty((num_groups, bias.shape[0]), dtype=torch.float64)


def _check_lift(
    projected: Tensor, bias: Tensor, pilot: Tensor, slope: float, num_groups: int, first: int
) -> None:
    check_real("projected", projected)
    if projected.dim() != 2:
        raise ValueError(f"projected must have shape [n, k], got {list(projected.shape)}")
    _check_vectors(bias, pilot, "projected", projected, projected.shape[1])
    _check_slope(slope)
    check_at_least("num_groups", num_groups, 1)
    check_at_least("first", first, 0)


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
    """Adds the moments of raw and lifted features of a batch, without ever having the features.

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
            in this order of folds, and n at the end; None for all rows in fold 0.
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
) -> None:
    _lift_moments_fake(sums, cross, z, weight, bias, pilot, offsets, slope, start)
    if offsets.device.type == "cpu":
        _check_segments(offsets.tolist(), len(z))
    if not _native.serves(z):
        reference.lift_moments_(sums, cross, z, weight, bias, pilot, offsets, slope, start)
        return
    z = with_unit_column_stride(z)
    weight, bias, pilot = weight.contiguous(), bias.contiguous(), pilot.contiguous()
    offsets = offsets.contiguous()
    folds, halves, (lifted, dim) = len(sums), len(cross), weight.shape
    workspace = _native.workspace("lift_moments", z, len(z), dim, lifted, folds, halves)
    _native.call(
        "lift_moments",
        z,
        z.data_ptr(),
        z.stride(0),
        weight.data_ptr(),
        bias.data_ptr(),
        pilot.data_ptr(),
        offsets.data_ptr(),
        sums.data_ptr(),
        cross.data_ptr(),
        address(workspace),
        len(z),
        dim,
        lifted,
        folds,
        halves,
        start,
        sums.shape[1],
        slope,
    )


def _lift_moments_fake(
    sums: Tensor,
    cross: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    pilot: Tensor,
    offsets: Tensor,
    slope: float,
    start: int,
) -> None:
    check_real("z", z)
    if z.dim() != 2:
        raise ValueError(f"z must have shape [n, d], got {list(z.shape)}")
    check_like("weight", weight, "z", z)
    if weight.dim() != 2 or weight.shape[1] != z.shape[1]:
        raise ValueError(
            f"weight must have shape [k, d] with d = {z.shape[1]}, got {list(weight.shape)}"
        )
    _check_vectors(bias, pilot, "z", z, weight.shape[0])
    size = z.shape[1] + weight.shape[0]
    room = sums.shape[-1] if sums.dim() == 2 else size
    if room < size:
        raise ValueError(
            f"sums must have shape [F, K] with K at least {size}, got {list(sums.shape)}"
        )
    _check_accumulator("sums", sums, z, "[F, K]", [room])
    _check_accumulator("cross", cross, z, "[H, K, K]", [room, room])
    if sums.shape[0] < 1:
        raise ValueError(f"sums must have shape [F, K] with F at least 1, got {list(sums.shape)}")
    if cross.shape[0] not in (1, 2):
        raise ValueError(
            f"cross must have shape [H, K, K] with H = 1 or 2, got {list(cross.shape)}"
        )
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets must be int64, got {dtype_name(offsets.dtype)}")
    check_device("offsets", offsets, "z", z)
    check_shape("offsets", offsets, "[F + 1]", [sums.shape[0] + 1])
    _check_slope(slope)
    if not 0 <= start <= size:
        raise ValueError(f"start must lie in [0, K] = [0, {size}], got {start}")


def _check_segments(offsets: list[int], rows: int) -> None:
    if offsets != sorted(offsets) or offsets[0] != 0 or offsets[-1] != rows:
        raise ValueError(f"offsets must rise from 0 to n = {rows}, got {offsets}")


def _check_vectors(
    bias: Tensor, pilot: Tensor, model_name: str, model: Tensor, lifted: int
) -> None:
    for name, tensor in (("bias", bias), ("pilot", pilot)):
        check_like(name, tensor, model_name, model)
        check_shape(name, tensor, "[k]", [lifted])


def _check_slope(slope: float) -> None:
    if not math.isfinite(slope):
        raise ValueError(f"slope must be finite, got {slope}")


def _check_accumulator(name: str, tensor: Tensor, z: Tensor, symbol: str, shape: list[int]) -> None:
    if tensor.dtype != torch.float64:
        raise TypeError(f"{name} must be float64, got {dtype_name(tensor.dtype)}")
    check_device(name, tensor, "z", z)
    if tensor.dim() != len(shape) + 1 or list(tensor.shape[1:]) != shape:
        raise ValueError(
            f"{name} must have shape {symbol} with K = {shape[0]}, got {list(tensor.shape)}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")


register(
    "lift(Tensor projected, Tensor bias, Tensor pilot, float slope, SymInt num_groups,"
    " SymInt first) -> (Tensor features, Tensor sums)",
    _lift,
    _lift_fake,
)
register(
    "lift_moments_(Tensor(a!) sums, Tensor(b!) cross, Tensor z, Tensor weight, Tensor bias,"
    " Tensor pilot, Tensor offsets, float slope, SymInt start) -> ()",
    _lift_moments_,
    _lift_moments_fake,
)
