"""The least mean square error where theta lies in a bounded range."""

from __future__ import annotations

import math

import pytest
import torch

from fisherfast.training.attainable import attainable_error, attainable_error_of_samples

NAN = math.nan


class TestAttainableError:
    """The posterior-mean error of a Gaussian measurement."""

    def test_two_values(self):
        """theta = -a or a: the posterior mean is a tanh(a y / s^2), the error a^2 (1 - E tanh) in
        closed form up to an integral. Catches Var(theta) without the measurement, and densities
        that are not normalised."""
        a, precision = 0.7, 2.0
        y = torch.linspace(-12, 12, 200_001, dtype=torch.float64) + a
        density = torch.exp(-((y - a) ** 2) * precision / 2) * math.sqrt(precision / 2 / math.pi)
        error = (a * torch.tanh(a * y * precision) - a) ** 2
        wanted = float((density * error).sum()) * 24 / 200_000
        got = attainable_error(precision, torch.tensor([-a, a, a, -a], dtype=torch.float64))
        assert got == pytest.approx(wanted, rel=1e-6)

    def test_uniform_range_by_simulation(self):
        """400 000 draws, posterior mean in closed form (a truncated normal): standard error 0.2 %,
        bound 4 sigma. Catches a prior that is not cut off, and edges half a cell off."""
        generator = torch.Generator().manual_seed(0)
        s = 0.25
        theta = 2 * torch.rand(400_000, generator=generator, dtype=torch.float64) - 1
        y = theta + s * torch.randn(400_000, generator=generator, dtype=torch.float64)
        low, high = (-1 - y) / s, (1 - y) / s
        share = torch.special.ndtr(high) - torch.special.ndtr(low)
        edges = torch.exp(-(low**2) / 2) - torch.exp(-(high**2) / 2)
        mean = y + s * edges / math.sqrt(2 * math.pi) / share
        simulated = float(((mean - theta) ** 2).mean())
        assert attainable_error(1 / s**2, (-1.0, 1.0)) == pytest.approx(simulated, rel=0.009)
        assert attainable_error(1 / s**2, theta) == pytest.approx(simulated, rel=0.009)

    def test_limits(self):
        """Nothing measured: variance of the prior, 1 / 3. All measured: 1 / J. Catches a level
        above 1 / J, and a grid far apart that is taken for a range. In between it scales with the
        unit of theta, also across the width from which on it is extrapolated."""
        assert attainable_error(1e4, torch.tensor([-1.0, 1.0])) < 1e-12
        assert attainable_error(1e-8, (-1.0, 1.0)) == pytest.approx(1 / 3, rel=1e-3)
        assert attainable_error(1e8, (-1.0, 1.0)) == pytest.approx(1e-8, rel=1e-3)
        here = attainable_error(3.0, (-1.0, 1.0))
        assert attainable_error(3e-4, (-100.0, 100.0)) == pytest.approx(1e4 * here, rel=1e-9)
        below = 1 - attainable_error(99.0**2, (-1.0, 1.0)) * 99.0**2
        above = 1 - attainable_error(101.0**2, (-1.0, 1.0)) * 101.0**2
        assert above / below == pytest.approx(99 / 101, rel=1e-3)


class TestAttainableErrorOfSamples:
    """The same, with distances that samples show."""

    def bent(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x in R^50 whose mean goes round three quarters of a circle of radius 1.5: the ends look
        alike. Returns samples, their theta, the grid of theta, and means in units of the noise."""
        generator = torch.Generator().manual_seed(0)
        grid = torch.linspace(-1, 1, 11, dtype=torch.float64)
        angle = 0.75 * math.pi * grid
        means = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
        scale = torch.linspace(1, 3, 50, dtype=torch.float64)  # noise of unequal size
        which = torch.arange(n) % len(grid)
        x = torch.randn(n, 50, generator=generator, dtype=torch.float64)
        x[:, :2] += means[which]
        return x * scale, grid[which], grid, means

    def exact(self, grid: torch.Tensor, means: torch.Tensor) -> float:
        """By a sum over the plane that the means lie in."""
        axis = torch.arange(-7, 7, 0.05, dtype=torch.float64)
        y = torch.cartesian_prod(axis, axis)
        density = torch.exp(-torch.cdist(y, means).square() / 2) / (2 * math.pi * len(grid))
        posterior = density / density.sum(1, keepdim=True)
        mean = posterior @ grid
        return float((density * (grid - mean[:, None]) ** 2).sum()) * 0.05**2

    def test_a_curve_whose_ends_look_alike(self):
        """5500 samples: the error of the simulation and of the fit is 1.5 %, bounds 6 %. Catches J
        of one theta for all (0.38 of the truth), and noise that is not whitened (1.9)."""
        x, theta, grid, means = self.bent(5500)
        truth = self.exact(grid, means)
        J = (0.75 * math.pi * 1.5) ** 2
        assert attainable_error(J, grid) < 0.5 * truth
        kept = x.clone()
        assert attainable_error_of_samples(x, theta) == pytest.approx(truth, rel=0.06)
        assert torch.equal(x, kept)

    def test_the_noise_of_the_fit_is_no_distance(self):
        """20 times 220 samples of 50 numbers: mean 1.06 of the truth, standard error 0.024 (few
        samples leave 6 %), 4 sigma bounds. Catches noise of the fit that counts as distance (0.77),
        and an inverse covariance that is not corrected (0.79)."""
        x, theta, grid, means = self.bent(4400)
        pairs = zip(x.split(220), theta.split(220), strict=True)
        ratio = torch.tensor([attainable_error_of_samples(*pair) for pair in pairs]).mean()
        assert 0.96 < float(ratio) / self.exact(grid, means) < 1.16

    def test_a_straight_line_agrees_with_J(self):
        """Catches a prior that is not that of the samples, and degrees that do not fit."""
        generator = torch.Generator().manual_seed(0)
        theta = torch.rand(20_000, generator=generator)
        x = 3 * theta[:, None, None] + torch.randn(20_000, 2, 3, generator=generator)
        wanted = attainable_error(9.0 * 6, (0.0, 1.0))
        for degree in (1, 6):
            got = attainable_error_of_samples(x, theta, degree=degree)
            assert got == pytest.approx(wanted, rel=0.06)


X = torch.randn(100, 60)
RANGE = "prior must be .low, high. with low < high"


@pytest.mark.parametrize(
    ("call", "first", "second", "message"),
    [
        (attainable_error, 0.0, (-1.0, 1.0), "precision must be positive and finite, got 0.0"),
        (attainable_error, 1.0, (1.0, -1.0), RANGE),
        (attainable_error, 1.0, (1.0, 2.0, 3.0), RANGE),
        (attainable_error, 1.0, torch.ones(5), "prior must hold more than one value of theta"),
        (attainable_error, 1.0, torch.tensor([1.0, NAN]), "prior must hold finite values of theta"),
        (attainable_error, 1.0, torch.empty(0), "prior must hold finite values of theta"),
        (attainable_error_of_samples, X, torch.rand(100), "x must hold at least 127 samples of 60"),
        (attainable_error_of_samples, X, torch.rand(100, 2), "theta must have one value per"),
        (attainable_error_of_samples, X[:, :5], torch.zeros(100), "theta must hold more than one"),
    ],
)
def test_bad_arguments(call, first, second, message):
    """Catches a prior without a range (an error of 0, and a rule that never stops), covariances
    that cannot be inverted, and theta of two parameters."""
    with pytest.raises(ValueError, match=message):
        call(first, second)
