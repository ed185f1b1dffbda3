"""One layer of a measurement: what is kept while samples stream by, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from fisherfast.data import Data
from fisherfast.derivatives import ScoreMoments, TangentMoments
from fisherfast.estimators import (
    SPARE_DOF,
    SingularCovarianceError,
    choose_features,
    cross_fitted_bound,
    fisher_curve,
)
from fisherfast.features import BLOCK_ROWS, FeatureDictionary, Lift, PilotMoments, Standardisation
from fisherfast.information_map import has_map, is_mapped
from fisherfast.maps import MapMoments
from fisherfast.marginal import pack_covariance
from fisherfast.moments import FoldMoments, FoldStatistics
from fisherfast.results import LayerFisher, finite_step_note
from fisherfast.taps import Site

__all__ = [
    "NO_TANGENTS",
    "LayerMeter",
    "carried_by",
    "curve_points",
    "estimate_layer",
    "no_information",
    "rows_of",
    "score_note",
]

CURVE_POINTS = 64
"""Points at which a result keeps its curve."""

PRODUCT_ROWS = 512
"""Samples of a pair whose features exist at the same time: 1 MB of float32 for 512 features."""


RESPONSE_WIDTH = 16
"""Widest layer whose response to theta is part of its result: outputs, not feature maps."""

NO_TANGENTS = (
    "no derivative reaches this layer (rounding, comparisons, integers): J = 0 is only a lower"
    " bound, a score or two conditions may tell more"
)

SCORE_ERRORS = 5.0
"""Standard errors from zero beyond which the mean of a score is no chance: 6e-7."""


class LayerMeter:
    """Everything kept of one layer while samples stream by."""

    dictionary: FeatureDictionary
    moments: FoldMoments
    map: MapMoments | None = None

    def __init__(self, site: Site) -> None:
        self.site = site
        self.pilot = PilotMoments()
        self._pending: list[torch.Tensor] = []
        self._dtype = torch.float32

    @property
    def seen(self) -> list[int]:
        """Samples of each condition in this pass."""
        return self.moments.seen

    @property
    def reads_carried(self) -> bool:
        """Whether this pass reads what the samples carry, tangents or a score."""
        return True

    @property
    def parts(self) -> list[FoldMoments]:
        """Moments of different samples, together of all."""
        return [self.moments]

    def observe_pilot(self, activations: torch.Tensor) -> None:
        """Add [n, ...] to the pilot statistics."""
        if activations.dtype == torch.float64:
            self._dtype = torch.float64
        self.pilot.update(rows_of(activations))

    def prepare(self, data: Data, settings: dict[str, Any]) -> None:
        """Fix the dictionary from the pilot; from here on `observe` counts."""
        standardisation = self.pilot.standardisation()
        self.dictionary = FeatureDictionary(
            standardisation, settings["max_features"], dtype=self._dtype, seed=settings["seed"]
        )
        size = self.dictionary.size
        if settings["grow"]:
            size = min(size, self.dictionary.raw + BLOCK_ROWS)
        streams = {"folds": settings["folds"], "paired": data.paired, **carried_by(data)}
        self.moments = FoldMoments(
            size, data.conditions, device=standardisation.mean.device, **streams
        )
        self._prepare_map(standardisation, data.conditions, settings, streams)

    def observe(
        self,
        condition: int,
        activations: torch.Tensor,
        *,
        tangents: torch.Tensor | None = None,
        score: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add activations [n, ...] of a condition, with what they carry.

        Args:
            tangents: [P, n, ...] of the activations; None for none, or for zero.
            score: [n, P] of the samples.

        Returns:
            Whether all of that condition were finite so far, as a 0-d tensor.
        """
        moments = self.moments
        raw = self.dictionary.raw_features(rows_of(activations))
        carried = score
        if tangents is not None:
            carried = self.dictionary.raw_tangents(rows_of(tangents, 1), raw)
        moments.update(condition, raw, self._lift(), carried)
        if moments.paired:
            self._pending.append(raw)
            if len(self._pending) == len(moments.seen):
                self._add_products()
        if self.map is not None and not moments.known:
            self.map.update(condition, activations, score if tangents is None else tangents)
        finite = torch.isfinite(moments.sums[condition]).all()
        if moments.carried is not None:
            finite = finite & torch.isfinite(moments.carried.sums).all()
        return finite

    def skip(self, condition: int, samples: int, *, first: int | None = None) -> None:
        """Count samples of a condition that another process observes.

        Args:
            condition: theirs.
            samples: how many.
            first: number of the first of them; None for the one after the last.
        """
        if self.map is not None and not self.moments.known:
            self.map.skip(condition, samples, first=first)
        self.moments.skip(condition, samples, first=first)

    def shared_sums(self) -> list[torch.Tensor]:
        """Views of all that this pass adds up over processes: sums of samples, nothing else."""
        sums = self.moments.shared_sums()
        return sums if self.map is None or self.moments.known else sums + self.map.shared_sums()

    def learned(self) -> list[torch.Tensor]:
        """What was learned between passes in a way that processors may differ in: all processes
        take that of the first."""
        return []

    def sums_were_shared(self) -> None:
        """`shared_sums` hold now what all processes have seen."""
        if self.map is not None:
            self.map.mirror_()

    def grow(self, contrast: torch.Tensor, ridge: float) -> bool:
        """Make room for twice the lifted features where the curve still rises at its end.

        Returns whether it did: the same samples are then to be observed again.
        """
        moments, raw = self.moments, self.dictionary.raw
        if moments.size == self.dictionary.size or int(moments.counts.min()) < 2:
            return False
        whole = moments.statistics(contrast)
        alive = (moments.variances() > self.rounding_variance()).nonzero()[:, 0]
        raw_alive = int((alive < raw).sum())
        if raw_alive == 0 or whole.dof < 2 * len(alive):
            return False
        try:
            curve = fisher_curve(whole.select(alive), ridge)
        except SingularCovarianceError:
            return False
        if choose_features(curve, raw_alive)[1]:
            return False
        size = min(2 * moments.size - raw, self.dictionary.size)
        self.moments = moments.grown(size)
        return True

    def estimate(self, data: Data, contrast: torch.Tensor, ridge: float) -> LayerFisher:
        """J, its errors and bounds, after the last pass."""
        return estimate_layer(self, data, contrast, ridge)

    def rounding_variance(self) -> torch.Tensor:
        """Variance of each present feature below which it is rounding."""
        return self.dictionary.rounding_variance[: self.moments.size]

    def _prepare_map(
        self,
        standardisation: Standardisation,
        conditions: int,
        settings: dict[str, Any],
        streams: dict[str, Any],
    ) -> None:
        if is_mapped(settings["maps"], self.site.names) and has_map(self.site.shape):
            pilot = standardisation.mean.reshape(self.site.shape).to(self._dtype)
            self.map = MapMoments(pilot, conditions, **streams)

    def _lift(self) -> Lift:
        return self.dictionary.lift.leading(self.moments.size - self.dictionary.raw)

    def _add_products(self) -> None:
        """Products of the features of a pair, a few hundred samples at a time."""
        held, self._pending = self._pending, []
        lift = self._lift()
        for start in range(0, len(held[0]), PRODUCT_ROWS):
            tiles = [raw[start : start + PRODUCT_ROWS] for raw in held]
            self.moments.update_products([torch.cat([raw, lift(raw)], 1) for raw in tiles])


def carried_by(data: Data) -> dict[str, int]:
    """What the samples of a source carry, as arguments of their moments."""
    return {
        "tangents": data.parameters if data.source == "pathwise" else 0,
        "score": data.parameters if data.source == "score" else 0,
    }


def rows_of(activations: torch.Tensor, leading: int = 0) -> torch.Tensor:
    """Activations [n, ...] of one layer as [n, d], one number per sample as d = 1; behind leading
    dimensions."""
    rows = leading + 1
    return activations.flatten(rows) if activations.ndim > rows else activations[..., None]


def estimate_layer(
    meter: LayerMeter, data: Data, contrast: torch.Tensor, ridge: float
) -> LayerFisher:
    """J, its errors and bounds from the fold moments of one layer."""
    site, dictionary, moments = meter.site, meter.dictionary, meter.moments
    _check_samples(site.name, dictionary.raw, moments)
    alive = (moments.variances() > meter.rounding_variance()).nonzero()[:, 0]
    raw = int((alive < dictionary.raw).sum())
    dropped = moments.size - len(alive)
    base = no_information(site, data, samples=sum(moments.seen), dropped=dropped)
    if raw == 0:
        return replace(base, notes=(f"all {site.dim} activations are constant: J = 0",))
    whole = moments.statistics(contrast)
    _check_freedom(site.name, raw, whole, moments)
    size, notes = _affordable(len(alive), raw, whole.dof)
    if dropped:
        notes.append(f"{dropped} constant features dropped")
    if dictionary.kind == "sketch":
        notes.append(
            f"sums of {site.dim} activations in random groups, a loose bound: data that can be read"
            " again are compressed instead"
        )
    try:
        curve = fisher_curve(whole.select(alive[:size]), ridge)
    except SingularCovarianceError as error:
        size = error.feature - 1
        if size < raw:
            raise ValueError(f"layer {site.name!r}: {error}") from None
        notes.append(f"features limited to {size}: the next is linear in these (ridge {ridge:g})")
        curve = fisher_curve(whole.select(alive[:size]), ridge)
    index = alive[:size]
    chosen, plateau = choose_features(curve, raw)
    halves = [moments.statistics(contrast, half).select(index[:chosen]) for half in (0, 1)]
    lower, lower_stderr = cross_fitted_bound(halves[0], halves[1])
    points = curve_points(raw, size)
    kind = "sketch" if dictionary.kind == "sketch" else "raw" if chosen == raw else "lift"
    layer = replace(
        base,
        J=curve.J[chosen - 1].cpu(),
        stderr=curve.stderr[chosen - 1].cpu(),
        lower=lower.cpu(),
        lower_stderr=lower_stderr.cpu(),
        linear=curve.J[raw - 1].cpu(),
        linear_stderr=curve.stderr[raw - 1].cpu(),
        naive=curve.naive[chosen - 1].cpu(),
        curve_k=points,
        curve_J=curve.J[points - 1].cpu(),
        curve_stderr=curve.stderr[points - 1].cpu(),
        features=chosen,
        feature_kind=kind,
        effective_dim=float(curve.effective_dim[chosen - 1]),
        plateau=plateau,
        error_covariance=pack_covariance(curve.error_covariance(chosen)).cpu(),
    )
    if site.dim <= min(RESPONSE_WIDTH, dictionary.raw):
        layer = replace(layer, response=dictionary.response(whole.derivative).cpu())
    if isinstance(moments.carried, TangentMoments) and not bool(moments.carried.sums.any()):
        notes.append(NO_TANGENTS)
    warning = finite_step_note(layer)
    return replace(layer, notes=(*notes, *([warning] if warning else [])))


def score_note(meter: LayerMeter) -> str | None:
    """A warning where the mean of what was given as score is not zero."""
    errors = [
        moments.carried.mean_error(moments.counts[0].to(moments.sums.device, torch.float64))
        for moments in meter.parts
        if isinstance(moments.carried, ScoreMoments)
    ]
    if not errors:
        return None
    off = torch.stack(errors).sum(0) / math.sqrt(len(errors))
    worst = float(off.abs().nan_to_num().max())
    if worst <= SCORE_ERRORS:
        return None
    return (
        f"mean of the score is {worst:.1f} standard errors from zero: it is no score of these"
        " samples, or one at another theta; J is wrong then"
    )


def no_information(site: Site, data: Data, *, samples: int, dropped: int) -> LayerFisher:
    """J = 0 and an empty curve: what a layer shows when none of its activations varies."""
    P = data.parameters
    zero = torch.zeros(P, P, dtype=torch.float64)
    empty = torch.zeros(0, P, P, dtype=torch.float64)
    return LayerFisher(
        name=site.name,
        kind=site.kind,
        shape=site.shape,
        J=zero,
        stderr=zero,
        lower=zero,
        lower_stderr=zero,
        linear=zero,
        linear_stderr=zero,
        naive=zero,
        curve_k=torch.zeros(0, dtype=torch.int64),
        curve_J=empty,
        curve_stderr=empty,
        features=0,
        feature_kind="none",
        effective_dim=0.0,
        samples=samples,
        dropped=dropped,
        plateau=True,
        dtheta=data.dtheta,
        error_covariance=pack_covariance(torch.zeros(P, P, P, P, dtype=torch.float64)),
        replicates=empty,
        aliases=tuple(site.aliases),
        descendants=tuple(sorted(site.descendants)),
    )


def _check_samples(name: str, raw: int, moments: FoldMoments) -> None:
    """Two samples in every fold, and asked for together with what `_check_freedom` will need."""
    if int(moments.counts.min()) >= 2:
        return
    least = 2 * moments.folds
    needed = max(least, _needed(raw, 1.0, moments))
    reason = "(two per fold)" if needed == least else f"for its {raw} activations"
    raise ValueError(
        f"layer {name!r} must see at least {needed} samples per condition {reason},"
        f" got {min(moments.seen)}"
    )


def _check_freedom(name: str, raw: int, whole: FoldStatistics, moments: FoldMoments) -> None:
    if whole.dof >= raw + SPARE_DOF:
        return
    inflation = (sum(moments.seen) - moments.counts.numel()) / whole.dof
    raise ValueError(
        f"layer {name!r} must see at least {_needed(raw, inflation, moments)} samples per condition"
        f" for its {raw} activations, got {min(moments.seen)}"
    )


def _needed(raw: int, inflation: float, moments: FoldMoments) -> int:
    """Samples per condition whose degrees of freedom carry the raw activations."""
    cells = moments.counts.numel()
    return math.ceil(((raw + SPARE_DOF) * inflation + cells) / len(moments.seen))


def _affordable(size: int, raw: int, dof: float) -> tuple[int, list[str]]:
    """Features that the samples can carry: lifted ones only up to half the degrees of freedom."""
    limit = max(raw, int(dof / 2))
    if size <= limit:
        return size, []
    return limit, [f"features limited to {limit} of {size} by the number of samples"]


def curve_points(raw: int, size: int) -> torch.Tensor:
    """The raw dimension, and about `CURVE_POINTS` sizes evenly up to all features."""
    steps = torch.linspace(raw, size, min(CURVE_POINTS, size - raw + 1), dtype=torch.float64)
    return steps.round().long().unique()
