"""Calls of every CPU kernel, each way that its source file distinguishes, for threads.cpp.

A kernel starts a thread for about 1e6 multiply-adds in fisher_solve, spatial_moments and
gradient_squares, 1e5 numbers in the backward pass, 1024 rows in moments of few columns,
32 KiB of a slice in dual_activation, 1e5 numbers in the other dual ops, and 4e6 multiply-adds in
the others: each case has at least 3 times that.
"""

from __future__ import annotations

import torch
from support.kernel_calls import kernels_called_by, request
from torch import Tensor

from fisherfast import ops


def run_all(dtype: torch.dtype) -> None:
    """Calls the ops one after another."""
    generator = torch.Generator().manual_seed(20250131)

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) - 0.5

    def systems(batch: int, d: int, P: int) -> tuple[Tensor, Tensor]:
        return some(batch, d, d) / d + torch.eye(d, dtype=dtype), some(batch, d, P)

    def lift_moments(rows: int, d: int, k: int, folds: int, halves: int, start: int) -> None:
        sums = torch.zeros(folds, d + k, dtype=torch.float64)
        cross = torch.zeros(halves, d + k, d + k, dtype=torch.float64)
        offsets = torch.arange(folds + 1) * rows // folds
        inputs = some(rows, d), some(k, d), some(k), some(k)
        ops.lift_moments_(sums, cross, *inputs, offsets=offsets, start=start)

    def last(x: Tensor) -> Tensor:
        """The same numbers with channels, dimension -3, last in memory."""
        return x.movedim(-3, -1).contiguous().movedim(-1, -3)

    ops.fisher_solve_details(*systems(900, 24, 3), ridge=0.01, solution=True)  # lanes
    ops.fisher_solve_details(*systems(200, 40, 3), inverse_rows=True, solution=True)  # blocks
    ops.fisher_solve(*systems(2, 200, 3))  # more threads than systems
    ops.fisher_solve_backward(some(200, 5, 5), some(200, 40, 5), 0.01)
    for rows, d, groups in ((8000, 10, 16), (1600, 130, 3)):  # few columns, many
        x = some(rows, d)
        ops.moments(x, pilot=some(d))
        ops.moments(x, torch.arange(rows) * 7 % groups, groups, pilot=some(d))
    ops.spatial_moments(some(30, 12, 30, 33), pilot=some(12, 30, 33))
    ops.spatial_moments(last(some(30, 17, 30, 33)))
    ops.gradient_gram(some(13, 33, 50), some(13, 3, 33, 17), some(13, 33, 50), some(13, 3, 33, 17))
    ops.gradient_gram(some(4, 300, 27), some(4, 300, 33))
    ops.gradient_squares(some(3, 19, 6, 7), some(3, 150, 6, 7), (3, 3), padding=(1, 1))
    depthwise = some(12, 40, 29, 30), some(12, 40, 29, 30)
    ops.gradient_squares(*depthwise, (3, 3), padding=(1, 1), groups=40)
    for shape, groups in (((20, 2, 40, 40), 1), ((4, 16, 30, 30), 1), ((15, 20, 40, 40), 20)):
        ops.patch_moments(some(*shape), (3, 3), padding=(1, 1), groups=groups)
    lift_moments(1600, 10, 120, 4, 2, 0)
    lift_moments(1600, 40, 100, 16, 1, 37)
    ops.dual_norm(some(4, 600, 170), some(170), some(170))
    ops.dual_softmax(some(4, 600, 170))
    ops.dual_softmax(some(4, 30, 50, 70), 2, log=True)
    ops.dual_pool(some(6, 50, 1, 31, 70), [3, 3], [2, 2], [1, 1])
    ops.dual_pool(last(some(6, 3, 37, 31, 33)), [3, 3], [2, 2], [1, 1])
    ops.dual_activation(some(4, 16, 7, 501), "gelu", scale=some(7), shift=some(7))
    ops.dual_activation(some(4, 2010, 28), "prelu", slope=some(28))  # channels last
    ops.dual_activation(some(4, 75, 5, 3003), "relu", scale=some(5))  # past the caches


def recorded() -> bytes:
    """The cases of both dtypes."""
    cases: list[bytes] = []

    def record(op: str, like: Tensor, /, **fields: object) -> None:
        cases.append(request(op, like.dtype, fields))

    with kernels_called_by(record):
        for dtype in (torch.float32, torch.float64):
            run_all(dtype)
    return b"".join(cases)
