r"""J without each fold of the samples: what the errors of two layers have in common.

.. math:: \delta J = W^T \delta D + \delta D^T W - W^T \delta S\, W, \qquad W = R^{-1} D

The derivative D is known fold by fold. The covariance S is not, but the numbers r = W^T f are all
that is asked of it, and a thousand samples tell how r r^T varies from fold to fold. With a score s
most of that is known of all samples: r r^T is R (s r^T + r s^T) - R^2 s s^T, R = tr(V^-1 J) / P,
but for a rest that is uncorrelated with these. All layers keep the same samples, so their
replicates are those of one jackknife (docs/theory.md, 18).
"""

from __future__ import annotations

import math

import torch

from fisherfast.derivatives import FoldScore
from fisherfast.estimators import FisherCurve
from fisherfast.score import explained

__all__ = ["KEPT_SAMPLES", "fold_replicates", "kept_squares", "spread_of_squares"]

KEPT_SAMPLES = 1024
"""Samples over all conditions whose activations are kept: the variance of r^2 to 5 to 10 %."""

SPARE_DOF = 3
"""nu - k_eff - 3 degrees of freedom remain of nu in the variance of an inverse covariance."""


def kept_squares(
    curve: FisherCurve, k: int, rows: torch.Tensor, score: torch.Tensor | None
) -> torch.Tensor:
    """r r^T [m, P, P] of the samples that were kept; with a score what all samples do not tell.

    Args:
        curve: of at least k features.
        k: how many are used.
        rows: r [m, P] about the mean of its condition and fold.
        score: s [m, P] about that mean.
    """
    squares = _outer(rows, rows)
    if score is None or curve.statistics.score is None:
        return squares
    share = _share(curve, k, curve.statistics.score)
    crossed = _outer(rows, score)
    return squares - share * (crossed + crossed.mT) + share**2 * _outer(score, score)


def fold_replicates(curve: FisherCurve, k: int, squares: torch.Tensor) -> torch.Tensor:
    """J [F, P, P] of the first k features without each fold.

    Args:
        curve: of at least k features.
        k: how many are used.
        squares: from `spread_of_squares` of `kept_squares`, with `FisherCurve.readout_of(k)`.
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
        R, of_score = _share(curve, k, statistics.score), statistics.score.folds
        change = gain * (1 - R) * (products + products.mT) + (gain * R**2 + 1 - gain) * of_score
        derivative_part = -(change - change.mean(0)) / (folds - 1)
        covariance_part = covariance_part * gain
    return J + derivative_part + covariance_part


def spread_of_squares(
    squares: torch.Tensor, folds: torch.Tensor, count: int, all_samples: int
) -> torch.Tensor:
    """How far the mean of r r^T in each fold lies from that in all, as shares [F, P, P] of the
    covariance W^T S W that add up to its error.

    Args:
        squares: r r^T [m, P, P] of the samples that were kept.
        folds: [m] of each.
        count: F.
        all_samples: how many the m stand for. Of pairs both are counted, here as in m.
    """
    products = squares.new_zeros(count, *squares.shape[1:])
    products.index_add_(0, folds, squares)
    return (products - products.mean(0)) / math.sqrt(max(len(squares), 1) * all_samples)


def _share(curve: FisherCurve, k: int, score: FoldScore) -> float:
    """R, the part of the score's variance that k features explain."""
    return float(explained(curve.J[k - 1 : k], score.covariance))


def _outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left[:, :, None] * right[:, None, :]
