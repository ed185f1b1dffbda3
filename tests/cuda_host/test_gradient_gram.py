"""The CUDA kernel of gradient_gram, run on the host, against inner products in float64."""

import pytest
import torch
from support.closeness import assert_close

from fisherfast import ops

# Errors relative to the largest result, float32 and float64. Measured: 3e-7 and 1e-15.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 2e-14}

# One tile of positions and several, of each of the two sizes of tile: n C T D M.
SIZES = [(1, 1, 1, 1, 1), (3, 2, 5, 17, 9), (2, 1, 70, 20, 33), (2, 3, 17, 65, 5)]


def gradient_gram(kernels, left, right=(None, None), **settings):
    """The products of two sides (a, b)."""
    with kernels.serving(**settings):
        return ops.gradient_gram(*left, *right)


def definition(left, right):
    G, H = (torch.einsum("itd,ictm->icmd", a.double(), b.double()) for a, b in (left, right))
    return torch.einsum("icmd,jemd->icje", G, H)


def assert_matches(got, left, right):
    assert_close(got, definition(left, right), TOLERANCE[left[0].dtype])


def side(normal, n, C, T, D, M, dtype):
    return normal(n, T, D, dtype=dtype), normal(n, C, T, M, dtype=dtype)


@pytest.mark.parametrize("size", SIZES)
def test_matches_the_definition(kernels, normal, dtype, size):
    n, C, T, D, M = size
    left = side(normal, *size, dtype)
    right = side(normal, n + 1, C + 1, T + 2, D, M, dtype)
    assert_matches(gradient_gram(kernels, left, right), left, right)
    symmetric = gradient_gram(kernels, left)
    assert_matches(symmetric, left, left)
    matrix = symmetric.reshape(n * C, n * C)
    assert torch.equal(matrix, matrix.T)
