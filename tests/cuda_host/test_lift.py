"""The CUDA kernels of lift, run on the host, against the float64 reference."""

import math

import pytest
import torch
from support.closeness import assert_close

from fisherfast import ops
from fisherfast.ops import reference

# Errors relative to the largest result: those of tests/ops/test_lift.py.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 2e-14}
SLOPE = 0.75  # the same number in float32 and float64


def lift(kernels, projected, bias, pilot, groups=1, first=0, **settings):
    with kernels.serving(**settings):
        return ops.lift(projected, bias, pilot, slope=SLOPE, num_groups=groups, first=first)


@pytest.mark.parametrize(("groups", "first"), [(1, 0), (16, 1_000_003)])
@pytest.mark.parametrize(("rows", "dim"), [(0, 3), (4, 0), (1, 1), (100, 33), (601, 7), (3, 300)])
def test_matches_the_reference(kernels, normal, dtype, rows, dim, groups, first):
    inputs = [normal(rows, dim, dtype=dtype), normal(dim, dtype=dtype), normal(dim, dtype=dtype)]
    got = lift(kernels, *inputs, groups, first)
    truth = reference.lift(*(t.double() for t in inputs), SLOPE, groups, first)
    for result, expected in zip(got, truth, strict=True):
        assert_close(result, expected, TOLERANCE[dtype])


def test_a_nan_stays_in_its_column_and_fold(kernels, normal, dtype):
    projected, bias, pilot = normal(10, 3, dtype=dtype), torch.ones(3, dtype=dtype), normal(3)
    projected[3, 1] = math.nan
    features, sums = lift(kernels, projected, bias, pilot.to(dtype), 2)
    assert features.isnan().sum() == 1
    assert sums.isnan().nonzero().tolist() == [[1, 1]]
