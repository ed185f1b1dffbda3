"""The live estimate: against closed forms, while weights drift, and of batches of every kind."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

import pytest
import torch
from support.theta_batches import BATCH, DIM, SIGMAS, generator, noise, shifted, uniform
from torch import nn

from fisherfast.problems import GaussianShift, mlp
from fisherfast.training.observe import Observer, leaves
from fisherfast.training.regression import (
    WINDOW,
    LiveEstimate,
    RegressionMoments,
    ThetaBatch,
    monomials,
    slopes_of,
)

BATCHES = 80  # many windows: what is seen is the last of it
ONES = torch.ones(DIM)


def live(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    parameters: int = 1,
    *,
    between: Callable[[int], None] = lambda _: None,
) -> dict[str, LiveEstimate]:
    """What an observer of every batch finds; `between` is what happens after each."""
    observer = Observer(model, parameters, every=1, modules=leaves(model))
    observer.observe(torch.zeros(1, parameters))  # listens from now on
    for number, (x, theta) in enumerate(batches):
        model(x)
        observer.observe(theta)
        between(number)
    observer.release()
    return observer.estimates()


def linear_network(*widths: int) -> nn.Module:
    return mlp(widths, nn.Identity, seed=0)


def assert_near(found: LiveEstimate, truth: torch.Tensor | float) -> None:
    """Within the stated errors, which are below a fifth: that is the power of the test."""
    assert float(((found.J - truth).abs() / found.stderr).amax()) < SIGMAS
    assert float(found.stderr.amax()) < 0.2 * float(found.J.diagonal().mean())


# --- against closed forms -------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [1, 2])
def test_layers_of_a_linear_network(parameters):
    """a^T W^T (W W^T)^-1 W a of each layer within 4 standard errors, all entries. Catches a slope
    in another unit, and of another layer."""
    direction = torch.randn(DIM, parameters, generator=generator) * 2
    problem = GaussianShift(direction)
    model = linear_network(DIM, 4, 3, parameters)
    found = live(model, shifted(direction, BATCHES), parameters)
    weights = torch.eye(DIM)
    assert_near(found["input"], problem.fisher_after(weights))
    for name, layer in (("fc1", model.fc1), ("fc2", model.fc2), ("output", model.fc3)):
        weights = layer.weight.detach() @ weights
        assert_near(found[name], problem.fisher_after(weights))


def test_the_error_bar_has_its_coverage():
    """120 short runs that share nothing, two layers. Of exact errors 95.4 % lie within two error
    bars; the sum of squares of z has mean 120 and error 15.5. Bounds at 4 sigma: false alarm 2e-4
    in all. Catches error bars that are off by a quarter, and a bias of 0.4 of one."""
    model, problem = linear_network(DIM, 1), GaussianShift(ONES)
    truths = {"input": torch.eye(DIM), "output": model.fc1.weight.detach()}
    runs = 120
    found = [live(model, shifted(ONES, batches=8)) for _ in range(runs)]
    for name, weights in truths.items():
        truth = problem.fisher_after(weights).item()
        z = torch.tensor([float((run[name].J - truth) / run[name].stderr) for run in found])
        within = int((z.abs() < 2).sum())
        assert within >= 0.954 * runs - SIGMAS * math.sqrt(runs * 0.954 * 0.046), name
        assert abs(float(z.mean())) < SIGMAS / math.sqrt(runs), name
        assert abs(float(z.square().sum()) - runs) < SIGMAS * math.sqrt(2 * runs) * 1.2, name


def test_short_windows_are_free_of_bias():
    """20 activations, 140 degrees of freedom, J = 1: the mean of 200 runs within 4 of its standard
    errors (0.11): false alarm 6e-5. Catches J as it comes (2.9), the noise of the slope left in
    (2.3), residuals over n instead of n - q (0.3)."""
    runs, dim, n, batches = 200, 20, 16, 12
    thetas = [uniform(n).double() for _ in range(batches)]
    known, values = [ThetaBatch(theta) for theta in thetas], []
    for _ in range(runs):
        moments = RegressionMoments(dim, 1)
        for theta, batch in zip(thetas, known, strict=True):
            moments.update(batch, theta * dim**-0.5 + noise(n, dim))
        values.append(moments.estimate().J.item())
    J = torch.tensor(values)
    error = float(J.std()) / math.sqrt(runs)
    assert abs(float(J.mean()) - 1) < SIGMAS * error
    assert error < 0.13  # the test's power


def test_a_relu_network_is_a_lower_bound():
    """Two ReLUs, each silent on one half of the range: J of the mean slope lies below the mean of J
    over theta, whose closed form stands in `RectifiedGaussian`. The mean of m'^T S^-1 m' with the
    mean S, a formula that looks right, lies above it: the last line is that it fails the test."""
    strength = 4.0
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    thetas = [uniform(BATCH) for _ in range(BATCHES)]
    found = live(model, ((strength * theta + noise(BATCH, 2), theta) for theta in thetas))["output"]
    t = strength * torch.linspace(-1, 1, 4001, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    cdf, pdf = normal.cdf(t), normal.log_prob(t).exp()
    mean = t * cdf + pdf
    variance = (t.square() + 1) * cdf + t * pdf - mean.square()
    slope = strength * cdf
    truth = 2 * (slope.square() / variance.clamp_min(1e-12))[variance > 1e-9].mean()
    assert 0.3 * truth < found.J.item() < truth + SIGMAS * found.stderr.item()
    wrong = 2 * slope.square().mean() / variance.mean()
    assert wrong > truth + SIGMAS * found.stderr.item()


def test_a_silent_layer_has_no_information():
    """Catches a division by the variance of dead units, and the noise of a slope taken for one."""
    model = mlp([DIM, 4, 1], seed=0)
    with torch.no_grad():
        model.fc1.bias.fill_(-100.0)
    found = live(model, shifted(ONES, 20))["relu1"]
    assert (found.J.item(), found.stderr.item()) == (0, 0)


def test_another_unit_of_theta_scales_j():
    """J is per unit of theta squared. Catches a polynomial that is only good for theta of order 1,
    and a weight of batches that depends on the unit."""
    model, scale = linear_network(DIM, 3, 1), 1e-6
    batches = list(shifted(ONES, 20))
    other = live(model, ((x, scale * theta.double()) for x, theta in batches))
    for name, estimate in live(model, batches).items():
        assert other[name].J.item() * scale**2 == pytest.approx(estimate.J.item(), rel=1e-4)
        assert other[name].samples == pytest.approx(estimate.samples, rel=1e-6)


def test_fewest_samples_of_a_batch():
    """Two more than the polynomial has terms: catches a residual without a degree of freedom."""
    terms = len(monomials(1))
    batches = [torch.linspace(0, 1, n).double()[:, None] for n in (terms + 1, terms + 2)]
    assert [ThetaBatch(theta).usable for theta in batches] == [False, True]


def test_slopes_are_derivatives():
    """Against autograd, for three parameters. Catches a monomial lowered in the wrong variable."""
    t = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    exponents = monomials(3)
    assert len(exponents) == 10
    for q, powers in enumerate(exponents):
        value = torch.stack([t[:, p] ** e for p, e in enumerate(powers)]).prod(0).sum()
        slope = torch.autograd.grad(value, t, allow_unused=True)[0]
        expected = torch.zeros_like(t) if slope is None else slope
        assert torch.allclose(slopes_of(t.detach(), exponents)[:, :, q], expected)


# --- weights and thetas that change ---------------------------------------------------------------


def test_weights_that_drift_do_not_count_as_noise():
    """The output grows tenfold within a window of 512 samples, J stays. Mean slope and mean
    covariance of what grows so fast keep 0.53 of it (geometric sums over the fading window), 0.09
    without a window. One regression of all batches counts the drift as noise: the last line is that
    it fails the test."""
    model = linear_network(DIM, 1)
    growth, direction = 10 ** (1 / 4), 2 * ONES
    with torch.no_grad():
        model.fc1.weight.fill_(1.0)
        model.fc1.bias.fill_(20.0)

    def grow(_: int) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(growth)

    truth = GaussianShift(direction).fisher_after(model.fc1.weight.detach()).item()
    seen = list(shifted(direction, 40))
    found = live(model, seen, between=grow)["output"]
    assert 0.35 * truth < found.J.item() < 0.7 * truth
    x, theta = (torch.cat(each).double() for each in zip(*seen[-4:], strict=True))
    size = growth ** torch.arange(4.0).double().repeat_interleave(BATCH)[:, None]
    a, basis = size * (x.sum(1, keepdim=True) + 20), theta ** torch.arange(4)
    coefficients = torch.linalg.lstsq(basis, a).solution
    pooled = coefficients[1] ** 2 / (a - basis @ coefficients).square().mean()
    assert float(pooled) < 0.1 * truth


@pytest.mark.parametrize(
    ("place", "spread", "center"), [(0, 3e-3, 0.0), (0, 3e-3, 1.0), (BATCHES - 2, 1e-5, 0.0)]
)
def test_a_batch_of_close_thetas_is_harmless(place, spread, center):
    """The first one, as a sorted loader gives it, or another: its slope is noise. Catches a
    polynomial standardised by the first batch, whose tails hold the others, and batches that all
    count by their samples alone."""
    thetas = [uniform(BATCH) for _ in range(BATCHES)]
    thetas[place] = spread * thetas[place] + center
    batches = ((theta * ONES + noise(BATCH), theta) for theta in thetas)
    assert_near(live(linear_network(DIM, 1), batches)["input"], DIM)


# --- batches without information ------------------------------------------------------------------


USELESS = {f"{n} samples": torch.linspace(-1, 1, n) for n in (0, 1, 2, 5)} | {
    "constant": torch.full((BATCH,), 0.7),
    "two values": torch.ones(BATCH).copysign(torch.arange(BATCH) - 60.5),
    "nan": torch.full((BATCH,), math.nan),
    "one infinite": torch.linspace(-1, 1, BATCH).index_fill(0, torch.tensor([3]), math.inf),
}


@pytest.mark.parametrize("kind", USELESS)
def test_thetas_that_determine_no_polynomial_are_skipped(kind):
    """Catches a division by no degrees of freedom, a singular regression, and its garbage in the
    window."""
    model, theta = mlp([DIM, 4, 1], seed=0), USELESS[kind]
    useless = [(noise(len(theta)), theta) for _ in range(3)]
    assert live(model, useless) == {}
    assert_near(live(model, [useless[0], *shifted(ONES, 20), *useless])["input"], DIM)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_activations_that_are_not_finite_do_not_stay(value):
    """Catches one NaN batch that makes the rest of the run NaN."""
    model = linear_network(DIM, 3, 1)
    healthy = model.fc1.weight.detach().clone()

    def fail(number: int) -> None:
        with torch.no_grad():
            model.fc1.weight.copy_(healthy)
            if number == 10:
                model.fc1.weight[0, 0] = value

    found = live(model, shifted(ONES, 30), between=fail)
    assert_near(found["fc1"], GaussianShift(ONES).fisher_after(healthy))


SHAPE = "theta must have shape [n, P] = [8, 1], one row per sample of the last forward pass, got "
REAL = "theta must be a tensor of real numbers, got"


@pytest.mark.parametrize(
    ("theta", "error", "message"),
    [
        (torch.zeros(5), ValueError, f"{SHAPE}[5]"),
        (torch.zeros(2, 8), ValueError, f"{SHAPE}[2, 8]"),
        (torch.zeros(()), ValueError, f"{SHAPE}[]"),
        (None, TypeError, REAL),
        ("x", TypeError, REAL),
        (torch.zeros(8, dtype=torch.complex64), TypeError, REAL),
    ],
)
def test_other_thetas_are_refused(theta, error, message):
    """Catches thetas that are broadcast or cut to fit, PyTorch's own words, an imaginary part that
    is dropped, and hooks that stay."""
    model = mlp([DIM, 4, 1], seed=0)
    with pytest.raises(error, match=re.escape(message)):
        live(model, [(noise(8), theta)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_thetas_may_be_given_in_any_form():
    """Catches a graph held by theta, and a form that is refused for nothing."""
    theta = torch.arange(BATCH) % 7
    x = noise(BATCH) + theta[:, None]
    wanting = theta.float().requires_grad_()
    forms = theta.double(), theta.tolist(), wanting, theta, theta[:, None, None].float()
    found = [live(linear_network(DIM, 1), [(x, form)] * 4)["input"].J for form in forms]
    assert all(torch.equal(J, found[0]) for J in found)


def test_weights_of_batches_are_their_size():
    """Twice the samples weigh twice, half the range a quarter, and the weight is the inverse of the
    slope's variance. Catches weights by samples or by range alone."""
    theta = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None]
    weight = ThetaBatch(theta).weight
    assert ThetaBatch(theta.repeat(2, 1)).weight == pytest.approx(2 * weight)
    assert ThetaBatch(theta / 2 + 5).weight == pytest.approx(weight / 4)
    assert ThetaBatch(theta).noise.item() == pytest.approx(1 / weight)


@pytest.mark.parametrize("parameters", [1, 2])
def test_old_batches_fade(parameters):
    """The sums are those of all batches, weighted by exp(-samples since / window). Catches a noise
    of the derivative or degrees of freedom that fade as the sums do, not as their squares."""
    sizes, moments = (300, 200, 400), RegressionMoments(DIM, parameters)
    batches = [ThetaBatch(uniform(n, parameters).double()) for n in sizes]
    for n, batch in zip(sizes, batches, strict=True):
        moments.update(batch, noise(n))
    fades = [math.exp(-sum(sizes[i + 1 :]) / WINDOW) for i in range(len(sizes))]
    weights = [fade * batch.weight for fade, batch in zip(fades, batches, strict=True)]
    state = moments.state_dict()
    expected = sum(w**2 * batch.noise for w, batch in zip(weights, batches, strict=True))
    torch.testing.assert_close(state["noise"], expected)
    parts = list(zip(weights, sizes, (len(batch.solver) for batch in batches), strict=True))
    free = [sum((n - q) * (w / n) ** power for w, n, q in parts) for power in (1, 2)]
    assert state["counts"] == pytest.approx([sum(weights), *free])
