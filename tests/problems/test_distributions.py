"""What is particular to one ground truth, and the messages for wrong input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from fisherfast.data import FiniteDifference
from fisherfast.problems import (
    GaussianFamily,
    GaussianScale,
    GaussianShift,
    Laplace,
    LogNormal,
    NoisyLinear,
    Poisson,
    Problem,
    RectifiedGaussian,
)
from fisherfast.problems.distributions import poisson_quantile, poisson_sample


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=stream, dtype=torch.float64)


def test_published_values():
    """The input FI of the published tasks: 100, 256 and 10."""
    assert GaussianScale(50).fisher(1.0).item() == 100
    assert GaussianShift(torch.ones(256)).fisher(0.5).item() == 256
    assert LogNormal.random().fisher(-7.0).item() == 10


def test_finite_step_of_a_shift_is_exact():
    """Catches a finite-step value that depends on dtheta where the mean is linear."""
    problem = GaussianShift(random(6), torch.eye(6) * 2)
    for step in (0.01, 1.0, 10.0):
        torch.testing.assert_close(problem.finite_step_fisher(0.0, step), problem.fisher(0.0))


def test_separation_is_the_full_one():
    """Catches conditions at theta +- dtheta, a factor 2 in the derivative and 4 in the FI."""
    problem = GaussianShift(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    minus, plus = problem.conditions([5.0, 7.0], [0.5, 0.25], 3, paired=True)
    torch.testing.assert_close(plus[0] - minus[0], torch.tensor([[0.5, 0.0]]).expand(3, 2))
    torch.testing.assert_close(plus[1] - minus[1], torch.tensor([[0.0, 0.25]]).expand(3, 2))


@pytest.mark.parametrize("paired", [True, False])
def test_finite_difference_hands_over_the_conditions(paired):
    """Catches dtheta or the pairing lost on the way."""
    data = GaussianScale(3).finite_difference(1.0, 0.1, 8, paired=paired)
    assert isinstance(data, FiniteDifference)
    assert data.dtheta == (0.1,)
    assert data.paired is paired
    assert data.samples(0) == data.samples(1) == 8
    two = GaussianShift(random(4, 2)).finite_difference([0.0, 0.0], [0.1, 0.2], 8, seed=3)
    assert two.parameters == 2
    assert two.dtheta == pytest.approx((0.1, 0.2))


def test_shift_after_a_layer():
    """Catches W^T for W, and a loss where an invertible layer loses nothing."""
    base = random(5, 5)
    covariance = base @ base.mT + torch.eye(5)
    problem = GaussianShift(random(5, seed=1), covariance)
    weight = random(2, 5, seed=2)
    behind = GaussianShift(weight @ problem.mean(1.0), (weight @ covariance @ weight.mT + 0.0))
    torch.testing.assert_close(problem.fisher_after(weight), behind.fisher(0.0))
    assert problem.fisher_after(weight) < problem.fisher(0.0)
    invertible = random(5, 5, seed=3)
    torch.testing.assert_close(problem.fisher_after(invertible), problem.fisher(0.0))
    white = GaussianShift(random(5, seed=1))
    torch.testing.assert_close(
        white.fisher_after(weight),
        GaussianShift(random(5, seed=1), torch.eye(5)).fisher_after(weight),
    )


def test_noise_of_a_layer_adds_to_that_of_its_input():
    """Catches s for s^2."""
    problem = NoisyLinear(torch.ones(4), noise_std=0.5, covariance=2 * torch.eye(4))
    assert problem.fisher(0.0).item() == pytest.approx(4 / 2.25)


def test_family_contains_shift_and_scale():
    """Catches a trace term without its 1/2, or with C in place of its derivative."""
    eye = torch.eye(3, dtype=torch.float64)
    scale = GaussianFamily(
        lambda theta: torch.zeros(3),
        lambda theta: theta**2 * eye,
        lambda theta: torch.zeros(1, 3),
        lambda theta: 2 * theta * eye[None],
        dim=3,
    )
    torch.testing.assert_close(scale.fisher(1.7), GaussianScale(3).fisher(1.7))
    assert scale.linear_fisher(1.7).item() == 0


def test_lognormal_linear_fisher_matches_its_moments():
    """Catches exp(K) for exp(K) - 1: two derivations of J, one of them from mean and covariance."""
    problem = LogNormal.random(seed=4)
    for theta in (-7.0, 0.0, 7.0):
        torch.testing.assert_close(
            problem.linear_fisher(theta), Problem.linear_fisher(problem, theta), rtol=1e-6, atol=0
        )
    assert 0 < problem.linear_fisher(0.0).item() < 10


def test_lognormal_mixing_has_the_published_spread():
    """Catches a variance taken for a standard deviation; 400 entries, bounds of 4 errors."""
    mixing = LogNormal.random(dim=20)._mixing
    assert mixing.square().mean().item() == pytest.approx(0.01, abs=4 * 0.01 * math.sqrt(2 / 400))


@pytest.mark.parametrize("t", [-2.0, -0.3, 0.0, 1.5])
def test_rectified_moments_by_quadrature(t):
    """Catches phi and Phi exchanged in mean, variance or linear FI."""

    def moment(power: int) -> float:
        return scipy.integrate.quad(
            lambda x: x**power * scipy.stats.norm.pdf(x - t), 0, np.inf, epsabs=1e-13
        )[0]

    problem = RectifiedGaussian(1)
    variance = moment(2) - moment(1) ** 2
    assert problem.mean(t).item() == pytest.approx(moment(1), rel=1e-8)
    assert problem.covariance(t).item() == pytest.approx(variance, rel=1e-8)
    passed = scipy.stats.norm.cdf(t)
    assert problem.linear_fisher(t).item() == pytest.approx(passed**2 / variance, rel=1e-8)


def test_finite_step_caps_a_laplace_location():
    """The docstring's cap, 1 - dtheta / 3: the best of all features of one pair of conditions.

    With q = integral of (p+ - p-)^2 / mean(p+, p-), that best is q / (1 - q / 4) / dtheta^2.
    """
    step = 0.1
    minus, plus = (scipy.stats.laplace(loc=shift).pdf for shift in (-step / 2, step / 2))
    q = scipy.integrate.quad(
        lambda x: 2 * (plus(x) - minus(x)) ** 2 / (plus(x) + minus(x)),
        -30,
        30,
        points=[-step / 2, step / 2],
    )[0]
    assert q / (1 - q / 4) / step**2 == pytest.approx(1 - step / 3, abs=0.003)


@pytest.mark.parametrize("rate", [1e-3, 0.3, 1.0, 7.5, 60.0, 900.0, 2e4])
def test_poisson_quantile(rate):
    """Catches a search that stops one count early, against scipy.stats on both tails."""
    middle = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    u = torch.cat([middle, torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64)])
    counts = poisson_quantile(u[:, None], torch.tensor([rate], dtype=torch.float64))[:, 0]
    expected = np.maximum(scipy.stats.poisson.ppf(u.numpy(), rate), 0)
    assert np.array_equal(counts.numpy(), expected)


def test_poisson_sample_is_monotone_in_the_rate():
    """Catches counts redrawn at each rate, which would unpair the conditions; crosses a block."""

    def draw(rate: float) -> torch.Tensor:
        rates = torch.full((1000,), rate, dtype=torch.float64)
        return poisson_sample(rates, 1100, torch.Generator().manual_seed(0))

    low, high = draw(3.0), draw(3.1)
    assert (high >= low).all()
    assert (high - low).mean().item() == pytest.approx(0.1, abs=4 * 0.3 / math.sqrt(low.numel()))


def test_samples_accept_any_default_dtype():
    """Catches samplers that follow the global default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        stream = torch.Generator().manual_seed(0)
        for problem in (GaussianScale(2), Laplace(2), LogNormal.random(dim=2), RectifiedGaussian()):
            assert problem.sample(1.0, 3, stream).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def simple_poisson() -> Poisson:
    return Poisson(lambda theta: theta * torch.ones(2), lambda theta: torch.ones(1, 2), dim=2)


ERRORS = {
    "theta shape": (
        lambda: GaussianShift(torch.ones(3, 2)).mean([1.0]),
        r"theta must have shape \(2,\), got \(1,\)",
    ),
    "theta nan": (
        lambda: GaussianShift(torch.ones(3)).mean(float("nan")),
        r"theta must be finite, got nan",
    ),
    "theta sign": (lambda: GaussianScale(3).fisher(-1.0), "theta must be positive, got -1.0"),
    "dtheta": (
        lambda: GaussianScale(3).conditions(1.0, -0.1, 5),
        "dtheta must be positive and finite, got -0.1",
    ),
    "dtheta count": (
        lambda: GaussianScale(3).conditions(1.0, [0.1, 0.2], 5),
        r"dtheta must be one number or 1, got shape \(2,\)",
    ),
    "n": (
        lambda: GaussianScale(3).conditions(1.0, 0.1, 0),
        "n must be at least 1, got 0",
    ),
    "dim": (lambda: GaussianScale(0), "dim must be at least 1, got 0"),
    "direction": (
        lambda: GaussianShift(torch.ones(2, 2, 2)),
        r"direction must have shape \[d\] or \[d, P\], got \(2, 2, 2\)",
    ),
    "covariance shape": (
        lambda: GaussianShift(torch.ones(2), torch.eye(3)),
        r"covariance must have shape \(2, 2\), got \(3, 3\)",
    ),
    "covariance sign": (
        lambda: GaussianShift(torch.ones(2), torch.diag(torch.tensor([1.0, -1.0]))),
        "covariance must be positive definite, got a matrix whose leading 2 x 2 block is not",
    ),
    "covariance symmetry": (
        lambda: GaussianShift(torch.ones(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
        "covariance must be symmetric, got a matrix that differs from its transpose",
    ),
    "weight": (
        lambda: NoisyLinear(torch.ones(2), noise_std=1.0, weight=torch.eye(3)),
        r"weight must have shape \[k, 2\], got \(3, 3\)",
    ),
    "noise_std": (
        lambda: NoisyLinear(torch.ones(2), noise_std=0.0),
        "noise_std must be positive and finite, got 0.0",
    ),
    "mixing shape": (
        lambda: LogNormal(torch.ones(2, 3)),
        r"mixing must have shape \(2, 2\), got \(2, 3\)",
    ),
    "mixing rank": (
        lambda: LogNormal(torch.ones(3, 3)),
        "mixing must be invertible, got rank 1 of 3",
    ),
    "rates": (lambda: simple_poisson().fisher(-2.0), "rates must be positive, got -2.0"),
    "returned shape": (
        lambda: Poisson(lambda t: torch.ones(3), lambda t: torch.ones(1, 2), dim=2).fisher(1.0),
        r"rates must return shape \(2,\), got \(3,\)",
    ),
    "samples": (
        lambda: Laplace(3).score(torch.zeros(5, 2), 0.0),
        "x must have 3 numbers per sample, got 2",
    ),
    "scale": (lambda: Laplace(3, scale=-1.0), "scale must be positive and finite, got -1.0"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_counts_have_no_tangent():
    with pytest.raises(NotImplementedError, match="Poisson has no pathwise derivative; use score"):
        simple_poisson().sample_with_tangent(1.0, 3, torch.Generator())
