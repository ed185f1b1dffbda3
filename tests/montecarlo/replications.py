"""Repeated experiments at the level of the estimators: fold moments of fresh samples, many
times."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import fisherfast as ff
from fisherfast.data import Data
from fisherfast.estimation.curve import fisher_curve
from fisherfast.estimation.features import FeatureDictionary
from fisherfast.estimation.fold_moments import FoldMoments, FoldStatistics
from fisherfast.estimation.pilot import PilotMoments
from fisherfast.estimation.ridge import LIFT_RIDGE
from fisherfast.problems import Problem

PUBLISHED_SLOPE = 0.7  # the published lift: here k - k_eff is largest


NO_STEP = torch.zeros(1, 1, dtype=torch.float64)
"""The contrast of one condition, whose samples carry the derivative of one parameter."""


class Same(nn.Module):
    """Passes its input on, as new numbers: a layer after the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1 * x


def of_features(data: Data, **options: object) -> ff.LayerFisher:
    """What the features of the samples show, also of scores, where the input itself is V."""
    return ff.fisher_flow(Same(), data, **options)["output"]


def carried_statistics(
    source: str, problem: Problem, theta: float, n: int, features: int, seed: int
) -> FoldStatistics:
    """Fold statistics of fresh samples with tangents ("pathwise") or a score ("score"), in a
    dictionary that is the same every time."""
    data = (problem.pathwise if source == "pathwise" else problem.scored)(theta, n, seed=seed)
    batch = next(data.read(0, n))
    pilot = PilotMoments()
    pilot.update(problem.sample(theta, 2048, torch.Generator().manual_seed(1)))
    dictionary = FeatureDictionary(pilot.standardisation(), features, dtype=torch.float64)
    if batch.tangents is None:
        moments, carried = FoldMoments(dictionary.size, 1, score=1), batch.score
    else:
        moments = FoldMoments(dictionary.size, 1, tangents=1)
        carried = dictionary.raw_tangents(batch.tangents)
    moments.update(0, dictionary.raw_features(batch.x), dictionary.lift, carried)
    return moments.statistics(NO_STEP)


def estimates(
    problem: Problem, theta: float, dtheta: float, n: int, features: int, seed: int
) -> dict[str, float]:
    """J at all features by each formula, for one replication of n samples of independent
    conditions. "classical" is Kanitscheider et al. 2015 with k, the number of features, in place of
    k_eff; "ordinary" has deviations from the condition's mean instead of the fold's."""
    data = problem.finite_difference(theta, dtheta, n, seed=seed)
    samples = [torch.cat([batch.x for batch in data.read(c, n)]) for c in range(2)]
    pilot = PilotMoments()
    for x in samples:
        pilot.update(x)
    dictionary = FeatureDictionary(
        pilot.standardisation(), features, seed=seed, slope=PUBLISHED_SLOPE
    )
    moments = FoldMoments(dictionary.size, 2)
    for condition, x in enumerate(samples):
        moments.update(condition, dictionary.raw_features(x), dictionary.lift)
    within = moments.statistics(data.contrast())
    means = moments.sums.sum(1) / n
    scatter = moments.cross.sum(0) - n * means.T @ means
    ordinary = replace(within, covariance=scatter / (2 * n - 2), dof=2.0 * n - 2)
    curve = fisher_curve(within, LIFT_RIDGE)
    k, nu, naive = dictionary.size, within.dof, float(curve.naive[-1])
    folds, wrong = (
        float(fisher_curve(replace(one, paired=True), LIFT_RIDGE).J[-1])
        for one in (within, ordinary)
    )
    return {
        "k_eff": float(curve.J[-1]),
        "folds": folds,
        "naive": naive,
        "classical": naive * (nu - k - 1) / nu - k * float(within.noise),
        "ordinary": wrong,
    }
