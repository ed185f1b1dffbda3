"""Fold moments: the streaming statistics of a layer that the estimator needs.

Samples are dealt to F folds (`fisherfast.data.dealing`); even folds form half A, odd folds half B.
Batches are sorted by half and fold, so that each fold is a run of rows. Stored are counts and sums
per condition and fold (vectors) and one matrix of cross products per half, all about a pilot mean
and in float64: memory is O(k^2) for any number of samples. Derived in docs/theory.md, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fisherfast import ops
from fisherfast.data.dealing import Place
from fisherfast.estimation.derivatives import FoldScore, LabelMoments, ScoreMoments, TangentMoments
from fisherfast.estimation.features import Lift


@dataclass(frozen=True)
class SampleFeatures:
    """Features of some samples about the means of their folds, scaled so that their squares are
    unbiased.

    Attributes:
        features: [m, k].
        score: [m, P] of the same samples, centred and scaled alike; None for other sources.
        conditions: how many conditions of the same m / conditions samples follow each other; 1 for
            samples that are not paired.
    """

    features: Tensor
    score: Tensor | None = None
    conditions: int = 1

    def whitened(self, readout: Tensor) -> Tensor:
        """Compute t [m, k] = L^-1 f from a readout L^-1 [k, k], in the dtype of the features."""
        return self.features @ readout.T.to(self.features)

    def select(self, index: Tensor) -> SampleFeatures:
        """Return the features in index (int64 [m])."""
        return replace(self, features=self.features[:, index])


def about_fold_means(rows: Tensor, fold: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """Subtract the mean of its fold from each row, and scale it so that its square is unbiased.

    Args:
        rows: [m, k].
        fold: int64 [m] of the rows.
        sums: [F, k] of all samples of each fold.
        counts: [F] of these samples.
    """
    counts = counts.to(sums)[:, None]
    means = (sums / counts.clamp_min(1)).to(rows)
    scale = (counts / (counts - 1).clamp_min(1)).sqrt().to(rows)
    return (rows - means[fold]).mul_(scale[fold])


@dataclass(frozen=True)
class FoldStatistics:
    """The input of the estimators: one covariance, and the derivative of the mean of all samples
    and of each fold.

    Attributes:
        covariance: S [k, k] float64, within folds: independent of the derivatives for Gaussian
            features.
        dof: nu, degrees of freedom of S.
        derivative: D [k, P] float64, derivative of the mean, per unit of theta.
        fold_derivatives: [F, k, P] float64, the same from each fold alone.
        noise: c [P, P] float64; Cov(D) = c S for independent conditions, in 1/theta^2.
        paired: the conditions share their noise, samples have tangents or depend on each other in
            groups: Cov(D) is not c S, and must be estimated from the folds.
        score: the covariance of the score, for D = Cov(f, s); None for other sources.
        samples: some of the samples, for corrections where they are not Gaussian; None for none.
        pair_inflation: by how much nu is smaller because paired conditions share their noise.
    """

    covariance: Tensor
    dof: float
    derivative: Tensor
    fold_derivatives: Tensor
    noise: Tensor
    paired: bool
    score: FoldScore | None = None
    samples: SampleFeatures | None = None
    pair_inflation: float = 1.0

    @property
    def columns(self) -> Tensor:
        """D and the derivatives of each fold, side by side [k, (1 + F) P]."""
        folds = self.fold_derivatives.permute(1, 0, 2).flatten(1)
        return torch.cat([self.derivative, folds], 1)

    def split(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Split whitened `columns` [..., (1 + F) P] into that of D [..., P] and those of the folds
        [..., F, P]."""
        folds, _, parameters = self.fold_derivatives.shape
        of_folds = columns[..., parameters:].unflatten(-1, (folds, parameters))
        return columns[..., :parameters], of_folds

    def project(self, readout: Tensor) -> FoldStatistics:
        """Return the statistics of the numbers readout^T f, readout [k, m]."""
        return replace(
            self,
            covariance=readout.T @ self.covariance @ readout,
            derivative=readout.T @ self.derivative,
            fold_derivatives=readout.T @ self.fold_derivatives,
            samples=None,
        )

    def select(self, index: Tensor) -> FoldStatistics:
        """Return the statistics of the features in index (int64 [m])."""
        return replace(
            self,
            covariance=self.covariance[index][:, index],
            derivative=self.derivative[index],
            fold_derivatives=self.fold_derivatives[:, index],
            samples=None if self.samples is None else self.samples.select(index),
        )


class FoldSums:
    """Sums of k features under C conditions, in F folds: what the statistics of a layer and those
    of a map have in common.

    Args:
        size: k.
        conditions: C.
        folds: F, even and at least 4.
        paired: the conditions share their noise.
        tangents: P if samples have tangents, else 0.
        score: P if samples have a score, else 0.
        labels: P if samples have labels theta, else 0.
        groups: int64 [F], number of groups in each fold, the same in all conditions, if samples
            depend on each other; None for independent samples. A group counts as one sample.
        device: of the accumulators.

    Attributes:
        counts: samples per condition and fold [C, F] int64, on the CPU.
        sums: [C, F, k] float64.
        products: sums over samples of f_a f_b, feature by feature, for each pair of conditions
            [C, C, k] (paired only).
        carried: fold-wise derivatives from tangents, score or labels; None for other sources.
    """

    def __init__(
        self,
        size: int,
        conditions: int,
        *,
        folds: int = 16,
        paired: bool = False,
        tangents: int = 0,
        score: int = 0,
        labels: int = 0,
        groups: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if folds < 4 or folds % 2:
            raise ValueError(f"folds must be even and at least 4, got {folds}")
        self.folds = folds
        self.paired = paired
        self.groups = groups
        self.counts = torch.zeros(conditions, folds, dtype=torch.int64)
        self.sums = torch.zeros(conditions, folds, size, dtype=torch.float64, device=device)
        pairs = conditions if paired else 0
        self.products = torch.zeros(pairs, pairs, size, dtype=torch.float64, device=device)
        self._waiting: list[Tensor] = []
        self.carried: TangentMoments | ScoreMoments | LabelMoments | None = None
        if tangents:
            self.carried = TangentMoments(tangents, size, folds=folds, device=device)
        elif score:
            self.carried = ScoreMoments(score, size, folds=folds, device=device)
        elif labels:
            self.carried = LabelMoments(labels, size, folds=folds, device=device)

    @property
    def seen(self) -> list[int]:
        """Samples of each condition."""
        return list(self.counts.sum(1).tolist())

    @property
    def units(self) -> int:
        """Fewest independent samples of a condition: groups, if any."""
        return min(self.seen) if self.groups is None else int(self.groups.sum())

    @property
    def fewest(self) -> int:
        """Fewest independent samples in a fold of a condition."""
        fewest = int(self.counts.min())
        return fewest if self.groups is None else min(fewest, int(self.groups.min()))

    def abreast(self, features: Tensor) -> list[Tensor]:
        """Collect features of the same samples under one condition after the other (paired only).
        Returns those of all conditions once the last ones come, and an empty list before."""
        self._waiting.append(features)
        if len(self._waiting) < len(self.counts):
            return []
        complete, self._waiting = self._waiting, []
        return complete

    def update_products(self, features: list[Tensor]) -> None:
        """Add the products of features [n, k] of the same samples under all conditions (paired
        only)."""
        for a, first in enumerate(features):
            for b, second in enumerate(features[:a]):
                product = (first * second).sum(0, dtype=torch.float64)
                self.products[a, b] += product
                self.products[b, a] += product

    def samples_of(
        self,
        rows: Iterable[Tensor],
        folds: Iterable[Tensor],
        carried: Tensor | None,
        index: Tensor | slice = slice(None),
    ) -> SampleFeatures:
        """Return some of the samples about the means of their folds, or about the regression on
        their labels.

        Args:
            rows: features [m, k] of samples of each condition.
            folds: theirs, int64 [m].
            carried: score or labels [m, P] of the same samples, or None.
            index: of the features; all by default.
        """
        folds = list(folds)
        parts = [
            about_fold_means(own, fold, sums[:, index], counts)
            for own, fold, sums, counts in zip(rows, folds, self.sums, self.counts, strict=True)
        ]
        score = None
        if isinstance(self.carried, ScoreMoments | LabelMoments) and carried is not None:
            columns, sums = self.carried.columns_of(carried), self.carried.column_sums
            score = about_fold_means(columns, folds[0], sums, self.counts[0])
        if isinstance(self.carried, LabelMoments) and score is not None:
            every, counts = slice(None), self.counts[0].to(self.sums)
            basis = self.carried.basis(every, counts)
            explained = self.carried.explained(every, counts, self.sums[0], basis)[:, index]
            along = score @ basis
            parts[0] -= (along @ explained).to(parts[0])
            parts[0] *= (1 - along.square().sum(1, keepdim=True)).rsqrt().to(parts[0])
            score = None
        paired = self.paired and self.groups is None
        return SampleFeatures(torch.cat(parts), score, len(parts) if paired else 1)

    def _scatter_freedom(self, columns: slice) -> float:
        """Return the divisor of the scatter within the folds in columns: samples minus cells.

        For groups it is computed as if the samples of a group were equal, because subtracting the
        mean of a fold then removes more of its scatter. With a score the plain divisor is used: the
        scatter of the score loses as much as that of the features, and the loss cancels."""
        counts = self.counts[:, columns]
        if self.groups is None or isinstance(self.carried, ScoreMoments):
            return float(counts.sum() - counts.numel() - self._terms(columns))
        groups = self.groups[columns]
        lost = len(groups) + self._terms(columns)
        return float(counts.sum()) * (1 - lost / float(groups.sum()))

    def _freedom(self, columns: slice, inflation: float) -> float:
        """Return nu of the folds in columns; groups that all conditions share count once."""
        counts = self.counts[:, columns] if self.groups is None else self.groups[columns]
        return int(counts.sum() - counts.numel() - self._terms(columns)) / inflation

    def _terms(self, columns: slice) -> int:
        """Return the terms of the labels that are fitted to the samples of the folds in columns."""
        if not isinstance(self.carried, LabelMoments):
            return 0
        return self.carried.basis(columns, self.counts[0, columns].to(self.sums)).shape[1]

    def explained(self, columns: slice, index: Tensor | slice = slice(None)) -> Tensor | None:
        """Return E [r, m]: E^T E is the scatter of the features in index, within the folds in
        columns, that the labels explain; None without labels."""
        if not isinstance(self.carried, LabelMoments):
            return None
        counts = self.counts[0, columns].to(self.sums)
        return self.carried.explained(columns, counts, self.sums[0, columns])[:, index]

    def _inflation(self, variance: Tensor, live: Tensor) -> float:
        r"""Compute the factor by which the pooled covariance of correlated conditions has fewer
        degrees of freedom.

        Two covariances of the same noise are not independent. For C conditions with mean
        self-correlations rho_ab the variance of their average is that of
        :math:`\nu / (1 + \sum_{a \ne b} \rho_{ab}^2 / C)` degrees of freedom; the factor is
        1 + rho^2 for one pair.

        Args:
            variance: [k] within folds.
            live: bool [k], the features that vary.
        """
        if not self.paired or self.groups is not None or not bool(live.any()):
            return 1.0
        weight = self.counts.to(self.sums.device, torch.float64)[..., None]
        means = self.sums / weight
        n = weight[0].sum()
        between = torch.einsum("afk,bfk->abk", means * weight, means)
        covariance = (self.products - between) / n
        variance = variance * (1 - self.folds / n)
        return pair_inflation((covariance[..., live] / variance[live]).mean(-1))

    def _statistics(
        self,
        covariance: Tensor,
        contrast: Tensor,
        inflation: float,
        columns: slice = slice(None),
        index: Tensor | slice = slice(None),
    ) -> FoldStatistics:
        """Return the statistics of the features in index and the folds in columns, given their
        covariance, of any shape."""
        device = self.sums.device
        contrast = contrast.to(device)
        counts = self.counts[:, columns].to(device, torch.float64)
        sums, samples = self.sums[:, columns], counts.sum(1)[:, None]
        score, noise = None, contrast.T @ (contrast / samples)
        if self.carried is None:
            sums = sums[..., index]
            derivative = (sums.sum(1) / samples).T @ contrast
            fold_derivatives = (sums / counts[..., None]).permute(1, 2, 0) @ contrast
        else:
            derivative, fold_derivatives = self.carried.derivatives(columns, counts[0], sums[0])
            derivative, fold_derivatives = derivative[index], fold_derivatives[:, index]
            score = self.carried.score(columns, counts[0])
        labelled = isinstance(self.carried, LabelMoments)
        if isinstance(self.carried, LabelMoments):
            noise = self.carried.noise(columns, counts[0])
        carried = self.carried is not None and not labelled
        return FoldStatistics(
            covariance=covariance,
            dof=self._freedom(columns, inflation),
            derivative=derivative,
            fold_derivatives=fold_derivatives,
            noise=noise,
            paired=self.paired or carried or self.groups is not None,
            score=score,
            pair_inflation=inflation,
        )


class FoldMoments(FoldSums):
    """Streaming moments of k features under C conditions, in F folds and two halves.

    Args:
        size: k.
        conditions: C.
        streams: of the samples, see `FoldSums`.

    A pilot is subtracted from the features beforehand (by `FeatureDictionary`); it cancels from all
    results. Lifted features are computed tile by tile, so those of a whole batch are never in
    memory. Products of raw features are computed in their dtype, products with a lifted feature in
    the dtype of the lift.

    Attributes:
        known: leading features whose moments are complete, see `grown`.
        cross: [2, k, k] float64 sums of products in each half, lower triangles.
    """

    def __init__(self, size: int, conditions: int, **streams: Any) -> None:
        super().__init__(size, conditions, **streams)
        self._streams = streams
        self.known = 0
        self._variances: Tensor | None = None
        self.cross = self.sums.new_zeros(2, size, size)

    @property
    def size(self) -> int:
        """Number of features k."""
        return self.sums.shape[-1]

    def update(
        self,
        condition: int,
        raw: Tensor,
        lift: Lift | None = None,
        carried: Tensor | None = None,
        place: Place | None = None,
    ) -> None:
        """Add a batch of one condition.

        Args:
            condition: which one.
            raw: [n, d] raw features about the pilot.
            lift: computes the other k - d features; None for none.
            carried: tangents [P, n, d] of the raw features (None for zero) or score [n, P], if the
                samples have these.
            place: folds of the rows, which are sorted by them; None to deal unsorted samples in
                turn, row i to fold (seen + i) % F.

        Cost: n k (k + 1) / 2 + n d (k - d) multiply-adds, less for known features.
        """
        lift = Lift.none(raw) if lift is None else lift
        if place is None:
            place, order = Place.in_turn(self.seen[condition], len(raw), self.folds)
            raw = raw[order]
            carried = None if carried is None else carried[..., order, :]
        dim, known = raw.shape[1], self.known
        if lift.weight.dtype != raw.dtype:
            if known < dim:
                self._add(condition, raw, Lift.none(raw), place, known)
            raw, known = raw.to(lift.weight.dtype), max(known, dim)
        if known < self.size:
            self._add(condition, raw, lift, place, known)
        if self.carried is not None:
            self.carried.update(raw, carried, lift, place, known=self.known)
        self.counts[condition] += place.counts
        self._variances = None

    def _add(self, condition: int, raw: Tensor, lift: Lift, place: Place, known: int) -> None:
        """Add sums and products of the features after the first `known`."""
        ops.lift_moments_(
            self.sums[condition],
            self.cross,
            raw,
            lift.weight,
            lift.bias,
            lift.pilot,
            offsets=place.offsets_on(raw.device),
            slope=lift.slope,
            start=known,
        )

    def shared_sums(self) -> list[Tensor]:
        """Views of all that adds up over processes which have each seen other samples. Known
        features are left out: they have been added up before."""
        self._variances = None
        parts = [self.counts, self.sums[..., self.known :], self.cross[:, self.known :]]
        parts += [self.products] if self.paired else []
        return parts + ([] if self.carried is None else self.carried.shared_sums(self.known))

    def grown(self, size: int, known: int | None = None) -> FoldMoments:
        """Extend to more features, keeping the moments of the first.

        The same samples, in the same order, must then be added again; only the new features are
        computed. Sums of pairs and of the score itself start from zero.

        Args:
            size: number of features.
            known: number of leading features to keep; None for all.
        """
        known = self.size if known is None else known
        moments = FoldMoments(size, len(self.counts), **self._streams)
        moments.known = known
        moments.sums[..., :known] = self.sums[..., :known]
        moments.cross[:, :known, :known] = self.cross[:, :known, :known]
        if self.carried is not None and moments.carried is not None:
            moments.carried.sums[..., :known] = self.carried.sums[..., :known]
        return moments

    @property
    def degrees_of_freedom(self) -> float:
        """nu of the covariance of all samples."""
        return self._freedom(slice(None), self._pair_inflation())

    def statistics(
        self, contrast: Tensor, half: int | None = None, index: Tensor | slice = slice(None)
    ) -> FoldStatistics:
        """Compute covariance and derivatives of all samples, or of half A (0) or B (1).

        Args:
            contrast: [C, P] float64 weights of the conditions, see `FiniteDifference.contrast`.
            half: 0 or 1; None for all samples.
            index: int64 [m] of the features; all by default.

        Raises:
            ValueError: a fold is empty, or no degree of freedom is left.
        """
        columns = slice(None) if half is None else slice(half, None, 2)
        counts = self.counts[:, columns]
        if int(counts.min()) < 1:
            raise ValueError(
                f"every condition must have at least {self.folds} samples (one per fold),"
                f" got {min(self.seen)}"
            )
        cells, total = counts.numel(), int(counts.sum())
        if total <= cells:
            raise ValueError(
                f"samples must outnumber the {cells} cells of conditions x folds, got {total}"
            )
        if self.groups is not None and int(self.groups.min()) < 2:
            raise ValueError(f"groups must be at least two per fold, got {self.groups.tolist()}")
        cross = self.cross.sum(0) if half is None else self.cross[half]
        cross = cross[index][:, index]
        cross = cross.tril() + cross.tril(-1).T
        weight = counts.to(cross)[..., None]
        means = self.sums[:, columns][..., index] / weight * weight.sqrt()
        covariance = cross - torch.einsum("cfi,cfj->ij", means, means)
        if (explained := self.explained(columns, index)) is not None:
            covariance -= explained.T @ explained
        covariance /= self._scatter_freedom(columns)
        return self._statistics(covariance, contrast, self._pair_inflation(), columns, index)

    def variances(self) -> Tensor:
        """Compute the within-fold variance of each feature [k] float64, over all conditions."""
        if self._variances is None:
            self._variances = self._variance()
        return self._variances

    def _variance(self) -> Tensor:
        weight = self.counts.to(self.sums)[..., None]
        between = (self.sums.square() / weight.clamp_min(1)).sum((0, 1))
        total = int(self.counts.sum()) - self.counts.numel()
        scatter = self.cross.sum(0).diagonal() - between
        if (explained := self.explained(slice(None))) is not None:
            scatter, total = scatter - explained.square().sum(0), total - len(explained)
        return scatter / max(total, 1)

    def _pair_inflation(self) -> float:
        if not self.paired:
            return 1.0
        variance = self.variances()
        return self._inflation(variance, variance > 0)


def pair_inflation(rho: Tensor) -> float:
    """Compute 1 + sum over pairs of conditions of rho^2 / C, with rho [C, C] the mean correlation
    of a feature with itself."""
    rho = rho.clone().fill_diagonal_(0.0)
    return float(1.0 + rho.square().sum() / len(rho))
