"""moments against its float64 reference."""

import pytest
import torch
from support.closeness import assert_close

from fisherfast import ops
from fisherfast.ops import reference

# Errors relative to the largest result. Measured: 7e-7 and 4e-15.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 2e-14}

LARGE = 230  # columns that all threads share, several panels and a rest


def assert_matches(got, truth, dtype):
    count, sums, cross = got
    assert count.dtype == torch.int64
    assert sums.dtype == cross.dtype == torch.float64
    assert torch.equal(count, truth[0])
    assert torch.equal(cross, cross.mT)
    for result, expected in zip((sums, cross), truth[1:], strict=True):
        assert_close(result, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("with_pilot", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 16])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (2, 5), (63, 4), (1025, 17), (7001, 3)])
def test_matches_the_reference(normal, device, dtype, route, rows, dim, groups, with_pilot):
    x = normal(rows, dim, dtype=dtype, device=device)
    pilot = normal(dim, dtype=dtype, device=device) if with_pilot else None
    group = torch.arange(rows, device=device) * 7 % groups if groups > 1 else None
    got = ops.moments(x, group, groups, pilot=pilot)
    assert_matches(got, reference.moments(x, group, groups, pilot), dtype)


@pytest.mark.parametrize("groups", [1, 4])
def test_matches_for_many_columns(normal, device, dtype, groups):
    x = normal(2500, LARGE, dtype=dtype, device=device)
    group = torch.arange(2500, device=device) % groups if groups > 1 else None
    pilot = normal(LARGE, dtype=dtype, device=device)
    got = ops.moments(x, group, groups, pilot=pilot)
    assert_matches(got, reference.moments(x, group, groups, pilot), dtype)


def test_a_pilot_near_the_mean_avoids_cancellation(normal, device, route):
    """Mean 1000, spread 1, float32: the variance about the pilot is right to 1e-5."""
    x = 1000 + normal(5000, 3, dtype=torch.float32, device=device)
    count, sums, cross = ops.moments(x, pilot=x.mean(0))
    covariance = (cross - sums[:, :, None] * sums[:, None, :] / count) / (count - 1)
    torch.testing.assert_close(covariance[0], x.double().T.cov(), rtol=1e-5, atol=1e-6)


def test_empty_input(device, dtype, route):
    kind = {"dtype": dtype, "device": device}
    count, sums, cross = ops.moments(
        torch.empty(0, 3, **kind), torch.empty(0, dtype=torch.int64, device=device), 2
    )
    assert count.tolist() == [0, 0]
    assert torch.equal(sums.cpu(), torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(cross.cpu(), torch.zeros(2, 3, 3, dtype=torch.float64))
    count, sums, cross = ops.moments(torch.empty(5, 0, **kind))
    assert count.tolist() == [5]
    assert sums.shape == (1, 0)
    assert cross.shape == (1, 0, 0)


def test_a_nan_stays_in_its_group(normal, device, dtype, route):
    x = normal(100, 3, dtype=dtype, device=device)
    x[7, 1] = float("nan")
    _, sums, cross = ops.moments(x, torch.arange(100, device=device) % 2, 2)
    assert sums[0].isfinite().all()
    assert cross[0].isfinite().all()
    assert sums[1, 1].isnan()
    assert sums[1, 0].isfinite()
