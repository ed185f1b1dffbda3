"""Forecasts: priors, credible ellipses, the bias from a systematic shift, names of parameters."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from support.training_histories import layer as layer_of

import fisherfast as ff
from fisherfast.problems import GaussianShift

S = torch.tensor([[1.0, 0.6, 0.0], [0.6, 2.0, 0.3], [0.0, 0.3, 0.5]], dtype=torch.float64)
A = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.2, -1.0]], dtype=torch.float64)
PROBLEM = GaussianShift(A, S)
J3 = torch.tensor([[4.0, 1.0, 0.5], [1.0, 3.0, -0.8], [0.5, -0.8, 2.0]], dtype=torch.float64)
SHAPE = "precision must have shape [P, P] = [3, 3], or [P] for 1 / sigma^2,"


def layer(J: torch.Tensor = J3, **changes: object) -> ff.LayerFisher:
    return dataclasses.replace(layer_of("fc", J, stderr=0.1), **changes)


@pytest.fixture(scope="module")
def measured() -> ff.LayerFisher:
    """Of the input: J is A^T S^-1 A."""
    noise = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    x = noise @ torch.linalg.cholesky(S).T.float()
    dx = A.T.float().expand(20_000, 2, 3)
    return ff.fisher_information(ff.Pathwise(x, dx, names=["x", "y"]), max_features=16)


# --- priors ---


@pytest.mark.parametrize(
    "precision",
    [[4.0, 0.0, 1.0], np.diag([4, 0, 1]), torch.diag(torch.tensor([4.0, 0.0, 1.0]))],
    ids=["1 / sigma^2", "array", "float32"],
)
def test_a_prior_adds_its_precision(precision):
    """Catches sigma or sigma^2 in place of 1 / sigma^2, errors that change, a curve, profile or
    bound without the prior, and a prior that makes a finite step look wider."""
    theta = torch.zeros(2, 1, dtype=torch.float64).expand(2, 3)
    profile = ff.results.profile.Profile(
        theta, J3.expand(2, 3, 3), J3.abs().expand(2, 3, 3), theta[:, 0].long()
    )
    before = layer(profile=profile, dtheta=(0.1,) * 3, replicates=J3.expand(4, 3, 3))
    after, more = before.with_prior(precision), torch.tensor([4.0, 0, 1]).double().diag()
    for name in ("J", "lower", "linear", "naive", "curve_J", "replicates"):
        assert torch.equal(getattr(after, name), getattr(before, name) + more), name
    assert after.profile is not None
    assert torch.equal(after.profile.J, profile.J + more)
    for name in ("stderr", "lower_stderr", "curve_stderr", "finite_step"):
        assert torch.allclose(getattr(after, name), getattr(before, name)), name
    covariance = torch.linalg.inv(J3 + more)
    assert torch.allclose(after.crlb, covariance.diagonal().sqrt())
    assert after.status == before.status
    assert after.prior is not None
    assert torch.equal(after.with_prior(precision).prior, 2 * more)
    assert torch.equal(before.J, J3)
    again = ff.LayerFisher.from_dict(after.to_dict())
    assert torch.equal(again.prior, more)


def test_a_prior_makes_a_singular_information_invertible():
    """Catches a bound that stays infinite: two equal parameters, one with a prior of sigma 0.5."""
    one = layer(torch.ones(2, 2, dtype=torch.float64))
    assert torch.isinf(one.crlb).all()
    bound = one.with_prior([4.0, 0.0]).crlb.square()
    assert bound.tolist() == pytest.approx([0.25, 1.25])
    number = layer(torch.ones(1, 1, dtype=torch.float64)).with_prior(3)
    assert number.value == 4


@pytest.mark.parametrize(
    ("precision", "error", "message"),
    [
        (2.0, ValueError, f"{SHAPE} got []"),
        (np.ones((2, 2)), ValueError, f"{SHAPE} got [2, 2]"),
        ([1.0, math.nan, 1.0], ValueError, "precision must be finite, got [1.0, nan, 1.0]"),
        ([1.0, math.inf, 1.0], ValueError, "precision must be finite, got [1.0, inf, 1.0]"),
        ([1.0, -1e-9, 1.0], ValueError, "precision must be positive semi-definite, got"),
        (np.eye(3) + np.eye(3, k=1), ValueError, "precision must be symmetric, got"),
        (1.0 - 1.6 * (1 - np.eye(3)), ValueError, "precision must be positive semi-definite, got"),
        (1e-20 * np.eye(3)[::-1], ValueError, "precision must be positive semi-definite, got"),
        ([1.0, 1j, 1.0], TypeError, "precision must hold real numbers, got"),
        ("tight", TypeError, "precision must hold real numbers, got 'tight'"),
        (None, TypeError, "precision must hold real numbers, got None"),
    ],
)
def test_wrong_priors_are_refused(precision, error, message):
    """Catches a covariance that is no prior, also where all its entries are tiny."""
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        layer().with_prior(precision)


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_units_do_not_decide_whether_a_prior_is_valid(unit):
    """Catches a tolerance in the unit of theta: a valid prior refused, or a wrong one taken."""
    scale = np.array([1.0, unit, 1 / unit])
    valid = np.array([[1.0, 0.9, 0.2], [0.9, 1.0, 0.1], [0.2, 0.1, 1.0]]) * np.outer(scale, scale)
    layer().with_prior(valid)
    valid[0, 1] *= 1.001
    with pytest.raises(ValueError, match="must be symmetric"):
        layer().with_prior(valid)


# --- ellipses ---


@pytest.mark.parametrize("level", [0.683, 0.954])
def test_an_ellipse_holds_its_probability(level):
    """The share of Gaussian draws of covariance J^-1 inside, with the third parameter left out, is
    the level: 4 standard errors of 200 000 draws are 0.004. Catches Delta chi^2 = 1 (0.39 for
    0.683), and nuisances that are taken for known."""
    found = layer().ellipse([2, 0], level, center=(5.0, -3.0))
    draws = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)).double()
    draws = draws @ torch.linalg.cholesky(torch.linalg.inv(J3)).T
    offset = draws[:, [2, 0]]
    inside = (offset @ torch.linalg.inv(found.covariance) * offset).sum(1) < found.delta_chi2
    assert abs(float(inside.double().mean()) - level) < 0.004
    points = found.points(4000)
    assert torch.allclose(points[0], points[-1])
    radius = (points - torch.tensor([5.0, -3.0])).norm(dim=1)
    assert float(radius.max()) == pytest.approx(found.semi_axes[0], rel=1e-6)
    assert float(radius.min()) == pytest.approx(found.semi_axes[1], rel=1e-6)
    x, y = points[int(radius.argmax())] - torch.tensor([5.0, -3.0])
    assert math.tan(found.angle) == pytest.approx(float(y / x), rel=0.01)
    assert found.area == pytest.approx(math.pi * math.prod(found.semi_axes))
    shoelace = points[:-1, 0] * points[1:, 1] - points[1:, 0] * points[:-1, 1]
    assert abs(float(shoelace.sum())) / 2 == pytest.approx(found.area, rel=1e-5)


def test_the_ellipse_of_a_gaussian_is_the_closed_form(measured):
    """Semi-axes are roots of the eigenvalues of (A^T S^-1 A)^-1 times 2.298; 1 % of errors are seen
    at 20 000 samples. Catches eigenvalues of J in place of those of its inverse."""
    truth = torch.linalg.eigvalsh(torch.linalg.inv(PROBLEM.fisher([0.0, 0.0])))
    found = measured.ellipse(["x", "y"])
    expected = (2.2977 * truth.flip(0)).sqrt().tolist()
    assert list(found.semi_axes) == pytest.approx(expected, rel=0.05)
    assert repr(found).startswith("Ellipse(['x', 'y'], level=0.683, semi-axes=")


def test_ellipses_keep_their_digits_in_any_unit():
    """Catches a minor axis that is rounding where one unit is a million times the other."""
    scale = torch.tensor([1e-9, 1e9, 1.0], dtype=torch.float64)
    far, near = layer(J3 / scale[:, None] / scale).ellipse([0, 1]), layer().ellipse([0, 1])
    assert torch.allclose(far.points() / scale[:2], near.points())
    assert far.area == pytest.approx(near.area)


def test_impossible_ellipses_are_refused():
    """Catches an infinite ellipse drawn from rounding: a parameter that equals a nuisance."""
    W = torch.tensor([[1.0, 0.3, 1.0], [0.2, 2.0, 0.2], [0.7, 0.1, 0.7]], dtype=torch.float64)
    degenerate = layer(W.T @ W, parameter_names=("x", "y", "z"))
    unbounded = (
        "J must be positive definite for an ellipse, got no information on x with the other"
        " parameters unknown: add a prior (with_prior)"
    )
    for message, call in {
        unbounded: lambda: degenerate.ellipse(["x", "y"]),
        "keep must name two parameters, got 3": lambda: layer().ellipse([0, 1, 2]),
        "level must be between 0 and 1, got 1": lambda: layer().ellipse([0, 1], 1),
        "level must be between 0 and 1, got nan": lambda: layer().ellipse([0, 1], math.nan),
        "center must be two finite numbers, got (0,)": lambda: layer().ellipse([0, 1], center=(0,)),
        "keep must be one of ['x', 'y', 'z'], got 'w'": lambda: degenerate.ellipse(["x", "w"]),
        "keep must be a number, or named in the data (names=), got 'x'": lambda: layer().ellipse(
            ["x", "y"]
        ),
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()
    assert degenerate.with_prior([1.0, 0, 0]).ellipse(["x", "y"]).area > 0


# --- bias ---


SHIFT = torch.tensor([0.4, -0.3, 0.25], dtype=torch.float64)


@pytest.mark.parametrize(("source", "samples"), [("pathwise", 64), ("scored", 600), ("paired", 64)])
def test_bias_is_the_closed_form(source, samples):
    """J^-1 A^T S^-1 shift within 4 standard errors of 24 seeds: one false alarm in 300 choices of
    seeds. Catches a readout without S^-1 (0.31 for 0.39), without J^-1, and one without the
    correction for few samples, which is 0.03 too large with 64 samples and an error of 0.006."""
    truth = torch.linalg.solve(PROBLEM.fisher([0.0] * 2), A.T @ torch.linalg.solve(S, SHIFT))
    found = []
    for seed in range(24):
        if source == "paired":
            data = PROBLEM.finite_difference([0.0] * 2, 0.1, samples, paired=True, seed=seed)
        else:
            data = getattr(PROBLEM, source)([0.0] * 2, samples, seed=seed)
        found.append(ff.fisher_information(data, max_features=4).bias(SHIFT))
    runs = torch.stack(found)
    error = runs.std(0) / math.sqrt(len(runs))
    assert ((runs.mean(0) - truth).abs() < 4 * error).all()
    assert (error < 0.02).all()


def test_the_bias_is_that_of_the_estimate_it_is_about():
    """The generalised least-squares estimate of shifted samples is off by the stated bias, also
    behind a linear layer, with a prior, in any unit of theta and for samples of the shift.
    Catches activations in the scale of the features."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    unit = torch.tensor([1.0, 50.0, 0.02], dtype=torch.float64)
    x = x @ torch.linalg.cholesky(S).T * unit + 7
    dx = (A * unit[:, None] * torch.tensor([1.0, 1e-6])).T.expand(4000, 2, 3)
    model = torch.nn.Linear(3, 3, dtype=torch.float64)
    shift = SHIFT * unit
    flow = ff.fisher_flow(model, ff.Pathwise(x, dx.contiguous()), max_features=8)
    covariance = torch.linalg.inv(torch.cov(x.T))
    J, pull = dx[0] @ covariance @ dx[0].T, dx[0] @ covariance @ shift
    expected = torch.linalg.solve(J, pull)
    many = shift + torch.randn(500, 3, generator=generator).double() * 1e-9
    inner = flow["output"].bias((model.weight @ shift).detach())
    for found in (flow["input"].bias(shift), flow["input"].bias(many.numpy()), inner):
        assert found.tolist() == pytest.approx(expected.tolist(), rel=0.01)
    prior = torch.tensor([1.0, 1e12], dtype=torch.float64).reciprocal()
    expected = torch.linalg.solve(J + prior.diag(), pull)
    held = flow["input"].with_prior(prior).bias(shift)
    assert held.tolist() == pytest.approx(expected.tolist(), rel=0.01)


def test_shifts_that_cannot_be_used_are_refused(measured):
    """Catches a shift of one number that is broadcast over all activations."""
    for message, shift in {
        "shift must have the shape of the activations, [3], or [n, ...] of n samples, got []": 1.0,
        "shift must have the shape of the activations, [3], or [n, ...] of n samples, got [2]": (
            torch.ones(2)
        ),
        "shift must be finite, got NaN or infinity": [0.0, math.nan, 0.0],
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            measured.bias(shift)
    with pytest.raises(TypeError, match=r"^shift must hold real numbers, got torch\.complex64$"):
        measured.bias(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"^layer 'fc' must have a readout of its activations"):
        layer().bias(torch.ones(3))
    nothing = dataclasses.replace(measured, linear=torch.zeros(2, 2, dtype=torch.float64))
    assert nothing.bias(torch.ones(3)).isnan().all()


# --- names ---


def simulate(theta, n, generator):
    return theta @ A.T.float() + torch.randn(n, 3, generator=generator)


def test_names_reach_the_results(tmp_path, measured):
    """Catches a source that drops names, also inside a wrapper, and files without them."""
    x, names = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)), ["x", "y"]
    for data in (
        ff.FiniteDifference([x, x], [x, x + 1], 0.1, names=names),
        ff.Pathwise(x, torch.ones(200, 2, 3), names=names),
        ff.Score(x, x[:, :2], names=names),
        ff.Labelled(x, x[:, :2], at=[[-1.0, 0.0], [1.0, 0.0]], names=names),
        ff.Simulator(simulate, [0.0, 0.0], samples=200, names=names),
    ):
        for wrapped in (data, ff.Shard(data), ff.data.KeptData(data, 10**6)):
            assert wrapped.names == ("x", "y")
    assert measured.parameter_names == ("x", "y")
    flow = ff.fisher_flow(torch.nn.Linear(3, 2), data, max_features=8)
    flow.save(tmp_path / "flow.json")
    again = ff.FisherFlow.load(tmp_path / "flow.json")["output"]
    assert again.parameter_names == ("x", "y")
    assert torch.equal(again.marginal("y").J, again.marginal(1).J)
    assert repr(again.marginal("y")).startswith("MarginalFisher(parameters=['y'], J=")
    assert torch.equal(again.readout, flow["output"].readout)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("xy", TypeError, "names must be a list of strings, one per parameter, got 'xy'"),
        (["x", 1], TypeError, "names must be strings, got ['x', 1]"),
        (["x"], ValueError, "names must hold one per parameter (2), got 1: ['x']"),
        (["x", "x"], ValueError, "names must be different and not empty, got ['x', 'x']"),
        (["x", " "], ValueError, "names must be different and not empty, got ['x', ' ']"),
    ],
)
def test_wrong_names_are_refused(names, error, message):
    """Catches a string that is taken for two names, and a name that means two parameters."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ff.Score(torch.randn(10, 2), torch.randn(10, 2), names=names)


def test_the_state_of_a_monitor_holds_no_readouts():
    """Catches a state of a training run that is three times as large, with every epoch's readouts;
    the last flow in memory still has them."""
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    data = ff.Pathwise(x, torch.ones(400, 3))
    monitor = ff.FisherMonitor(torch.nn.Linear(3, 1), data, max_features=8)
    monitor.step()
    (record,) = monitor.state_dict()["history"]
    assert not any("readout" in layer for layer in record["flow"]["layers"])
    assert monitor.history[0].flow["input"].bias(torch.ones(3)).item() == pytest.approx(1, rel=0.1)
