"""moments against its float64 reference."""

import torch
from support.closeness import assert_close
from support.op_bounds import BOUNDS
from support.pairwise import DTYPES, pairwise

from fisherfast import ops
from fisherfast.ops import reference

# Errors relative to the largest result. Measured: 7e-7 and 4e-15.
TOLERANCE = BOUNDS["moments"]

LARGE = 230  # columns that all threads share, several panels and a rest


def assert_matches(got, truth, dtype):
    count, sums, cross = got
    assert count.dtype == torch.int64
    assert sums.dtype == cross.dtype == torch.float64
    assert torch.equal(count, truth[0])
    assert torch.equal(cross, cross.mT)
    for result, expected in zip((sums, cross), truth[1:], strict=True):
        assert_close(result, expected, TOLERANCE[dtype])


@pairwise(
    shape=[(1, 1), (2, 5), (63, 4), (1025, 17), (7001, 3), (2500, LARGE)],
    groups=[1, 3, 16],
    with_pilot=[False, True],
    dtype=DTYPES,
)
def test_matches_the_reference(normal, device, dtype, route, shape, groups, with_pilot):
    rows, dim = shape
    x = normal(rows, dim, dtype=dtype, device=device)
    pilot = normal(dim, dtype=dtype, device=device) if with_pilot else None
    group = torch.arange(rows, device=device) * 7 % groups if groups > 1 else None
    got = ops.moments(x, group, groups, pilot=pilot)
    assert_matches(got, reference.moments(x, group, groups, pilot), dtype)


def test_a_pilot_near_the_mean_avoids_cancellation(normal, device, route):
    """Mean 1000, spread 1, float32: the variance about the pilot is right to 1e-5."""
    x = 1000 + normal(5000, 3, dtype=torch.float32, device=device)
    count, sums, cross = ops.moments(x, pilot=x.mean(0))
    covariance = (cross - sums[:, :, None] * sums[:, None, :] / count) / (count - 1)
    torch.testing.assert_close(covariance[0], x.double().T.cov(), rtol=1e-5, atol=1e-6)


def test_a_nan_stays_in_its_group(normal, device, dtype, route):
    x = normal(100, 3, dtype=dtype, device=device)
    x[7, 1] = float("nan")
    _, sums, cross = ops.moments(x, torch.arange(100, device=device) % 2, 2)
    assert sums[0].isfinite().all()
    assert cross[0].isfinite().all()
    assert sums[1, 1].isnan()
    assert sums[1, 0].isfinite()
