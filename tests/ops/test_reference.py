"""Every op against its reference in float64, at every size, on every instruction set."""

import pytest
import torch
from support.op_cases import (
    CASES,
    HOSTILE,
    ONES,
    ZEROS,
    added,
    channels_last,
    grouped,
    images_last,
    normed,
    pair,
    solved,
    squared,
)  # fmt: skip
from support.op_oracle import assert_right

from fisherfast import _native
from fisherfast.ops import selfcheck

SIZES = [*range(1, 36), 48, 63, 64, 65, 96, 127, 128, 129, 130]

# Sizes one at a time, at which a vector, a panel or a group of tangents is cut off or runs over.
EVERY_SIZE = {
    "fisher_solve": lambda n, s, **k: [
        solved(n, (17,), s, 2, **k), solved(n, (s,), 5, 3, **k), solved(n, (s,), 33, 1, **k),
        solved(n, (9,), 16, 1 + s % 17, **k),
    ],
    "fisher_solve_backward": lambda n, s, **k: [
        (n(3, 2, 2, **k), n(3, s, 2, **k), 0.3), (n(2, s, s, **k), n(2, 5, s, **k), 0.3)
    ],
    "moments": lambda n, s, **k: [grouped(n, s, 17, **k), grouped(n, 67, s, **k)],
    "spatial_moments": lambda n, s, **k: [
        (n(9, s, 2, 3, **k), None), (n(6, 3, 2, s, **k), None), (n(s, 5, 2, 2, **k), None)
    ],
    "patch_moments": lambda n, s, **k: [
        (n(2, 2, 2, s, **k), [2, 3], ONES, [0, 2], ONES, 1),
        (n(2, 2, 2, s, **k), [2, 3], [1, 2], ONES, ONES, 1),
        (n(3, s, 3, 3, **k), ONES, ONES, ZEROS, ONES, 1),
    ],
    "lift_moments_": lambda n, s, **k: [
        added(n, 37, 1 + s * 7 % s, s, **k), added(n, 37, s, 1 + s % 5, **k), added(n, s, 3, 9, **k)
    ],
    "gradient_gram": lambda n, s, **k: [
        (*pair(n, 2, 2, s, 3, 2, **k), None, None), (*pair(n, 2, 2, 3, s, 2, **k), None, None),
        (*pair(n, 2, 2, 3, 2, s, **k), None, None),
        (*pair(n, s, 2, 3, 5, 4, **k), *pair(n, 7, 1, 3, 5, 4, **k)),
    ],
    "gradient_squares": lambda n, s, **k: [
        squared(n, (3, c, 1, positions), m, ONES, **k)
        for m, c, positions in ((s, 2, 15), (3, s, 15), (17, 17, s))
    ],
    "dual_activation": lambda n, s, **k: [
        (n(3, 2, 3, s, **k), "gelu", [], n(3, **k), n(3, **k), None, 2),
        (n(3, s, 17, **k), "elu", [1.0, 1.0, 1.0], None, None, None, 2),
        (n(1 + s % 17, 2, 37, **k), "relu", [], None, None, None, 2),
    ],
    "dual_norm": lambda n, s, **k: [
        normed(n, (1 + s % 17, 5, s), s, **k), normed(n, (6, 4, s), 4 * s, groups=4, **k)
    ],
    "dual_softmax": lambda n, s, **k: [
        (n(*shape, **k), dim, log)
        for shape, dim in (((1 + s % 17, 5, s), 2), ((6, s, 5), 1), ((4, 3, 6, s), -2))
        for log in (False, True)
    ],
    "dual_pool": lambda n, s, **k: [
        *((n(1 + s % 17, 1, 2, 5, 2 + s, **k), [3, 3], [1, stride], ONES, ONES, False)
          for stride in (1, 2, 3)),
        (channels_last(n(1 + s % 17, 2, s, 5, 6, **k)), [3, 2], [2, 1], ONES, [1, 2], False),
    ],
}  # fmt: skip

# Work for three threads, on every way to share it; results beyond the caches, which are written
# past them; rows whose sums in float32, one number after another, are wrong by 1e-4 and more.
LARGE = {
    "fisher_solve": lambda n, **k: [
        solved(n, *size, **k) for size in (((301,), 24, 2), ((3,), 193, 2), ((2,), 257, 1))
    ],
    "fisher_solve_backward": lambda n, **k: [(n(301, 3, 3, **k), n(301, 24, 3, **k), 0.1)],
    "moments": lambda n, **k: [grouped(n, 20_001, 7, **k), grouped(n, 2500, 230, **k)],
    "lift_moments_": lambda n, **k: [
        added(n, 5001, 11, 70, **k), added(n, 40, 11, 70, start=30, **k)
    ],
    "spatial_moments": lambda n, **k: [
        (order(n(*shape, **k)), None)
        for shape in ((600, 7, 5, 5), (3000, 17, 1, 1), (2, 3, 40, 40))
        for order in (torch.Tensor.contiguous, images_last)
    ],
    "patch_moments": lambda n, **k: [
        (n(*shape, **k), [3, 3], ONES, ONES, ONES, groups)
        for shape, groups in (((9, 3, 40, 40), 1), ((4, 20, 12, 12), 1), ((5, 8, 30, 30), 8))
    ],
    "gradient_gram": lambda n, **k: [
        (*pair(n, *size, **k), None, None)
        for size in ((70, 2, 9, 60, 20), (3, 1, 400, 40, 30), (2, 2, 7, 519, 65))
    ],
    "gradient_squares": lambda n, **k: [
        squared(n, shape, m, [3, 3], padding=ONES, groups=groups, **k)
        for shape, m, groups in (
            ((40, 3, 6, 7), 4, 1), ((24, 31, 4, 5), 150, 1), ((32, 19, 5, 6), 19, 19),
            ((1600, 3, 3, 4), 5, 1),
        )
    ],
    "dual_activation": lambda n, **k: [
        (order(n(*shape, **k)), "gelu", [], n(shape[2], **k), n(shape[2], **k), None, 2)
        for shape in ((5, 40, 17, 7, 33), (2, 300, 1000, 1, 1), (5, 3, 3, 330, 331))
        for order in (torch.Tensor.contiguous, channels_last)
    ],
    "dual_norm": lambda n, **k: [
        normed(n, shape, shape[-1], **k)
        for shape in ((5, 700, 300), (3, 7, 50_000), (17, 10_000, 3))
    ],
    "dual_softmax": lambda n, **k: [
        (n(*shape, **k), dim, log)
        for shape in ((5, 700, 300), (3, 7, 50_000), (17, 90, 30, 35))
        for dim, log in ((-1, False), (-2, True))
    ],
    "dual_pool": lambda n, **k: [
        (order(n(*shape, **k)), [3, 3], [2, 2], ONES, ONES, False)
        for shape in ((5, 16, 8, 32, 32), (3, 300, 20, 7, 9))
        for order in (torch.Tensor.contiguous, channels_last)
    ],
}  # fmt: skip


@pytest.mark.parametrize("op", CASES)
def test_right_on_every_instruction_set(machine, with_threads, normal, dtype, op):
    """Catches a kernel of one instruction set alone that is wrong, or that computes a number in a
    vector for one number of threads and by itself for another."""
    kind = {"dtype": dtype, "device": machine}
    for call in selfcheck.calls(machine, dtype)[op] + CASES[op](normal, **kind):
        one = with_threads(1, lambda call=call: assert_right(op, call))
        if _native.build_info():
            several = with_threads(3, lambda call=call: selfcheck.results_of(op, call))
            assert all(map(torch.equal, several, one))


@pytest.mark.parametrize("op", HOSTILE)
def test_numbers_that_are_not_finite_stay_in_their_place(machine, normal, dtype, op):
    """NaN, infinities, ties, exponents out of range. Catches 0 * NaN in lanes that are padded or
    masked, sums that are shared by rows, groups, folds or positions, and a NaN that a comparison
    swallows."""
    for call in HOSTILE[op](normal, dtype=dtype, device=machine):
        assert_right(op, call)


@pytest.mark.parametrize("op", EVERY_SIZE)
def test_every_size(device, normal, dtype, op):
    """Catches lost tails, and loads that run over the end of a row."""
    for size in SIZES:
        for call in EVERY_SIZE[op](normal, size, dtype=dtype, device=device):
            assert_right(op, call)


@pytest.mark.parametrize("op", LARGE)
def test_threads_change_no_bit(device, with_threads, normal, dtype, op):
    """Catches sums whose order follows from who computes them, a part of the work that is left out
    or done twice, and sums that lose digits."""
    for call in LARGE[op](normal, dtype=dtype, device=device):
        one = with_threads(1, lambda call=call: assert_right(op, call))
        for threads in (2, 3) if _native.serves(one[0]) else ():
            several = with_threads(threads, lambda call=call: selfcheck.results_of(op, call))
            assert all(map(torch.equal, several, one))
