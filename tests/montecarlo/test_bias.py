"""The corrections are unbiased where the classical ones are far off (docs/theory.md, 5).

Bounds are 4 standard errors of the mean over replications: a false alarm in 1 of 16 000 runs of
each assertion, and none for a fixed seed. The wrong formulas must leave the same bounds.
"""

from __future__ import annotations

import pytest
import torch
from montecarlo.replications import estimates

from fisherfast.problems import GaussianScale, GaussianShift

SIGMAS = 4.0

CASES = {
    # I = 16; naive about 130, classical about 4
    "shift": (GaussianShift(torch.ones(16)), 0.0, 0.0625, 2000, 400, 16.0, 100),
    # I = 40; naive about 230, classical about 20
    "scale": (GaussianScale(20), 1.0, 0.04, 4000, 600, 40.0, 150),
}


@pytest.fixture(scope="module", params=CASES)
def replications(request):
    problem, theta, dtheta, n, features, truth, count = CASES[request.param]
    runs = [estimates(problem, theta, dtheta, n, features, seed) for seed in range(count)]
    values = {name: torch.tensor([run[name] for run in runs]) for name in runs[0]}
    return values, truth


def deviation(values: torch.Tensor, truth: float) -> float:
    """Distance of the mean from the truth in its standard errors."""
    return float((values.mean() - truth) / (values.std() / len(values) ** 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("formula", ["k_eff", "folds"])
def test_corrections_are_unbiased(replications, formula):
    """Catches a wrong shrinkage h, a wrong noise term c k_eff, dtheta taken for a half step."""
    values, truth = replications
    assert abs(deviation(values[formula], truth)) < SIGMAS


@pytest.mark.slow
@pytest.mark.parametrize("formula", ["naive", "classical", "ordinary"])
def test_wrong_formulas_are_rejected(replications, formula):
    """The power of the test above: no correction, k for k_eff, the covariance about condition
    means."""
    values, truth = replications
    assert abs(deviation(values[formula], truth)) > SIGMAS
