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


def moments_of(
    problem: Problem, theta: float, dtheta: float, n: int, features: int, seed: int, paired: bool
) -> tuple[FoldMoments, torch.Tensor]:
    """Fold moments of n samples per condition in `features` lifted features, and the contrast."""
    data = problem.finite_difference(theta, dtheta, n, seed=seed, paired=paired)
    samples = [torch.cat([batch.x for batch in data.read(c, n)]) for c in range(data.conditions)]
    pilot = PilotMoments()
    for x in samples:
        pilot.update(x)
    dictionary = FeatureDictionary(
        pilot.standardisation(), features, seed=seed, slope=PUBLISHED_SLOPE
    )
    moments = FoldMoments(dictionary.size, data.conditions, paired=paired)
    lifted = []
    for condition, x in enumerate(samples):
        moments.update(condition, dictionary.raw_features(x), dictionary.lift)
        lifted.append(x)
    if paired:
        moments.update_products([dictionary(x) for x in lifted])
    return moments, data.contrast()


def ordinary_covariance(moments: FoldMoments, within_folds: FoldStatistics) -> FoldStatistics:
    """The same statistics with deviations from the condition's mean instead of the fold's: wrong on
    purpose."""
    n = moments.counts.sum(1).double()[:, None]
    means = moments.sums.sum(1) / n
    scatter = moments.cross.sum(0) - torch.einsum("ci,cj->ij", means * n, means)
    dof = int(moments.counts.sum()) - len(means)
    return replace(within_folds, covariance=scatter / dof, dof=float(dof))


def classical(statistics: FoldStatistics, naive: float) -> float:
    """Kanitscheider et al. 2015 with k, the number of features, in place of k_eff: wrong with a
    ridge."""
    k, nu = len(statistics.derivative), statistics.dof
    return naive * (nu - k - 1) / nu - k * float(statistics.noise)


def estimates(
    problem: Problem, theta: float, dtheta: float, n: int, features: int, seed: int
) -> dict[str, float]:
    """J at all features by each formula, for one replication of independent conditions."""
    moments, contrast = moments_of(problem, theta, dtheta, n, features, seed, paired=False)
    within = moments.statistics(contrast)
    curve = fisher_curve(within, LIFT_RIDGE)
    naive = float(curve.naive[-1])
    ordinary = ordinary_covariance(moments, within)
    return {
        "k_eff": float(curve.J[-1]),
        "folds": float(fisher_curve(replace(within, paired=True), LIFT_RIDGE).J[-1]),
        "naive": naive,
        "classical": classical(within, naive),
        "ordinary": float(fisher_curve(replace(ordinary, paired=True), LIFT_RIDGE).J[-1]),
    }
