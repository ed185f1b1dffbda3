"""lift against its float64 reference, by hand."""

import math

import pytest
import torch
from support.closeness import assert_close
from support.op_bounds import BOUNDS
from support.pairwise import DTYPES, pairwise

from fisherfast import ops
from fisherfast.ops import reference

# Errors relative to the largest result. Measured: 1e-7 and 4e-15.
TOLERANCE = BOUNDS["lift"]
SLOPE = 0.75  # the same number in float32 and float64


def assert_matches(got, truth, dtype):
    for result, expected in zip(got, truth, strict=True):
        assert_close(result, expected, TOLERANCE[dtype])


@pytest.fixture
def inputs(normal, device, dtype):
    def draw(rows, dim):
        kind = {"dtype": dtype, "device": device}
        return normal(rows, dim, **kind), normal(dim, **kind), normal(dim, **kind)

    return draw


def test_by_hand(device, dtype):
    kind = {"dtype": dtype, "device": device}
    features, sums = ops.lift(
        torch.tensor([[-1.0, 2.0], [3.0, -5.0], [0.0, 1.0]], **kind),
        torch.tensor([0.0, 1.0], **kind),
        torch.tensor([1.0, 0.5], **kind),
        slope=0.5,
        num_groups=2,
        first=1,
    )
    assert features.tolist() == [[-1.5, 2.5], [2.0, -2.5], [-1.0, 1.5]]
    assert sums.tolist() == [[2.0, -2.5], [-2.5, 4.0]]  # rows 0 and 2 are dealt to fold 1
    assert features.dtype == dtype
    assert sums.dtype == torch.float64


@pairwise(
    shape=[(1, 1), (2, 3), (100, 33), (5001, 40), (3, 700)],
    folds=[(1, 0), (2, 1), (16, 1_000_003)],
    dtype=DTYPES,
)
def test_matches_the_reference(inputs, dtype, shape, folds):
    projected, bias, pilot = inputs(*shape)
    groups, first = folds
    got = ops.lift(projected, bias, pilot, slope=SLOPE, num_groups=groups, first=first)
    doubles = (projected.double(), bias.double(), pilot.double())
    assert_matches(got, reference.lift(*doubles, SLOPE, groups, first), dtype)


@pytest.mark.parametrize("slope", [0.0, 1.0, -1.0, 3.0])
def test_any_finite_slope(inputs, dtype, slope):
    projected, bias, pilot = inputs(50, 4)
    doubles = (projected.double(), bias.double(), pilot.double())
    got = ops.lift(projected, bias, pilot, slope=slope)
    assert_matches(got, reference.lift(*doubles, slope), dtype)


def test_a_nan_stays_in_its_column_and_fold(inputs):
    projected, bias, pilot = inputs(10, 3)
    projected[3, 1] = math.nan
    features, sums = ops.lift(projected, bias, pilot, num_groups=2)
    assert features.isnan().sum() == 1
    assert sums.isnan().nonzero().tolist() == [[1, 1]]
