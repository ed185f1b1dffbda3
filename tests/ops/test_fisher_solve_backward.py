"""The derivative of fisher_solve: gradcheck, closed forms, plain torch's autograd, and failures.

J = D^T (C + ridge diag C)^-1 D and its gradients for a gradient G with respect to J:
Z = X (G + G^T), grad_deriv = Z, grad_cov = -(Z X^T) / 2 with the diagonal times (1 + ridge).
"""

import re

import pytest
import torch
from support.closeness import assert_close
from support.pairwise import DTYPES, pairwise

from fisherfast import ops

TOLERANCE = {torch.float32: 2e-5, torch.float64: 2e-13}


def plain(cov, deriv, ridge):
    """J as anyone would write it, differentiable by torch."""
    regular = cov + ridge * torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1))
    return deriv.mT @ torch.linalg.solve(regular, deriv)


def regular_systems(normal, batch, dim, params, **kind):
    """Systems of one unit (a gradient has the units of 1/C, gradcheck steps are absolute)."""
    samples = normal(*batch, dim, 2 * dim + 3)
    cov = samples @ samples.mT / (2 * dim + 3) + 0.1 * torch.eye(dim, dtype=torch.float64)
    return cov.to(**kind), normal(*batch, dim, params).to(**kind)


def gradients(fisher, inputs, weight):
    return torch.autograd.grad(fisher, inputs, weight)


def assert_matches(got, expected, dtype):
    """Relative to the largest entry of each system."""
    assert got.dtype == dtype
    if got.numel() > 0:
        assert_close(got, expected, TOLERANCE[dtype], expected.abs().amax((-2, -1), keepdim=True))


# --- solution ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize(("batch", "dim", "params"), [((), 1, 1), ((5,), 7, 3), ((2, 3), 33, 1)])
def test_solution(normal, device, dtype, route, batch, dim, params, ridge):
    """X = (C + ridge diag C)^-1 D. Catches the X of the scaled system, and a ridge on I."""
    cov, deriv = regular_systems(normal, batch, dim, params, dtype=dtype, device=device)
    unit = torch.logspace(-2, 2, dim, dtype=dtype, device=device)
    cov, deriv = unit[:, None] * cov * unit, unit[:, None] * deriv
    got = ops.fisher_solve_details(cov, deriv, ridge=ridge, solution=True)
    regular = (cov + ridge * torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1))).double()
    expected = torch.linalg.solve(regular, deriv.double())
    assert_matches(unit[:, None] * got.solution, unit[:, None] * expected, dtype)
    without = ops.fisher_solve_details(cov, deriv, ridge=ridge)
    assert without.solution.shape == (0,)
    torch.testing.assert_close(got.fisher, without.fisher)
    torch.testing.assert_close(got.half, without.half)


# --- the derivative ------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize(
    ("batch", "dim", "params"), [((), 1, 1), ((), 4, 2), ((3,), 5, 1), ((2, 2), 3, 3)]
)
def test_gradcheck(normal, device, route, batch, dim, params, ridge):
    """Finite differences in float64, through cov = A A^T + I. Catches a diagonal without
    (1 + ridge), a factor 2, a sign, and G for G + G^T (gradcheck weights J at random)."""
    root = normal(*batch, dim, dim, device=device).requires_grad_()
    deriv = normal(*batch, dim, params, device=device).requires_grad_()
    unit = torch.eye(dim, dtype=torch.float64, device=device)

    def fisher(root, deriv):
        return ops.fisher_solve(root @ root.mT + unit, deriv, ridge=ridge)[0]

    assert torch.autograd.gradcheck(fisher, (root, deriv))


def test_two_features_have_a_closed_form(device, dtype, route):
    """C = [[1, r], [r, 1]], D = e_1: J = 1 / (1 - r^2). Each of the two entries r gets half of
    dJ/dr = 2 r / (1 - r^2)^2; a gradient of the lower triangle alone fails."""
    kind = {"dtype": dtype, "device": device}
    r = 0.5
    cov = torch.tensor([[1.0, r], [r, 1.0]], **kind).requires_grad_()
    fisher = ops.fisher_solve(cov, torch.tensor([[1.0], [0.0]], **kind))[0]
    fisher.backward(torch.ones_like(fisher))
    x = 1 / (1 - r * r)
    expected = torch.tensor([[-x * x, r * x * x], [r * x * x, -r * r * x * x]], **kind)
    torch.testing.assert_close(cov.grad, expected)


@pairwise(
    dim=[1, 2, 5, 16, 33, 70],
    params=[1, 2, 5],
    ridge=[0.0, 0.3],
    wanted=["", "inverse_rows", "solution", "inverse_rows solution"],
    dtype=DTYPES,
)
def test_matches_autograd_of_the_formula(normal, device, dtype, route, dim, params, ridge, wanted):
    """float64 autograd through torch.linalg.solve, whatever else is asked for; the weight G is not
    symmetric."""
    cov, deriv = regular_systems(normal, (4,), dim, params, dtype=dtype, device=device)
    weight = normal(4, params, params, dtype=dtype, device=device)
    inputs = [t.double().requires_grad_() for t in (cov, deriv)]
    # cov is read as symmetric by the op; torch's gradient of the symmetrised one is that too
    formula = plain((inputs[0] + inputs[0].mT) / 2, inputs[1], ridge)
    expected = gradients(formula, inputs, weight.double())
    inputs = [t.clone().requires_grad_() for t in (cov, deriv)]
    options = dict.fromkeys(wanted.split(), True)
    details = ops.fisher_solve_details(*inputs, ridge=ridge, **options)
    got = gradients(details.fisher, inputs, weight)
    for left, right in zip(got, expected, strict=True):
        assert_matches(left, right, dtype)
    assert torch.equal(got[0], got[0].mT)


def test_only_fisher_is_differentiable_and_no_value_changes(normal, device, dtype, route):
    """Catches a gradient that flows through half and is not there, silently zero, and another
    route, with other bits, for inputs that require grad."""
    cov, deriv = regular_systems(normal, (3,), 21, 2, dtype=dtype, device=device)
    wanted = {"ridge": 0.1, "inverse_rows": True, "solution": True}
    expected = ops.fisher_solve_details(cov, deriv, **wanted)
    inputs = cov.requires_grad_(), deriv.requires_grad_()
    details = ops.fisher_solve_details(*inputs, **wanted)
    assert details.fisher.requires_grad
    assert not any(result.requires_grad for result in details[1:])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            without = ops.fisher_solve_details(*inputs, **wanted)
        assert not any(result.requires_grad for result in without)
        for results in zip(details, without, expected, strict=True):
            assert torch.equal(results[0], results[2])
            assert torch.equal(results[1], results[2])


@pytest.mark.parametrize("needed", ["cov", "deriv"])
def test_one_input_needs_a_gradient(normal, device, route, needed):
    cov, deriv = regular_systems(normal, (3,), 5, 2, device=device)
    tensor = {"cov": cov, "deriv": deriv}[needed].requires_grad_()
    (expected,) = gradients(plain((cov + cov.mT) / 2, deriv, 0.1).sum(), [tensor], None)
    (got,) = gradients(ops.fisher_solve(cov, deriv, ridge=0.1)[0].sum(), [tensor], None)
    assert_matches(got, expected, torch.float64)


def test_strided_inputs_and_an_expanded_gradient(normal, device, dtype, route):
    """fisher.sum() hands over a gradient of stride 0, a transposed loss one that is transposed."""
    cov, deriv = regular_systems(normal, (4,), 5, 3, dtype=dtype, device=device)
    inputs = [t.requires_grad_() for t in (cov, deriv)]
    G = normal(3, 3, 4, dtype=dtype, device=device).permute(2, 1, 0)
    for weight in (torch.ones((), dtype=dtype, device=device).expand(4, 3, 3), G):
        contiguous = gradients(ops.fisher_solve(*inputs)[0], inputs, weight.contiguous())
        strided = [cov.mT.contiguous().mT, deriv.mT.contiguous().mT]
        got = gradients(ops.fisher_solve(*strided)[0], inputs, weight)
        for left, right in zip(got, contiguous, strict=True):
            torch.testing.assert_close(left, right)


# --- failures and edges --------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 2, 4])
def test_failed_systems_have_nan_gradients(normal, device, dtype, route, position):
    """NaN there, the bits of a good batch elsewhere: no gradient is made up, none is lost."""
    cov, deriv = regular_systems(normal, (5,), 4, 2, dtype=dtype, device=device)
    broken = cov.clone()
    broken[position, 2, 2] = -1

    def run(cov):
        inputs = [cov.clone().requires_grad_(), deriv.clone().requires_grad_()]
        return gradients(ops.fisher_solve(*inputs)[0].sum(), inputs, None)

    others = [i for i in range(5) if i != position]
    for got, expected in zip(run(broken), run(cov), strict=True):
        assert got[position].isnan().all()
        assert torch.equal(got[others], expected[others])


@pytest.mark.parametrize(
    ("batch", "dim", "params"),
    [((0,), 3, 2), ((2,), 0, 2), ((2,), 3, 0), ((), 0, 0), ((2, 0), 1, 1)],
)
def test_empty_gradients(device, dtype, route, batch, dim, params):
    cov = torch.eye(dim, dtype=dtype, device=device).repeat(*batch, 1, 1).requires_grad_()
    deriv = torch.ones(*batch, dim, params, dtype=dtype, device=device).requires_grad_()
    fisher = ops.fisher_solve(cov, deriv)[0]
    grad_cov, grad_deriv = gradients(fisher.sum(), [cov, deriv], None)
    assert grad_cov.shape == cov.shape
    assert grad_deriv.shape == deriv.shape
    assert grad_cov.eq(0).all()
    assert grad_deriv.eq(0).all()


def test_backward_twice_is_right_or_refused(device, route):
    """J = D^2 / C, d^2 J / dD^2 = 2 / C. A gradient of the gradient that is quietly zero, or left
    out of a sum, is what must not happen."""
    kind = {"dtype": torch.float64, "device": device}
    cov = torch.tensor([[4.0]], **kind).requires_grad_()
    deriv = torch.tensor([[3.0]], **kind).requires_grad_()
    fisher = ops.fisher_solve(cov, deriv)[0]
    reason = "twice|differentiable|double|second|backward"
    try:
        (slope,) = torch.autograd.grad(fisher.sum(), deriv, create_graph=True)
        penalty = deriv.sum() + slope.square().sum()  # 3 + (2 D / C)^2
        (got,) = torch.autograd.grad(penalty, deriv)
    except (RuntimeError, NotImplementedError) as error:
        assert re.search(reason, str(error))  # noqa: PT017
    else:
        assert got.item() == pytest.approx(1 + 8 * 3 / 16)


# --- the op of the backward ----------------------------------------------------------------------


def backward_by_formula(G, X, ridge):
    Z = X @ (G + G.mT)
    grad_cov = -(Z @ X.mT) / 2
    diagonal = torch.diag_embed(grad_cov.diagonal(dim1=-2, dim2=-1))
    return grad_cov + ridge * diagonal, Z


@pairwise(dim=[1, 3, 8, 33, 130], params=[1, 2, 3, 16, 17], ridge=[0.0, 0.3], dtype=DTYPES)
def test_backward_is_the_formula(normal, device, dtype, dim, params, ridge):
    """Z X^T = X (G + G^T) X^T is symmetric, to the bit; G itself is not."""
    G = normal(3, params, params, dtype=dtype, device=device)
    X = normal(3, dim, params, dtype=dtype, device=device)
    expected = backward_by_formula(G.double(), X.double(), ridge)
    got = ops.fisher_solve_backward(G, X, ridge)
    for left, right in zip(got, expected, strict=True):
        assert_matches(left, right, dtype)
    assert torch.equal(got[0], got[0].mT)


# --- torch.library -------------------------------------------------------------------------------


@pytest.mark.parametrize("solution", [False, True])
def test_opcheck_with_gradients(normal, device, solution):
    cov, deriv = regular_systems(normal, (2, 3), 5, 2, device=device)
    options = {"ridge": 1e-4, "inverse_rows": False, "solution": solution}
    inputs = (cov.requires_grad_(), deriv.requires_grad_())
    torch.library.opcheck(torch.ops.fisherfast.fisher_solve.default, inputs, options)


def test_compiles_with_its_backward(normal):
    cov, deriv = regular_systems(normal, (4,), 3, 2)
    inputs = [t.requires_grad_() for t in (cov, deriv)]

    def loss(cov, deriv):
        return ops.fisher_solve(cov, deriv, ridge=0.1)[0].square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = gradients(loss(*inputs), inputs, None)
    for left, right in zip(gradients(compiled(*inputs), inputs, None), expected, strict=True):
        assert torch.equal(left, right)
