"""Measurements of two halves of the samples, each with features learned from the other, and their
mean.

A Krylov space or a network must not be measured on the samples that it was learned from. So the
features for one half are learned from the other, and the two results are averaged: they are
independent measurements of the same J, and their mean has half the variance of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherfast.estimation.choice import choose_features
from fisherfast.estimation.curve import (
    FisherCurve,
    SingularCovarianceError,
    cross_fitted_bound,
    fisher_curve,
)
from fisherfast.estimation.fold_moments import FoldMoments, FoldStatistics
from fisherfast.estimation.ridge import HIDDEN_SHARE
from fisherfast.estimation.variance import standard_errors
from fisherfast.results.layer import LayerFisher
from fisherfast.results.marginal import pack_covariance


@dataclass(frozen=True)
class HalfFit:
    """J of features learned from one half, measured on the other.

    Attributes:
        curve: over the leading features.
        index: int64 [k] numbers of these features.
        chosen: how many of them are used.
        plateau: that number is on a plateau of the curve.
        ridge: [k] of these features.
    """

    curve: FisherCurve
    index: Tensor
    chosen: int
    plateau: bool
    ridge: Tensor

    @property
    def carried(self) -> bool:
        """True if rounding hides only a small part of J."""
        J = self.at_chosen("J").diagonal().clamp_min(0)
        return not bool((self.at_chosen("hidden") > HIDDEN_SHARE * J).any())

    def at_chosen(self, name: str) -> Tensor:
        """Return the value of one of the curves at the chosen size."""
        return self.at(name, torch.tensor(self.chosen))

    def at(self, name: str, sizes: Tensor) -> Tensor:
        """Return the values of one of the curves at sizes [n]; its last one if it ends before."""
        values: Tensor = getattr(self.curve, name)
        return values[(sizes.to(values.device) - 1).clamp_max(len(values) - 1)]


def leading_curve(
    whole: FoldStatistics, index: Tensor, ridge: Tensor
) -> tuple[FisherCurve, Tensor]:
    """Compute the curve of the features in index [k] up to the first that is linear in those before
    it.

    Returns:
        The curve, and the numbers of its features.
    """
    while True:
        try:
            return fisher_curve(whole.select(index), ridge[index]), index
        except SingularCovarianceError as error:
            index = index[: error.feature - 1]


def crossed(
    fits: Sequence[tuple[FisherCurve, Tensor]], ridges: Sequence[Tensor], least: int
) -> list[HalfFit]:
    """Read each half at the size chosen on the *other* curve, whose noise is independent: the best
    of many sizes on the same curve would be biased upwards.

    Args:
        fits: curve of each half and the numbers of its features, from `leading_curve`.
        ridges: ridge of all features of each half.
        least: fewest features to choose.
    """
    choices = [choose_features(curve, min(least, len(curve))) for curve, _ in fits]
    return [
        HalfFit(curve, index, min(chosen, len(index)), plateau, ridge[index])
        for (curve, index), ridge, (chosen, plateau, *_) in zip(
            fits, ridges, reversed(choices), strict=True
        )
    ]


def joined(
    base: LayerFisher,
    halves: Sequence[HalfFit],
    measured: Sequence[FoldMoments],
    contrast: Tensor,
    points: Tensor,
) -> LayerFisher:
    """Average two halves, in all but the linear J, the replicates and the kind of features.

    The honest bound of each half learns its readout on a quarter of all samples and measures it on
    another.

    Args:
        base: everything else about the layer.
        halves: the two measurements.
        measured: their moments.
        contrast: [C, P] float64 weights of the conditions.
        points: int64 [n] sizes at which the curve is kept.
    """
    bounds, bound_errors = [], []
    for moments, half in zip(measured, halves, strict=True):
        index = half.index[: half.chosen]
        quarters = [moments.statistics(contrast, part).select(index) for part in (0, 1)]
        ridge = half.ridge[: half.chosen]
        bound, error = cross_fitted_bound(quarters[0], quarters[1], ridge)
        bounds.append(bound)
        bound_errors.append(error)
    errors = mean_of([half.curve.error_covariance(half.chosen) for half in halves]) / 2
    return replace(
        base,
        J=mean_of([half.at_chosen("J") for half in halves]),
        stderr=standard_errors(errors),
        lower=mean_of(bounds),
        lower_stderr=error_of_mean(bound_errors),
        naive=mean_of([half.at_chosen("naive") for half in halves]),
        curve_k=points,
        curve_J=mean_of([half.at("J", points) for half in halves]),
        curve_stderr=error_of_mean([half.at("stderr", points) for half in halves]),
        features=max(half.chosen for half in halves),
        effective_dim=float(mean_of([half.at_chosen("effective_dim") for half in halves])),
        plateau=all(half.plateau for half in halves),
        error_covariance=pack_covariance(errors),
        carried=all(half.carried for half in halves),
    )


def replicates_of_mean(parts: Sequence[Tensor]) -> Tensor:
    """Average the replicates [F / 2, P, P] of both halves, even folds first, into J without each
    fold [F, P, P]; empty if one of them is."""
    if not all(map(len, parts)):
        return parts[0].new_empty(0, *parts[0].shape[1:]).cpu()
    means = torch.stack([part.mean(0) for part in parts])
    changes = (torch.stack(list(parts), 1) - means) / 2
    folds = 2 * len(changes)  # a jackknife over these, where each half had one over its own
    scale = math.sqrt((folds / 2 - 1) / (folds / 2) * folds / (folds - 1))
    return (means.mean(0) + changes.flatten(0, 1) * scale).cpu()


def mean_of(values: list[Tensor]) -> Tensor:
    """Average results, on the CPU."""
    return torch.stack(values).mean(0).cpu()


def error_of_mean(errors: list[Tensor]) -> Tensor:
    """Return the standard error of the mean of independent results with these errors."""
    return torch.stack(errors).square().sum(0).sqrt().cpu() / len(errors)
