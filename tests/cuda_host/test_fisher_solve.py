"""The CUDA kernels of fisher_solve, run on the host, against the float64 reference."""

import math

import pytest
import torch
from support.pairwise import DTYPES, pairwise

from fisherfast import ops
from fisherfast.ops import reference

# Errors relative to the largest result of a system: those of tests/ops/test_fisher_solve.py.
# Measured: 1e-6 and 1.6e-15.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 2e-14}

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


@both_plans
@pytest.mark.parametrize(("batch", "dim", "params"), SHAPES)
def test_matches_the_reference(kernels, systems, dtype, batch, dim, params, inverse_rows):
    cov, deriv = systems(batch, dim, params, dtype)
    got = fisher_solve(kernels, cov, deriv, 2.0**-13, inverse_rows)
    assert_matches(got, cov, deriv, 2.0**-13)


@both_plans
@pytest.mark.parametrize("dim", [5, 12, 30, 40, 66])
def test_blocks_take_turns(kernels, systems, dtype, dim, inverse_rows):
    cov, deriv = systems(40 if dim < 20 else 7, dim, 2, dtype)
    cov[-2, 1, 1] = -1.0  # a failed system in a later turn
    expected = fisher_solve(kernels, cov, deriv, 0.5, inverse_rows)
    got = fisher_solve(kernels, cov, deriv, 0.5, inverse_rows, grid=(1, 1))
    assert got["info"].count_nonzero() == 1
    for name in got:
        assert torch.equal(got[name].nan_to_num(-7), expected[name].nan_to_num(-7)), name


@both_plans
@pytest.mark.parametrize("dim", [5, 40, 66])
def test_only_the_lower_triangle_is_read(kernels, systems, dtype, dim, inverse_rows):
    cov, deriv = systems(3, dim, 2, dtype)
    upper = torch.ones(dim, dim, dtype=torch.bool).triu(1)
    expected = fisher_solve(kernels, cov, deriv, 0.0, inverse_rows)
    got = fisher_solve(kernels, cov.masked_fill(upper, math.nan), deriv, 0.0, inverse_rows)
    for name in got:
        assert torch.equal(got[name], expected[name]), name


@both_plans
@pytest.mark.parametrize("dim", [5, 20, 40, 66])
def test_strided_input(kernels, systems, dtype, dim, inverse_rows):
    cov, deriv = systems(6, dim, 3, dtype)
    expected = fisher_solve(kernels, cov[::2], deriv[::2].contiguous(), 0.0, inverse_rows)
    wide = torch.zeros(6, 2 * dim, 3 * dim + 1, dtype=dtype)
    wide[:, ::2, 1::3] = cov
    got = fisher_solve(
        kernels, wide[::2, ::2, 1::3], deriv.mT.contiguous().mT[::2], 0.0, inverse_rows
    )
    for name in got:
        assert torch.equal(got[name], expected[name]), name


@both_plans
@pytest.mark.parametrize(("batch", "dim", "params"), [(0, 4, 2), (3, 0, 2), (3, 4, 0)])
def test_empty_input(kernels, systems, dtype, batch, dim, params, inverse_rows):
    got = fisher_solve(kernels, *systems(batch, dim, params, dtype), 0.0, inverse_rows)
    assert got["info"].tolist() == [0] * batch
    assert got["fisher"].shape == (batch, params, params)
    assert got["fisher"].eq(0).all()
    assert got["condition"].isfinite().all()


# As in tests/ops/test_fisher_solve.py: entries put into the identity, and the pivot that fails.
FAILURES = {
    "zero variance": ([(2, 2, 0.0)], 3),
    "negative variance": ([(0, 0, -1.0)], 1),
    "NaN variance": ([(4, 4, math.nan)], 5),
    "infinite variance": ([(3, 3, math.inf)], 4),
    "NaN covariance": ([(3, 1, math.nan)], 4),
    "infinite covariance": ([(2, 0, -math.inf)], 3),
    "not positive definite": ([(1, 0, 1.5)], 2),
    "singular": ([(4, 2, 1.0)], 5),
    "the first of two": ([(3, 0, 2.0), (4, 4, math.nan)], 4),
    "the first of two, diagonal first": ([(1, 1, 0.0), (3, 0, 2.0)], 2),
}


@pairwise(failure=list(FAILURES), dim=[5, 36], inverse_rows=[False, True], dtype=DTYPES)
def test_failures_stay_in_their_system(kernels, systems, dtype, failure, dim, inverse_rows):
    entries, pivot = FAILURES[failure]
    cov, deriv = systems(5, dim, 2, dtype)
    expected = fisher_solve(kernels, cov, deriv, 0.0, inverse_rows)
    broken = cov.clone()
    broken[2] = torch.eye(dim, dtype=dtype)
    for row, column, value in entries:
        broken[2, row, column] = value
    got = fisher_solve(kernels, broken, deriv, 0.0, inverse_rows)
    assert got["info"].tolist() == [0, 0, pivot, 0, 0]
    for name in got:
        assert torch.equal(got[name][[0, 1, 3, 4]], expected[name][[0, 1, 3, 4]]), name
        assert name == "info" or got[name][2].isnan().all(), name


@both_plans
def test_a_failed_derivative_is_no_failure_of_the_system(kernels, systems, dtype, inverse_rows):
    cov, deriv = systems(2, 4, 2, dtype)
    deriv[0, 1, 0] = math.nan
    got = fisher_solve(kernels, cov, deriv, 0.0, inverse_rows)
    assert got["info"].tolist() == [0, 0]
    assert got["half"][0, 0].isfinite().all()
    assert got["fisher"][0, 0, 0].isnan()
    assert got["fisher"][1].isfinite().all()


def test_a_system_that_does_not_fit_is_an_error(kernels, systems, dtype):
    message = "the factor of one system must take at most 8192 bytes of shared memory"
    with pytest.raises(RuntimeError, match=message):
        fisher_solve(kernels, *systems(1, 64, 1, dtype), limit=8192)


def test_a_failed_system_has_no_gradient(kernels, normal, dtype):
    solution = normal(3, 4, 2, dtype=dtype)
    solution[1] = math.nan
    with kernels.serving():
        gradients = ops.fisher_solve_backward(normal(3, 2, 2, dtype=dtype), solution)
    for gradient in gradients:
        assert gradient[1].isnan().all()
        assert gradient[[0, 2]].isfinite().all()
