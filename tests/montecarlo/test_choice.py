"""How often a lift is used that adds nothing, and how often one that adds half of J.

Features are chosen on a curve with noise. Where the activations are Gaussian and theta moves their
mean, the raw ones hold all information.
"""

import pytest
import torch

import fisherfast as ff
from fisherfast.problems import GaussianScale, Laplace

pytestmark = pytest.mark.slow
REPEATS = 100


def tangents(g, n, d):
    return ff.Pathwise(torch.randn(n, d, generator=g), torch.ones(n, d))


def paired(g, n, d):
    x = torch.randn(n, d, generator=g)
    return ff.FiniteDifference(x - 0.05, x + 0.05, dtheta=0.1, paired=True)


def independent(g, n, d):
    x = torch.randn(2, n, d, generator=g)
    return ff.FiniteDifference(x[0] - 0.05, x[1] + 0.05, dtheta=0.1)


def score(g, n, d):
    x = torch.randn(n, d, generator=g)
    return ff.Score(x, (x.sum(1) + torch.randn(n, generator=g)).double())


def measured(data, **options):
    flow = ff.fisher_flow(torch.nn.Hardtanh(-1e9, 1e9), data, layers=["output"], **options)
    return flow["output"]


@pytest.mark.parametrize(
    ("draw", "n", "d"),
    [
        (tangents, 300, 1),
        (tangents, 2000, 10),
        (paired, 500, 5),
        (independent, 1000, 5),
        (score, 2000, 10),
    ],
)
def test_useless_features_are_not_used(draw, n, d):
    """At most 4 of 100 (0.004 by chance where one of 200 is); J is the truth d within 4 errors of
    the mean. Power: with 2 errors in the place of 3.5 the lift enters in a tenth of the sets."""
    layers = [
        measured(draw(torch.Generator().manual_seed(seed), n, d), max_features=200)
        for seed in range(REPEATS)
    ]
    assert sum(layer.features > d for layer in layers) <= 4
    J = torch.tensor([layer.value for layer in layers])
    assert abs(float(J.mean()) - d) < 4 * float(J.std()) / REPEATS**0.5


def test_a_few_useful_features_are_found():
    """A Laplace location: the raw activation has half of the information. Equal steps of k, which
    begin with eight lifted features, miss the rest in 60 of 100 data sets."""
    layers = [
        measured(
            ff.Pathwise(
                *Laplace(1).sample_with_tangent(0.0, 4000, torch.Generator().manual_seed(seed))
            )
        )
        for seed in range(40)
    ]
    J = torch.tensor([layer.value for layer in layers])
    assert sum(layer.feature_kind == "lift" for layer in layers) >= 38
    assert float(J.mean()) > 0.75


@pytest.mark.parametrize("seed", range(5))
def test_a_gain_that_cannot_be_seen_is_no_plateau(seed):
    """The raw activations have nothing of the scale of a Gaussian; 300 samples do not show it."""
    problem = GaussianScale(2)
    data = problem.finite_difference(1.0, 0.1, 300, seed=seed)
    layer = measured(data)
    assert layer.status == "noisy"
    assert not layer.sensitive
    assert measured(problem.finite_difference(1.0, 0.1, 100_000, seed=seed)).sensitive
