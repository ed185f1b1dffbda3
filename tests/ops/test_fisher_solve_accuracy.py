"""fisher_solve against torch's own route, over condition numbers, sizes and positions in a batch.

Kernels that solve many systems at once, one in each lane of a vector, must not lose accuracy, nor
let one system touch another: the cases here are around the widths of such vectors.
"""

import math

import pytest
import torch
from support.op_bounds import BOUNDS
from support.pairwise import DTYPES, pairwise

from fisherfast import ops
from fisherfast.ops import reference

# Errors relative to the largest result of a system, of systems with condition numbers below 100.
TOLERANCE = BOUNDS["fisher_solve"]

CONDITIONS = [1.0, 100.0, 1e4, 1e6]
SYSTEMS = {4: 600, 8: 600, 16: 400, 32: 300, 64: 150, 128: 60}
SIZES = [*range(1, 41), 48, 63, 64, 65, 96, 127, 128, 129, 130, 200, 257]
COUNTS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100]


def correlations(normal, count, dim, condition):
    """Unit diagonal, random orthogonal bases, eigenvalues spread evenly in their logarithm.

    The unit diagonal changes the condition number a little.
    """
    basis = torch.linalg.qr(normal(count, dim, dim))[0]
    eigenvalues = torch.logspace(0, -math.log10(condition), dim, dtype=torch.float64)
    matrix = basis * eigenvalues @ basis.mT
    scale = matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
    return scale[:, :, None] * matrix * scale[:, None, :]


def torch_route(cov, deriv):
    """What a user writes: J by cholesky and solve_triangular."""
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), deriv, upper=False)
    return half.mT @ half


def errors(fisher, truth):
    """Relative error [B] of J, by its largest entry."""
    return (fisher.double() - truth).abs().amax((-2, -1)) / truth.abs().amax((-2, -1))


@pytest.mark.parametrize("condition", CONDITIONS, ids="{:g}".format)
@pytest.mark.parametrize("dim", SYSTEMS)
def test_as_accurate_as_torch(normal, device, dim, condition):
    """float32 against the truth in float64 on the same rounded systems: the largest and the median
    error are never twice those of torch. Catches reciprocals and square roots of half the bits,
    and an inverse that is multiplied where a system should be solved.
    """
    kind = {"dtype": torch.float32, "device": device}
    cov = correlations(normal, SYSTEMS[dim], dim, condition).to(**kind)
    cov = (cov + cov.mT) / 2
    deriv = normal(SYSTEMS[dim], dim, 2, **kind)
    truth, _, info, *_ = reference.fisher_solve(cov.double(), deriv.double())
    assert info.eq(0).all()
    fisher, _, info = ops.fisher_solve(cov, deriv)
    assert info.eq(0).all()
    ours, theirs = errors(fisher, truth), errors(torch_route(cov, deriv), truth)
    assert ours.max() <= 2 * theirs.max()
    assert ours.median() <= 2 * theirs.median()
    if condition <= 100:
        assert ours.max() <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dim", [4, 16, 33, 128])
def test_gradients_are_accurate(normal, device, dim):
    """solution, which the gradients are made of, at condition 100: as accurate as torch's."""
    kind = {"dtype": torch.float32, "device": device}
    cov = correlations(normal, 100, dim, 100.0).to(**kind)
    cov = (cov + cov.mT) / 2
    deriv = normal(100, dim, 2, **kind)
    truth = torch.linalg.solve(cov.double(), deriv.double())
    ours = errors(ops.fisher_solve_details(cov, deriv, solution=True).solution, truth)
    theirs = errors(torch.cholesky_solve(deriv, torch.linalg.cholesky(cov)), truth)
    assert ours.max() <= 2 * theirs.max()
    assert ours.median() <= 2 * theirs.median()


# --- sizes ---------------------------------------------------------------------------------------


def assert_matches(cov, deriv, ridge=2.0**-13):
    got = ops.fisher_solve_details(cov, deriv, ridge=ridge, inverse_rows=True)
    truth = reference.fisher_solve(cov.double(), deriv.double(), ridge, True)
    assert got.info.eq(0).all()
    for name, expected in zip(("fisher", "half"), truth, strict=False):
        result = getattr(got, name)
        assert result.shape == expected.shape
        assert (errors(result, expected) <= TOLERANCE[cov.dtype]).all(), name
    for result, expected in ((got.condition, truth[3]), (got.inverse_rows, truth[4])):
        scale = expected if expected.dim() == 1 else expected.amax(-1, keepdim=True)
        assert ((result.double() - expected).abs() <= TOLERANCE[cov.dtype] * scale).all()


@pytest.mark.parametrize("dim", SIZES)
def test_every_size(systems, device, dtype, dim):
    """Catches the edges of blocks in d: one full vector of systems and one more."""
    assert_matches(*systems((17,), dim, 2, dtype=dtype, device=device))


@pairwise(count=COUNTS, dim=[1, 5, 8, 16, 33, 192, 193], dtype=DTYPES)
def test_every_number_of_systems(systems, device, dtype, dim, count):
    """Catches a last group of systems that is not full, also where lanes give way to blocks."""
    assert_matches(*systems((count,), dim, 3, dtype=dtype, device=device))


@pairwise(params=[1, 2, 3, 4, 5, 8, 9, 16, 17], dim=[1, 4, 15, 16, 40, 130], dtype=DTYPES)
def test_every_number_of_parameters(systems, device, dtype, dim, params):
    """Catches more right-hand sides than a block holds."""
    assert_matches(*systems((9,), dim, params, dtype=dtype, device=device))


# --- lanes ---------------------------------------------------------------------------------------


@pairwise(
    count=[1, 4, 8, 16, 17, 33, 100],
    dim=[1, 5, 12, 40, 130],
    inverse_rows=[False, True],
    dtype=DTYPES,
)
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
    position=[0, 1, 15, 16, 17, -1],
    failure=list(FAILURES),
    size=[(5, 37), (24, 33), (70, 20)],
    dtype=DTYPES,
)
def test_a_failure_stays_in_its_lane(normal, device, dtype, size, position, failure):
    """At the edges of a vector of systems: info is the failed pivot, all else keeps its bits."""
    dim, count = size
    row, column, value = FAILURES[failure]
    kind = {"dtype": dtype, "device": device}
    cov, deriv = correlations(normal, count, dim, 10.0).to(**kind), normal(count, dim, 2, **kind)
    expected = ops.fisher_solve_details(cov, deriv, inverse_rows=True)
    broken = cov.clone()
    broken[position, row, column] = value
    got = ops.fisher_solve_details(broken, deriv, inverse_rows=True)
    pivots = [0] * count
    pivots[position] = 3
    assert got.info.tolist() == pivots
    others = torch.ones(count, dtype=torch.bool, device=device)
    others[position] = False
    for left, right in zip(got[:5], expected[:5], strict=True):
        assert torch.equal(left[others], right[others])
    for name in ("fisher", "half", "condition", "inverse_rows"):
        assert getattr(got, name)[position].isnan().all(), name
