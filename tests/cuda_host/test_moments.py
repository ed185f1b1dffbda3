"""The CUDA kernels of moments, run on the host, against the float64 reference."""

import pytest
import torch
from support.closeness import assert_close

from fisherfast import ops
from fisherfast.ops import reference

# Errors relative to the largest result: those of tests/ops/test_moments.py.
# Measured: 2e-7 and 2.4e-15.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 2e-14}


def moments(kernels, x, group=None, groups=1, pilot=None, **settings):
    with kernels.serving(**settings):
        return ops.moments(x, group, groups, pilot=pilot)


def assert_matches(got, truth, dtype):
    assert torch.equal(got[0], truth[0])
    assert torch.equal(got[2], got[2].mT)
    for result, expected in zip(got[1:], truth[1:], strict=True):
        assert_close(result, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (63, 4), (130, 17), (9001, 3), (70, 100)])
def test_matches_the_reference(kernels, normal, dtype, rows, dim, groups):
    x, pilot = normal(rows, dim, dtype=dtype), normal(dim, dtype=dtype)
    group = torch.arange(rows) * 7 % groups if groups > 1 else None
    got = moments(kernels, x, group, groups, pilot)
    assert_matches(got, reference.moments(x, group, groups, pilot), dtype)


def test_a_nan_stays_in_its_group(kernels, normal, dtype):
    x = normal(100, 3, dtype=dtype)
    x[7, 1] = float("nan")
    count, sums, cross = moments(kernels, x, torch.arange(100) % 2, 3)
    assert count.tolist() == [50, 50, 0]  # the last group has no rows
    assert sums[[0, 2]].isfinite().all()
    assert cross[[0, 2]].isfinite().all()
    assert sums[1].isnan().tolist() == [False, True, False]
    assert cross[1].isnan().sum() == 5
