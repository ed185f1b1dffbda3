"""Moments of rows by group."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference
from fisherfast.ops._common import (
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


def _moments(
    x: Tensor, group: Tensor | None, num_groups: int, pilot: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    count, sums, cross = results = _moments_fake(x, group, num_groups, pilot)
    if group is not None:
        _check_group_range(group, num_groups)
    if not _native.serves(x):
        return reference.moments(x, group, num_groups, pilot)
    x = with_unit_column_stride(x)
    group = None if group is None else group.contiguous()
    pilot = None if pilot is None else pilot.contiguous()
    _native.call(
        "moments",
        x,
        x=x,
        row_stride=x.stride(0),
        group=group,
        pilot=pilot,
        count=count,
        sums=sums,
        cross=cross,
        workspace=None,
        rows=x.shape[0],
        dim=x.shape[1],
        groups=num_groups,
    )
    return results


def _moments_fake(
    x: Tensor, group: Tensor | None, num_groups: int, pilot: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_moments(x, group, num_groups, pilot)
    dim = x.shape[1]
    return (
        x.new_empty((num_groups,), dtype=torch.int64),
        x.new_empty((num_groups, dim), dtype=torch.float64),
        x.new_empty((num_groups, dim, dim), dtype=torch.float64),
    )


def _check_moments(x: Tensor, group: Tensor | None, num_groups: int, pilot: Tensor | None) -> None:
    check_real("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [N, d], got {list(x.shape)}")
    check_at_least("num_groups", num_groups, 1)
    if group is None:
        if num_groups != 1:
            raise ValueError(f"num_groups must be 1 when group is None, got {num_groups}")
    else:
        if group.dtype != torch.int64:
            raise TypeError(f"group must be int64, got {dtype_name(group.dtype)}")
        check_device("group", group, "x", x)
        check_shape("group", group, "[N]", [x.shape[0]])
    if pilot is not None:
        check_like("pilot", pilot, "x", x)
        check_shape("pilot", pilot, "[d]", [x.shape[1]])


def _check_group_range(group: Tensor, num_groups: int) -> None:
    if group.numel() == 0:
        return
    for bound in torch.stack(group.aminmax()).tolist():
        if not 0 <= bound < num_groups:
            raise ValueError(f"group must lie in [0, {num_groups}), got {bound}")


register(
    "moments(Tensor x, Tensor? group, SymInt num_groups, Tensor? pilot)"
    " -> (Tensor count, Tensor sums, Tensor cross)",
    _moments,
    _moments_fake,
)
