"""Moments of the features of a layer, and how many features the samples can carry."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fisherfast.data import Batch, Data
from fisherfast.data.dealing import Place, groups_by_fold
from fisherfast.estimation.curve import SPARE_DOF
from fisherfast.estimation.features import MAX_WIDTH, FeatureDictionary, Lift
from fisherfast.estimation.fold_moments import FoldMoments
from fisherfast.estimation.ridge import RidgeSetting
from fisherfast.measurement.replicates import HeldSamples

PRODUCT_ROWS = 512
"""Samples of a pair whose features exist at the same time: 1 MB of float32 for 512 features."""


class UnmeasuredError(ValueError):
    """A layer cannot be measured with these samples or settings; others may."""


class LayerMoments:
    """Fold moments of the features of one layer.

    Args:
        layer: its name.
        dictionary: computes the features.
        moments: of the first features of the dictionary.
        seed: of the noise that is added to rounded activations; None adds none.

    Attributes:
        held: samples kept for the errors; not set for the halves of a probe.
    """

    held: HeldSamples

    def __init__(
        self,
        layer: str,
        dictionary: FeatureDictionary,
        moments: FoldMoments,
        *,
        seed: int | None = None,
    ) -> None:
        self.layer, self.dictionary, self.moments = layer, dictionary, moments
        self._seed = seed

    @property
    def lift(self) -> Lift:
        """The lifted features that are present."""
        return self.dictionary.lift.leading(self.moments.size - self.dictionary.raw)

    def leading_lift(self, index: Tensor) -> Lift:
        """Return the lift up to the last of the features in index [k]."""
        last = int(index.max()) + 1 if len(index) else 0
        return self.lift.leading(max(last - self.dictionary.raw, 0))

    @property
    def rounds_lift(self) -> bool:
        """True if the products of the lift are in float32."""
        lift = self.dictionary.lift
        return len(lift) > 0 and lift.weight.dtype == torch.float32

    def add(self, condition: int, batch: Batch, place: Place) -> tuple[Tensor, Tensor | None]:
        """Add activations [n, d] of a condition with their tangents or score.

        Returns:
            Their raw features [n, raw], with the tangents [P, n, raw] of these or the score [n, P].
        """
        raw, carried = self.dictionary.raw_features(batch.x), batch.score
        if (tangents := batch.tangents) is not None:
            if self._seed is not None:
                key = place.numbers, self._seed, self.layer
                raw = self.dictionary.dithered(raw, batch.x, tangents, *key)
            carried = self.dictionary.raw_tangents(tangents, raw)
        self.moments.update(condition, raw, self.lift, carried, place)
        if self.moments.paired:
            lift = self.lift
            pairs = self.moments.abreast(raw.to(lift.weight.dtype))
            tiles = zip(*(rows.split(PRODUCT_ROWS) for rows in pairs), strict=True)
            for tile in tiles:  # a few hundred samples at a time
                self.moments.update_products([torch.cat([rows, lift(rows)], 1) for rows in tile])
        return raw, carried

    def ridges(self, ridge: RidgeSetting) -> Tensor:
        """Return the ridge [k] of each present feature, relative to its variance."""
        return self.dictionary.ridge(ridge, self.moments.variances())

    def varied(self) -> Tensor:
        """Return which present features vary by more than rounding, bool [k]."""
        rounding = self.dictionary.rounding_variance[: self.moments.size]
        return self.moments.variances() > rounding

    def alive(self) -> tuple[Tensor, int]:
        """Return the numbers int64 [k] of the features that vary, and how many of them are raw."""
        alive = self.varied().nonzero()[:, 0]
        return alive, int((alive < self.dictionary.raw).sum())

    def check(self) -> bool:
        """Return whether any activation varies.

        Raises:
            UnmeasuredError: the samples are too few (says how many are needed).
        """
        moments, width = self.moments, self.dictionary.raw
        if moments.fewest < 2:
            least = 2 * moments.folds
            needed = max(least, _needed(width, 1.0, moments))
            reason = "(two per fold)" if needed == least else f"for its {width} activations"
            raise _too_few(self.layer, needed, reason, moments)
        _, raw = self.alive()
        dof = moments.degrees_of_freedom
        if raw > 0 and dof < raw + SPARE_DOF:
            inflation = (sum(moments.seen) - moments.counts.numel()) / dof
            needed = _needed(raw, inflation, moments)
            raise _too_few(self.layer, needed, f"for its {raw} activations", moments)
        return raw > 0


def _too_few(layer: str, needed: int, reason: str, moments: FoldMoments) -> UnmeasuredError:
    units = "samples" if moments.groups is None else "groups of samples"
    return UnmeasuredError(
        f"layer {layer!r} must see at least {needed} {units} per condition {reason}, got"
        f" {moments.units}"
    )


def _needed(raw: int, inflation: float, moments: FoldMoments) -> int:
    """Return the samples per condition whose degrees of freedom carry the raw activations."""
    if moments.groups is not None:
        return raw + SPARE_DOF + moments.folds
    cells = moments.counts.numel()
    return math.ceil(((raw + SPARE_DOF) * inflation + cells) / len(moments.seen))


def all_finite(moments: FoldMoments, condition: int) -> Tensor:
    """Return whether all values added for a condition are finite, a 0-d tensor."""
    finite = torch.isfinite(moments.sums[condition]).all()
    if moments.carried is None:
        return finite
    return finite & torch.isfinite(moments.carried.sums).all()


def worst_dof(data: Data, folds: int) -> float | None:
    """Return the fewest degrees of freedom that a covariance of these samples within folds can
    have; None if their number is unknown."""
    counts = [data.units(c) for c in range(data.conditions)]
    if None in counts:
        return None
    if data.groups is not None:
        return float(len(data.groups) - folds)
    dof = float(sum(n for n in counts if n is not None) - folds * data.conditions)
    return dof / data.conditions if data.paired else dof  # the same noise in all conditions


def sketch_groups(dim: int, data: Data, max_features: int, folds: int) -> int | None:
    """Return the number of groups in which a layer of dim activations is sketched, if it can
    neither be measured as a whole nor compressed; else None."""
    dof = None if data.sharded else worst_dof(data, folds)
    if dof is None or dof >= dim + SPARE_DOF:
        return max_features if dim > MAX_WIDTH else None
    return max(min(max_features, int(dof / 2) - SPARE_DOF), 1)


def streams_of(
    data: Data, folds: int, half: int | None = None, own: int | None = None
) -> dict[str, Any]:
    """Return the arguments of `FoldMoments` and `MapMoments` that describe the samples, or those of
    a half, dealt to its `own` folds."""
    groups = None
    if data.groups is not None:
        count, among = len(data.groups.labels), data.groups.present
        groups = groups_by_fold(count, folds, half, own, among)
    return {
        "folds": folds if own is None else own,
        "paired": data.paired,
        "groups": groups,
        "tangents": data.parameters if data.source == "pathwise" else 0,
        "score": data.parameters if data.source == "score" else 0,
        "labels": data.parameters if data.source == "labelled" else 0,
    }
