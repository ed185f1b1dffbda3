"""The CUDA kernels of fisher_solve_backward, run on the host, against the float64 reference."""

import math

import pytest
import torch
from support.closeness import assert_close

from fisherfast import ops
from fisherfast.ops import reference

# Errors relative to the largest result. Measured: 1.2e-7 and 2.7e-16.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
RIDGE = 0.125  # the same number in float32 and float64

# Several systems a warp, rows of one system over several warps, and the sizes between.
SHAPES = [(1, 1, 1), (3, 2, 1), (70, 5, 2), (5, 8, 16), (3, 33, 3), (2, 64, 1), (1, 130, 2)]


def backward(kernels, grad_fisher, solution, **settings):
    with kernels.serving(**settings):
        return ops.fisher_solve_backward(grad_fisher, solution, RIDGE)


@pytest.mark.parametrize(("batch", "dim", "params"), SHAPES)
def test_matches_the_reference(kernels, normal, dtype, batch, dim, params):
    grad_fisher = normal(batch, params, params, dtype=dtype)
    solution = normal(batch, dim, params, dtype=dtype)
    got = backward(kernels, grad_fisher, solution)
    truth = reference.fisher_solve_backward(grad_fisher.double(), solution.double(), RIDGE)
    assert torch.equal(got[0], got[0].mT)
    for result, expected in zip(got, truth, strict=True):
        assert_close(result, expected, TOLERANCE[dtype])


def test_a_failed_system_has_no_gradient(kernels, normal, dtype):
    solution = normal(3, 4, 2, dtype=dtype)
    solution[1] = math.nan
    for grad in backward(kernels, normal(3, 2, 2, dtype=dtype), solution):
        assert grad[1].isnan().all()
        assert grad[[0, 2]].isfinite().all()
