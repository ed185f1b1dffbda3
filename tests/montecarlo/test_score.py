"""J from the score, on the published task."""

from __future__ import annotations

import pytest
import torch
from montecarlo.replications import of_features

from fisherfast.problems import LogNormal


@pytest.mark.slow
def test_published_lognormal_task():
    """The score against what two conditions give: 4000 samples in all, 300 features, 24 seeds.

    The spread of J is that of V, sqrt(2 / n) J = 0.22: seen 0.196 here, 0.200 over 200 seeds. Two
    independent conditions have 1.2. J / V, what the features explain, is known to 0.2 %.
    """
    problem = LogNormal.random(dim=10, variance=0.01, seed=0)
    layers = [
        of_features(problem.scored(0.0, 4000, seed=seed), max_features=300) for seed in range(24)
    ]
    J = torch.tensor([layer.value for layer in layers])
    large = of_features(problem.scored(0.0, 100_000, seed=1000), max_features=300)
    assert float(J.std()) <= 0.2
    assert abs(float(J.mean()) / large.value - 1) < 0.03
    assert all(float(layer.lower) < layer.value + 3 * float(layer.stderr) for layer in layers)
    assert (
        abs(float(torch.stack([layer.lower for layer in layers]).mean()) / large.value - 1) < 0.03
    )
