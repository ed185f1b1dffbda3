"""The CUDA kernel of dual_pool, run on the host, against the reference: it moves numbers, so that
every comparison is exact."""

import math

import pytest
import torch
from cuda_host.dual_buffers import buffer
from support.pairwise import DTYPES, pairwise

from fisherfast import ops
from fisherfast.ops import _dual_pool, reference_dual

# size, kernel, stride, padding, dilation
POOLS = {
    "halves": ([8, 6], [2, 2], [2, 2], [0, 0], [1, 1]),
    "resnet": ([9, 7], [3, 3], [2, 2], [1, 1], [1, 1]),
    "overlapping": ([6, 11], [4, 3], [1, 2], [2, 0], [1, 1]),
    "dilated": ([12, 9], [3, 2], [2, 1], [1, 1], [2, 3]),
    "gaps": ([11, 10], [1, 2], [3, 4], [0, 1], [1, 1]),
    "whole": ([5, 4], [5, 4], [1, 1], [0, 0], [1, 1]),
    "line": ([301], [3], [2], [1], [1]),
    "volume": ([5, 6, 7], [2, 3, 2], [2, 2, 1], [1, 1, 0], [1, 1, 2]),
}


def dual_pool(kernels, x, pool, *, ceil_mode=False, **settings):
    with kernels.serving(**settings):
        return ops.dual_pool(x, *pool[1:], ceil_mode=ceil_mode)


def assert_same(got, truth):
    """The same numbers, a NaN where the truth has one."""
    assert torch.equal(got.isnan(), truth.isnan())
    assert torch.equal(got.nan_to_num(0.0), truth.nan_to_num(0.0))


@pairwise(pool=list(POOLS.values()), tangents=[0, 1, 5], ceil_mode=[False, True], dtype=DTYPES)
def test_matches_the_reference(kernels, normal, dtype, pool, tangents, ceil_mode):
    """Catches a window that begins or ends one tap early or late, and dimensions in wrong order."""
    x = buffer(normal, dtype, (1 + tangents, 2, 3, *pool[0]), gap=3, offset=1)
    truth = reference_dual.dual_pool(x, *pool[1:], ceil_mode)
    assert_same(dual_pool(kernels, x, pool, ceil_mode=ceil_mode), truth)


@pairwise(pool=list(POOLS.values()), channels=[2, 5, 64], dtype=DTYPES)
def test_channels_last(kernels, normal, dtype, pool, channels):
    """Catches a neighbour's channel."""
    x = buffer(normal, dtype, (3, 2, *pool[0], channels), gap=3)
    x = x.movedim(-1, 2)
    assert_same(dual_pool(kernels, x, pool), reference_dual.dual_pool(x, *pool[1:], False))


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_ties_nan_and_infinity(kernels, normal, dtype, pool):
    """Few different numbers: the tangents tell which of equals was taken, the first. A NaN counts
    as the largest, the last of several; windows of -inf have a place. Catches a comparison that a
    NaN never passes, and a search that starts above -inf."""
    ties = buffer(normal, dtype, (2, 3, 4, *pool[0]))
    ties[0] = ties[0].round().clamp(-1, 1)
    x = buffer(normal, dtype, (2, 6, 4, *pool[0]))
    x[0][x[0] > 0.8] = math.nan
    x[0, :3][x[0, :3] < 0.8] = -math.inf
    for given in (ties, x):
        truth = reference_dual.dual_pool(given, *pool[1:], False)
        assert_same(dual_pool(kernels, given, pool), truth)


def test_a_window_of_padding_alone(kernels, normal, dtype, monkeypatch):
    """Taps at -1 and 4 of four numbers: catches a read outside."""
    monkeypatch.setattr(_dual_pool, "_check_no_empty_window", lambda *numbers: None)
    x = buffer(normal, dtype, (3, 1, 2, 4))
    y = dual_pool(kernels, x, ([4], [2], [1], [1], [5]))
    assert y.flatten().tolist() == [-math.inf] * 2 + [0.0] * 4
