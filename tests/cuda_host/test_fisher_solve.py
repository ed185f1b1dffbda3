"""The CUDA kernels of fisher_solve, run on the host, against the float64 reference."""

import math

import pytest
import torch
from support.op_bounds import BOUNDS
from support.pairwise import DTYPES, pairwise
from support.solve_failures import COUNT, with_failures

from fisherfast import ops
from fisherfast.ops import reference

# Errors relative to the largest result of a system: those of tests/ops/test_fisher_solve.py.
# Measured: 1e-6 and 1.6e-15.
TOLERANCE = BOUNDS["fisher_solve"]

# Both plans: a column a thread (d <= 64, P <= 4), and systems in the shared memory of a block.
SHAPES = [
    (1, 1, 1),
    (3, 2, 1),
    (9, 5, 2),
    (5, 8, 16),
    (3, 31, 3),
    (9, 32, 1),
    (4, 33, 3),
    (2, 64, 1),
]

# A lane, a part of a warp, or a block: the plan without inverse_rows, and that with them.
both_plans = pytest.mark.parametrize("inverse_rows", [False, True])


def fisher_solve(kernels, cov, deriv, ridge=0.0, inverse_rows=True, **settings):
    """The results by name, those of inverse_rows where they are wanted."""
    with kernels.serving(**settings):
        got = ops.fisher_solve_details(
            cov, deriv, ridge=ridge, inverse_rows=inverse_rows, solution=True
        )._asdict()
    return got if inverse_rows else {n: got[n] for n in got if n != "inverse_rows"}


def truth_of(cov, deriv, ridge):
    """The results in float64, by name."""
    truth = reference.fisher_solve(cov.double(), deriv.double(), ridge, True, True)
    return ops.FisherSolve(*truth)._asdict()


def assert_matches(got, cov, deriv, ridge):
    assert got["info"].eq(0).all()
    assert torch.equal(got["fisher"], got["fisher"].mT)
    for name, expected in truth_of(cov, deriv, ridge).items():
        if name in got and name != "info" and expected.numel() > 0:
            unit = (
                cov.double().diagonal(dim1=1, dim2=2).sqrt()[..., None] if name == "solution" else 1
            )
            error = (unit * (got[name].double() - expected)).abs().reshape(len(expected), -1)
            scale = (unit * expected).abs().reshape(len(expected), -1).amax(1)
            assert (error.amax(1) / scale).max() < TOLERANCE[cov.dtype], name


@pairwise(shape=SHAPES, inverse_rows=[False, True], dtype=DTYPES)
def test_matches_the_reference(kernels, systems, dtype, shape, inverse_rows):
    batch, dim, params = shape
    cov, deriv = systems((batch,), dim, params, dtype=dtype)
    got = fisher_solve(kernels, cov, deriv, 2.0**-13, inverse_rows)
    assert_matches(got, cov, deriv, 2.0**-13)


@pairwise(dim=[5, 12, 30, 40, 66], inverse_rows=[False, True], dtype=DTYPES)
def test_blocks_take_turns(kernels, systems, dtype, dim, inverse_rows):
    cov, deriv = systems((40 if dim < 20 else 7,), dim, 2, dtype=dtype)
    cov[-2, 1, 1] = -1.0  # a failed system in a later turn
    expected = fisher_solve(kernels, cov, deriv, 0.5, inverse_rows)
    got = fisher_solve(kernels, cov, deriv, 0.5, inverse_rows, grid=(1, 1))
    assert got["info"].count_nonzero() == 1
    for name in got:
        assert torch.equal(got[name].nan_to_num(-7), expected[name].nan_to_num(-7)), name


@pairwise(dim=[5, 40, 66], inverse_rows=[False, True], dtype=DTYPES)
def test_only_the_lower_triangle_is_read(kernels, systems, dtype, dim, inverse_rows):
    cov, deriv = systems((3,), dim, 2, dtype=dtype)
    upper = torch.ones(dim, dim, dtype=torch.bool).triu(1)
    expected = fisher_solve(kernels, cov, deriv, 0.0, inverse_rows)
    got = fisher_solve(kernels, cov.masked_fill(upper, math.nan), deriv, 0.0, inverse_rows)
    for name in got:
        assert torch.equal(got[name], expected[name]), name


@pairwise(dim=[5, 20, 40, 66], inverse_rows=[False, True], dtype=DTYPES)
def test_strided_input(kernels, systems, dtype, dim, inverse_rows):
    cov, deriv = systems((6,), dim, 3, dtype=dtype)
    expected = fisher_solve(kernels, cov[::2], deriv[::2].contiguous(), 0.0, inverse_rows)
    wide = torch.zeros(6, 2 * dim, 3 * dim + 1, dtype=dtype)
    wide[:, ::2, 1::3] = cov
    got = fisher_solve(
        kernels, wide[::2, ::2, 1::3], deriv.mT.contiguous().mT[::2], 0.0, inverse_rows
    )
    for name in got:
        assert torch.equal(got[name], expected[name]), name


@pairwise(shape=[(0, 4, 2), (3, 0, 2), (3, 4, 0)], inverse_rows=[False, True], dtype=DTYPES)
def test_empty_input(kernels, systems, dtype, shape, inverse_rows):
    batch, dim, params = shape
    got = fisher_solve(kernels, *systems((batch,), dim, params, dtype=dtype), 0.0, inverse_rows)
    assert got["info"].tolist() == [0] * batch
    assert got["fisher"].shape == (batch, params, params)
    assert got["fisher"].eq(0).all()
    assert got["condition"].isfinite().all()


@pairwise(dim=[5, 36], inverse_rows=[False, True], dtype=DTYPES)
def test_failures_stay_in_their_system(kernels, systems, dtype, dim, inverse_rows):
    cov, deriv = systems((COUNT,), dim, 2, dtype=dtype)
    expected = fisher_solve(kernels, cov, deriv, 0.0, inverse_rows)
    broken, pivots = with_failures(cov)
    got = fisher_solve(kernels, broken, deriv, 0.0, inverse_rows)
    assert got["info"].tolist() == pivots
    for name in got:
        assert torch.equal(got[name][::2], expected[name][::2]), name
        assert name == "info" or got[name][1::2].isnan().all(), name


@both_plans
def test_a_failed_derivative_is_no_failure_of_the_system(kernels, systems, dtype, inverse_rows):
    cov, deriv = systems((2,), 4, 2, dtype=dtype)
    deriv[0, 1, 0] = math.nan
    got = fisher_solve(kernels, cov, deriv, 0.0, inverse_rows)
    assert got["info"].tolist() == [0, 0]
    assert got["half"][0, 0].isfinite().all()
    assert got["fisher"][0, 0, 0].isnan()
    assert got["fisher"][1].isfinite().all()


def test_a_system_that_does_not_fit_is_an_error(kernels, systems, dtype):
    message = "the factor of one system must take at most 8192 bytes of shared memory"
    with pytest.raises(RuntimeError, match=message):
        fisher_solve(kernels, *systems((1,), 64, 1, dtype=dtype), limit=8192)


def test_a_failed_system_has_no_gradient(kernels, normal, dtype):
    solution = normal(3, 4, 2, dtype=dtype)
    solution[1] = math.nan
    with kernels.serving():
        gradients = ops.fisher_solve_backward(normal(3, 2, 2, dtype=dtype), solution)
    for gradient in gradients:
        assert gradient[1].isnan().all()
        assert gradient[[0, 2]].isfinite().all()
