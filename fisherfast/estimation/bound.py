"""The honest lower bound, from a readout learned on one half of the samples and measured on the
other."""

from __future__ import annotations

import torch

from fisherfast.estimation.curve import SingularCovarianceError, fisher_curve
from fisherfast.estimation.fold_moments import FoldStatistics
from fisherfast.estimation.ridge import (
    FACTOR_ROUNDING,
    LIFT_RIDGE,
    as_vector,
    with_ridge,
)

__all__ = ["cross_fitted_bound"]

VARIANCE_FLOOR = 0.1
"""Variance below which a feature counts as rare, relative to the median feature of a half."""

BOUND_RIDGE = 1e-8
"""Ridge of the P readouts, needed only if readouts are copies of each other (one output, two
parameters)."""


def cross_fitted_bound(
    half_a: FoldStatistics,
    half_b: FoldStatistics,
    ridge: float | torch.Tensor = LIFT_RIDGE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the honest lower bound: learn the readout on one half, measure it on the other, swap
    the halves, and average.

    For any readout W = R_A^-1 D_A [k, P], the linear Fisher information of the P numbers W^T f is a
    lower bound. It is measured on samples that W was not learned on, so only k = P features need a
    correction, and without the ridge that W was learned with.

    Args:
        half_a, half_b: statistics of the same features.
        ridge: of the readout, see `linear_readout`.

    Returns:
        lower [P, P] and its standard error [P, P], in 1/theta^2.
    """
    measured = []
    for learn, test in ((half_a, half_b), (half_b, half_a)):
        seen = test.project(linear_readout(learn, ridge))
        varied = (seen.covariance.diagonal() > 0).nonzero()[:, 0]
        measured.append(_last_or_zero(seen.select(varied)))
    (J_a, variance_a), (J_b, variance_b) = measured
    return (J_a + J_b) / 2, ((variance_a + variance_b) / 4).sqrt()


def _last_or_zero(statistics: FoldStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """Return J and its variance [P, P] of all features of the statistics; zero without features."""
    if len(statistics.derivative) == 0:
        zero = torch.zeros_like(statistics.noise)
        return zero, zero
    ridge = BOUND_RIDGE
    while True:
        try:
            curve = fisher_curve(statistics, ridge)
        except SingularCovarianceError:  # readouts that are the same except for rounding
            ridge *= 10
        else:
            return curve.J[-1], curve.stderr[-1].square()


def linear_readout(
    statistics: FoldStatistics, ridge: float | torch.Tensor = LIFT_RIDGE
) -> torch.Tensor:
    """Compute W = R^-1 D [k, P] in the scale of the features: the readout that attains the linear
    information.

    Any readout gives a valid bound, so this one is cautious. A feature that hardly varies in these
    samples is not scaled up to unit variance, and gets a larger ridge: it may vary strongly in
    other samples, where a large weight on it would add much noise. If rounding makes R indefinite,
    the ridge grows until R is positive definite.

    Args:
        statistics: of k features.
        ridge: one number or [k], relative to the variance of each feature.
    """
    variance = statistics.covariance.diagonal()
    live = variance > 0
    floor = VARIANCE_FLOOR * (variance[live].median() if bool(live.any()) else 1.0)
    ridge = as_vector(ridge, variance)
    ridge = torch.where(variance < floor, ridge.clamp_min(LIFT_RIDGE), ridge)
    scale = torch.where(live, variance.clamp_min(floor), torch.inf).rsqrt()
    scaled = (scale[:, None] * statistics.covariance * scale).clamp(-1, 1)
    factor, failed = torch.linalg.cholesky_ex(with_ridge(scaled, ridge))
    while int(failed):
        ridge = (10 * ridge).clamp_min(FACTOR_ROUNDING * len(variance))
        factor, failed = torch.linalg.cholesky_ex(with_ridge(scaled, ridge))
    return scale[:, None] * torch.cholesky_solve(scale[:, None] * statistics.derivative, factor)
