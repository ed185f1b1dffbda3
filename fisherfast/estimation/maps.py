r"""Maps of the information: the linear Fisher information of the C channels at each position of a
feature map.

Each position (h, w) of a layer [C, H, W] has its own within-fold covariance S_hw [C, C] and
derivative D_hw [C, P], with the same corrections as a whole layer (docs/theory.md, 4 to 6). All H W
systems are solved in one batched call.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfast import ops
from fisherfast.data.dealing import Place
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.curve import SPARE_DOF
from fisherfast.estimation.derivatives import ProductMoments, fold_sums
from fisherfast.estimation.estimate import estimate
from fisherfast.estimation.features import Lift
from fisherfast.estimation.fold_moments import FoldStatistics, FoldSums, SampleFeatures
from fisherfast.estimation.leverage import Seen, leverage
from fisherfast.estimation.pilot import Standardisation
from fisherfast.estimation.ridge import AUTO, MOSTLY_RIDGE, RidgeSetting, raw_ridge

KEPT_SAMPLES = 256
"""Samples over all conditions that are kept to compute leverages."""


class MapMoments(FoldSums):
    """Streaming moments of the C channels at each of B = H W positions, by condition and fold. The
    features of its sums are those of one position after the other, k = B C.

    Args:
        standardisation: of the C H W activations; its mean is subtracted from them.
        shape: (C, H, W).
        conditions: number of conditions.
        streams: of the samples, see `FoldSums`.

    Products are in float64, see `FeatureDictionary`.

    Memory: 8 H W C (C + conditions F) bytes, and 8 H W C P F for tangents or score.
    """

    def __init__(
        self,
        standardisation: Standardisation,
        shape: tuple[int, ...],
        conditions: int,
        **streams: Any,
    ) -> None:
        pilot = standardisation.mean.reshape(shape)
        super().__init__(pilot.numel(), conditions, device=pilot.device, **streams)
        self.shape = shape
        self._pilot = pilot
        self._rounding, self._noise = standardisation.rounding, standardisation.noise
        self.kept = KeptSamples(conditions, KEPT_SAMPLES // conditions, block=self.folds)
        self._cross = self.sums.new_zeros(math.prod(shape[1:]), shape[0], shape[0])

    def update(
        self, condition: int, activations: Tensor, carried: Tensor | None, place: Place
    ) -> None:
        """Add activations [n, C, H, W] of a condition.

        Args:
            carried: their tangents [P, n, C, H, W] (None for zero), or the score [n, P].
            place: folds of the rows, which are sorted by them.
        """
        z = activations.double() - self._pilot
        rows = _by_position(z)
        if carried is not None and carried.ndim > 2:
            carried = _by_position(carried)
        if self.carried is not None:
            self.carried.update(rows, carried, Lift.none(rows), place)
        self.kept.add(condition, place, rows, carried if self._keeps_carried else None)
        self._cross += ops.spatial_moments(z)[1].flatten(0, 1)
        self.sums[condition] += fold_sums(rows[None], place)[:, 0]
        self.counts[condition] += place.counts
        if self.paired:
            self.update_products(self.abreast(rows))

    @property
    def _keeps_carried(self) -> bool:
        return isinstance(self.carried, ProductMoments)

    def shared_sums(self) -> list[Tensor]:
        """Return views of the sums to add up over processes, see `FoldMoments.shared_sums`."""
        parts = [self.counts, self.sums, self._cross]
        parts += [self.products] if self.paired else []
        return parts + ([] if self.carried is None else self.carried.shared_sums())

    def statistics(self, contrast: Tensor) -> FoldStatistics:
        """Compute the statistics of the B C features, with the within-fold covariances [B, C, C] of
        the positions."""
        weight = self.counts.to(self.sums)[..., None]
        means = self._at_positions((self.sums / weight.sqrt()).flatten(0, 1).T)
        covariance = self._cross - means @ means.mT
        if (explained := self.explained(slice(None))) is not None:
            terms = self._at_positions(explained.T)
            covariance -= terms @ terms.mT
        covariance /= self._scatter_freedom(slice(None))
        live = self.alive(covariance).flatten()
        inflation = self._inflation(_diagonal(covariance).flatten(), live)
        statistics = self._statistics(covariance, contrast, inflation)
        return replace(statistics, samples=self._samples())

    def _samples(self) -> SampleFeatures | None:
        """Return the kept samples [m, B C] about the means of their folds; None without any."""
        if self.kept.forgotten:
            return None
        kept = self.kept.kept()
        rows = (x.double() for _, _, x, *_ in kept)
        folds = (fold.to(x.device) for _, fold, x, *_ in kept)
        return self.samples_of(rows, folds, kept[0][3].double() if self._keeps_carried else None)

    def alive(self, covariance: Tensor) -> Tensor:
        """Return which channels [B, C] vary by more than the rounding of their mean."""
        return _diagonal(covariance) > (self._rounding * self._mean()).square()

    def ridge(self, setting: RidgeSetting, variance: Tensor) -> Tensor:
        """Compute the ridge [B, C], relative to the variances [B, C]."""
        if setting != AUTO:
            return torch.full_like(variance, setting)
        return raw_ridge(variance, self._noise**2 * (self._mean().square() + variance))

    def _mean(self) -> Tensor:
        """Mean activations [B, C]."""
        mean = self.sums.sum((0, 1)) / self.counts.sum() + _by_position(self._pilot)
        return self._at_positions(mean)

    def _at_positions(self, features: Tensor) -> Tensor:
        """Split features [B C, ...] into those of each position [B, C, ...]."""
        return features.unflatten(0, (-1, self.shape[0]))


def _by_position(maps: Tensor) -> Tensor:
    """Flatten maps [..., C, H, W] to [..., B C], channels last."""
    return maps.movedim(-3, -1).flatten(-3)


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)


def estimate_map(
    name: str, moments: MapMoments, contrast: Tensor, ridge: RidgeSetting
) -> tuple[Tensor, Tensor]:
    r"""Estimate J [H, W, P, P] and its standard errors at each position, in 1/theta^2.

    .. math::
        \text{independent:}\quad J = h \, J_\text{naive} - k_\text{eff} \, c \qquad
        \text{paired, pathwise:}\quad J = h \, \frac{\sum_{f \ne g} y_f y_g^T}{F (F - 1)} \qquad
        \text{score:}\quad J = V - (V - J_\text{naive}) \, \nu / (\nu - k_\text{eff})

    with k_eff of the C channels that vary at the position.

    Raises:
        ValueError: too few samples were seen for C channels.
    """
    statistics = moments.statistics(contrast)
    covariance, nu = statistics.covariance, statistics.dof
    alive = moments.alive(covariance)
    channels = int(alive.sum(-1).max())
    if nu < channels + SPARE_DOF:
        raise ValueError(
            f"layer {name!r} must have more degrees of freedom than {channels + SPARE_DOF} for the"
            f" map of its {channels} channels, got {nu:.0f}: use more samples or maps=False"
        )
    columns = statistics.columns.unflatten(0, alive.shape)
    ridges = moments.ridge(ridge, _diagonal(covariance))
    solved, effective, known = _solve(covariance, alive, columns, ridges, rounding=ridge == AUTO)
    half, fold_half = statistics.split(solved)
    naive = half.mT @ half
    seen = None
    if statistics.samples is not None:
        seen = _seen(statistics.samples, covariance, ridges, known, half, nu)
    found = estimate(half, fold_half, naive, effective, _fold_products, statistics, seen)
    J, variance = found.J, found.variance
    nothing = (~alive).all(-1)[:, None, None]
    J = torch.where(nothing, 0.0, (J + J.mT) / 2)
    stderr = torch.where(nothing, 0.0, (variance + variance.mT).div(2).sqrt())
    J, stderr = (t.unflatten(0, moments.shape[1:]).detach().cpu() for t in (J, stderr))
    return J, stderr


def _regularised(covariance: Tensor, kept: Tensor, ridge: Tensor) -> Tensor:
    """Compute S + Lambda [B, C, C] of the channels in kept [B, C]; the others become features of
    unit variance without covariance."""
    R = torch.where(kept[..., None] & kept[..., None, :], covariance, 0.0)
    _diagonal(R).copy_(torch.where(kept, _diagonal(R) * (1 + ridge), 1.0))
    return R


def _solve(
    covariance: Tensor, alive: Tensor, columns: Tensor, ridge: Tensor, *, rounding: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute L^-1 times all columns [B, C, (1 + F) P], k_eff [B], and which channels count [B, C].

    Channels that do not vary have no derivative: they add nothing to J and are not counted. The
    ridge share of a feature is computed with the largest ridge of its position: it is near 0 except
    for channels that are linear in others, which are left out if the ridge stands for rounding.
    """
    largest = torch.where(alive, ridge, 0.0).amax(-1)
    columns = torch.where(alive[..., None], columns, 0.0)
    solved = ops.fisher_solve_details(
        _regularised(covariance, alive, ridge), columns, inverse_rows=True
    )
    ridge_share = (largest[:, None] * solved.inverse_rows).clamp(0, 1)
    known = alive & (ridge_share <= MOSTLY_RIDGE) if rounding else alive
    half = torch.where(known[..., None], solved.half, 0.0)
    return half, torch.where(known, 1 - ridge_share, 0.0).sum(-1), known


def _seen(
    samples: SampleFeatures,
    covariance: Tensor,
    ridge: Tensor,
    known: Tensor,
    half: Tensor,
    dof: float,
) -> Seen:
    """Compute leverage and prediction of kept samples at each position; zero where the covariance
    is singular."""
    factor, failed = torch.linalg.cholesky_ex(_regularised(covariance, known, ridge))
    x = samples.features.unflatten(1, known.shape).permute(1, 2, 0)
    x = torch.where(known[..., None] & (failed == 0)[:, None, None], x, 0.0)
    whitened = torch.linalg.solve_triangular(factor, x, upper=False).nan_to_num()
    prediction = torch.einsum("bcm,bcp->pmb", whitened, half)
    return Seen(leverage(whitened.square().sum(1).T, dof), prediction, samples.score)


def _fold_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum l r^T over channels, [B, F, P, P], with l and r [B, C, F, P]."""
    return torch.einsum("bcfp,bcfq->bfpq", left, right)
