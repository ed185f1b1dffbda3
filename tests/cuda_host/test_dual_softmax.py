"""The CUDA kernels of dual_softmax, run on the host, against the float64 reference."""

import math

import pytest
import torch
from cuda_host.dual_buffers import assert_matches, buffer
from support.pairwise import DTYPES, pairwise

from fisherfast import ops
from fisherfast.ops import reference_dual

# Measured: 2.1e-7 and 1.7e-15.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}

# [outer, width, inner]: rows of a warp; of a block, in registers; walked along; columns.
ROWS = [(9, 1, 1), (9, 3, 1), (5, 32, 1), (3, 127, 1), (3, 500, 1), (2, 513, 1), (2, 2048, 1)]
LONG = [(2, 2500, 1), (2, 4097, 1)]
COLUMNS = [(1, 1, 2), (3, 5, 7), (2, 100, 33), (4, 3, 300)]
ONE_OF_EACH = [(3, 40, 1), (3, 600, 1), (3, 4500, 1), (2, 6, 5)]


def dual_softmax(kernels, x, log, in_place=False, **settings):
    """Over dimension 2 of x [1 + P, outer, width, inner]."""
    with kernels.serving(in_place=in_place, **settings):
        y = ops.dual_softmax(x, 2, log=bool(log))
    return x if in_place else y


def truth_of(x, log):
    return reference_dual.dual_softmax(x.double(), 2, bool(log))


@pairwise(shape=ROWS + LONG + COLUMNS, tangents=[0, 1, 5], log=[0, 1], dtype=DTYPES)
def test_matches_the_reference(kernels, normal, dtype, shape, tangents, log):
    """Catches a sum over part of a row or over a neighbour's, and a tangent that gets the sum of
    another."""
    x = buffer(normal, dtype, (1 + tangents, *shape), gap=3)
    x[0] *= 3
    assert_matches(dual_softmax(kernels, x, log), truth_of(x, log), TOLERANCE[dtype])


@pairwise(shape=ONE_OF_EACH, shift=[-1e4, 1e4], log=[0, 1], dtype=DTYPES)
def test_large_numbers(kernels, normal, dtype, shape, shift, log):
    """Catches exponentials without the largest number taken off: all overflow or all vanish."""
    x = buffer(normal, dtype, (5, *shape))
    x[0] = 100 * x[0] + shift
    # log s is some hundreds below zero: its error is relative.
    assert_matches(dual_softmax(kernels, x, log), truth_of(x, log), TOLERANCE[dtype])


@pairwise(shape=ONE_OF_EACH, log=[0, 1], dtype=DTYPES)
def test_masked_entries(kernels, normal, dtype, shape, log):
    """Entries of -inf have weight zero, a row of nothing else gives NaN, and so does one with a NaN
    or +inf: catches -inf - -inf, and a NaN that the search for the largest overlooks for good."""
    x = buffer(normal, dtype, (3, *shape))
    x[0, :, 1:3] = -math.inf
    x[0, 0] = -math.inf
    x[0, 1, :, 0] = -math.inf
    x[0, 1, 4, 0] = math.nan
    x[0, -1, 5, -1] = math.inf
    assert_matches(dual_softmax(kernels, x, log), truth_of(x, log), TOLERANCE[dtype])


@pytest.mark.parametrize("log", [0, 1])
def test_a_row_of_many_numbers(kernels, normal, dtype, log):
    """Catches sums that lose digits with the width: those of a column are added one by one."""
    tolerance = max(TOLERANCE[dtype], 5e-14)  # measured: 1.1e-14 in float64
    for shape in [(1, 50_001, 1), (1, 20_001, 2)]:
        x = buffer(normal, dtype, (2, *shape)) + 1
        assert_matches(dual_softmax(kernels, x, log), truth_of(x, log), tolerance)


@pairwise(
    shape=[(3, 9, 1), (3, 40, 1), (2, 1001, 1), (2, 4504, 1), (2, 5, 8)],
    offset=[0, 1],
    log=[0, 1],
    dtype=DTYPES,
)
def test_any_alignment_gives_the_same_bits(kernels, normal, dtype, shape, offset, log):
    """Catches a vector access at an address that does not allow it."""
    x = buffer(normal, dtype, (3, *shape), gap=1, offset=offset)
    expected = dual_softmax(kernels, x.contiguous(), log)
    assert torch.equal(dual_softmax(kernels, x, log), expected)


@pairwise(shape=ONE_OF_EACH, tangents=[0, 3, 9], log=[0, 1], dtype=DTYPES)
def test_in_place(kernels, normal, dtype, shape, tangents, log):
    """Catches a primal that is overwritten while tangents still need it: a row that is walked along
    takes nine of them in three turns."""
    x = buffer(normal, dtype, (1 + tangents, *shape))
    expected = dual_softmax(kernels, x, log)
    assert torch.equal(dual_softmax(kernels, x, log, in_place=1), expected)
