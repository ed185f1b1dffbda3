r"""J without each fold of the samples: what the errors of two layers have in common.

.. math:: \delta J = W^T \delta D + \delta D^T W - W^T \delta S\, W, \qquad W = R^{-1} D

The derivative D is known fold by fold. The covariance S is not, but the numbers r = W^T f are all
that is asked of it, and a thousand samples tell how r r^T varies from fold to fold. All layers keep
the same samples, so their replicates are those of one jackknife (docs/theory.md, 18).
"""

from __future__ import annotations

import math

import torch

from fisherfast.estimators import FisherCurve

__all__ = ["KEPT_SAMPLES", "fold_replicates", "spread_of_squares"]

KEPT_SAMPLES = 1024
"""Samples over all conditions whose activations are kept: the variance of r^2 to 5 to 10 %."""

SPARE_DOF = 3
"""nu - k_eff - 3 degrees of freedom remain of nu in the variance of an inverse covariance."""


def fold_replicates(curve: FisherCurve, k: int, squares: torch.Tensor) -> torch.Tensor:
    """J [F, P, P] of the first k features without each fold.

    Args:
        curve: of at least k features.
        k: how many are used.
        squares: from `spread_of_squares`, of the readout `FisherCurve.readout_of(k)`.
    """
    statistics, J = curve.statistics, curve.J[k - 1]
    folds = len(statistics.fold_derivatives)
    dof, effective = statistics.dof, float(curve.effective_dim[k - 1])
    covariance_part = squares * math.sqrt(folds / (folds - 1))
    if statistics.score is None:
        naive = curve.naive[k - 1].diagonal()
        share = (J.diagonal() / naive).nan_to_num(0.0).clamp(0, 1).sqrt()
        replicates = curve.replicates[k - 1]
        derivative_part = replicates - replicates.mean(0)
        covariance_part = covariance_part * share[:, None] * share
        covariance_part = covariance_part * math.sqrt(dof / (dof - effective - SPARE_DOF))
    else:
        gain = dof / (dof - effective)
        products = curve.readout_of(k).T @ statistics.fold_derivatives[:, :k]
        change = gain * (products + products.mT) + (1 - gain) * statistics.score.folds
        derivative_part = -(change - change.mean(0)) / (folds - 1)
        covariance_part = covariance_part * gain
    return J + derivative_part + covariance_part


def spread_of_squares(
    rows: torch.Tensor, folds: torch.Tensor, count: int, dof: float
) -> torch.Tensor:
    """How far the mean of r r^T in each fold lies from that in all, as shares [F, P, P] of the
    covariance W^T S W that add up to its error.

    Args:
        rows: r [m, P] about the mean of its condition and fold.
        folds: [m] of each.
        count: F.
        dof: degrees of freedom of S: m samples stand for so many.
    """
    samples, parameters = rows.shape
    products = rows.new_zeros(count, parameters, parameters)
    products.index_add_(0, folds, rows[:, :, None] * rows[:, None, :])
    return (products - products.mean(0)) / math.sqrt(max(samples, 1) * dof)
