"""The CUDA kernel of spatial_moments, run on the host, against sums in float64."""

import pytest
import torch
from support.closeness import assert_close

from fisherfast import ops

# Errors relative to the largest result, float32 and float64. Measured: 2.3e-7 and 1e-15.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 2e-14}

# One tile of channels and several, the sizes of tile that few and many positions choose.
SHAPES = [
    (1, 1, 1, 1),
    (3, 17, 60, 50),
    (5, 3, 4, 7),
    (70, 17, 3, 3),
    (130, 2, 1, 65),
    (9, 40, 2, 2),
]  # n C H W


def spatial_moments(kernels, x, pilot=None, **settings):
    with kernels.serving(**settings):
        return ops.spatial_moments(x, pilot=pilot)


def assert_matches(got, x, pilot):
    centred = (x if pilot is None else x - pilot).double()
    truth = centred.sum(0).permute(1, 2, 0), torch.einsum("nchw,nehw->hwce", centred, centred)
    assert torch.equal(got[1], got[1].mT)
    for result, expected in zip(got, truth, strict=True):
        assert_close(result, expected, TOLERANCE[x.dtype])


@pytest.mark.parametrize("with_pilot", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(kernels, normal, dtype, shape, with_pilot):
    x = normal(*shape, dtype=dtype)
    pilot = normal(*shape[1:], dtype=dtype) if with_pilot else None
    assert_matches(spatial_moments(kernels, x, pilot), x, pilot)


def test_a_nan_stays_at_its_position(kernels, normal, dtype):
    x = normal(7, 3, 2, 4, dtype=dtype)
    x[2, 1, 1, 3] = float("nan")
    sums, cross = spatial_moments(kernels, x)
    assert sums.isnan().nonzero().tolist() == [[1, 3, 1]]
    assert cross.isnan().sum() == 5
    assert cross[1, 3].isnan().sum() == 5
