"""J from the score: without the bias of the plain formulas, and known as well as it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from montecarlo.replications import NO_STEP, carried_statistics, of_features

from fisherfast.estimation.curve import fisher_curve
from fisherfast.estimation.fold_moments import FoldMoments
from fisherfast.problems import (
    Camera,
    GaussianScale,
    GaussianShift,
    Laplace,
    LogNormal,
    glyph_scene,
)

REPLICATIONS = 300


@pytest.mark.slow
def test_adjusted_and_nothing_else():
    """Catches J without the adjustment (naive), with the correction of a given derivative (h J),
    and with half the degrees of freedom. The score of 60 numbers, 40 of them seen, in 200 samples:
    J = 40, V = 60, where the formula is exact. 4 standard errors of the mean of 400 (false alarm
    6e-5)."""
    values: dict[str, list[float]] = {"adjusted": [], "naive": [], "given": [], "half": []}
    for seed in range(400):
        x = torch.randn(200, 60, generator=torch.Generator().manual_seed(seed)).double()
        moments = FoldMoments(40, 1, score=1)
        moments.update(0, x[:, :40], None, x.sum(1, keepdim=True))
        s = moments.statistics(NO_STEP)
        curve, V = fisher_curve(s), float(s.score.covariance)
        naive, k = float(curve.naive[-1]), float(curve.effective_dim[-1])
        values["adjusted"].append(float(curve.J[-1]))
        values["naive"].append(naive)
        values["given"].append(naive * (s.dof - k - 1) / s.dof)
        values["half"].append(V - (V - naive) * s.dof / (s.dof - 2 * k))
    off = {}
    for name, entries in values.items():
        sample = torch.tensor(entries, dtype=torch.float64)
        off[name] = float((sample.mean() - 40).abs() / (sample.std() / 20))
    assert off["adjusted"] < 4
    assert min(off["naive"], off["given"], off["half"]) > 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "theta"),
    [(Laplace(4), 0.0), (LogNormal.random(dim=10), 0.0)],
    ids=["laplace", "ln"],
)
def test_little_remains_of_the_optimism(problem, theta):
    """Catches an adjustment that is off where the residual is neither Gaussian nor of one size: a
    quarter as many features as samples leave less than 0.6 % of V (seen: -0.3 and +0.4 %, a tenth
    of the error of J), where no correction leaves 0.8 to 1.0 %, and h J has 20 % too little.

    J / V is compared with that of 100 000 samples in the same features: it is known to 0.05 %.
    """
    large = carried_statistics("score", problem, theta, 100_000, 200, 10_000)
    truth = float(fisher_curve(large).J[-1] / large.score.covariance)
    J, naive = [], []
    for seed in range(60):
        s = carried_statistics("score", problem, theta, 800, 200, seed)
        curve = fisher_curve(s)
        J.append(float(curve.J[-1] / s.score.covariance))
        naive.append(float(curve.naive[-1] / s.score.covariance))
    assert abs(sum(J) / len(J) - truth) < 0.006
    assert sum(naive) / len(naive) - truth > 0.007


CASES = {
    # problem, theta, samples, max_features
    "all explained": (GaussianShift(torch.ones(20)), 0.0, 2000, 100),
    "scale": (GaussianScale(8), 1.0, 2000, 64),
    "part explained": (Laplace(4), 0.0, 2000, 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_coverage(name):
    """Catches stderr off by a quarter either way (1.96 / 1.25 covers 88 %, 1.96 * 1.25 covers 98.6
    %), and the error of a derivative and a covariance that are taken as independent, which is up to
    2.2 times too wide.

    300 replications know the coverage to 1.3 % and the spread to 4 %: bounds are 3.5 and 4 standard
    errors away. Seen: 94 %, 94 %, 93 %.
    """
    problem, theta, n, features = CASES[name]
    layers = [
        of_features(problem.scored(theta, n, seed=seed), max_features=features)
        for seed in range(REPLICATIONS)
    ]
    J = torch.stack([layer.J[0, 0] for layer in layers])
    stderr = torch.stack([layer.stderr[0, 0] for layer in layers])
    covered = ((J - J.mean()).abs() < 1.96 * stderr).double().mean()
    assert 0.90 < float(covered) < 0.985
    assert 0.84 < float(J.std() / stderr.square().mean().sqrt()) < 1.16


@pytest.mark.slow
def test_error_of_independent_parts_is_too_wide():
    """The power of the test above: jackknife of D and 2 J^2 / (nu - k) are no error of the score's
    J, where the derivative and the covariance come from the same samples."""
    s = carried_statistics("score", GaussianShift(torch.ones(20)), 0.0, 2000, 100, 0)
    right = float(fisher_curve(s).stderr[-1])
    apart = float(fisher_curve(replace(s, paired=True, score=None)).stderr[-1])
    assert apart > 1.8 * right


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
    large = of_features(problem.scored(0.0, 200_000, seed=1000), max_features=300)
    assert float(J.std()) <= 0.2
    assert abs(float(J.mean()) / large.value - 1) < 0.03
    assert all(float(layer.lower) < layer.value + 3 * float(layer.stderr) for layer in layers)
    assert (
        abs(float(torch.stack([layer.lower for layer in layers]).mean()) / large.value - 1) < 0.03
    )


@pytest.mark.slow
def test_camera_with_photon_noise():
    """Photon counts, which have no derivative at all: 3 standard errors, a false alarm in 370."""
    camera = Camera(
        glyph_scene(), white_std=0.0, row_std=0.0, correlated_std=0.0, gain=0.3, psf_sigma=0.5
    )
    info = of_features(camera.scored(0.1, 4000), max_features=64)
    truth = float(camera.fisher(0.1))
    assert abs(info.value - truth) < 3 * float(info.stderr)
    assert float(info.stderr) < 0.05 * truth
    assert abs(float(info.lower) - truth) < 4 * float(info.lower_stderr)
