"""fisher_solve against its float64 reference, against closed forms."""

import math

import pytest
import torch
from support.pairwise import DTYPES, pairwise

from fisherfast import ops
from fisherfast.ops import reference


def test_fisher_solve_is_the_first_three_details(systems, device, dtype):
    cov, deriv = systems((3,), 6, 2, dtype=dtype, device=device)
    details = ops.fisher_solve_details(cov, deriv, ridge=0.1)
    assert all(map(torch.equal, ops.fisher_solve(cov, deriv, ridge=0.1), details[:3]))
    assert details.inverse_rows.shape == details.solution.shape == (0,)


def test_units_of_powers_of_two_change_no_bit(systems, device, dtype, route):
    """J does not depend on the unit of a feature; powers of two are exact in floating point."""
    cov, deriv = systems((3,), 7, 2, dtype=dtype, device=device)
    unit = torch.tensor([2.0**e for e in (-20, 15, 0, 3, -7, 20, 1)], dtype=dtype, device=device)
    expected = ops.fisher_solve(cov, deriv, ridge=0.1)
    got = ops.fisher_solve(unit[:, None] * cov * unit, unit[:, None] * deriv, ridge=0.1)
    assert all(map(torch.equal, got, expected))


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


# --- failures, one system at a time --------------------------------------------------------------


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


# --- accuracy ------------------------------------------------------------------------------------


def correlations(normal, count, dim, condition, **kind):
    """Unit diagonal, random orthogonal bases, eigenvalues spread evenly in their logarithm.

    The unit diagonal changes the condition number a little.
    """
    basis = torch.linalg.qr(normal(count, dim, dim))[0]
    eigenvalues = torch.logspace(0, -math.log10(condition), dim, dtype=torch.float64)
    matrix = basis * eigenvalues @ basis.mT
    scale = matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
    matrix = scale[:, :, None] * matrix * scale[:, None, :]
    return ((matrix + matrix.mT) / 2).to(**kind)


@pytest.mark.parametrize("condition", [100.0, 1e6], ids="{:g}".format)
@pytest.mark.parametrize(("dim", "count"), [(4, 600), (16, 400), (33, 300), (128, 60)])
def test_as_accurate_as_torch(normal, device, dim, count, condition):
    """float32 against the truth in float64 on the same rounded systems: the largest and the median
    error of J and X are never twice those of torch. Catches reciprocals and square roots of half
    the bits, and an inverse that is multiplied where a system should be solved."""
    kind = {"dtype": torch.float32, "device": device}
    cov, deriv = correlations(normal, count, dim, condition, **kind), normal(count, dim, 2, **kind)
    truth = reference.fisher_solve(cov.double(), deriv.double(), 0.0, False, True)
    got = ops.fisher_solve_details(cov, deriv, solution=True)
    factor = torch.linalg.cholesky(cov)
    half = torch.linalg.solve_triangular(factor, deriv, upper=False)
    for ours, theirs, exact in (
        (got.fisher, half.mT @ half, truth[0]),
        (got.solution, torch.cholesky_solve(deriv, factor), truth[5]),
    ):
        mine, others = (
            (result.double() - exact).abs().amax((-2, -1)) / exact.abs().amax((-2, -1))
            for result in (ours, theirs)
        )
        assert mine.max() <= 2 * others.max()
        assert mine.median() <= 2 * others.median()
    assert got.info.eq(0).all()


# --- systems in the lanes of a vector ------------------------------------------------------------


@pairwise(count=[1, 8, 17, 100], dim=[1, 5, 40, 130], inverse_rows=[False, True], dtype=DTYPES)
def test_a_permuted_batch_gives_permuted_bits(
    normal, systems, device, dtype, dim, count, inverse_rows
):
    """Catches a tail of systems that takes another route, with other bits."""
    cov, deriv = systems((count,), dim, 2, dtype=dtype, device=device)
    order = normal(count).argsort().to(device)
    options = {"ridge": 1e-3, "inverse_rows": inverse_rows}
    got = ops.fisher_solve_details(cov[order], deriv[order], **options)
    expected = ops.fisher_solve_details(cov, deriv, **options)
    for left, right in zip(got, expected, strict=True):
        assert torch.equal(left, right[order] if right.numel() else right)


FAILURES = {
    "zero variance": (2, 2, 0.0),
    "NaN": (2, 0, math.nan),
    "not positive definite": (2, 1, 3.0),
    "infinite variance": (2, 2, math.inf),
    "negative variance, tiny": (2, 2, -1e-38),
}


@pairwise(
    position=[0, 15, 16, -1],
    failure=list(FAILURES),
    size=[(5, 37), (24, 33), (70, 20)],
    dtype=DTYPES,
)
def test_a_failure_stays_in_its_lane(normal, device, dtype, route, size, position, failure):
    """At the edges of a vector of systems: info is the failed pivot, all else keeps its bits."""
    dim, count = size
    row, column, value = FAILURES[failure]
    kind = {"dtype": dtype, "device": device}
    cov, deriv = correlations(normal, count, dim, 10.0, **kind), normal(count, dim, 2, **kind)
    expected = ops.fisher_solve_details(cov, deriv, inverse_rows=True, solution=True)
    cov[position, row, column] = value
    got = ops.fisher_solve_details(cov, deriv, inverse_rows=True, solution=True)
    pivots = [0] * count
    pivots[position] = 3
    assert got.info.tolist() == pivots
    others = got.info == 0
    for name, left, right in zip(got._fields, got, expected, strict=True):
        assert torch.equal(left[others], right[others]), name
        assert name == "info" or left[position].isnan().all(), name
