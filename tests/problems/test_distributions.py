"""What is particular to one ground truth, and the messages for wrong input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from fisherfast.problems import (
    CorrelatedImage,
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


def test_separation_is_the_full_one():
    """Catches conditions at theta +- dtheta, a factor 2 in the derivative and 4 in the FI; dtheta
    or the pairing lost on the way to the data."""
    problem = GaussianShift(torch.eye(2))
    minus, plus = problem.conditions([5.0, 7.0], [0.5, 0.25], 3, paired=True)
    torch.testing.assert_close(plus[0] - minus[0], torch.tensor([[0.5, 0.0]]).expand(3, 2))
    torch.testing.assert_close(plus[1] - minus[1], torch.tensor([[0.0, 0.25]]).expand(3, 2))
    for paired in (True, False):
        data = problem.finite_difference([0.0, 0.0], [0.1, 0.2], 8, paired=paired)
        assert (data.dtheta, data.paired, data.parameters) == ((0.1, 0.2), paired, 2)
        assert data.samples(0) == data.samples(1) == 8


def test_shift_after_a_layer():
    """Catches W^T for W, and a loss where an invertible layer loses nothing."""
    base, direction, weight = random(5, 5), random(5, seed=1), random(2, 5, seed=2)
    for covariance in (None, base @ base.mT + torch.eye(5)):
        problem = GaussianShift(direction, covariance)
        S = torch.eye(5).double() if covariance is None else covariance
        behind = GaussianShift(weight @ direction, weight @ S @ weight.mT)
        torch.testing.assert_close(problem.fisher_after(weight), behind.fisher(0.0))
        assert problem.fisher_after(weight) < problem.fisher(0.0)
        torch.testing.assert_close(problem.fisher_after(base), problem.fisher(0.0))


def test_lognormal_mixing_has_the_published_spread():
    """Catches a variance taken for a standard deviation; 400 entries, bounds of 4 errors."""
    mixing = LogNormal.random(dim=20)._mixing
    assert mixing.square().mean().item() == pytest.approx(0.01, abs=4 * 0.01 * math.sqrt(2 / 400))


def test_noise_of_an_image_has_the_stated_variances():
    """Catches a spectrum that is not scaled to the standard deviations, or on the wrong grid: the
    closed form is that of the dense covariance."""
    image = CorrelatedImage((8, 7), spot=1.5, white_std=0.8, correlated_std=1.3)
    variance = image.covariance((0.3, 1.7)).diagonal()
    torch.testing.assert_close(variance, torch.full_like(variance, 0.8**2 + 1.3**2))
    dense = Problem.linear_fisher(image, (0.3, 1.7))
    torch.testing.assert_close(image.fisher((0.3, 1.7)), dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rate", [1e-3, 0.3, 7.5, 60.0, 900.0])
def test_poisson_quantile(rate):
    """Catches a search that stops one count early, against scipy.stats on both tails."""
    middle = torch.linspace(0, 1, 201, dtype=torch.float64)[:-1]
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


def simple_poisson(returned: int = 2) -> Poisson:
    return Poisson(lambda theta: theta * torch.ones(returned), lambda _: torch.ones(1, 2), dim=2)


SKEWED = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
INDEFINITE = torch.diag(torch.tensor([1.0, -1.0]))
ERRORS = [
    (lambda: GaussianShift(torch.ones(3, 2)).mean([1.0]), r"theta must have shape \(2,\), got"),
    (lambda: GaussianShift(torch.ones(3)).mean(math.nan), "theta must be finite, got nan"),
    (lambda: GaussianScale(3).fisher(-1.0), "theta must be positive, got -1.0"),
    (lambda: GaussianScale(3).conditions(1.0, -0.1, 5), "dtheta must be positive .*, got -0.1"),
    (lambda: GaussianScale(3).conditions(1.0, [0.1, 0.2], 5), r"one number or 1, got shape \(2,\)"),
    (lambda: GaussianScale(3).conditions(1.0, 0.1, 0), "n must be at least 1, got 0"),
    (lambda: GaussianScale(0), "dim must be at least 1, got 0"),
    (lambda: GaussianShift(torch.ones(2, 2, 2)), r"\[d\] or \[d, P\], got \(2, 2, 2\)"),
    (lambda: GaussianShift(torch.ones(2), torch.eye(3)), r"shape \(2, 2\), got \(3, 3\)"),
    (lambda: GaussianShift(torch.ones(2), INDEFINITE), "leading 2 x 2 block is not"),
    (lambda: GaussianShift(torch.ones(2), SKEWED), "covariance must be symmetric"),
    (lambda: NoisyLinear(torch.ones(2), noise_std=1.0, weight=torch.eye(3)), r"\[k, 2\], got"),
    (lambda: NoisyLinear(torch.ones(2), noise_std=0.0), "noise_std must be positive .*, got 0.0"),
    (lambda: LogNormal(torch.ones(2, 3)), r"mixing must have shape \(2, 2\), got \(2, 3\)"),
    (lambda: LogNormal(torch.ones(3, 3)), "mixing must be invertible, got rank 1 of 3"),
    (lambda: simple_poisson().fisher(-2.0), "rates must be positive, got -2.0"),
    (lambda: simple_poisson(3).fisher(1.0), r"rates must return shape \(2,\), got \(3,\)"),
    (lambda: Laplace(3).score(torch.zeros(5, 2), 0.0), "3 numbers per sample, got 2"),
    (lambda: CorrelatedImage((0, 4)), "shape must be at least 1, got 0"),
    (lambda: CorrelatedImage(spot=0.0), "spot must be positive and finite, got 0.0"),
    (lambda: CorrelatedImage(white_std=0.0), "white_std must be positive and finite, got 0.0"),
    (lambda: CorrelatedImage(correlated_std=-1.0), "correlated_std must be at least 0, got -1.0"),
    (lambda: Laplace(3, scale=-1.0), "scale must be positive and finite, got -1.0"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_counts_have_no_tangent():
    with pytest.raises(NotImplementedError, match="Poisson has no pathwise derivative; use score"):
        simple_poisson().sample_with_tangent(1.0, 3, torch.Generator())
