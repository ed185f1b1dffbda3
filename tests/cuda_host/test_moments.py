"""The CUDA kernels of moments and gradients, run on the host: symmetry, and where a NaN goes."""

import math

import torch

from fisherfast import ops


def test_a_nan_stays_in_its_group(kernels, normal, dtype):
    x = normal(100, 3, dtype=dtype)
    x[7, 1] = math.nan
    with kernels.serving():
        count, sums, cross = ops.moments(x, torch.arange(100) % 2, 3)
    assert count.tolist() == [50, 50, 0]  # the last group has no rows
    assert sums[[0, 2]].isfinite().all()
    assert cross[[0, 2]].isfinite().all()
    assert sums[1].isnan().tolist() == [False, True, False]
    assert cross[1].isnan().sum() == 5


def test_a_nan_stays_at_its_position(kernels, normal, dtype):
    x = normal(7, 3, 2, 4, dtype=dtype)
    x[2, 1, 1, 3] = math.nan
    with kernels.serving():
        sums, cross = ops.spatial_moments(x)
    assert sums.isnan().nonzero().tolist() == [[1, 3, 1]]
    assert cross.isnan().sum() == 5
    assert cross[1, 3].isnan().sum() == 5


def test_cross_products_are_symmetric_to_the_bit(kernels, normal, dtype):
    """Over several tiles of each. Catches the two halves computed apart."""
    x = normal(70, 100, dtype=dtype)
    with kernels.serving():
        matrices = [ops.moments(x)[2], ops.spatial_moments(x.view(7, 40, 5, 5))[1]]
        matrices += [ops.patch_moments(x.view(2, 20, 25, 7), (2, 2))[1]]
        matrices += [ops.gradient_gram(x.view(5, 70, 20), x.view(5, 2, 70, 10)).reshape(10, 10)]
        matrices += [
            ops.fisher_solve_backward(x.view(7, 10, 100)[:, :, :10], x.view(7, 100, 10))[0]
        ]
    for matrix in matrices:
        assert torch.equal(matrix, matrix.mT)
