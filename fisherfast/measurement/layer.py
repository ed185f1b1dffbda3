"""One layer of a measurement: what is kept while samples stream by, and what follows from it."""

from __future__ import annotations

from dataclasses import replace

import torch

from fisherfast.data import Data
from fisherfast.data.dealing import Place
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.bound import cross_fitted_bound
from fisherfast.estimation.curve import (
    SPARE_DOF,
    FisherCurve,
    SingularCovarianceError,
    fisher_curve,
    independent_features,
)
from fisherfast.estimation.derivatives import ScoreMoments, TangentMoments
from fisherfast.estimation.features import (
    BLOCK_ROWS,
    MAX_WIDTH,
    MIN_LIFT_SHARE,
    FeatureDictionary,
    Lift,
)
from fisherfast.estimation.fold_moments import FoldMoments, FoldStatistics, SampleFeatures
from fisherfast.estimation.pilot import FLOAT32_INVERSE
from fisherfast.estimation.ridge import (
    AUTO,
    MOSTLY_RIDGE,
    RidgeSetting,
)
from fisherfast.estimation.variance import jackknife_covariance, standard_errors
from fisherfast.measurement.checks import (
    affordable,
    check_freedom,
    check_samples,
    sketch_groups,
    streams_of,
)
from fisherfast.measurement.fit import Fit, UnmeasuredError
from fisherfast.measurement.memory import DOUBLE, moment_bytes, pilot_bytes
from fisherfast.measurement.meter import Meter, rows_of
from fisherfast.measurement.replicates import (
    KEPT_SAMPLES,
    LEAST_ERROR,
    HeldSamples,
    Readout,
    kept_samples,
)
from fisherfast.measurement.settings import MeasurementSettings
from fisherfast.measurement.without_estimate import no_information
from fisherfast.model.sites import Site
from fisherfast.results.layer import LayerFisher, finite_step_note
from fisherfast.results.marginal import SINGULAR, pack_covariance

__all__ = [
    "NO_TANGENTS",
    "ROUNDED",
    "LayerMeter",
    "curve_points",
    "estimate_layer",
    "in_turn",
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

NOT_CARRIED = (
    "information may lie below the rounding of the activations: directions that vary less are left"
    " out"
)

ROUNDED = (
    "values are rounded, in steps of up to {:.1g} standard deviations: noise of half a step was"
    " added, because tangents do not give the derivative on a lattice"
)

LEVERAGE_NUMBERS = 2**18
"""Features of samples whose leverage is computed at all sizes: 512 samples of 512 features, whose
mean is known to 1 % from them. Twice as many of a score, whose residuals may follow it."""

MIN_LEVERAGE_SAMPLES = 256
"""However many features there are."""

ERROR_NUMBERS = 2**19
"""Features of samples that tell the error of J: 1024 samples of 512 features."""

NARROW = 128
"""Features whose whitening costs little in float64."""

TAKEN = 0.1
"""Part of J that noise against rounding may take before the layer is noisy."""

TAKEN_NOTE = (
    "noise against rounding takes at least {:.0%} of J: use values with more digits, or a score"
)

RIDGE_LOSS = 0.02
"""Part of J that a ridge given as a number may take before a note says so."""


class LayerMeter(Meter):
    """Fold moments of the activations of a layer and of a random lift of them."""

    dictionary: FeatureDictionary
    moments: FoldMoments
    _held: HeldSamples | None = None
    _dither_key: tuple[int, str] | None = None

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._pending: list[torch.Tensor] = []
        self._fit: Fit | None = None

    @property
    def seen(self) -> list[int]:
        """Samples of each condition in this pass."""
        return self.moments.seen

    @property
    def parts(self) -> list[FoldMoments]:
        """Moments of different samples, together of all."""
        return [self.moments]

    def prepare(self, data: Data, settings: MeasurementSettings) -> None:
        """Fix the dictionary from the pilot; from here on `observe` counts."""
        standardisation = self.pilot.standardisation()
        self.dictionary = FeatureDictionary(
            standardisation,
            settings.max_features,
            dtype=self._dtype,
            seed=settings.seed,
            groups=sketch_groups(self.site.dim, data, settings.max_features, settings.folds),
        )
        size = self.dictionary.size
        self._dither_key = (settings.seed, self.site.name)
        if standardisation.steps is not None:
            self.note_steps(standardisation.steps)
        self._grows = bool(settings.grow)
        self._repeats = data.repeatable
        if settings.grow:
            size = min(size, self.dictionary.raw + BLOCK_ROWS)
        streams = streams_of(data, settings.folds)
        self.moments = FoldMoments(
            size, data.conditions, device=standardisation.mean.device, **streams
        )
        self._held = HeldSamples(data, settings.folds, self.dictionary.raw, self._dtype)
        self._prepare_map(standardisation, data.conditions, settings, streams)

    def taken_by_noise(self, curve: FisherCurve, index: torch.Tensor) -> float:
        """Share of J of the features in index [k] that noise against rounding has taken: without
        the noise N their readout W alone would have J^2 / (J - W^T N W)."""
        if self._half_steps is None or self.dictionary.kind == "sketch":
            return 0.0
        raw = index[index < self.dictionary.raw]
        W = curve.readout_of(len(index))[: len(raw)]
        J = curve.J[len(index) - 1].diagonal()
        noise = (W * self._half_steps[raw, None]).square().sum(0)
        return float(torch.where(J > 0, noise / J, 0.0).max())

    def observe(
        self,
        condition: int,
        activations: torch.Tensor,
        *,
        tangents: torch.Tensor | None = None,
        score: torch.Tensor | None = None,
        place: Place | None = None,
    ) -> torch.Tensor:
        """Add activations [n, ...] of a condition, with what they carry.

        Args:
            tangents: [P, n, ...] of the activations; None for none, or for zero.
            score: [n, P] of the samples.
            place: of the samples, which are sorted by it; None for samples that are dealt in turn.

        Returns:
            Whether all of that condition were finite so far, as a 0-d tensor.
        """
        moments = self.moments
        if place is None:
            place, activations, tangents, score = in_turn(
                moments.seen[condition], moments.folds, activations, tangents, score
            )
        rows = rows_of(activations)
        raw = self.dictionary.raw_features(rows)
        carried = score
        if tangents is not None:
            moved = rows_of(tangents, 1)
            if self._dither_key is not None:
                raw = self.dictionary.dithered(raw, rows, moved, place.numbers, *self._dither_key)
            carried = self.dictionary.raw_tangents(moved, raw)
        if self._held is not None and not moments.known:
            self._held.add(condition, raw, carried, place)
        moments.update(condition, raw, self._lift(), carried, place)
        self._fit = None
        if moments.paired:
            self._pending.append(raw.to(self.dictionary.lift.weight.dtype))
            if len(self._pending) == len(moments.seen):
                self._add_products()
        if self.map is not None and not moments.known:
            carried = score if tangents is None else tangents
            self.map.update(condition, activations, carried, place)
        finite = torch.isfinite(moments.sums[condition]).all()
        if moments.carried is not None:
            finite = finite & torch.isfinite(moments.carried.sums).all()
        return finite

    def shared_sums(self) -> list[torch.Tensor]:
        """Views of all that this pass adds up over processes: counts and sums of samples."""
        sums = self.moments.shared_sums()
        self._fit = None
        return sums if self.map is None or self.moments.known else sums + self.map.shared_sums()

    def shared_samples(self) -> list[KeptSamples]:
        """Samples kept in this pass, to be joined with those of the other processes."""
        if self.moments.known:
            return []
        kept = [store for held in self.held for store in held.stores]
        return kept if self.map is None else [*kept, self.map.kept]

    def end_pass(self, contrast: torch.Tensor, ridge: RidgeSetting) -> bool:
        """Return whether another pass over the same samples must follow: with twice the lifted
        features where the curve still rises at its end, or in float64 where float32 products do not
        carry the covariance."""
        moments, dictionary = self.moments, self.dictionary
        grows = self._grows and moments.size < dictionary.size
        rounds = self._rounds_lift() or dictionary.raw_dtype == torch.float32
        if not self._repeats or self._unfit() or not (grows or rounds):
            return False
        if dictionary.raw_dtype == torch.float32 and not self._float32_carries(contrast, ridge):
            dictionary.raw_dtype = torch.float64  # the pilot has not shown it
            self.moments = moments.grown(moments.size, known=0)
            return True
        fit = self.fit(contrast, ridge)
        if self._rounds_lift() and fit.exact_features() < len(fit.alive):
            dictionary.lift = dictionary.lift.to(torch.float64)
            self.moments = moments.grown(moments.size, known=dictionary.raw)
            return True
        if not grows or fit.whole.dof < 2 * len(fit.alive):
            return False
        if len(fit.alive) < int((moments.variances() > self.rounding_variance()).sum()):
            return False  # the next feature is linear in these
        if fit.choice.plateau:
            return False
        size = min(2 * moments.size - dictionary.raw, dictionary.size)
        self.moments = moments.grown(size)
        return True

    def _float32_carries(self, contrast: torch.Tensor, ridge: RidgeSetting) -> bool:
        """Whether float32 products of the raw activations give a covariance that can be inverted.
        An outlier can leave one that is not even positive definite."""
        try:
            return self.fit(contrast, ridge).inverse() <= 3 * FLOAT32_INVERSE
        except UnmeasuredError:
            return False

    def fit(self, contrast: torch.Tensor, ridge: RidgeSetting) -> Fit:
        """The curve of the features that vary, as far as the samples carry it.

        Raises:
            ValueError: raw activations are linear in each other, and no ridge parts them.
        """
        if self._fit is None:
            self._fit = self._fitted(contrast, ridge)
        return self._fit

    def _fitted(self, contrast: torch.Tensor, ridge: RidgeSetting) -> Fit:
        alive = (self.moments.variances() > self.rounding_variance()).nonzero()[:, 0]
        raw = int((alive < self.dictionary.raw).sum())
        whole, ridges = self.moments.statistics(contrast), self.ridges(ridge)
        try:
            fit = self._curve(whole, alive, raw, ridges)
            copies = ridge == AUTO and bool((fit.curve.ridge_share[:raw] > MOSTLY_RIDGE).any())
        except UnmeasuredError:
            if ridge != AUTO:
                raise
            copies = True
        if not copies:
            return fit
        linear = alive[:raw]
        try:
            kept, lost = independent_features(whole.select(linear), ridges[linear])
        except SingularCovarianceError as error:
            raise UnmeasuredError(f"layer {self.site.name!r}: {error}") from None
        alive = torch.cat([linear[kept], alive[raw:]])
        return replace(self._curve(whole, alive, len(kept), ridges), lost=lost)

    def _curve(
        self, whole: FoldStatistics, alive: torch.Tensor, raw: int, ridges: torch.Tensor
    ) -> Fit:
        """The curve of as many of these features as can be used, raw ones first."""
        lost = whole.derivative.new_zeros(whole.derivative.shape[1])
        size, notes = affordable(len(alive), raw, whole.dof)
        while True:
            index = alive[:size]
            seen = replace(
                whole.select(index), samples=self._samples(index, self._leverage_samples())
            )
            try:
                curve = fisher_curve(seen, ridges[index])
            except SingularCovarianceError as error:
                if error.feature <= raw:
                    raise UnmeasuredError(f"layer {self.site.name!r}: {error}") from None
                size = error.feature - 1
                notes.append(f"features limited to {size}: the next is linear in these")
            else:
                return Fit(whole, index, raw, ridges[index], curve, lost, tuple(notes))

    def _leverage_samples(self) -> int:
        """The same number while the dictionary grows."""
        numbers = LEVERAGE_NUMBERS * (2 if isinstance(self.moments.carried, ScoreMoments) else 1)
        return max(numbers // self.dictionary.size, MIN_LEVERAGE_SAMPLES)

    def _leading_lift(self, index: torch.Tensor) -> Lift:
        """The lift up to the last of the features in index [k]."""
        last = int(index.max()) + 1 if len(index) else 0
        return self._lift().leading(max(last - self.dictionary.raw, 0))

    def _samples(self, index: torch.Tensor, most: int) -> SampleFeatures | None:
        """Features in index [k] of so many of the samples that are kept."""
        if self._held is None:
            return None
        lift = self._leading_lift(index)
        exact = len(index) <= NARROW or self.dictionary.raw_dtype == torch.float64
        dtype = torch.float64 if exact else torch.float32

        def features(raw: torch.Tensor) -> torch.Tensor:
            return torch.cat([raw.to(dtype), lift(raw.to(lift.weight.dtype)).to(dtype)], 1)

        return self._held.samples(features, self.moments, index, most)

    def _unfit(self) -> bool:
        """Whether the samples are too few, or no activation varies: there is no curve then."""
        moments = self.moments
        if moments.fewest < 2:
            return True
        raw = int((moments.variances() > self.rounding_variance())[: self.dictionary.raw].sum())
        return raw == 0 or moments.degrees_of_freedom < raw + SPARE_DOF

    def _rounds_lift(self) -> bool:
        """Whether the products of the lift are of float32."""
        lift = self.dictionary.lift
        return len(lift) > 0 and lift.weight.dtype == torch.float32

    def readout(self, W: torch.Tensor, index: torch.Tensor) -> Readout:
        """How raw features are read.

        Args:
            W: [k, P].
            index: int64 [k] numbers of the features that it reads.
        """
        raw, lift = self.dictionary.raw, self._leading_lift(index)
        full = W.new_zeros(raw + len(lift), W.shape[1])
        full[index] = W
        lifted = bool(full[raw:].any())

        def read(
            z: torch.Tensor, tangents: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            u = z.double() @ full[:raw]
            moved = None if tangents is None else tangents.double() @ full[:raw]
            if not lifted:
                return u, moved
            narrow = z.to(lift.weight.dtype)
            u += lift(narrow).double() @ full[raw:]
            if tangents is not None and moved is not None:
                slopes = lift.slopes(narrow)[:, None] * (tangents.to(narrow) @ lift.weight.T)
                moved += slopes.double() @ full[raw:]
            return u, moved

        return read

    def replicates(self, curve: FisherCurve, index: torch.Tensor) -> torch.Tensor:
        """J of the features in index [k] without each fold [F, P, P]; empty where no samples were
        kept."""
        J, k = curve.J[-1], len(index)
        if self._held is None:
            return J.new_empty(0, *J.shape)
        read = self.readout(curve.readout_of(k), index)
        return self._held.replicates(curve, k, read, self.moments.units)

    def error_covariance(self, curve: FisherCurve, index: torch.Tensor) -> torch.Tensor:
        """Covariance [P, P, P, P] of the errors of J of the features in index [k], the first of a
        curve."""
        k = len(index)
        if self._held is None:
            return curve.error_covariance(k)
        read = self.readout(curve.readout_of(k), index)
        curve, most = curve.leading(k), self._leverage_samples()
        samples = curve.statistics.samples
        if ERROR_NUMBERS // k > most:
            most = ERROR_NUMBERS // k
            samples = self._samples(index, most)
        return self._held.error_covariance(curve, samples, read, most)

    @property
    def held(self) -> list[HeldSamples]:
        """Kept samples that errors are read from."""
        return [] if self._held is None else [self._held]

    def replicates_of_score(self, V: torch.Tensor) -> torch.Tensor:
        """V of the score without each fold [F, P, P]."""
        if self._held is None:
            return V.new_empty(0, *V.shape)
        return self._held.replicates_of_score(V, self.moments.units)

    def estimate(self, data: Data, contrast: torch.Tensor, ridge: RidgeSetting) -> LayerFisher:
        """J, its errors and bounds, after the last pass."""
        return estimate_layer(self, data, contrast, ridge)

    def nbytes(self, data: Data, settings: MeasurementSettings, number: int) -> tuple[int, int]:
        """Bytes kept of the layer, and bytes more while it is estimated."""
        d, most = self.site.dim, settings.max_features
        raw = d if d <= MAX_WIDTH else most
        aimed = max(most - d, most // MIN_LIFT_SHARE) if d <= MAX_WIDTH else most - d
        k = raw + max(aimed, 0)
        lift = (k - raw) * d * number
        carried = data.parameters if data.source == "pathwise" else 0
        held = number * (KEPT_SAMPLES + kept_samples(raw, data.source)) * raw * (1 + carried)
        moments, estimate = moment_bytes(k, data, settings.folds)
        if settings.probe is not None:  # the same of each half, with another lift
            held += 2 * (moments + lift)
        drawn = DOUBLE * max(lift // number + BLOCK_ROWS * d, 0)  # in float64
        map_kept, map_extra = self._map_bytes(data, settings)
        kept = pilot_bytes(d) + lift + held + 3 * number * d + moments + map_kept
        return kept, max(drawn, estimate, map_extra)

    def ridges(self, ridge: RidgeSetting) -> torch.Tensor:
        """The ridge of each present feature [k], relative to its variance."""
        return self.dictionary.ridge(ridge, self.moments.variances())

    def rounding_variance(self) -> torch.Tensor:
        """Variance of each present feature below which it is rounding."""
        return self.dictionary.rounding_variance[: self.moments.size]

    def _lift(self) -> Lift:
        return self.dictionary.lift.leading(self.moments.size - self.dictionary.raw)

    def _add_products(self) -> None:
        """Products of the features of a pair, a few hundred samples at a time."""
        held, self._pending = self._pending, []
        lift = self._lift()
        for start in range(0, len(held[0]), PRODUCT_ROWS):
            tiles = [raw[start : start + PRODUCT_ROWS] for raw in held]
            self.moments.update_products([torch.cat([raw, lift(raw)], 1) for raw in tiles])


def in_turn(
    first: int,
    folds: int,
    activations: torch.Tensor,
    tangents: torch.Tensor | None,
    score: torch.Tensor | None,
) -> tuple[Place, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The place of a batch that is dealt to folds in turn from sample `first` on, and the batch
    sorted by it."""
    place, order = Place.in_turn(first, len(activations), folds)
    return (
        place,
        activations[order],
        None if tangents is None else tangents[:, order],
        None if score is None else score[order],
    )


def estimate_layer(
    meter: LayerMeter, data: Data, contrast: torch.Tensor, ridge: RidgeSetting
) -> LayerFisher:
    """J, its errors and bounds from the fold moments of one layer."""
    site, dictionary, moments = meter.site, meter.dictionary, meter.moments
    check_samples(site.name, dictionary.raw, moments)
    alive = (moments.variances() > meter.rounding_variance()).nonzero()[:, 0]
    raw = int((alive < dictionary.raw).sum())
    dropped = moments.size - len(alive)
    base = no_information(site, data, samples=sum(moments.seen), dropped=dropped)
    if raw == 0:
        return replace(base, notes=(f"all {site.dim} activations are constant: J = 0",))
    check_freedom(site.name, raw, moments)
    fit = meter.fit(contrast, ridge)
    curve, whole, raw, size = fit.curve, fit.whole, fit.raw, len(fit.alive)
    notes = list(fit.notes)
    if dropped:
        notes.append(f"{dropped} constant features dropped")
    if dictionary.kind == "sketch":
        notes.append(
            f"sums of {site.dim} activations in random groups, a loose bound: data that can be read"
            " again are compressed instead"
        )
    chosen, plateau, doubt, sensitive = fit.choice
    if meter._rounds_lift() and chosen > (most := fit.exact_features()):
        chosen, plateau = most, False
        notes.append(f"features limited to {most}: float32 products do not carry more")
    index = fit.alive[:chosen]
    halves = [moments.statistics(contrast, half, index) for half in (0, 1)]
    lower, lower_stderr = cross_fitted_bound(halves[0], halves[1], fit.ridge[:chosen])
    points = curve_points(raw, size)
    kind = "sketch" if dictionary.kind == "sketch" else "raw" if chosen == raw else "lift"
    errors = meter.error_covariance(curve, index)
    if halves[0].score is None:
        lower_stderr = _with_tails(lower_stderr, lower, curve, chosen, errors)
    linear = errors if chosen == raw else meter.error_covariance(curve, fit.alive[:raw])
    errors = errors + jackknife_covariance(doubt)
    replicates = meter.replicates(curve, index)
    J = curve.J[chosen - 1]
    layer = replace(
        base,
        J=J.cpu(),
        stderr=standard_errors(errors).cpu(),
        lower=lower.cpu(),
        lower_stderr=lower_stderr.cpu(),
        linear=curve.J[raw - 1].cpu(),
        linear_stderr=standard_errors(linear).cpu(),
        naive=curve.naive[chosen - 1].cpu(),
        curve_k=points,
        curve_J=curve.J[points - 1].cpu(),
        curve_stderr=curve.stderr[points - 1].cpu(),
        features=chosen,
        feature_kind=kind,
        effective_dim=float(curve.effective_dim[chosen - 1]),
        plateau=plateau,
        sensitive=sensitive,
        compressed=dictionary.kind == "sketch",
        carried=fit.carried(chosen),
        rounding=max(SINGULAR, curve.rounding(chosen, torch.finfo(meter._dtype).eps)),
        replicates=(replicates + doubt if len(replicates) else replicates).cpu(),
        error_covariance=pack_covariance(errors).cpu(),
    )
    if not layer.carried:
        notes.append(NOT_CARRIED)
    taken = meter.taken_by_noise(curve, index)
    if taken > TAKEN:
        notes.append(TAKEN_NOTE.format(taken))
        layer = replace(layer, carried=False)
    if ridge != AUTO:
        notes += _loss_by_ridge(meter, fit)
    if site.dim <= min(RESPONSE_WIDTH, dictionary.raw):
        layer = replace(layer, response=dictionary.response(whole.derivative).cpu())
    if isinstance(moments.carried, TangentMoments) and not bool(moments.carried.sums.any()):
        notes.append(NO_TANGENTS)
    warning = finite_step_note(layer)
    return replace(layer, notes=(*notes, *([warning] if warning else [])))


def _with_tails(
    stderr: torch.Tensor, bound: torch.Tensor, curve: FisherCurve, k: int, errors: torch.Tensor
) -> torch.Tensor:
    """Errors [P, P] of the honest bound, which has the tails of the same readout as J(k)."""
    more = standard_errors(errors).square() - standard_errors(curve.error_covariance(k)).square()
    J = curve.J[k - 1].diagonal()
    size = torch.where(J > 0, bound.diagonal() / J, 0.0).clamp(0, 1)
    variance = stderr.square()
    return (variance + more * size[:, None] * size).maximum(LEAST_ERROR * variance).sqrt()


def _loss_by_ridge(meter: LayerMeter, fit: Fit) -> list[str]:
    """A note where the ridge that was asked for takes much of the linear information."""
    index = fit.alive[: fit.raw]
    linear, least = fit.whole.select(index), meter.ridges(AUTO)[index]
    kept, _ = independent_features(linear, least)
    J = fisher_curve(linear.select(kept), least[kept]).J[-1].diagonal()
    loss = 1 - fit.curve.J[fit.raw - 1].diagonal() / J
    worst = float(torch.where(J > 0, loss, 0.0).max())
    if worst <= RIDGE_LOSS:
        return []
    return [f'the ridge takes {worst:.0%} of the linear information: ridge="auto" takes none']


def curve_points(raw: int, size: int) -> torch.Tensor:
    """The raw dimension, and about `CURVE_POINTS` sizes evenly up to all features."""
    steps = torch.linspace(raw, size, min(CURVE_POINTS, size - raw + 1), dtype=torch.float64)
    return steps.round().long().unique()
