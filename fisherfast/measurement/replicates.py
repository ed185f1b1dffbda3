r"""Replicates of J without each fold of the samples, and the error of J from kept samples.

.. math:: \delta J = W^T \delta D + \delta D^T W - W^T \delta S\, W, \qquad W = R^{-1} D

Moments give J and its error, but not the effect of each sample on J. That takes the numbers u =
W^T f of the samples, and W is known only after the pass. So a thousand samples are kept and
represent the others. All layers keep the same ones, so their replicates belong to one jackknife,
which gives the error of any function of several layers (docs/theory.md, 18).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fisherfast.data import Data
from fisherfast.data.dealing import Place
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.curve import FisherCurve, at_least
from fisherfast.estimation.fold_moments import FoldMoments, SampleFeatures, about_fold_means
from fisherfast.estimation.leverage import (
    excess_covariance,
    left_out,
    leverage,
    score_corrections,
    score_covariance,
)
from fisherfast.estimation.variance import covariance_of_entries

KEPT_SAMPLES = 1024
"""Samples kept over all conditions: a variance is known to 5 % from them."""

KEPT_NUMBERS = 2**18
"""Activations kept of a narrow layer, 1 MB of float32, so of more samples ..."""

MOST_SHARED = 4
"""Largest factor by which each of several points keeps fewer samples: their mean needs no more."""

MOST_SAMPLES = 8192
"""... up to this number."""

NEIGHBOURS = 16
"""Consecutive samples that are kept together: 15 pairs of neighbours."""

SPARE_DOF = 3
"""The variance of an inverse covariance has nu - k_eff - 3 degrees of freedom."""

NOTHING = 1e-9
"""Eigenvalue of normalised terms of the labels below which they are linear in each other."""

LEAST_ERROR = 0.01
"""Smallest part of a Gaussian variance that light tails can leave."""

Readout = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""Computes from raw features [m, d] and their tangents [m, P, d] (or None) the numbers W^T f
[m, P] and their tangents [m, P, P], the parameter first."""


Features = Callable[[Tensor], Tensor]
"""Computes features [m, k] of raw ones [m, d]."""


def kept_samples(width: int, data: Data) -> list[int]:
    """Return the samples to keep over all conditions, the same for all layers and those for a
    number of raw features: more in a narrow layer, and twice as many with a score, whose residuals
    may depend on the leverage. One of several points keeps as much less as it has siblings, up to a
    factor of `MOST_SHARED`, or its square for narrow layers."""
    least = KEPT_SAMPLES * (2 if data.source == "score" else 1)
    most = MOST_SAMPLES // min(data.siblings, MOST_SHARED)
    more = max(least, min(KEPT_NUMBERS // max(width, 1), most))
    return sorted({kept // min(data.siblings, MOST_SHARED) for kept in (KEPT_SAMPLES, more)})


class HeldSamples:
    """Some of the samples of one layer with their tangents or score; the same ones in all layers.

    Blocks of consecutive samples are kept, because neighbours show whether samples depend on each
    other.

    Args:
        data: the source of the samples.
        folds: F.
        width: raw features of a sample.
        dtype: of the kept features.

    Attributes:
        stores: of the thousand samples that are the same in all layers, and of more for the tails
            of the distribution; one store if both numbers are equal.
        dependence: largest correlation of a sample with its neighbour that `replicates` has seen,
            in standard errors of independent samples.

    Memory: the larger of 1024 d and 2^18 numbers, times 1 + P with tangents.
    """

    def __init__(self, data: Data, folds: int, width: int, dtype: torch.dtype) -> None:
        self._source, self._folds = data.source, folds
        self._shared = min(data.siblings, MOST_SHARED)
        self._parameters, self._contrast = data.parameters, data.contrast()
        self._groups = None if data.groups is None else data.groups.numbers
        counts = [data.samples(c) for c in range(data.conditions)]
        known = None if None in counts else max(n for n in counts if n is not None)
        known = known if data.spread == 1 else None  # numbers run over the samples of all points
        self.stores = [
            KeptSamples(
                data.conditions,
                samples * data.spread // data.conditions,
                block=NEIGHBOURS,
                dtype=dtype,
                expected=known,
            )
            for samples in kept_samples(width, data)
        ]
        self.dependence = 0.0

    def add(self, condition: int, raw: Tensor, carried: Tensor | None, place: Place) -> None:
        """Add raw features [n, d] of a condition with their tangents [P, n, d] (None for zero) or
        score [n, P]."""
        if self._source == "pathwise":
            if carried is None:
                carried = raw.new_zeros(1, 1, 1).expand(self._parameters, *raw.shape)
            carried = carried.transpose(0, 1)
        for kept in self.stores:
            kept.add(condition, place, raw, carried)

    def samples(
        self, features: Features, moments: FoldMoments, index: Tensor, most: int
    ) -> SampleFeatures | None:
        """Compute the features in index [k] of some kept samples; None if there are none.

        Args:
            features: computes them from raw ones [m, d].
            moments: of these features, for the means of folds.
            index: int64 [k].
            most: most samples, of all conditions together.
        """
        if self.stores[0].forgotten:
            return None
        kept = [self._thinned(condition, most) for condition in range(len(self._contrast))]
        rows = (features(raw)[:, index] for raw, *_ in kept)
        folds = (fold for _, _, fold, _ in kept)
        carried = kept[0][1] if self._source in ("score", "labelled") else None
        return moments.samples_of(rows, folds, carried, index)

    def error_covariance(
        self, curve: FisherCurve, k: int, samples: SampleFeatures | None, read: Readout, most: int
    ) -> Tensor:
        """Return the covariance [P, P, P, P] of the errors of the entries of J of the first k
        features: Gaussian theory with the excess that the samples show; with a score all of it is
        from the samples.

        Args:
            curve: of at least k features.
            k: how many are used.
            samples: from `samples`, with k features.
            read: applies the readout `FisherCurve.readout_of(k)`.
            most: as for `samples`.
        """
        errors = curve.error_covariance(k)
        if samples is None:
            return errors
        J, dof = curve.J[k - 1], curve.statistics.dof
        spare = dof - float(curve.effective_dim[k - 1]) - SPARE_DOF
        whitened = samples.whitened(curve.readout[:k, :k]).double()
        u = whitened @ curve.half[:k]
        if samples.score is not None:
            errors = score_covariance(whitened, u, samples.score, J, curve.naive[k - 1], dof)
            looked_at = curve.statistics.samples
            if looked_at is None:
                return errors
            missing = 1 / len(looked_at.features) - 1 / dof
            changes = score_corrections(whitened, u, samples.score, dof)
            return errors + covariance_of_entries(changes) * max(missing, 0.0)
        g = left_out(leverage(whitened.square().sum(1, keepdim=True), dof))
        moved = None
        if self._source == "pathwise":
            raw, tangents, *_ = self._thinned(0, most)
            moved = read(raw, tangents)[1]
        excess = excess_covariance(u * g.sqrt(), moved, J, spare)
        return at_least(errors + excess, LEAST_ERROR * errors)

    def _thinned(self, condition: int, most: int) -> tuple[Tensor, ...]:
        """As `_condition`, thinned to at most `most` samples of all conditions."""
        parts = self._condition(
            condition, self.stores[-1 if most > KEPT_SAMPLES // self._shared else 0]
        )
        step = -(-len(parts[0]) * len(self._contrast) // most)
        return tuple(part[::step] for part in parts)

    def replicates(self, curve: FisherCurve, k: int, read: Readout, samples: int) -> Tensor:
        """Return J [F, P, P] of the first k features without each fold; empty if no samples are
        kept.

        Args:
            curve: of at least k features.
            k: how many are used.
            read: applies the readout `FisherCurve.readout_of(k)`.
            samples: number of independent samples of each condition, kept or not.
        """
        statistics, J = curve.statistics, curve.J[k - 1]
        if self.stores[0].forgotten:
            return J.new_empty(0, *J.shape)
        dof, effective = statistics.dof, float(curve.effective_dim[k - 1])
        if self._source == "score":
            gain = dof / (dof - effective)
            squares, crossed, scores = self._sums(read, samples)
            return J - self._left_out(gain * (crossed - squares) + (1 - gain) * scores)
        naive = curve.naive[k - 1].diagonal()
        size = (J.diagonal() / naive).nan_to_num(0.0).clamp(0, 1).sqrt()  # of W, free of its noise
        squares, crossed, _ = self._sums(read, samples)
        squares = squares * size[:, None] * size * math.sqrt(dof / (dof - effective - SPARE_DOF))
        if statistics.paired:
            return J - self._left_out(crossed * (size[:, None] + size) / 2 - squares)
        return (
            J + curve.replicates[k - 1] - curve.replicates[k - 1].mean(0) + self._left_out(squares)
        )

    def replicates_of_score(self, V: Tensor, samples: int) -> Tensor:
        """Return V [F, P, P] of the score without each fold; empty if no samples are kept."""
        if self.stores[0].forgotten:
            return V.new_empty(0, *V.shape)
        _, score, fold, numbers = self._condition(0)
        s = _about_own_means(score, fold, self._folds)
        share = self._units(0, numbers) / samples
        return V - self._left_out(self._by_fold(_outer(s, s), fold, share))

    def _sums(self, read: Readout, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sum by fold (see `_by_fold`) u u^T, the changes of W^T D + D^T W, and s s^T."""
        P = self._parameters
        squares = crossed = scores = self._contrast.new_zeros(self._folds, P, P)
        for condition in range(len(self._contrast)):
            raw, carried, fold, numbers = self._condition(condition)
            tangents = carried if self._source == "pathwise" else None
            u, moved = read(raw, tangents)
            if self._source == "labelled":
                u = _about_labels(u, carried)
            share = self._units(condition, numbers) / samples
            groups = None if self._groups is None else self._groups[condition][numbers]
            self.dependence = max(self.dependence, _dependence(u, numbers, groups))
            own = _about_own_means(u, fold, self._folds)
            squares = squares.to(u) + self._by_fold(_outer(own, own), fold, share)
            if self._source == "score":
                s = _about_own_means(carried, fold, self._folds)
                change = _outer(s, own)
                scores = self._by_fold(_outer(s, s), fold, share)
            elif self._source == "labelled":
                change = _outer(u, _slope_weights(carried).to(u))
            elif moved is not None:
                change = moved.mT
            else:
                change = (u - u.mean(0))[:, :, None] * self._contrast[condition].to(u)
            crossed = crossed.to(u) + self._by_fold(change + change.mT, fold, share)
        return squares / len(self._contrast), crossed, scores

    def _condition(self, condition: int, kept: KeptSamples | None = None) -> tuple[Tensor, ...]:
        """Return raw features, their tangents, score or labels (the features themselves if there
        are none), folds and numbers of the samples."""
        numbers, fold, raw, *carried = (kept or self.stores[0]).kept()[condition]
        return raw, (carried[0] if carried else raw).double(), fold.to(raw.device), numbers

    def _units(self, condition: int, numbers: Tensor) -> int:
        """Count the independent samples among kept samples of these numbers: groups, if any."""
        if self._groups is None:
            return len(numbers)
        return len(self._groups[condition][numbers].unique())

    def _by_fold(self, values: Tensor, fold: Tensor, share: float) -> Tensor:
        """Sum values [m, P, P] about their mean in each fold [F, P, P], scaled so that the squares
        add up to the variance of the mean of all samples, of which these are a share."""
        sums = values.new_zeros(self._folds, *values.shape[1:])
        sums.index_add_(0, fold, values - values.mean(0))
        return sums * (math.sqrt(share) / max(len(values), 1))

    def _left_out(self, sums: Tensor) -> Tensor:
        """Scale sums to the replicates of a jackknife."""
        return sums * math.sqrt(self._folds / (self._folds - 1))


def _dependence(u: Tensor, numbers: Tensor, groups: Tensor | None = None) -> float:
    """Return the rank correlation of numbers u [m, P], or of their sizes, with those of the next
    sample (of another group, if there are groups), times the root of the number of pairs: 0 +- 1
    for independent samples of any distribution."""
    neighbours = (numbers.diff() == 1).to(u.device)
    if groups is not None:
        neighbours &= (groups.diff() != 0).to(u.device)
    sizes = (u - u.median(0).values).abs()
    z = torch.stack([_ranks(column) for column in torch.cat([u, sizes], 1).T])
    a, b = z[:, :-1][:, neighbours], z[:, 1:][:, neighbours]
    r = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
    return float(r.nan_to_num().abs().max()) * math.sqrt(a.shape[1])


def _ranks(values: Tensor) -> Tensor:
    """Return the ranks [m] about their mean, the same for equal values."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place].double()
    return ranks - ranks.mean()


def _about_labels(u: Tensor, theta: Tensor) -> Tensor:
    """Subtract from numbers u [m, P] their regression on theta [m, P] and its squares."""
    centred = theta - theta.mean(0)
    terms = torch.cat([torch.ones_like(theta[:, :1]), centred, centred.square()], 1).to(u)
    terms = terms / terms.norm(dim=0).clamp_min(torch.finfo(u.dtype).tiny)
    values, vectors = torch.linalg.eigh(terms.T @ terms)
    basis = terms @ (vectors[:, values > NOTHING] / values[values > NOTHING].sqrt())
    return u - basis @ (basis.T @ u)


def _slope_weights(theta: Tensor) -> Tensor:
    """Return weights [m, P]: the slope on theta [m, P] is the mean of weight times feature."""
    centred = theta - theta.mean(0)
    return len(theta) * centred @ torch.linalg.pinv(centred.T @ centred, hermitian=True)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[:, :, None] * right[:, None, :]


def _about_own_means(rows: Tensor, fold: Tensor, folds: int) -> Tensor:
    """As `about_fold_means`, for rows [m, P] that are all samples of their folds."""
    sums = rows.new_zeros(folds, rows.shape[1]).index_add_(0, fold, rows)
    return about_fold_means(rows, fold, sums, torch.bincount(fold, minlength=folds))
