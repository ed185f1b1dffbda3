"""fisher_solve against its float64 reference, against closed forms."""

import math

import pytest
import torch
from support.op_bounds import BOUNDS
from support.solve_failures import COUNT, with_failures

from fisherfast import ops
from fisherfast.ops import reference

# Errors relative to the largest result of a system. Measured: 1.1e-6 and 1.5e-15.
TOLERANCE = BOUNDS["fisher_solve"]

SHAPES = [((), 1, 1), ((1,), 2, 1), ((7,), 5, 2), ((2, 3), 8, 16), ((37,), 33, 3), ((5,), 64, 1)]


def relative_error(result, truth, core_dims):
    """Largest |result - truth| over the systems, relative to the largest |truth| of each."""
    dims = tuple(range(-core_dims, 0))
    difference = (result.double() - truth).abs()
    if core_dims == 0:
        return (difference / truth.abs()).max().item()
    return (difference.amax(dims) / truth.abs().amax(dims)).max().item()


def largest_error(got, cov, deriv, ridge):
    truth = reference.fisher_solve(cov.double(), deriv.double(), ridge, True, True)
    assert got.info.eq(0).all()
    core_dims = {"fisher": 2, "half": 2, "condition": 0, "inverse_rows": 1, "solution": 2}
    expected = dict(zip(ops.FisherSolve._fields, truth, strict=True))
    return max(
        relative_error(getattr(got, name), expected[name], dims)
        for name, dims in core_dims.items()
        if getattr(got, name).numel() > 0
    )


# --- the reference against the definition --------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 2.0])
def test_reference_is_the_definition(systems, ridge):
    cov, deriv = systems((4,), 9, 2)
    regular = cov + ridge * torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1))
    fisher, half, info, condition, inverse_rows, solution = reference.fisher_solve(
        cov, deriv, ridge, True, True
    )
    torch.testing.assert_close(solution, torch.linalg.solve(regular, deriv))
    torch.testing.assert_close(fisher, deriv.mT @ torch.linalg.solve(regular, deriv))
    torch.testing.assert_close(half, torch.linalg.inv(torch.linalg.cholesky(regular)) @ deriv)
    assert info.dtype == torch.int32
    assert info.tolist() == [0] * 4

    s = cov.diagonal(dim1=-2, dim2=-1).rsqrt()
    correlation = s[:, :, None] * regular * s[:, None, :]
    inverse = torch.linalg.inv(torch.linalg.cholesky(correlation))
    torch.testing.assert_close(inverse_rows, inverse.square().sum(-1))
    assert (condition <= torch.linalg.cond(correlation, 2) * (1 + 1e-12)).all()
    assert (condition >= 1).all()


def test_inverse_rows_give_the_effective_dimension(systems):
    """k - ridge * cumsum(inverse_rows) = tr((S_k + ridge)^-1 S_k); a wrong power of L fails."""
    ridge, dim = 0.3, 6
    cov, deriv = systems((), dim, 1)
    s = cov.diagonal().rsqrt()
    correlation = s[:, None] * cov * s
    rows = ops.fisher_solve_details(cov, deriv, ridge=ridge, inverse_rows=True).inverse_rows
    for k in range(1, dim + 1):
        block = correlation[:k, :k]
        trace = torch.linalg.solve(block + ridge * torch.eye(k, dtype=torch.float64), block).trace()
        torch.testing.assert_close(k - ridge * rows[:k].sum(), trace)


# --- the op against the reference ----------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.0, 2.0**-13])
@pytest.mark.parametrize(("batch", "dim", "params"), SHAPES)
def test_matches_the_reference(systems, device, dtype, route, batch, dim, params, ridge):
    cov, deriv = systems(batch, dim, params, dtype=dtype, device=device)
    got = ops.fisher_solve_details(cov, deriv, ridge=ridge, inverse_rows=True, solution=True)
    assert got.fisher.shape == (*batch, params, params)
    assert got.half.shape == (*batch, dim, params)
    assert got.info.shape == got.condition.shape == batch
    assert got.inverse_rows.shape == (*batch, dim)
    assert {t.dtype for t in got} == {dtype, torch.int32}
    assert torch.equal(got.fisher, got.fisher.mT)
    assert largest_error(got, cov, deriv, ridge) < TOLERANCE[dtype]


def test_fisher_solve_is_the_first_three_details(systems, device, dtype):
    cov, deriv = systems((3,), 6, 2, dtype=dtype, device=device)
    details = ops.fisher_solve_details(cov, deriv, ridge=0.1)
    for got, expected in zip(ops.fisher_solve(cov, deriv, ridge=0.1), details[:3], strict=True):
        assert torch.equal(got, expected)
    assert details.inverse_rows.shape == (0,)


def test_only_the_lower_triangle_is_read(systems, device, dtype, route):
    cov, deriv = systems((3,), 6, 2, dtype=dtype, device=device)
    upper = torch.ones(6, 6, dtype=torch.bool, device=device).triu(1)
    expected = ops.fisher_solve_details(cov.masked_fill(upper, 0.0), deriv, inverse_rows=True)
    got = ops.fisher_solve_details(cov.masked_fill(upper, math.nan), deriv, inverse_rows=True)
    for left, right in zip(got, expected, strict=True):
        assert torch.equal(left, right)


# --- properties ----------------------------------------------------------------------------------


def test_leading_rows_of_half_give_the_fisher_of_leading_features(systems, device, dtype, route):
    cov, deriv = systems((4,), 12, 2, dtype=dtype, device=device)
    _, half, _ = ops.fisher_solve(cov, deriv, ridge=0.01)
    for k in (1, 5, 12):
        leading, _, _ = ops.fisher_solve(cov[:, :k, :k], deriv[:, :k], ridge=0.01)
        running = half[:, :k].mT @ half[:, :k]
        torch.testing.assert_close(running, leading, rtol=TOLERANCE[dtype], atol=0)


def test_units_of_powers_of_two_change_no_bit(systems, device, dtype, route):
    """J does not depend on the unit of a feature; powers of two are exact in floating point."""
    cov, deriv = systems((3,), 7, 2, dtype=dtype, device=device)
    unit = torch.tensor([2.0**e for e in (-20, 15, 0, 3, -7, 20, 1)], dtype=dtype, device=device)
    expected = ops.fisher_solve(cov, deriv, ridge=0.1)
    got = ops.fisher_solve(unit[:, None] * cov * unit, unit[:, None] * deriv, ridge=0.1)
    for left, right in zip(got, expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.99, 1 - 2.0**-13])
def test_equal_correlations_have_a_closed_form(device, dtype, route, correlation):
    """C = (1 - r) I + r 1 1^T: J = d / (1 + (d - 1) r) along 1, and 2 / (1 - r) along e_1 - e_2.

    The second is the ill-conditioned one: its error grows as d eps / (1 - r). Measured: at most
    0.1 of the first bound and 0.05 of the second.
    """
    dim = 20
    cov = torch.full((dim, dim), correlation, dtype=dtype, device=device).fill_diagonal_(1.0)
    deriv = torch.ones(dim, 2, dtype=dtype, device=device)
    deriv[:, 1] = 0
    deriv[0, 1], deriv[1, 1] = 1, -1
    fisher, _, info = ops.fisher_solve(cov, deriv)
    r = cov[0, 1].item()  # rounded to the dtype
    eps = torch.finfo(dtype).eps
    assert info.item() == 0
    assert fisher[0, 0].item() == pytest.approx(dim / (1 + (dim - 1) * r), rel=dim * eps)
    assert fisher[1, 1].item() == pytest.approx(2 / (1 - r), rel=dim * eps / (1 - r))


@pytest.mark.parametrize("failed_pivot", [0, 1, 301, 600])
def test_threads_share_a_large_system(systems, dtype, with_threads, failed_pivot):
    """Catches a panel that is read before it is finished, and a thread that goes on alone after a
    pivot failed, which would wait for ever."""
    cov, deriv = systems((2,), 600, 3, dtype=dtype)
    if failed_pivot:
        cov[0, failed_pivot - 1, failed_pivot - 1] = -1.0

    def solve():
        return ops.fisher_solve_details(cov, deriv, ridge=1e-3, inverse_rows=True, solution=True)

    one = with_threads(1, solve)
    assert one.info.tolist() == [failed_pivot, 0]
    for threads in (3, 4, 7):
        for left, right in zip(with_threads(threads, solve), one, strict=True):
            assert torch.equal(left.nan_to_num(7.0), right.nan_to_num(7.0))


# --- empty input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "dim", "params"), [((3,), 0, 2), ((3,), 4, 0), ((0,), 4, 2), ((2, 0), 4, 2)]
)
def test_empty_input(device, dtype, route, batch, dim, params):
    kind = {"dtype": dtype, "device": device}
    cov, deriv = torch.eye(dim, **kind).expand(*batch, dim, dim), torch.ones(dim, params, **kind)
    got = ops.fisher_solve_details(
        cov, deriv.expand(*batch, dim, params), inverse_rows=True, solution=True
    )
    assert torch.equal(got.fisher, torch.full((*batch, params, params), float(dim), **kind))
    assert got.half.shape == got.solution.shape == (*batch, dim, params)
    assert torch.equal(got.info, torch.zeros(batch, dtype=torch.int32, device=device))
    assert torch.equal(got.condition, torch.ones(batch, **kind))
    assert torch.equal(got.inverse_rows, torch.ones(*batch, dim, **kind))


# --- failures, one system at a time --------------------------------------------------------------


def test_failures_stay_in_their_system(systems, device, dtype, route):
    cov, deriv = systems((COUNT,), 5, 2, dtype=dtype, device=device)
    expected = ops.fisher_solve_details(cov, deriv, inverse_rows=True, solution=True)
    broken, pivots = with_failures(cov)
    got = ops.fisher_solve_details(broken, deriv, inverse_rows=True, solution=True)
    assert got.info.tolist() == pivots
    for name, left, right in zip(got._fields, got, expected, strict=True):
        assert torch.equal(left[::2], right[::2]), name
        assert name == "info" or left[1::2].isnan().all(), name


def test_the_smallest_pivot_is_d_eps(device, dtype, route):
    """The second pivot of [[1, r], [r, 1]] is 1 - r^2: 2 (1 - r), nearly. d eps = 2 eps."""
    eps = torch.finfo(dtype).eps
    r = torch.tensor([1.0, 1 - eps / 2, 1 - eps, 1 - 2 * eps, 1 - 8 * eps], dtype=dtype)
    cov = torch.ones(5, 2, 2, dtype=dtype)
    cov[:, 1, 0] = r
    _, _, info = ops.fisher_solve(cov.to(device), torch.ones(5, 2, 1, dtype=dtype, device=device))
    assert info.tolist()[:2] == [2, 2]
    assert info.tolist()[3:] == [0, 0]


def test_a_failed_derivative_is_no_failure_of_the_system(systems, device, dtype, route):
    cov, deriv = systems((2,), 4, 2, dtype=dtype, device=device)
    deriv[0, 1, 0] = math.nan
    fisher, half, info = ops.fisher_solve(cov, deriv)
    assert info.tolist() == [0, 0]
    assert half[0, 0].isfinite().all()
    assert fisher[0, 0, 0].isnan()
    assert fisher[1].isfinite().all()
