"""patch_moments against patches cut out one by one."""

import itertools

import pytest
import torch
from support.closeness import assert_close
from support.op_bounds import BOUNDS

from fisherfast import ops

# Relative to the same sums of magnitudes. Measured: 3e-7 in float32, 1e-15 in float64.
TOLERANCE = BOUNDS["patch_moments"]

# Shape of x, kernel, and what is not 1, 0, 1, 1: borders wider than the kernel, strides that jump
# over positions, kernels of the size of x, more columns than a panel, more patches than a tile.
CASES = {
    "one number": ((1, 1, 1, 1), (1, 1), {}),
    "plain": ((3, 2, 5, 7), (3, 2), {}),
    "padded": ((2, 3, 4, 5), (3, 3), {"padding": (1, 1)}),
    "far border": ((2, 1, 3, 2), (2, 2), {"padding": (4, 5)}),
    "strided": ((2, 3, 9, 10), (3, 3), {"stride": (2, 3), "padding": (1, 0)}),
    "stride beyond the kernel": ((3, 2, 11, 13), (2, 1), {"stride": (4, 5)}),
    "dilated": ((2, 2, 9, 11), (3, 3), {"dilation": (2, 3), "padding": (2, 1)}),
    "whole image": ((4, 3, 4, 5), (4, 5), {}),
    "one row": ((3, 4, 1, 70), (1, 3), {"padding": (0, 1)}),
    "one column": ((3, 4, 70, 1), (5, 1), {"stride": (2, 1)}),
    "groups": ((3, 6, 5, 6), (3, 3), {"groups": 2, "padding": (1, 1)}),
    "depthwise": ((2, 35, 6, 5), (2, 3), {"groups": 35, "stride": (1, 2)}),
    "many entries": ((3, 17, 6, 6), (3, 3), {"padding": (1, 1)}),
    "many patches": ((5, 2, 17, 19), (2, 2), {"padding": (0, 1)}),
    "wide and deep": ((2, 40, 13, 40), (1, 2), {"groups": 2, "stride": (1, 2)}),
}
DEFAULTS = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


def patches_of(x, kernel, settings):
    """[G, patches, K] float64: every number fetched by itself."""
    given = DEFAULTS | settings
    (n, C, *size), groups = x.shape, given["groups"]
    x = x.double().cpu()
    counts = [
        (size[i] + 2 * given["padding"][i] - given["dilation"][i] * (kernel[i] - 1) - 1)
        // given["stride"][i]
        + 1
        for i in (0, 1)
    ]
    found = torch.zeros(groups, n, *counts, C // groups, *kernel, dtype=torch.float64)
    for place in itertools.product(*map(range, counts)):
        for tap in itertools.product(*map(range, kernel)):
            at = [
                place[i] * given["stride"][i] - given["padding"][i] + tap[i] * given["dilation"][i]
                for i in (0, 1)
            ]
            if all(0 <= at[i] < size[i] for i in (0, 1)):
                numbers = x[:, :, at[0], at[1]].reshape(n, groups, -1).transpose(0, 1)
                found[:, :, place[0], place[1], :, tap[0], tap[1]] = numbers
    return found.reshape(groups, -1, C // groups * kernel[0] * kernel[1])


def assert_matches(got, x, kernel, settings):
    rows = patches_of(x, kernel, settings)
    tolerance = TOLERANCE[x.dtype]
    for result, truth, magnitude in (
        (got[0], rows.sum(1), rows.abs().sum(1)),
        (got[1], rows.mT @ rows, rows.abs().mT @ rows.abs()),
    ):
        assert result.dtype == torch.float64
        assert_close(result.cpu(), truth, tolerance, magnitude)
    assert torch.equal(got[1], got[1].mT)


# --- against the definition ----------------------------------------------------------------------


def test_by_hand(device, dtype):
    """Catches a flipped kernel, [kw, kh] for [kh, kw], and a mean for a sum: patches [1, 2, 4, 5]
    and [2, 3, 5, 6]."""
    x = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]], dtype=dtype, device=device)
    sums, cross = ops.patch_moments(x, (2, 2))
    assert sums.tolist() == [[3.0, 5.0, 9.0, 11.0]]
    assert cross[0, 0].tolist() == [5.0, 8.0, 14.0, 17.0]
    assert cross[0].diagonal().tolist() == [5.0, 13.0, 41.0, 61.0]


@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(normal, device, dtype, case):
    """Catches borders, strides and dilations that are off by one, entries in another order than the
    weights, groups that are mixed, and lost tails."""
    shape, kernel, settings = CASES[case]
    x = normal(*shape, dtype=dtype, device=device)
    assert_matches(ops.patch_moments(x, kernel, **settings), x, kernel, settings)


@pytest.mark.parametrize("width", [*range(1, 36), 63, 64, 65])
def test_every_width(normal, device, dtype, width):
    """Catches vector loads that run over the end of a row of x."""
    x = normal(2, 2, 2, width, dtype=dtype, device=device)
    for settings in ({"padding": (0, 2)}, {"padding": (1, 1), "stride": (1, 2)}):
        got = ops.patch_moments(x, (2, 3), **(settings if width > 2 else {"padding": (1, 3)}))
        assert_matches(got, x, (2, 3), settings if width > 2 else {"padding": (1, 3)})


@pytest.mark.parametrize("channels", [*range(1, 36), 63, 64, 65])
def test_every_number_of_entries(normal, device, dtype, channels):
    """Catches a panel that is cut off or read twice."""
    x = normal(3, channels, 3, 3, dtype=dtype, device=device)
    assert_matches(ops.patch_moments(x, (1, 1)), x, (1, 1), {})


# --- properties ----------------------------------------------------------------------------------


def test_a_nan_stays_in_its_group_and_entries(normal, device, dtype):
    """Catches 0 * NaN in padded lanes and rows."""
    x = normal(3, 4, 6, 6, dtype=dtype, device=device)
    x[1, 3, 0, 0] = float("nan")
    sums, cross = ops.patch_moments(x, (2, 2), groups=2)
    assert sums.isnan().nonzero().tolist() == [[1, 4]]
    hit = torch.zeros(8, 8, dtype=torch.bool, device=device)
    hit[4], hit[:, 4] = True, True
    assert not cross[0].isnan().any()
    assert torch.equal(cross[1].isnan(), hit)
