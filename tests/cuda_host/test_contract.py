"""What every CUDA kernel keeps, run on the host: the reference's numbers, blocks that take turns,
strides, empty input."""

import pytest
import torch
from cuda_host.harness import ORDERS
from support.op_cases import CASES, HOSTILE, ONES, added, grouped, pair, solved, squared
from support.op_empty import EMPTY, empty_call
from support.op_oracle import BOUNDS, assert_right
from support.op_views import seen_through
from support.pairwise import DTYPES, pairwise

from fisherfast.ops.selfcheck import results_of

ONE_ORDER = ORDERS[-1:]  # the random one; all of them are taken where the reference is compared

# Arguments for every kernel, more than blocks of a grid of this size do in one turn.
CALLS = {
    "fisher_solve": ((1, 1), lambda n, **k: [
        solved(n, (count,), dim, 2, rows, **k)
        for count, dim in ((40, 5), (7, 40), (2, 66))
        for rows in (False, True)
    ]),
    "fisher_solve_backward": ((1, 1), lambda n, **k: [
        (n(30, 2, 2, **k), n(30, 5, 2, **k), 0.5), (n(2, 2, 2, **k), n(2, 130, 2, **k), 0.5),
    ]),
    "moments": ((8, 1), lambda n, **k: [
        grouped(n, 600, dim, 5, **k) for dim in (3, 70)
    ]),
    "spatial_moments": ((8, 1), lambda n, **k: [(n(9, 20, 3, 40, **k), n(20, 3, 40, **k))]),
    "patch_moments": ((2, 1), lambda n, **k: [(n(2, 6, 5, 5, **k), [3, 3], ONES, ONES, ONES, 3)]),
    "lift_moments_": ((8, 1), lambda n, **k: [added(n, 150, 6, 70, halves=1, **k)]),
    "gradient_gram": ((3, 1), lambda n, **k: [(*pair(n, 4, 2, 3, 5, 2, **k), None, None)]),
    "gradient_squares": ((2, 1), lambda n, **k: [
        squared(n, (4, 6, 5, 3), 4, [3, 1], [1, 2], [1, 0], groups=2, **k),
        squared(n, (2, 9, 4, 5), 18, [1, 2], padding=[0, 1], **k),
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


@pytest.mark.parametrize("op", CALLS)
def test_blocks_take_turns(kernels, normal, op):
    """Catches a stride of the grid that leaves work out or does it twice."""
    grid, calls = CALLS[op]
    for call in calls(normal, dtype=torch.float32):
        with kernels.serving():
            expected = results_of(op, call)
        with kernels.serving(grid=grid):
            assert all(map(torch.equal, results_of(op, call), expected))


@pairwise(
    op=list(CALLS),
    view=["channels last", "every second number", "slices apart", "unaligned"],
    dtype=DTYPES,
)
def test_any_strides(kernels, normal, dtype, op, view):
    """The same bits. Catches a stride that is assumed, or a vector access at an address that does
    not allow it."""
    for call in CALLS[op][1](normal, dtype=dtype):
        moved = next(seen_through(view, op, call))
        plain = tuple(a.contiguous() if isinstance(a, torch.Tensor) else a for a in moved)
        with kernels.serving(orders=ONE_ORDER):
            assert all(map(torch.equal, results_of(op, moved), results_of(op, plain)))


# Elementwise, where the largest number of a slice is about one. Measured: 8.7e-7 and 1.8e-15.
HERE = BOUNDS | {"dual_norm": {torch.float32: 4e-6, torch.float64: 1e-14}}


@pytest.mark.parametrize("op", CASES)
def test_matches_the_reference(kernels, normal, dtype, op):
    """Catches a lost tail of a tile, a margin that is read, a split that is lost or summed twice,
    and groups that are mixed."""
    calls = CASES[op](normal, dtype=dtype)
    if op == "lift_moments_":  # more rows than the workspace holds at a time
        calls.append(added(normal, 8192 + 77, 2, 3, 3, dtype=dtype))
    with kernels.serving():
        for call in calls:
            assert_right(op, call, HERE)


@pytest.mark.parametrize("op", HOSTILE)
def test_numbers_that_are_not_finite_stay_in_their_place(kernels, normal, dtype, op):
    """NaN, infinities, ties, exponents out of range. Catches 0 * NaN in lanes that are masked, sums
    that are shared by rows, groups or positions, and a NaN that a comparison swallows."""
    with kernels.serving(orders=ONE_ORDER):
        for call in HOSTILE[op](normal, dtype=dtype):
            assert_right(op, call, HERE)


@pytest.mark.parametrize("op", ["dual_activation", "dual_norm", "dual_softmax"])
def test_in_place(kernels, normal, dtype, op):
    """Catches a primal that is overwritten while tangents still need it: a long row takes nine of
    them in three turns."""
    for tangents in (0, 9):
        for call in CALLS[op][1](normal, dtype=dtype):
            x = normal(1 + tangents, 3, *call[0].shape[2:], dtype=dtype)
            with kernels.serving(orders=ONE_ORDER):
                (expected,) = results_of(op, (x, *call[1:]))
            with kernels.serving(in_place=True):
                results_of(op, (x, *call[1:]))
            assert torch.equal(x, expected)


@pytest.mark.parametrize(("op", "shapes"), EMPTY)
def test_empty_input(kernels, dtype, op, shapes):
    """Zeros, not what happens to be in memory. Catches a launch of no blocks."""
    call = empty_call(op, shapes, dtype=dtype)
    with kernels.serving(orders=ONE_ORDER):
        for result in results_of(op, call):
            assert result.eq(5 if result.dtype == torch.int64 and shapes == ((5, 0),) else 0).all()
