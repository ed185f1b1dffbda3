"""Random features of a batch."""

from __future__ import annotations

import math

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
        projected=projected,
        row_stride=projected.stride(0),
        bias=bias,
        pilot=pilot,
        features=features,
        sums=sums,
        rows=projected.shape[0],
        dim=projected.shape[1],
        groups=num_groups,
        first=first,
        slope=slope,
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
    check_vectors(bias, pilot, "projected", projected, projected.shape[1])
    check_slope(slope)
    check_at_least("num_groups", num_groups, 1)
    check_at_least("first", first, 0)


def check_vectors(bias: Tensor, pilot: Tensor, model_name: str, model: Tensor, lifted: int) -> None:
    for name, tensor in (("bias", bias), ("pilot", pilot)):
        check_like(name, tensor, model_name, model)
        check_shape(name, tensor, "[k]", [lifted])


def check_slope(slope: float) -> None:
    if not math.isfinite(slope):
        raise ValueError(f"slope must be finite, got {slope}")


register(
    "lift(Tensor projected, Tensor bias, Tensor pilot, float slope, SymInt num_groups,"
    " SymInt first) -> (Tensor features, Tensor sums)",
    _lift,
    _lift_fake,
)
