"""Fold moments: all that the estimator needs to know of a layer, streamed, mergeable.

Samples are dealt to F folds (`fisherfast.data.dealing`); even folds form half A, odd folds half B.
Batches come sorted by half and fold, so that each is a run of rows. Kept are counts and sums per
condition and fold (vectors) and one matrix of cross products per half, all about a pilot mean and
in float64: memory is O(k^2), whatever the number of samples. Derived in docs/theory.md, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fisherfast import ops
from fisherfast.data.dealing import Place
from fisherfast.estimation.derivatives import (
    DerivativeMoments,
    FoldScore,
    ScoreMoments,
    TangentMoments,
)
from fisherfast.estimation.features import Lift

__all__ = ["FoldMoments", "FoldStatistics"]


@dataclass(frozen=True)
class SampleFeatures:
    """Features of some of the samples about the means of their folds, scaled so that their squares
    are unbiased.

    Attributes:
        features: [m, k].
        score: [m, P] of the same samples, likewise; None for the other sources.
    """

    features: torch.Tensor
    score: torch.Tensor | None = None

    def whitened(self, readout: torch.Tensor) -> torch.Tensor:
        """t [m, k] = L^-1 f, of a readout L^-1 [k, k], in the dtype of the features."""
        return self.features @ readout.T.to(self.features)

    def select(self, index: torch.Tensor) -> SampleFeatures:
        """The features in index (int64 [m])."""
        return SampleFeatures(self.features[:, index], self.score)


@dataclass(frozen=True)
class FoldStatistics:
    """What the estimators see: one covariance and the derivative of the mean, whole and fold by
    fold.

    Attributes:
        covariance: S [k, k] float64, within folds: independent of the derivatives for Gaussian
            features.
        dof: nu, degrees of freedom of S.
        derivative: D [k, P] float64, derivative of the mean, per unit of theta.
        fold_derivatives: [F, k, P] float64, the same from each fold alone.
        noise: c [P, P] float64; Cov(D) = c S for independent conditions, in 1/theta^2.
        paired: the conditions share their noise, samples carry tangents or depend on each other in
            groups: Cov(D) is not c S, and only the folds tell it.
        score: the covariance of the score, for D = Cov(f, s); None for the other sources.
        samples: some of the samples, to see where they are not Gaussian; None for none.
    """

    covariance: torch.Tensor
    dof: float
    derivative: torch.Tensor
    fold_derivatives: torch.Tensor
    noise: torch.Tensor
    paired: bool
    score: FoldScore | None = None
    samples: SampleFeatures | None = None

    @property
    def columns(self) -> torch.Tensor:
        """D and the derivatives of each fold next to each other [k, (1 + F) P]."""
        folds = self.fold_derivatives.permute(1, 0, 2).flatten(1)
        return torch.cat([self.derivative, folds], 1)

    def project(self, readout: torch.Tensor) -> FoldStatistics:
        """Statistics of the numbers readout^T f, readout [k, m]."""
        return replace(
            self,
            covariance=readout.T @ self.covariance @ readout,
            derivative=readout.T @ self.derivative,
            fold_derivatives=readout.T @ self.fold_derivatives,
            samples=None,
        )

    def leading(self, k: int) -> FoldStatistics:
        """Statistics of the first k features."""
        return self.select(torch.arange(k, device=self.covariance.device))

    def select(self, index: torch.Tensor) -> FoldStatistics:
        """Statistics of the features in index (int64 [m])."""
        return replace(
            self,
            covariance=self.covariance[index][:, index],
            derivative=self.derivative[index],
            fold_derivatives=self.fold_derivatives[:, index],
            samples=None if self.samples is None else self.samples.select(index),
        )


class FoldMoments:
    """Streaming moments of k features under C conditions, in F folds and two halves.

    Args:
        size: k.
        conditions: C.
        folds: F, even and at least 4.
        paired: the conditions share their noise.
        tangents: P, where each sample comes with its tangents; 0 for none.
        score: P, where each sample comes with its score; 0 for none.
        groups: int64 [F], number of groups in each fold, the same in all conditions, where samples
            depend on each other; None for independent samples. A group counts as one sample.
        device: of the accumulators.

    Features arrive with a pilot subtracted (`FeatureDictionary` does it); the pilot cancels from
    all results. Lifted ones are made on the way, tile by tile: the features of a batch never exist.
    Products of raw features are taken in their dtype, those with a lifted one in the lift's.

    Attributes:
        known: leading features whose moments are complete, see `grown`.
        carried: fold-wise derivatives from what the samples carry; None for none.
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
        groups: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if folds < 4 or folds % 2:
            raise ValueError(f"folds must be even and at least 4, got {folds}")
        self.folds = folds
        self.paired = paired
        self.groups = groups
        self.known = 0
        self._seen_before: list[int] | None = None
        self.sums = torch.zeros(conditions, folds, size, dtype=torch.float64, device=device)
        # lower triangles
        self.cross = torch.zeros(2, size, size, dtype=torch.float64, device=device)
        pairs = conditions if paired else 0
        #: Sums over samples of f_a f_b, feature by feature, for each two conditions [C, C, k]
        # (paired only).
        self.products = torch.zeros(pairs, pairs, size, dtype=torch.float64, device=device)
        self._counts = torch.zeros(conditions, folds, dtype=torch.int64)
        self.carried: DerivativeMoments | None = None
        if tangents:
            self.carried = TangentMoments(tangents, size, folds=folds, device=device)
        elif score:
            self.carried = ScoreMoments(score, size, folds=folds, device=device)

    @property
    def size(self) -> int:
        """Number of features k."""
        return self.sums.shape[-1]

    @property
    def counts(self) -> torch.Tensor:
        """Samples per condition and fold [C, F] int64, on the CPU."""
        return self._counts

    @property
    def seen(self) -> list[int]:
        """Samples of each condition."""
        return list(self._counts.sum(1).tolist())

    def update(
        self,
        condition: int,
        raw: torch.Tensor,
        lift: Lift | None = None,
        carried: torch.Tensor | None = None,
        place: Place | None = None,
    ) -> None:
        """Add a batch of one condition.

        Args:
            condition: which one.
            raw: [n, d] raw features about the pilot.
            lift: makes the other k - d features; None for none.
            carried: tangents [P, n, d] of the raw features (None for zero) or score [n, P], where
                the samples carry these.
            place: folds of the rows, which are sorted by them; None for samples that are dealt in
                turn, row i to fold (seen + i) % F, in the order in which they come.

        Cost: n k (k + 1) / 2 + n d (k - d) multiply-adds, those of known features left out.
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
        self._counts[condition] += place.counts

    def _add(self, condition: int, raw: torch.Tensor, lift: Lift, place: Place, known: int) -> None:
        """Add sums and products of the features after the first known ones."""
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

    def shared_sums(self) -> list[torch.Tensor]:
        """Views of all that adds up over processes which have each seen other samples. Known
        features are left out: they have been added up before."""
        parts = [self._counts, self.sums[..., self.known :], self.cross[:, self.known :]]
        parts += [self.products] if self.paired else []
        return parts + ([] if self.carried is None else self.carried.shared_sums(self.known))

    def grown(self, size: int, known: int | None = None) -> FoldMoments:
        """Moments of more features, whose first ones are these.

        What is known stays; the same samples, in the same order, must be added again for the new
        features, and only these are computed then.

        Args:
            size: number of features.
            known: how many of these stay; None for all.
        """
        known = self.size if known is None else known
        moments = FoldMoments(
            size,
            len(self._counts),
            folds=self.folds,
            paired=self.paired,
            groups=self.groups,
            device=self.sums.device,
        )
        moments.known = known
        moments._seen_before = self.seen
        moments.sums[..., :known] = self.sums[..., :known]
        moments.cross[:, :known, :known] = self.cross[:, :known, :known]
        moments.carried = None if self.carried is None else self.carried.grown(size, known)
        return moments

    def update_products(self, features: list[torch.Tensor]) -> None:
        """Add the products of features [n, k] of the same samples under all conditions (paired
        only)."""
        add_pair_products_(self.products, features)

    def merge(self, other: FoldMoments) -> None:
        """Add the moments of other samples of the same features about the same pilot."""
        if self.known or other.known:
            raise ValueError("moments must not be merged while they grow, got known features")
        if (other.size, other.folds, len(other.counts), other.paired) != (
            self.size,
            self.folds,
            len(self.counts),
            self.paired,
        ):
            raise ValueError(
                "other must describe the same features, folds and conditions, got"
                f" k={other.size}, F={other.folds}, C={len(other.counts)}, paired={other.paired}"
            )
        if (self.carried is None) != (other.carried is None):
            raise ValueError("other must hold the same kind of derivatives, got one without")
        if self.carried is not None and other.carried is not None:
            self.carried.merge(other.carried)
        self.sums += other.sums.to(self.sums.device)
        self.cross += other.cross.to(self.cross.device)
        self.products += other.products.to(self.products.device)
        self._counts += other._counts

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain numbers."""
        return {
            "folds": self.folds,
            "paired": self.paired,
            "groups": self.groups,
            "known": self.known,
            "seen_before": self._seen_before,
            "counts": self._counts.clone(),
            "sums": self.sums.clone(),
            "cross": self.cross.clone(),
            "products": self.products.clone(),
            "carried": None if self.carried is None else self.carried.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> FoldMoments:
        """Rebuild what `state_dict` returned."""
        conditions, _, size = state["sums"].shape
        moments = cls(
            size,
            conditions,
            folds=state["folds"],
            paired=state["paired"],
            groups=state.get("groups"),
            device=state["sums"].device,
        )
        moments.known = state["known"]
        moments._seen_before = state["seen_before"]
        moments._counts = state["counts"].clone()
        moments.sums = state["sums"].clone()
        moments.cross = state["cross"].clone()
        moments.products = state["products"].clone()
        if state.get("carried") is not None:
            moments.carried = DerivativeMoments.from_state_dict(state["carried"])
        return moments

    @property
    def degrees_of_freedom(self) -> float:
        """nu of the covariance of all samples."""
        return self._freedom(slice(None))

    @property
    def units(self) -> int:
        """Independent samples of the condition with the fewest: groups, where there are any."""
        return min(self.seen) if self.groups is None else int(self.groups.sum())

    @property
    def fewest(self) -> int:
        """Independent samples in the fold of a condition with the fewest."""
        fewest = int(self._counts.min())
        return fewest if self.groups is None else min(fewest, int(self.groups.min()))

    def _freedom(self, columns: slice) -> float:
        """nu of the folds in columns: of groups that all conditions have in common, once."""
        if self.groups is None:
            counts = self._counts[:, columns]
            return (int(counts.sum()) - counts.numel()) / self._pair_inflation()
        groups = self.groups[columns]
        return float(groups.sum() - len(groups))

    def _scatter_freedom(self, columns: slice) -> float:
        """What the scatter within the folds in columns is divided by: samples less cells. Where
        they depend on each other within groups, as if those of a group were the same: the mean of
        a fold takes the more from its scatter. The scatter of a score has lost as much as that of
        the features, and is divided by the same."""
        counts = self._counts[:, columns]
        if self.groups is None or isinstance(self.carried, ScoreMoments):
            return float(counts.sum() - counts.numel())
        groups = self.groups[columns]
        return float(counts.sum()) * (1 - len(groups) / float(groups.sum()))

    def statistics(
        self,
        contrast: torch.Tensor,
        half: int | None = None,
        index: torch.Tensor | None = None,
    ) -> FoldStatistics:
        """Covariance and derivatives of all samples, or of half A (0) or B (1).

        Args:
            contrast: [C, P] float64 weights of the conditions, see `FiniteDifference.contrast`.
            half: which one; None for all samples.
            index: int64 [m] of the features; None for all.

        Raises:
            ValueError: a fold is empty, or no degree of freedom is left.
        """
        if self._seen_before not in (None, self.seen):
            raise ValueError(
                f"samples must be the same at every pass, got {self.seen} after"
                f" {self._seen_before} per condition"
            )
        columns = slice(None) if half is None else slice(half, None, 2)
        counts = self._counts[:, columns]
        if int(counts.min()) < 1:
            raise ValueError(
                f"every condition must have at least {self.folds} samples (one per fold),"
                f" got {int(self._counts.sum(1).min())}"
            )
        device = self.sums.device
        contrast = contrast.to(device)
        weight = counts.to(device, torch.float64)[..., None]
        sums = self.sums[:, columns]
        cross = self.cross.sum(0) if half is None else self.cross[half]
        if index is not None:
            sums = sums[..., index]
            cross = cross[index][:, index]
        means = sums / weight
        cross = cross.tril() + cross.tril(-1).T
        between = torch.einsum("cfi,cfj->ij", means * weight.sqrt(), means * weight.sqrt())
        cells, total = counts.numel(), int(counts.sum())
        if total <= cells:
            raise ValueError(
                f"samples must outnumber the {cells} cells of conditions x folds, got {total}"
            )
        if self.groups is not None and int(self.groups.min()) < 2:
            raise ValueError(f"groups must be two per fold at least, got {self.groups.tolist()}")
        per_condition = counts.sum(1).to(device, torch.float64)
        statistics = FoldStatistics(
            covariance=(cross - between) / self._scatter_freedom(columns),
            dof=self._freedom(columns),
            derivative=(sums.sum(1) / per_condition[:, None]).T @ contrast,
            fold_derivatives=means.permute(1, 2, 0) @ contrast,
            noise=contrast.T @ (contrast / per_condition[:, None]),
            paired=self.paired or self.carried is not None or self.groups is not None,
        )
        if self.carried is None:
            return statistics
        of_condition = weight[0, :, 0]
        all_sums = self.sums[0, columns]
        derivative, fold_derivatives = self.carried.derivatives(columns, of_condition, all_sums)
        if index is not None:
            derivative, fold_derivatives = derivative[index], fold_derivatives[:, index]
        return replace(
            statistics,
            derivative=derivative,
            fold_derivatives=fold_derivatives,
            score=self.carried.score(columns, of_condition),
        )

    def variances(self) -> torch.Tensor:
        """Within-fold variance of each feature [k] float64, all conditions together."""
        weight = self._counts.to(self.sums.device, torch.float64)[..., None]
        between = (self.sums.square() / weight.clamp_min(1)).sum((0, 1))
        total = int(self._counts.sum()) - self._counts.numel()
        return (self.cross.sum(0).diagonal() - between) / max(total, 1)

    def _pair_inflation(self) -> float:
        r"""How much the pooled covariance of correlated conditions over-counts its samples.

        Two covariances of the same noise are no two independent ones. For C conditions with mean
        self-correlations rho_ab the variance of their average is that of
        :math:`\nu / (1 + \sum_{a \ne b} \rho_{ab}^2 / C)` degrees of freedom; 1 + rho^2 for one
        pair.
        """
        if not self.paired:
            return 1.0
        weight = self._counts.to(self.sums.device, torch.float64)[..., None]
        means = self.sums / weight
        n = weight[0].sum()
        between = torch.einsum("afk,bfk->abk", means * weight, means)
        covariance = (self.products - between) / n
        variance = self.variances() * (1 - self.folds / n)
        live = variance > 0
        if not bool(live.any()):
            return 1.0
        return pair_inflation(covariance[..., live] / variance[live])


def add_pair_products_(products: torch.Tensor, samples: list[torch.Tensor]) -> None:
    """Adds to products [C, C, ...] the sums over n of x_a x_b of the same samples [n, ...] under
    each two of C conditions."""
    for a, first in enumerate(samples):
        for b, second in enumerate(samples[:a]):
            product = (first * second).sum(0, dtype=torch.float64)
            products[a, b] += product
            products[b, a] += product


def pair_inflation(correlations: torch.Tensor) -> float:
    """1 + sum over pairs of conditions of rho^2 / C, rho [C, C] the mean over features of
    correlations [C, C, k] of a feature with itself."""
    rho = correlations.mean(-1)
    rho.fill_diagonal_(0.0)
    return float(1.0 + rho.square().sum() / len(rho))
