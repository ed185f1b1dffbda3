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


@pytest.mark.parametrize("view", ["rows", "columns", "from an odd address"])
def test_strided_input(kernels, normal, dtype, view):
    base = normal(60, 60, dtype=dtype)
    x = {"rows": base[::3], "columns": base[:, 8:28], "from an odd address": base[:, 1:30]}[view]
    got = moments(kernels, x)
    for left, right in zip(got, moments(kernels, x.contiguous()), strict=True):
        assert torch.equal(left, right)


def test_small_integers_are_exact(kernels, dtype):
    """Every product and partial sum is an integer below 2^24: a lost or doubled row fails."""
    rows, dim, groups = 8300, 6, 3
    x = (torch.arange(rows * dim).reshape(rows, dim) * 37 % 11 - 5).to(dtype)
    group = torch.arange(rows).square() % groups
    got = moments(kernels, x, group, groups)
    for left, right in zip(got, reference.moments(x, group, groups), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(("rows", "dim"), [(0, 3), (5, 0), (0, 0)])
def test_empty_input(kernels, dtype, rows, dim):
    group = torch.zeros(rows, dtype=torch.int64)
    count, sums, cross = moments(kernels, torch.empty(rows, dim, dtype=dtype), group, 2)
    assert count.tolist() == [rows, 0]
    assert sums.eq(0).all()
    assert cross.eq(0).all()


def test_a_nan_stays_in_its_group(kernels, normal, dtype):
    x = normal(100, 3, dtype=dtype)
    x[7, 1] = float("nan")
    count, sums, cross = moments(kernels, x, torch.arange(100) % 2, 3)
    assert count.tolist() == [50, 50, 0]  # the last group has no rows
    assert sums[[0, 2]].isfinite().all()
    assert cross[[0, 2]].isfinite().all()
    assert sums[1].isnan().tolist() == [False, True, False]
    assert cross[1].isnan().sum() == 5


@pytest.mark.parametrize("dim", [3, 70])
def test_blocks_take_turns(kernels, normal, dtype, dim):
    x, group = normal(600, dim, dtype=dtype), torch.arange(600) % 5
    expected = moments(kernels, x, group, 5)
    for got, right in zip(moments(kernels, x, group, 5, grid=(8, 1)), expected, strict=True):
        assert torch.equal(got, right)
