"""Two halves of the samples, each measured with features that the other has taught: their mean.

A Krylov space or a network that has seen samples may not be measured on them. So each half teaches
features for the other, both are measured, and the results are averaged: independent measurements of
the same J, half the variance of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fisherfast.data.dealing import Place
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

__all__ = ["HalfFit", "dealt_to_halves", "error_of_mean", "joined", "leading_curve", "mean_of"]


@dataclass(frozen=True)
class HalfFit:
    """J of features that one half has taught, measured on the other.

    Attributes:
        curve: over the leading features.
        index: int64 [k] numbers of these features.
        chosen: how many of them are used.
        plateau: that number is on a plateau of the curve.
        ridge: [k] of these features.
        half: whose samples were measured, 0 for those of even folds.
        replicates: [F, P, P] J without each fold of this half; None where it is not known.
    """

    curve: FisherCurve
    index: torch.Tensor
    chosen: int
    plateau: bool
    ridge: torch.Tensor
    half: int
    replicates: torch.Tensor | None = None

    @property
    def carried(self) -> bool:
        """Whether the arithmetic carries the condition of the covariance."""
        J = self.at_chosen("J").diagonal().clamp_min(0)
        return not bool((self.at_chosen("hidden") > HIDDEN_SHARE * J).any())

    def at_chosen(self, name: str) -> torch.Tensor:
        """Value of one of the curves at the chosen size."""
        values: torch.Tensor = getattr(self.curve, name)
        return values[self.chosen - 1]

    def at(self, name: str, sizes: torch.Tensor) -> torch.Tensor:
        """Values of one of the curves at sizes [n], the last one where it ends before."""
        values: torch.Tensor = getattr(self.curve, name)
        return values[(sizes.to(values.device) - 1).clamp_max(len(values) - 1)]


def dealt_to_halves(
    place: Place,
    rows: torch.Tensor,
    tangents: torch.Tensor | None,
    score: torch.Tensor | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
    """Yield what each half has of a batch, as views.

    Args:
        place: of the batch.
        rows: [n, d] activations.
        tangents: [P, n, d], or None.
        score: [n, P], or None.
    """
    for own in place.halves:
        yield (
            rows[own],
            None if tangents is None else tangents[:, own],
            None if score is None else score[own],
        )


def leading_curve(
    whole: FoldStatistics, index: torch.Tensor, ridge: torch.Tensor
) -> tuple[FisherCurve, torch.Tensor]:
    """The curve of the features in index [k] up to the first that is linear in those before it, and
    the features that it holds."""
    while True:
        try:
            return fisher_curve(whole.select(index), ridge[index]), index
        except SingularCovarianceError as error:
            index = index[: error.feature - 1]


def joined(
    base: LayerFisher,
    halves: Sequence[HalfFit],
    measured: Sequence[FoldMoments],
    contrast: torch.Tensor,
    points: torch.Tensor,
) -> LayerFisher:
    """The mean of two halves, in all but the linear J and the kind of features.

    The honest bound of each half learns its readout on a quarter of all samples and measures it on
    the next.

    Args:
        base: what else there is to say of the layer.
        halves: the two measurements.
        measured: their moments.
        contrast: [C, P] float64 weights of the conditions.
        points: int64 [n], sizes at which the curve is kept.
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
        replicates=_replicates(halves),
        carried=all(half.carried for half in halves),
    )


def _replicates(halves: Sequence[HalfFit]) -> torch.Tensor:
    """The mean of the halves without each fold [F, P, P]; empty where they are not known."""
    ordered = sorted(halves, key=lambda half: half.half)
    known = [half.replicates for half in ordered if half.replicates is not None]
    if len(known) < len(halves):
        J = halves[0].at_chosen("J")
        return J.new_empty(0, *J.shape).cpu()
    return replicates_of_mean(known)


def replicates_of_mean(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of both halves without each fold [F, P, P], of replicates [F / 2, P, P] of each,
    whose folds are the even and the odd ones; empty where one is."""
    if not all(map(len, parts)):
        return parts[0].new_empty(0, *parts[0].shape[1:]).cpu()
    means = torch.stack([part.mean(0) for part in parts])
    changes = (torch.stack(list(parts), 1) - means) / 2
    folds = 2 * len(changes)  # a jackknife over these, where each half had one over its own
    scale = math.sqrt((folds / 2 - 1) / (folds / 2) * folds / (folds - 1))
    return (means.mean(0) + changes.flatten(0, 1) * scale).cpu()


def mean_of(values: list[torch.Tensor]) -> torch.Tensor:
    """Mean of results, on the CPU."""
    return torch.stack(values).mean(0).cpu()


def error_of_mean(errors: list[torch.Tensor]) -> torch.Tensor:
    """Standard error of the mean of independent results with these errors."""
    return torch.stack(errors).square().sum(0).sqrt().cpu() / len(errors)
