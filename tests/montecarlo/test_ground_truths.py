"""The whole public path against closed forms: data in, J out, at the sizes people use."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch

import fisherfast as ff
from fisherfast.problems import (
    GaussianScale,
    GaussianShift,
    Laplace,
    LogNormal,
    invertible_chain,
)

pytestmark = pytest.mark.slow
SEEDS = range(5)
SAMPLES = 100_000
FEATURES = 400

PROBLEMS = {
    # problem, theta, dtheta, I, bounds of the mean of J / I
    "log-normal": (LogNormal.random(dim=10, variance=0.01), 0.0, 0.2, 10.0, (0.95, 1.03)),
    "scale": (GaussianScale(20), 1.0, 0.1, 40.0, (0.95, 1.03)),
    # the finite step caps it at 0.97
    "laplace": (Laplace(4, 1.0), 0.0, 0.1, 4.0, (0.87, 1.00)),
}


@cache
def measured(name: str) -> list[ff.LayerFisher]:
    problem, theta, dtheta, _, _ = PROBLEMS[name]
    with warnings.catch_warnings():
        # log-normal at dtheta 0.2: 0.32, a little above the limit of 0.3, as the figure has
        # it
        warnings.simplefilter("ignore", ff.FisherWarning)
        return [
            ff.fisher_information(
                problem.finite_difference(theta, dtheta, SAMPLES, seed=seed),
                max_features=FEATURES,
                seed=seed,
            )
            for seed in SEEDS
        ]


@pytest.mark.parametrize("name", PROBLEMS)
def test_mean_over_seeds(name):
    """Catches a lift without bias (Laplace at 0.53), one without axis-aligned rows, a stop at a
    plateau too early.

    The mean of 5 has a standard error of 0.7 % (2 % for Laplace): the bounds of the accepted range
    are several away.
    """
    _, _, _, truth, (low, high) = PROBLEMS[name]
    mean = sum(layer.value for layer in measured(name)) / len(SEEDS) / truth
    assert low <= mean <= high


@pytest.mark.parametrize("name", ["log-normal", "scale"])
def test_lower_is_close_and_lower(name):
    """Catches a bound measured on the samples it was learned from (above J) or with a noisy
    readout."""
    for layer in measured(name):
        assert float(layer.lower) >= 0.9 * layer.value
        errors = (float(layer.stderr) ** 2 + float(layer.lower_stderr) ** 2) ** 0.5
        assert float(layer.lower) <= layer.value + 2 * errors


def test_invertible_chain_keeps_its_information():
    """Catches a lift that loses ground with depth; the linear information falls, the information
    does not."""
    problem = GaussianShift(torch.ones(16))
    model = invertible_chain(16, depth=6, slope=0.6)
    data = problem.pathwise(0.0, 20_000, seed=0)  # 1 % of I
    flow = ff.fisher_flow(model, data, layers=r"^leakyrelu", max_features=FEATURES)
    fractions = [layer.value / 16 for layer in flow]
    assert len(fractions) == 7
    assert all(0.92 <= fraction <= 1.03 for fraction in fractions)
    linear = [float(layer.linear) / 16 for layer in flow]
    assert linear[-1] < linear[0] - 0.03
