"""What every CUDA kernel keeps, run on the host: the reference's numbers, blocks that take turns,
strides, empty input."""

import pytest
import torch
from support.op_bounds import BOUNDS
from support.op_empty import EMPTY, empty_call
from support.op_views import seen_through
from support.pairwise import DTYPES, pairwise

from fisherfast.ops.selfcheck import largest_error, results_of

ONES = [1, 1]


def added(normal, rows, dim, lifted, **kind):
    """The arguments of `lift_moments_`."""
    sums, cross = normal(5, dim + lifted), normal(1, dim + lifted, dim + lifted)
    z, weight = normal(rows, dim, **kind), normal(lifted, dim, **kind)
    offsets = torch.tensor([0, rows // 5, rows // 2, rows // 2, 2 * rows // 3, rows])
    return sums, cross, z, weight, normal(lifted, **kind), normal(lifted, **kind), offsets, 0.75, 0


# Arguments for every kernel, more than blocks of a grid of this size do in one turn.
CALLS = {
    "fisher_solve_backward": ((1, 1), lambda n, **k: [
        (n(30, 2, 2, **k), n(30, 5, 2, **k), 0.5), (n(2, 2, 2, **k), n(2, 130, 2, **k), 0.5),
    ]),
    "moments": ((8, 1), lambda n, **k: [
        (n(600, dim, **k), torch.arange(600) % 5, 5, n(dim, **k)) for dim in (3, 70)
    ]),
    "spatial_moments": ((8, 1), lambda n, **k: [(n(9, 20, 3, 40, **k), n(20, 3, 40, **k))]),
    "patch_moments": ((2, 1), lambda n, **k: [(n(2, 6, 5, 5, **k), [3, 3], ONES, ONES, ONES, 3)]),
    "lift_moments_": ((8, 1), lambda n, **k: [added(n, 150, 6, 70, **k)]),
    "gradient_gram": ((3, 1), lambda n, **k: [(n(4, 3, 5, **k), n(4, 2, 3, 2, **k), None, None)]),
    "gradient_squares": ((2, 1), lambda n, **k: [
        (n(4, 6, 5, 3, **k), n(4, 4, 5, 2, **k), [3, 1], [1, 2], [1, 0], ONES, 2),
        (n(2, 9, 4, 5, **k), n(2, 18, 4, 6, **k), [1, 2], ONES, [0, 1], ONES, 1),
    ]),
    "dual_activation": ((1, 1), lambda n, **k: [
        (n(3, 11, 3, 101, **k), "relu", [], n(3, **k), n(3, **k), None, 2)
    ]),
    "dual_norm": ((1, 1), lambda n, **k: [
        (n(2, 19, width, **k), n(width, **k), n(width, **k), 0.125, 1, 1, True)
        for width in (20, 600, 4500)
    ]),
    "dual_softmax": ((1, 1), lambda n, **k: [
        (n(2, *shape, **k), 2, False)
        for shape in ((19, 20, 1), (19, 600, 1), (5, 4500, 1), (9, 3, 100))
    ]),
    "dual_pool": ((1, 1), lambda n, **k: [
        (n(6, 7, 11, 9, 7, **k), [3, 3], [2, 2], ONES, ONES, False)
    ]),
}  # fmt: skip


def assert_equal(got, expected):
    for left, right in zip(got, expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("op", CALLS)
def test_blocks_take_turns(kernels, normal, op):
    """Catches a stride of the grid that leaves work out or does it twice."""
    grid, calls = CALLS[op]
    for call in calls(normal, dtype=torch.float32):
        with kernels.serving():
            expected = results_of(op, call)
        with kernels.serving(grid=grid):
            assert_equal(results_of(op, call), expected)


@pairwise(op=list(CALLS), view=["channels last", "every second number", "unaligned"], dtype=DTYPES)
def test_any_strides(kernels, normal, dtype, op, view):
    """The same bits. Catches a stride that is assumed, or a vector access at an address that does
    not allow it."""
    call = next(seen_through(view, op, CALLS[op][1](normal, dtype=dtype)[0]))
    plain = tuple(a.contiguous() if isinstance(a, torch.Tensor) else a for a in call)
    with kernels.serving():
        assert_equal(results_of(op, call), results_of(op, plain))


# Measured: 3e-7 and 3e-15, and 1.2e-7 for fisher_solve_backward.
HERE = BOUNDS | {"fisher_solve_backward": {torch.float32: 2e-6, torch.float64: 1e-14}}

# The sizes around one tile, a warp or a part of the work, and several of them.
CASES = {
    "fisher_solve_backward": lambda n, **k: [
        (n(b, P, P, **k), n(b, d, P, **k), 0.125)
        for b, d, P in ((1, 1, 1), (3, 2, 1), (70, 5, 2), (5, 8, 16), (3, 33, 3), (2, 64, 1),
                        (1, 130, 2))
    ],
    "moments": lambda n, **k: [
        (n(rows, dim, **k), torch.arange(rows) * 7 % groups, groups, n(dim, **k))
        for rows, dim in ((1, 1), (63, 4), (130, 17), (9001, 3), (70, 100))
        for groups in (1, 5)
    ],
    "spatial_moments": lambda n, **k: [
        (n(*shape, **k), pilot)
        for shape in ((1, 1, 1, 1), (3, 17, 60, 50), (5, 3, 4, 7), (70, 17, 3, 3), (130, 2, 1, 65),
                      (9, 40, 2, 2))
        for pilot in (None, n(*shape[1:], **k))
    ],
    "patch_moments": lambda n, **k: [
        (n(1, 1, 1, 1, **k), ONES, ONES, [0, 0], ONES, 1),
        (n(2, 4, 5, 7, **k), [3, 2], [2, 1], [1, 3], [1, 2], 2),
        (n(2, 9, 6, 5, **k), [3, 3], ONES, ONES, ONES, 1),
        (n(3, 5, 4, 40, **k), [1, 3], [1, 2], [0, 1], ONES, 5),
        (n(2, 1, 60, 50, **k), [2, 2], ONES, [0, 1], ONES, 1),  # more than 4096 patches
    ],
    "gradient_gram": lambda n, **k: [
        (n(i, T, D, **k), n(i, C, T, M, **k), *right)
        for i, C, T, D, M in ((1, 1, 1, 1, 1), (3, 2, 5, 17, 9), (2, 1, 70, 20, 33),
                              (2, 3, 17, 65, 5))
        for right in ((None, None), (n(i + 1, T + 2, D, **k), n(i + 1, C + 1, T + 2, M, **k)))
    ],
    "gradient_squares": lambda n, **k: [
        (n(1, 1, 1, 1, **k), n(1, 1, 1, 1, **k), ONES, ONES, [0, 0], ONES, 1),
        (n(3, 3, 5, 6, **k), n(3, 5, 3, 4, **k), [3, 2], [2, 1], [1, 0], [1, 2], 1),
        (n(2, 9, 4, 5, **k), n(2, 18, 4, 6, **k), [1, 2], ONES, [0, 1], ONES, 1),
        (n(2, 8, 4, 3, **k), n(2, 70, 4, 3, **k), [3, 3], ONES, ONES, ONES, 1),
        (n(4, 6, 5, 3, **k), n(4, 4, 5, 2, **k), [3, 1], [1, 2], [1, 0], ONES, 2),
        (n(3, 5, 4, 4, **k), n(3, 5, 3, 3, **k), [2, 2], ONES, [0, 0], ONES, 5),
        (n(2, 2, 9, 11, **k), n(2, 3, 10, 12, **k), [2, 2], ONES, ONES, ONES, 1),
        (n(2, 2, 2, 3, **k), n(2, 3, 5, 4, **k), [2, 2], [2, 3], [4, 5], ONES, 1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("op", CASES)
def test_matches_the_reference(kernels, normal, dtype, op):
    """Catches a lost tail of a tile, a margin that is read, a split that is lost or summed twice,
    and groups that are mixed."""
    for call in CASES[op](normal, dtype=dtype):
        with kernels.serving():
            assert largest_error(op, [call]) <= HERE[op][dtype]


@pytest.mark.parametrize(("op", "shapes"), EMPTY)
def test_empty_input(kernels, dtype, op, shapes):
    """Zeros, not what happens to be in memory. Catches a launch of no blocks."""
    call = empty_call(op, shapes, dtype=dtype)
    with kernels.serving():
        for result in results_of(op, call):
            assert result.eq(5 if result.dtype == torch.int64 and shapes == ((5, 0),) else 0).all()
