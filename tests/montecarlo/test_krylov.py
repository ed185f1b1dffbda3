"""J in a learned space is unbiased, because nothing in it has seen the samples that it is measured
on (docs/theory.md, 15).

The truth of each replication is the linear information of the learned vectors under the known
covariance. Bounds are 4 standard errors of the mean over replications: a false alarm in 1 of 16 000
runs of each assertion, and none for a fixed seed. The wrong ways must leave the same bounds.
"""

from __future__ import annotations

import pytest
import torch
from support.wide_layers import information_in, measured

from fisherfast.data import Data
from fisherfast.estimation.curve import fisher_curve
from fisherfast.estimation.fold_moments import FoldMoments
from fisherfast.estimation.krylov import KrylovSpace, projected
from fisherfast.problems import GaussianShift

SIGMAS = 4.0
SAMPLES = 400
DIM = 300


def problem() -> GaussianShift:
    """300 activations, noise of 100 : 1 in random directions: no space of 16 vectors holds all of
    J, and 400 samples teach it badly."""
    g = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(DIM, DIM, generator=g, dtype=torch.float64))[0]
    covariance = axes @ torch.diag(torch.logspace(0, 2, DIM, dtype=torch.float64)) @ axes.T
    return GaussianShift(torch.full((DIM,), 0.5), (covariance + covariance.T) / 2)


PROBLEM = problem()
TRUTH = float(PROBLEM.fisher(0.0))


def data(source: str, seed: int) -> Data:
    """Samples of one replication; two conditions are one standard deviation of theta apart."""
    if source == "pathwise":
        return PROBLEM.pathwise(0.0, SAMPLES, seed=seed)
    if source == "score":
        return PROBLEM.scored(0.0, SAMPLES, seed=seed)
    return PROBLEM.finite_difference(0.0, TRUTH**-0.5, SAMPLES // 2, seed=seed)


def truth_in(space: KrylovSpace, size: int) -> float:
    """Information of the leading vectors of a space."""
    derivative, covariance = PROBLEM.mean_derivative(0.0).T, PROBLEM.covariance(0.0)
    return float(information_in(space.projection()[:size].double(), derivative, covariance))


def on_its_own_half(space: KrylovSpace, samples: Data, size: int) -> float:
    """J in a space on the even samples, which taught it: wrong on purpose."""
    batch = next(samples.read(0, SAMPLES))
    moments = FoldMoments(size, 1, folds=8, tangents=1)
    projection = space.projection()[:size]
    assert batch.tangents is not None
    tangents = projected(batch.tangents[0, ::2], projection)[None]
    rows = projected(batch.x[::2], projection, batch.x.mean(0))
    moments.update(0, rows, carried=tangents)
    return float(fisher_curve(moments.statistics(samples.contrast()), 1e-12).J[-1])


def replication(source: str, seed: int) -> dict[str, float]:
    """Estimates less the truth of their spaces, in units of J."""
    samples = data(source, seed)
    meter = measured(samples)
    layer = meter.estimate()
    pairs = list(zip(meter.spaces, meter.halves(), strict=True))
    truth = sum(truth_in(space, half.chosen) for space, half in pairs) / 2
    luckiest = 0.0
    for space, half in pairs:
        size = int(half.curve.J[:, 0, 0].argmax()) + 1
        luckiest += (float(half.curve.J[size - 1]) - truth_in(space, size)) / 2
    result = {
        "estimate": layer.value - truth,
        "lower": float(layer.lower) - truth,
        "stderr": float(layer.stderr),
        "luckiest": luckiest,
        "naive": float(layer.naive) - truth,
    }
    if source == "pathwise":
        space, half = pairs[0]
        own = on_its_own_half(space, samples, half.chosen)
        result["own"] = own - truth_in(space, half.chosen)
    return {name: value / TRUTH for name, value in result.items()}


def deviation(values: torch.Tensor) -> float:
    """Distance of the mean from zero in its standard errors."""
    return float(values.mean() / (values.std() / len(values) ** 0.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "wrong", "count"),
    [("pathwise", "own", 60), ("score", "luckiest", 120), ("independent", "naive", 80)],
)
def test_estimate_is_that_of_the_space(source, wrong, count):
    """Catches J measured on the samples from which the space was learned or its size was chosen, a
    readout measured on the quarter from which it was learned, halves that are not independent, and
    an average without its factor of a half (the spread over the stated error: 1.05 and 1.06
    measured, 1 within 4 standard errors of a standard deviation).

    Power: three wrong ways must fail. They measure on the half from which the space was learned,
    take the size with the largest J on the same curve, or leave out the correction.
    """
    runs = [replication(source, seed) for seed in range(count)]
    values = {name: torch.tensor([run[name] for run in runs]) for name in runs[0]}
    assert abs(deviation(values["estimate"])) < SIGMAS
    assert deviation(values["lower"]) < SIGMAS
    assert deviation(values[wrong]) > SIGMAS
    if source != "independent":
        ratio = float(values["estimate"].std() / values["stderr"].square().mean().sqrt())
        assert abs(ratio - 1) < SIGMAS / (2 * count) ** 0.5
