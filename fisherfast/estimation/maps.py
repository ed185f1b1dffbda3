r"""Maps of the information: the linear Fisher information of the C channels at each position of a
feature map.

Each position (h, w) of a layer [C, H, W] has its own within-fold covariance S_hw [C, C] and
derivative D_hw [C, P], with the same corrections as a whole layer (docs/theory.md, 4 to 6). All H W
systems are solved in one batched call.
"""

from __future__ import annotations

import torch

from fisherfast import ops
from fisherfast.data.dealing import Place
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.curve import SPARE_DOF, fold_estimate
from fisherfast.estimation.derivatives import (
    DerivativeMoments,
    FoldScore,
    ScoreMoments,
    TangentMoments,
)
from fisherfast.estimation.features import Lift
from fisherfast.estimation.fold_moments import (
    SampleFeatures,
    about_fold_means,
    add_pair_products_,
    pair_inflation,
)
from fisherfast.estimation.leverage import Seen, left_out_score, leverage
from fisherfast.estimation.pilot import Standardisation
from fisherfast.estimation.ridge import AUTO, MOSTLY_RIDGE, RidgeSetting, raw_ridge
from fisherfast.estimation.score import score_estimate

__all__ = ["MapMoments", "estimate_map"]

KEPT_SAMPLES = 256
"""Samples over all conditions that are kept to compute leverages."""


class MapMoments:
    """Streaming moments of the C channels at each position, by condition and fold.

    Args:
        standardisation: of the C H W activations; its mean is subtracted from them.
        shape: (C, H, W).
        conditions: number of conditions.
        folds: F.
        paired: the conditions share their noise.
        tangents: P if samples have tangents, else 0.
        score: P if samples have a score, else 0.
        groups: int64 [F] in each fold, as in `FoldMoments`; None for independent samples.

    Products are in float64, see `FeatureDictionary`.

    Memory: 8 H W C (C + conditions F) bytes, and 8 H W C P F for tangents or score.
    """

    def __init__(
        self,
        standardisation: Standardisation,
        shape: tuple[int, ...],
        conditions: int,
        *,
        folds: int,
        paired: bool,
        tangents: int = 0,
        score: int = 0,
        groups: torch.Tensor | None = None,
    ) -> None:
        self.folds = folds
        self.paired = paired
        self.groups = groups
        pilot = standardisation.mean.reshape(shape)
        self._pilot = pilot
        self._rounding, self._noise = standardisation.rounding, standardisation.noise
        self._held: list[torch.Tensor] = []
        self.kept = KeptSamples(conditions, KEPT_SAMPLES // conditions, block=folds)
        self._counts = torch.zeros(conditions, folds, dtype=torch.int64)
        channels, height, width = pilot.shape
        self._sums = _zeros(pilot, conditions, folds, channels, height, width)
        self._cross = _zeros(pilot, height, width, channels, channels)
        self._products = _zeros(pilot, conditions, conditions, channels, height, width)
        self._carried: DerivativeMoments | None = None
        if tangents:
            self._carried = TangentMoments(
                tangents, pilot.numel(), folds=folds, device=pilot.device
            )
        elif score:
            self._carried = ScoreMoments(score, pilot.numel(), folds=folds, device=pilot.device)

    def update(
        self,
        condition: int,
        activations: torch.Tensor,
        carried: torch.Tensor | None = None,
        place: Place | None = None,
    ) -> None:
        """Add activations [n, C, H, W] of a condition.

        Args:
            carried: their tangents [P, n, C, H, W] (None for zero), or the score [n, P].
            place: folds of the rows, as in `FoldMoments.update`.
        """
        x = activations.double()
        if carried is not None and carried.ndim > 2:
            carried = carried.flatten(2)
        if place is None:
            place, order = Place.in_turn(int(self._counts[condition].sum()), len(x), self.folds)
            x = x[order]
            carried = None if carried is None else carried[..., order, :]
        if self._carried is not None:
            raw = (x - self._pilot).flatten(1)
            self._carried.update(raw, carried, Lift.none(raw), place)
        score = None if carried is None or carried.ndim > 2 else carried
        self.kept.add(condition, place, (x - self._pilot).flatten(1), score)
        self._cross += ops.spatial_moments(x, pilot=self._pilot)[1]
        for fold, rows in place.within(0, len(x)):
            self._sums[condition, fold] += (x[rows] - self._pilot).sum(0, dtype=torch.float64)
        self._counts[condition] += place.counts
        if self.paired:
            self._held.append(x - self._pilot)
            if len(self._held) == len(self._counts):
                add_pair_products_(self._products, self._held)
                self._held = []

    def shared_sums(self) -> list[torch.Tensor]:
        """Return views of the sums to add up over processes, see `FoldMoments.shared_sums`."""
        parts = [self._counts, self._sums, self._cross]
        parts += [self._products] if self.paired else []
        return parts + ([] if self._carried is None else self._carried.shared_sums())

    def covariance(self) -> tuple[torch.Tensor, int]:
        """Compute the within-fold covariance S [H, W, C, C] and its degrees of freedom."""
        weight = self._counts.to(self._sums.device, torch.float64)[..., None, None, None]
        means = (self._sums / weight.sqrt()).flatten(0, 1).permute(2, 3, 1, 0)
        samples, dof = int(self._counts.sum()), int(self._counts.sum()) - self._counts.numel()
        scatter = self._cross - means @ means.mT
        if self.groups is None:
            return scatter / dof, dof
        groups = int(self.groups.sum())
        own = groups - self.folds
        if not isinstance(self._carried, ScoreMoments):
            return scatter / (samples * own / groups), own
        return scatter / dof, own

    def derivatives(self, contrast: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute D [H, W, C, P] of all samples, and that of each fold alone [H, W, C, F, P]."""
        if self._carried is not None:
            counts = self._counts[0].to(self._sums.device, torch.float64)
            whole, folds = self._carried.derivatives(slice(None), counts, self._sums[0].flatten(1))
            shape = self._pilot.shape
            return (
                whole.unflatten(0, shape).permute(1, 2, 0, 3),
                folds.unflatten(1, shape).permute(2, 3, 1, 0, 4),
            )
        weight = self._counts.to(self._sums.device, torch.float64)
        fold_means = self._sums / weight[..., None, None, None]
        means = self._sums.sum(1) / weight.sum(1)[..., None, None, None]
        return (
            torch.einsum("achw,ap->hwcp", means, contrast),
            torch.einsum("afchw,ap->hwcfp", fold_means, contrast),
        )

    def samples(self) -> SampleFeatures | None:
        """Return the kept samples [m, C H W] about the means of their folds; None without any."""
        if self.kept.forgotten:
            return None
        parts, scores = [], []
        for condition, (_, fold, x, *score) in enumerate(self.kept.kept()):
            fold, counts = fold.to(x.device), self._counts[condition]
            sums = self._sums[condition].flatten(1)
            parts.append(about_fold_means(x.double(), fold, sums, counts))
            if score and isinstance(self._carried, ScoreMoments):
                sums = self._carried.score_sums
                scores.append(about_fold_means(score[0].double(), fold, sums, counts))
        return SampleFeatures(torch.cat(parts), torch.cat(scores) if scores else None)

    def score(self) -> FoldScore | None:
        """Compute the covariance of the score; None for other sources."""
        counts = self._counts[0].to(self._sums.device, torch.float64)
        return None if self._carried is None else self._carried.score(slice(None), counts)

    @property
    def carries(self) -> bool:
        """Whether the derivative comes from tangents or score."""
        return self._carried is not None

    def noise(self, contrast: torch.Tensor) -> torch.Tensor:
        """Compute c [P, P]: Cov(D) = c S for independent conditions."""
        per_condition = self._counts.sum(1).to(contrast)
        return contrast.T @ (contrast / per_condition[:, None])

    def alive(self, covariance: torch.Tensor) -> torch.Tensor:
        """Return which channels [H, W, C] vary by more than the rounding of their mean."""
        rounding = self._rounding * self._mean()
        return covariance.diagonal(dim1=-2, dim2=-1) > rounding.square()

    def ridge(self, setting: RidgeSetting, variance: torch.Tensor) -> torch.Tensor:
        """Compute the ridge [H, W, C], relative to the variances [H, W, C]."""
        if setting != AUTO:
            return torch.full_like(variance, setting)
        return raw_ridge(variance, self._noise**2 * (self._mean().square() + variance))

    def _mean(self) -> torch.Tensor:
        """Mean activations [H, W, C]."""
        return (self._sums.sum((0, 1)) / self._counts.sum() + self._pilot).permute(1, 2, 0)

    def pair_inflation(self, covariance: torch.Tensor, alive: torch.Tensor) -> float:
        """Compute the factor by which correlated conditions have fewer degrees of freedom, as for a
        whole layer."""
        if not self.paired or self.groups is not None or not bool(alive.any()):
            return 1.0
        weight = self._counts.to(self._sums.device, torch.float64)[..., None, None, None]
        means = self._sums / weight
        n = weight[0].sum()
        between = torch.einsum("afchw,bfchw->abchw", means * weight, means)
        shared = ((self._products - between) / n).permute(0, 1, 3, 4, 2)
        variance = covariance.diagonal(dim1=-2, dim2=-1) * (1 - self.folds / n)
        return pair_inflation((shared[..., alive] / variance[alive]).mean(-1))


def _zeros(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=like.device)


def estimate_map(
    name: str, moments: MapMoments, contrast: torch.Tensor, ridge: RidgeSetting
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Estimate J [H, W, P, P] and its standard errors at each position, in 1/theta^2.

    .. math::
        \text{independent:}\quad J = h \, J_\text{naive} - k_\text{eff} \, c \qquad
        \text{paired, pathwise:}\quad J = h \, \frac{\sum_{f \ne g} y_f y_g^T}{F (F - 1)} \qquad
        \text{score:}\quad J = V - (V - J_\text{naive}) \, \nu / (\nu - k_\text{eff})

    with k_eff of the C channels that vary at the position.

    Raises:
        ValueError: too few samples were seen for C channels.
    """
    covariance, dof = moments.covariance()
    contrast = contrast.to(covariance.device)
    alive = moments.alive(covariance)
    nu = dof / moments.pair_inflation(covariance, alive)
    channels = int(alive.sum(-1).max())
    if nu < channels + SPARE_DOF:
        raise ValueError(
            f"layer {name!r} must have more degrees of freedom than {channels + SPARE_DOF} for the"
            f" map of its {channels} channels, got {nu:.0f}: use more samples or maps=False"
        )
    derivative, fold_derivatives = moments.derivatives(contrast)
    ridges = moments.ridge(ridge, covariance.diagonal(dim1=-2, dim2=-1))
    columns = torch.cat([derivative, fold_derivatives.flatten(-2)], -1)
    solved, effective, known = _solve(covariance, alive, columns, ridges, rounding=ridge == AUTO)
    parameters, folds = derivative.shape[-1], moments.folds
    half = solved[..., :parameters]
    naive = half.mT @ half
    fold_half = solved[..., parameters:].unflatten(-1, (folds, parameters))
    score, samples = moments.score(), moments.samples()
    seen = None
    if samples is not None:
        seen = _seen(samples, covariance, ridges, known, half, nu)
    if score is not None:
        products = torch.einsum("bcp,bcfq->bfpq", half, fold_half)
        estimate = score_estimate(naive, effective, products, score, nu)
        J, variance = estimate.J, estimate.variance
        if seen is not None:
            J = left_out_score(seen, naive, effective, score.covariance, nu)
    else:
        paired = moments.paired or moments.carries or moments.groups is not None
        noise = None if paired else moments.noise(contrast)
        found = fold_estimate(naive, effective, fold_half, _fold_products, noise, nu, seen)
        J, variance = found.J, found.variance
    nothing = (alive.sum(-1) == 0).flatten()[:, None, None]
    J = torch.where(nothing, 0.0, (J + J.mT) / 2)
    stderr = torch.where(nothing, 0.0, (variance + variance.mT).div(2).sqrt())
    height, width = alive.shape[:2]
    J, stderr = (t.unflatten(0, (height, width)).detach().cpu() for t in (J, stderr))
    return J, stderr


def _solve(
    covariance: torch.Tensor,
    alive: torch.Tensor,
    columns: torch.Tensor,
    ridge: torch.Tensor,
    *,
    rounding: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute L^-1 times all columns [H W, C, (1 + F) P], k_eff [H W], and which channels count
    [H W, C].

    Channels that do not vary become features of unit variance without derivative or covariance:
    they add nothing to J and are not counted. The ridge share of a feature is computed with the
    largest ridge of its position: it is near 0 except for channels that are linear in others, which
    are left out if the ridge stands for rounding.
    """
    both = alive[..., None] & alive[..., None, :]
    covariance = torch.where(both, covariance, 0.0)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    variance.copy_(torch.where(alive, variance * (1 + ridge), 1.0))
    largest = torch.where(alive, ridge, 0.0).amax(-1).flatten()
    columns = torch.where(alive[..., None], columns, 0.0)
    solved = ops.fisher_solve_details(
        covariance.flatten(0, 1), columns.flatten(0, 1), inverse_rows=True
    )
    counted = alive.flatten(0, 1)
    ridge_share = (largest[:, None] * solved.inverse_rows).clamp(0, 1)
    known = counted & (ridge_share <= MOSTLY_RIDGE) if rounding else counted
    half = torch.where(known[..., None], solved.half, 0.0)
    return half, torch.where(known, 1 - ridge_share, 0.0).sum(-1), known


def _seen(
    samples: SampleFeatures,
    covariance: torch.Tensor,
    ridge: torch.Tensor,
    known: torch.Tensor,
    half: torch.Tensor,
    dof: float,
) -> Seen:
    """Compute leverage and prediction of kept samples at each position; zero where the covariance
    is singular."""
    height, width, channels, _ = covariance.shape
    both = (known[:, :, None] & known[:, None, :]).reshape(covariance.shape)
    R = torch.where(both, covariance, 0.0)
    variance = R.diagonal(dim1=-2, dim2=-1)
    live = known.reshape(variance.shape)
    variance.copy_(torch.where(live, variance * (1 + ridge), 1.0))
    factor, failed = torch.linalg.cholesky_ex(R.flatten(0, 1))
    x = samples.features.reshape(-1, channels, height * width).permute(2, 1, 0)
    x = torch.where(known[..., None] & (failed == 0)[:, None, None], x, 0.0)
    whitened = torch.linalg.solve_triangular(factor, x, upper=False).nan_to_num()
    prediction = torch.einsum("bcm,bcp->pmb", whitened, half)
    return Seen(leverage(whitened.square().sum(1).T, dof), prediction, samples.score)


def _fold_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Sum l r^T over channels, [B, F, P, P], with l and r [B, C, F, P]."""
    return torch.einsum("bcfp,bcfq->bfpq", left, right)
