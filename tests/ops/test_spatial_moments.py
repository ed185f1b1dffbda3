"""spatial_moments against its definition in float64."""

import resource
import sys

import pytest
import torch
from support.closeness import assert_close
from support.op_bounds import BOUNDS
from support.pairwise import DTYPES, pairwise

from fisherfast import _native, ops

# Errors at a position, relative to its sum of |x - m| and to its largest sum of squares.
TOLERANCE = BOUNDS["spatial_moments"]

SHAPES = [(1, 1, 1), (3, 5, 1), (17, 1, 5), (3, 4, 4), (64, 3, 3), (5, 3, 11), (17, 4, 8)]
ROWS = [1, 2, 7, 64, 257, 1030]


def centred(x, pilot):
    """x - m, rounded to the dtype of x (part of the definition), then float64."""
    return (x if pilot is None else x - pilot).double()


def definition(x, pilot=None):
    """sums [H, W, C] and cross [H, W, C, C], by the formula alone."""
    x = centred(x, pilot)
    return x.sum(0).permute(1, 2, 0), torch.einsum("nahw,nbhw->hwab", x, x)


def assert_matches(got, x, pilot=None):
    sums, cross = got
    true_sums, true_cross = definition(x, pilot)
    tolerance = TOLERANCE[x.dtype]
    assert sums.dtype == cross.dtype == torch.float64
    assert torch.equal(cross, cross.mT)
    magnitude = centred(x, pilot).abs().sum(0).permute(1, 2, 0)
    assert_close(sums, true_sums, tolerance, magnitude)
    if cross.numel() > 0:
        largest = true_cross.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
        assert_close(cross, true_cross, tolerance, largest)


def images(normal, shape, **kind):
    """Channels of different spread and mean, so that two exchanged channels show."""
    channel = torch.arange(1, shape[1] + 1, dtype=torch.float64)[:, None, None]
    return (normal(*shape) * channel.sqrt() + channel / 3).to(**kind)


# --- against the definition ----------------------------------------------------------------------


def test_by_hand(device, dtype):
    """Catches [W, H] for [H, W], a mean for a sum, and a pilot that is not subtracted."""
    kind = {"dtype": dtype, "device": device}
    x = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]], [[[5.0, 6.0]], [[7.0, 9.0]]]], **kind)
    sums, cross = ops.spatial_moments(x)
    assert sums.tolist() == [[[6.0, 10.0], [8.0, 13.0]]]
    assert cross.tolist() == [[[[26.0, 38.0], [38.0, 58.0]], [[40.0, 62.0], [62.0, 97.0]]]]
    pilot = torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]]], **kind)
    sums, cross = ops.spatial_moments(x, pilot=pilot)
    assert sums.tolist() == [[[4.0, 4.0], [8.0, 5.0]]]
    assert cross.tolist() == [[[[16.0, 16.0], [16.0, 16.0]], [[40.0, 30.0], [30.0, 25.0]]]]


@pairwise(shape=SHAPES, rows=ROWS, with_pilot=[False, True], dtype=DTYPES)
def test_matches_the_definition(normal, device, dtype, rows, shape, with_pilot):
    """Catches a lost tail of rows, channels or positions (every size is odd somewhere)."""
    x = images(normal, (rows, *shape), dtype=dtype, device=device)
    pilot = normal(*shape, dtype=dtype, device=device) if with_pilot else None
    assert_matches(ops.spatial_moments(x, pilot=pilot), x, pilot)


@pytest.mark.parametrize("channels", [*range(1, 20), 31, 32, 33, 63, 64, 65, 100])
def test_every_number_of_channels(normal, device, dtype, channels):
    """Catches a tile of channels that is cut off, or read twice."""
    x = images(normal, (9, channels, 2, 3), dtype=dtype, device=device)
    assert_matches(ops.spatial_moments(x), x)


@pytest.mark.parametrize("width", [*range(1, 20), 31, 32, 33, 63, 64, 65])
def test_every_width(normal, device, dtype, width):
    """Catches vector loads that run over the end of a row of positions."""
    x = images(normal, (6, 3, 2, width), dtype=dtype, device=device)
    assert_matches(ops.spatial_moments(x), x)


def test_a_pilot_near_the_mean_avoids_cancellation(normal, device):
    """Mean 1000, spread 1, float32: the covariance is right to 1e-5. Catches a pilot subtracted
    from the sums afterwards."""
    x = 1000 + normal(3000, 3, 2, 2, dtype=torch.float32, device=device)
    sums, cross = ops.spatial_moments(x, pilot=x.mean(0))
    covariance = (cross - sums[..., :, None] * sums[..., None, :] / 3000) / 2999
    for h, w in ((0, 1), (1, 0)):
        expected = x[:, :, h, w].double().T.cov()
        torch.testing.assert_close(covariance[h, w], expected, rtol=1e-5, atol=1e-6)


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "channels"), [(2**30 + 8, 2), (2**31 + 16, 1)])
def test_more_than_2_to_the_31_elements(rows, channels):
    """Catches an int for the number of rows or elements, float32 sums beyond 2^24, and a copy of x
    (8.6 GB, or 17 GB in float64), which the contract excludes."""
    if _native.load() is None:
        pytest.skip("plain torch copies x; the kernel does not")
    value = torch.arange(1.0, channels + 1)
    x = value[None, :, None, None].expand(rows, channels, 1, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sums, cross = ops.spatial_moments(x)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert sums[0, 0].tolist() == (rows * value.double()).tolist()
    assert cross[0, 0].tolist() == (rows * torch.outer(value, value).double()).tolist()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    assert grown * unit < 2**30


# --- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_a_nan_stays_at_its_position(normal, device, dtype, value, last):
    """Catches 0 * NaN in padded lanes, and products across positions."""
    x = images(normal, (30, 5, 3, 9), dtype=dtype, device=device)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = ops.spatial_moments(x)
    x[7, 1, 2, 4] = value
    got = ops.spatial_moments(x)
    elsewhere = torch.ones(3, 9, dtype=torch.bool, device=device)
    elsewhere[2, 4] = False
    for left, right in zip(got, expected, strict=True):
        assert torch.equal(left[elsewhere], right[elsewhere])
    sums, cross = got[0][2, 4], got[1][2, 4]
    assert sums.isfinite().tolist() == [True, False, True, True, True]
    others = [0, 2, 3, 4]
    assert cross[others][:, others].isfinite().all()
    assert not cross[1].isfinite().any()
    assert not cross[:, 1].isfinite().any()
