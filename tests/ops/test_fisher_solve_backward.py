"""The derivative of fisher_solve: gradcheck, plain torch's autograd, and failures.

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


def regular_systems(normal, batch, dim, params, **kind):
    """Systems of one unit (a gradient has the units of 1/C, gradcheck steps are absolute)."""
    samples = normal(*batch, dim, 2 * dim + 3)
    cov = samples @ samples.mT / (2 * dim + 3) + 0.1 * torch.eye(dim, dtype=torch.float64)
    return cov.to(**kind), normal(*batch, dim, params).to(**kind)


def gradients(cov, deriv, weight=None, ridge=0.0):
    """The gradients of sum(weight J) with respect to cov and deriv."""
    inputs = [t.detach().clone().requires_grad_() for t in (cov, deriv)]
    fisher = ops.fisher_solve(*inputs, ridge=ridge)[0]
    return torch.autograd.grad(
        fisher, inputs, torch.ones_like(fisher) if weight is None else weight
    )


@pytest.mark.parametrize(("ridge", "shape"), [(0.0, ((), 4, 2)), (0.3, ((2, 2), 3, 3))])
def test_gradcheck(normal, device, route, shape, ridge):
    """Finite differences in float64, through cov = A A^T + I. Catches a diagonal without
    (1 + ridge), a factor 2, a sign, and G for G + G^T (gradcheck weights J at random)."""
    batch, dim, params = shape
    root = normal(*batch, dim, dim, device=device).requires_grad_()
    deriv = normal(*batch, dim, params, device=device).requires_grad_()
    unit = torch.eye(dim, dtype=torch.float64, device=device)

    def fisher(root, deriv):
        return ops.fisher_solve(root @ root.mT + unit, deriv, ridge=ridge)[0]

    assert torch.autograd.gradcheck(fisher, (root, deriv))


@pairwise(
    dim=[1, 5, 33],
    params=[1, 3],
    ridge=[0.0, 0.3],
    wanted=["", "inverse_rows", "solution", "inverse_rows solution"],
    dtype=DTYPES,
)
def test_matches_autograd_of_the_formula(normal, device, dtype, route, dim, params, ridge, wanted):
    """float64 autograd through torch.linalg.solve, whatever else is asked for; the weight G is not
    symmetric. Catches a gradient of the lower triangle alone."""
    cov, deriv = regular_systems(normal, (4,), dim, params, dtype=dtype, device=device)
    weight = normal(4, params, params, dtype=dtype, device=device)
    inputs = [t.double().requires_grad_() for t in (cov, deriv)]
    # cov is read as symmetric by the op; torch's gradient of the symmetrised one is that too
    symmetric = (inputs[0] + inputs[0].mT) / 2
    regular = symmetric + ridge * torch.diag_embed(symmetric.diagonal(dim1=-2, dim2=-1))
    formula = inputs[1].mT @ torch.linalg.solve(regular, inputs[1])
    expected = torch.autograd.grad(formula, inputs, weight.double())
    inputs = [t.clone().requires_grad_() for t in (cov, deriv)]
    options = dict.fromkeys(wanted.split(), True)
    details = ops.fisher_solve_details(*inputs, ridge=ridge, **options)
    got = torch.autograd.grad(details.fisher, inputs, weight, retain_graph=True)
    for i, (left, right) in enumerate(zip(got, expected, strict=True)):
        assert left.dtype == dtype
        assert_close(left, right, TOLERANCE[dtype], right.abs().amax((-2, -1), keepdim=True))
        (alone,) = torch.autograd.grad(details.fisher, inputs[i], weight, retain_graph=True)
        assert torch.equal(alone, left)
    assert torch.equal(got[0], got[0].mT)


def test_only_fisher_is_differentiable_and_no_value_changes(normal, device, dtype, route):
    """Catches a gradient that flows through half and is not there, silently zero, and another
    route, with other bits, for inputs that require grad."""
    cov, deriv = regular_systems(normal, (3,), 21, 2, dtype=dtype, device=device)
    wanted = {"ridge": 0.1, "inverse_rows": True, "solution": True}
    expected = ops.fisher_solve_details(cov, deriv, **wanted)
    inputs = cov.requires_grad_(), deriv.requires_grad_()
    details = ops.fisher_solve_details(*inputs, **wanted)
    assert [result.requires_grad for result in details] == [True] + [False] * 5
    assert all(map(torch.equal, details, expected))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            without = ops.fisher_solve_details(*inputs, **wanted)
        assert not any(result.requires_grad for result in without)
        assert all(map(torch.equal, without, expected))


def test_strided_inputs_and_an_expanded_gradient(normal, device, dtype, route):
    """fisher.sum() hands over a gradient of stride 0, a transposed loss one that is transposed."""
    cov, deriv = regular_systems(normal, (4,), 5, 3, dtype=dtype, device=device)
    strided = [t.mT.contiguous().mT for t in (cov, deriv)]
    G = normal(3, 3, 4, dtype=dtype, device=device).permute(2, 1, 0)
    for weight in (torch.ones((), dtype=dtype, device=device).expand(4, 3, 3), G):
        contiguous = gradients(cov, deriv, weight.contiguous())
        for left, right in zip(gradients(*strided, weight), contiguous, strict=True):
            torch.testing.assert_close(left, right)


# --- failures and edges --------------------------------------------------------------------------


def test_failed_systems_have_nan_gradients(normal, device, dtype, route):
    """NaN there, the bits of a good batch elsewhere: no gradient is made up, none is lost."""
    cov, deriv = regular_systems(normal, (5,), 4, 2, dtype=dtype, device=device)
    expected = gradients(cov, deriv)
    cov[2, 2, 2] = -1
    for got, right in zip(gradients(cov, deriv), expected, strict=True):
        assert got[2].isnan().all()
        assert torch.equal(got[[0, 1, 3, 4]], right[[0, 1, 3, 4]])


def test_empty_gradients(device, dtype, route):
    kind = {"dtype": dtype, "device": device}
    for batch, dim, params in (
        ((0,), 3, 2),
        ((2,), 0, 2),
        ((2,), 3, 0),
        ((), 0, 0),
        ((2, 0), 1, 1),
    ):
        cov = torch.eye(dim, **kind).repeat(*batch, 1, 1)
        deriv = torch.ones(*batch, dim, params, **kind)
        for given, gradient in zip((cov, deriv), gradients(cov, deriv), strict=True):
            assert torch.equal(gradient, torch.zeros_like(given))


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


# --- torch.library -------------------------------------------------------------------------------


def test_opcheck_with_gradients(normal, device):
    cov, deriv = regular_systems(normal, (2, 3), 5, 2, device=device)
    inputs = (cov.requires_grad_(), deriv.requires_grad_())
    options = {"ridge": 1e-4, "inverse_rows": False, "solution": True}
    torch.library.opcheck(torch.ops.fisherfast.fisher_solve.default, inputs, options)


def test_compiles_with_its_backward(normal):
    inputs = [t.requires_grad_() for t in regular_systems(normal, (4,), 3, 2)]

    def loss(cov, deriv):
        return ops.fisher_solve(cov, deriv, ridge=0.1)[0].square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = (torch.autograd.grad(run(*inputs), inputs) for run in (compiled, loss))
    assert all(map(torch.equal, *results))
