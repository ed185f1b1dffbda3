"""The CUDA kernels of patch_moments, run on the host, against unfolded patches in float64."""

import pytest
import torch
from support.closeness import assert_close

from fisherfast import ops

# Errors relative to the largest result, float32 and float64. Measured: 3e-7 and 1e-15.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 2e-14}

# Shape, kernel, stride, padding, dilation, groups: one tile of entries and several.
CASES = [
    ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((2, 4, 5, 7), (3, 2), (2, 1), (1, 3), (1, 2), 2),
    ((2, 9, 6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((3, 5, 4, 40), (1, 3), (1, 2), (0, 1), (1, 1), 5),
]


def patch_moments(kernels, x, kernel, stride, padding, dilation, groups, **settings):
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    with kernels.serving(**settings):
        return ops.patch_moments(x, kernel, **geometry)


def definition(x, kernel, stride, padding, dilation, groups):
    patches = torch.nn.functional.unfold(x.double(), kernel, dilation, padding, stride)
    rows = patches.unflatten(1, (groups, -1))
    return rows.sum((0, 3)), torch.einsum("ngap,ngbp->gab", rows, rows)


def assert_matches(got, x, *geometry):
    assert torch.equal(got[1], got[1].mT)
    for result, truth in zip(got, definition(x, *geometry), strict=True):
        assert_close(result, truth, TOLERANCE[x.dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_definition(kernels, normal, dtype, case):
    shape, *geometry = case
    x = normal(*shape, dtype=dtype)
    assert_matches(patch_moments(kernels, x, *geometry), x, *geometry)


def test_several_splits(kernels, normal, dtype):
    """More than 4096 patches: catches a split that is lost or summed twice."""
    x, geometry = normal(2, 1, 60, 50, dtype=dtype), ((2, 2), (1, 1), (0, 1), (1, 1), 1)
    assert_matches(patch_moments(kernels, x, *geometry), x, *geometry)
