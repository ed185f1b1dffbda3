"""The image in stationary noise against dense matrices, autograd and its own samples."""

from __future__ import annotations

import pytest
import torch

from fisherfast.problems import CorrelatedImage
from fisherfast.problems.problem import whitened_norm

THETA = (0.3, 1.7)
IMAGE = CorrelatedImage((8, 7), spot=1.5, white_std=0.8, correlated_std=1.3, correlation_length=2.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_fisher_is_that_of_the_dense_covariance():
    """Catches a wrong normalisation of the transform, a spectrum on the wrong grid."""
    dense = whitened_norm(IMAGE.mean_derivative(THETA).flatten(1), IMAGE.covariance(THETA))
    torch.testing.assert_close(IMAGE.fisher(THETA), dense, rtol=1e-12, atol=1e-12)
    assert torch.equal(IMAGE.linear_fisher(THETA), IMAGE.fisher(THETA))


def test_derivative_is_that_of_the_mean():
    """Catches a sign, a missing amplitude."""
    jacobian = torch.autograd.functional.jacobian(
        IMAGE.mean, torch.tensor(THETA, dtype=torch.float64)
    )
    torch.testing.assert_close(IMAGE.mean_derivative(THETA), jacobian.permute(2, 0, 1))


def test_variance_of_a_pixel_is_the_sum_of_both_noises():
    """Catches a spectrum that is not scaled to the standard deviations."""
    expected = torch.full((IMAGE.dim,), 0.8**2 + 1.3**2, dtype=torch.float64)
    torch.testing.assert_close(IMAGE.covariance(THETA).diagonal(), expected)


def test_samples_have_the_stated_moments():
    """Five standard errors, fixed seed. Catches noise filtered by s instead of its root, an image
    that is not on a torus."""
    n = 40_000
    x = IMAGE.sample(THETA, n, generator()).double().flatten(1)
    C = IMAGE.covariance(THETA)
    error = (x.mean(0) - IMAGE.mean(THETA).flatten()) / (C.diagonal() / n).sqrt()
    assert float(error.abs().max()) < 5
    spread = ((C.square() + C.diagonal()[:, None] * C.diagonal()) / n).sqrt()
    assert float(((torch.cov(x.T) - C) / spread).abs().max()) < 5


def test_score_is_the_gradient_of_the_log_density():
    """Catches a score without the mean, or whitened twice."""
    x = IMAGE.sample(THETA, 3, generator()).double().flatten(1)
    theta = torch.tensor(THETA, dtype=torch.float64)

    def log_density(theta: torch.Tensor) -> torch.Tensor:
        residual = x - IMAGE.mean(theta).flatten()
        return -0.5 * (residual * torch.linalg.solve(IMAGE.covariance(theta), residual.T).T).sum(1)

    expected = torch.autograd.functional.jacobian(log_density, theta)
    torch.testing.assert_close(IMAGE.score(x, THETA), expected)


def test_tangents_are_the_derivative_of_the_samples():
    """Catches tangents of another theta or in another order of parameters."""
    x, dx = IMAGE.sample_with_tangent(THETA, 2, generator())
    assert torch.equal(x, IMAGE.sample(THETA, 2, generator()))
    step = 1e-2
    for p, (low, high) in enumerate((((0.29, 1.7), (0.31, 1.7)), ((0.3, 1.69), (0.3, 1.71)))):
        difference = IMAGE.sample(high, 2, generator()) - IMAGE.sample(low, 2, generator())
        torch.testing.assert_close(dx[:, p], difference / (2 * step), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (0, 4)}, "shape must be at least 1, got 0"),
        ({"spot": 0.0}, "spot must be positive and finite, got 0.0"),
        ({"white_std": 0.0}, "white_std must be positive and finite, got 0.0"),
        ({"correlated_std": -1.0}, "correlated_std must be at least 0, got -1.0"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    """Catches noise without a floor, whose closed form is infinite."""
    with pytest.raises(ValueError, match=message):
        CorrelatedImage(**options)
