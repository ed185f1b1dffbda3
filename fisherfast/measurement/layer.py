"""`LayerMeter` measures a layer that fits into one covariance: its activations and a random lift of
them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fisherfast.data import Batch
from fisherfast.data.dealing import Place
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.choice import Choice
from fisherfast.estimation.curve import FisherCurve, SingularCovarianceError, cross_fitted_bound
from fisherfast.estimation.derivatives import TangentMoments
from fisherfast.estimation.features import BLOCK_ROWS, MAX_WIDTH, MIN_LIFT_SHARE, FeatureDictionary
from fisherfast.estimation.fold_moments import FoldMoments, FoldStatistics
from fisherfast.estimation.pilot import FLOAT32_INVERSE, Standardisation
from fisherfast.estimation.ridge import AUTO
from fisherfast.estimation.variance import jackknife_covariance, standard_errors
from fisherfast.measurement.fit import Fit, fitted
from fisherfast.measurement.memory import DOUBLE, moment_bytes, pilot_bytes
from fisherfast.measurement.meter import Meter
from fisherfast.measurement.moments import (
    LayerMoments,
    UnmeasuredError,
    all_finite,
    sketch_groups,
    streams_of,
)
from fisherfast.measurement.replicates import LEAST_ERROR, HeldSamples, kept_samples
from fisherfast.measurement.without_estimate import no_information
from fisherfast.model.sites import INPUT
from fisherfast.results.layer import READOUT_WIDTH, LayerFisher, finite_step_note
from fisherfast.results.marginal import SINGULAR, pack_covariance

CURVE_POINTS = 64
"""Points at which a result keeps its curve."""

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

BEND_ERRORS = 4.0
"""Standard errors of a bend that is no chance."""

BEND_TO_J = 5.0
"""For even theta J(theta) of a mean b t + a t^2 is on average larger than that of its slope b by
five times the ratio of what t^2 and t explain."""

BENT = 0.1
"""Part of J that a bend may add before a note says so."""

TAKEN = 0.1
"""Part of J that noise against rounding may take before the layer is noisy."""

TAKEN_NOTE = (
    "noise against rounding takes at least {:.0%} of J: use values with more digits, or a score"
)


class LayerMeter(Meter):
    """Fold moments of the activations of a layer and of a random lift of them."""

    features: LayerMoments
    _fit: Fit | None = None
    _halves: tuple[FoldStatistics, FoldStatistics] | None = None
    _readouts: Sequence[Tensor] = ()

    @property
    def moments(self) -> FoldMoments:
        """Moments of the features."""
        return self.features.moments

    @property
    def seen(self) -> list[int]:
        """Samples of each condition in this pass."""
        return self.moments.seen

    @property
    def parts(self) -> list[FoldMoments]:
        """The moments of all samples."""
        return [self.moments]

    @property
    def held(self) -> list[HeldSamples]:
        """Samples kept for the errors."""
        return [self.features.held]

    def _prepare(self, standardisation: Standardisation) -> None:
        """Fix the dictionary."""
        data, settings = self._data, self._settings
        dictionary = FeatureDictionary(
            standardisation,
            settings.max_features,
            dtype=self._dtype,
            seed=settings.seed,
            groups=sketch_groups(self.site.dim, data, settings.max_features, settings.folds),
        )
        if standardisation.steps is not None:
            self.note_steps(standardisation.steps)
        size = dictionary.size
        if settings.grow:
            size = min(size, dictionary.raw + BLOCK_ROWS)
        streams, device = streams_of(data, settings.folds), standardisation.mean.device
        moments = FoldMoments(size, data.conditions, device=device, **streams)
        self.features = LayerMoments(self.site.name, dictionary, moments, seed=settings.seed)
        self.features.held = HeldSamples(data, settings.folds, dictionary.raw, self._dtype)

    def _observe(self, condition: int, batch: Batch, place: Place) -> Tensor:
        raw, carried = self.features.add(condition, batch, place)
        if self._first_pass:
            self.features.held.add(condition, raw, carried, place)
        self._fit = self._halves = None
        return all_finite(self.moments, condition)

    def shared_sums(self) -> list[Tensor]:
        """Return views of all sums of this pass."""
        self._fit = self._halves = None
        return super().shared_sums() + self.moments.shared_sums()

    def shared_samples(self) -> list[KeptSamples]:
        """Return the samples kept in this pass."""
        return super().shared_samples() + (self.features.held.stores if self._first_pass else [])

    def _end_pass(self) -> bool:
        """Ask for another pass with twice the lifted features if the curve still rises at its end,
        or in float64 if float32 products do not carry the covariance."""
        features, moments, dictionary = self.features, self.moments, self.features.dictionary
        grows = self._settings.grow and moments.size < dictionary.size
        rounds = features.rounds_lift or dictionary.raw_dtype == torch.float32
        if not (self._data.repeatable and (grows or rounds) and features.check()):
            return False
        if dictionary.raw_dtype == torch.float32 and not self._float32_carries():
            dictionary.raw_dtype = torch.float64  # the pilot has not shown it
            features.moments = moments.grown(moments.size, known=0)
            return True
        fit = self.fit()
        if features.rounds_lift and fit.exact_features() < len(fit.alive):
            dictionary.lift = dictionary.lift.to(torch.float64)
            features.moments = moments.grown(moments.size, known=dictionary.raw)
            return True
        if not grows or fit.whole.dof < 2 * len(fit.alive):
            return False
        if len(fit.alive) < int(features.varied().sum()):
            return False  # the next feature is linear in these
        if fit.choice.plateau:
            return False
        size = min(2 * moments.size - dictionary.raw, dictionary.size)
        features.moments = moments.grown(size)
        return True

    def _float32_carries(self) -> bool:
        """Return whether float32 products of the raw activations give a covariance that can be
        inverted. After an outlier it may not even be positive definite."""
        try:
            return self.fit().inverse() <= 3 * FLOAT32_INVERSE
        except UnmeasuredError:
            return False

    def fit(self) -> Fit:
        """Fit the features that vary, as far as the samples carry them.

        Raises:
            UnmeasuredError: raw activations are linear in each other, and no ridge separates them.
        """
        if self._fit is None:
            ridge = self._settings.ridge
            try:
                self._fit = fitted(self.features, self._contrast, ridge)
            except SingularCovarianceError as error:
                raise UnmeasuredError(f"layer {self.site.name!r}: {error}") from None
        return self._fit

    @property
    def sketched(self) -> bool:
        """True if the features are sums of the activations in random groups."""
        return self.features.dictionary.kind == "sketch"

    def half_statistics(self) -> tuple[FoldStatistics, FoldStatistics]:
        """Compute the statistics of all features in each half of the samples."""
        if self._halves is None:
            first, second = (self.moments.statistics(self._contrast, half) for half in (0, 1))
            self._halves = first, second
        return self._halves

    def read_also(self, readouts: Sequence[Tensor]) -> None:
        """Use other readouts of the raw features [raw, P] for the honest bound, one for each half,
        learned without the samples of the other half."""
        self._readouts = readouts

    def choose(self, choice: Choice) -> None:
        """Use as many features as others have chosen."""
        self._fit = replace(self.fit(), given=choice)

    def bends(self) -> bool:
        """Return whether the mean of the activations bends with theta so strongly that the mean of
        J over a bin is clearly above J of the mean slope."""
        fit = self.fit()
        explained = self.moments.explained(slice(None), fit.alive[: fit.raw])
        P = self._data.parameters
        if explained is None or len(explained) == P:
            return False
        squares = (fit.curve.readout[: fit.raw, : fit.raw] @ explained.T).square().sum(0)
        effective = float(fit.curve.effective_dim[fit.raw - 1])
        shrink = (fit.whole.dof - effective - 1) / fit.whole.dof
        sizes = shrink * squares - effective
        line, bend, terms = float(sizes[:P].sum()), float(sizes[P:].sum()), len(sizes) - P
        error = math.sqrt(2 * terms * effective + 4 * max(bend, 0.0))
        return bend > BEND_ERRORS * error and BEND_TO_J * bend > BENT * max(line, 0.0)

    def nbytes(self, number: int) -> tuple[int, int]:
        """Return the bytes kept for the layer, and the additional bytes while it is estimated."""
        data, settings = self._data, self._settings
        d, most = self.site.dim, settings.max_features
        raw = d if d <= MAX_WIDTH else most
        aimed = max(most - d, most // MIN_LIFT_SHARE) if d <= MAX_WIDTH else most - d
        k = raw + max(aimed, 0)
        lift = (k - raw) * d * number
        carried = data.parameters if data.source == "pathwise" else 0
        held = number * sum(kept_samples(raw, data)) * raw * (1 + carried)
        moments, estimate = moment_bytes(k, data, settings.folds)
        if settings.probe is not None:  # the same of each half, with another lift
            held += 2 * (moments + lift)
        drawn = DOUBLE * max(lift // number + BLOCK_ROWS * d, 0)  # in float64
        map_kept, map_extra = self._map_bytes()
        kept = pilot_bytes(d) + lift + held + 3 * number * d + moments + map_kept
        return kept, max(drawn, estimate, map_extra)

    def estimate(self) -> LayerFisher:
        """Estimate J, its errors and bounds after the last pass."""
        features, moments = self.features, self.moments
        varies = features.check()
        dropped = moments.size - len(features.alive()[0])
        base = no_information(self.site, self._data, samples=sum(self.seen), dropped=dropped)
        if not varies:
            return replace(base, notes=(f"all {self.site.dim} activations are constant: J = 0",))
        fit, sketched = self.fit(), features.dictionary.kind == "sketch"
        notes = list(fit.notes)
        if dropped:
            notes.append(f"{dropped} constant features dropped")
        if sketched:
            notes.append(
                f"sums of {self.site.dim} activations in random groups, a loose bound: data that"
                " can be read again are compressed instead"
            )
        chosen, plateau, *_ = fit.choice
        if features.rounds_lift and chosen > (most := fit.exact_features()):
            chosen, plateau = most, False
            notes.append(f"features limited to {most}: float32 products do not carry more")
        layer = replace(
            self._read(base, fit, chosen),
            feature_kind="sketch" if sketched else "raw" if chosen == fit.raw else "lift",
            plateau=plateau,
            compressed=sketched,
        )
        if not layer.carried:
            notes.append(NOT_CARRIED)
        taken = self._taken_by_noise(fit, chosen)
        if taken > TAKEN:
            notes.append(TAKEN_NOTE.format(taken))
            layer = replace(layer, carried=False)
        if self._settings.ridge != AUTO:
            notes += fit.loss_by_ridge()
        if isinstance(moments.carried, TangentMoments) and not bool(moments.carried.sums.any()):
            notes.append(NO_TANGENTS)
        warning = finite_step_note(layer)
        return replace(layer, notes=(*notes, *([warning] if warning else [])))

    def _read(self, base: LayerFisher, fit: Fit, chosen: int) -> LayerFisher:
        """Read J, its errors and bounds at a number of features."""
        curve, raw, index = fit.curve, fit.raw, fit.alive[:chosen]
        halves = [half.select(index) for half in self.half_statistics()]
        others = [_at_features(readout, index, raw) for readout in self._readouts]
        lower, lower_stderr = cross_fitted_bound(halves[0], halves[1], fit.ridge[:chosen], others)
        errors = fit.error_covariance(chosen)
        if halves[0].score is None:
            lower_stderr = _with_tails(lower_stderr, lower, curve, chosen, errors)
        linear = errors if chosen == raw else fit.error_covariance(raw)
        doubt = fit.choice.doubt
        errors = errors + jackknife_covariance(doubt)
        replicates = fit.replicates(chosen)
        points = curve_points(raw, len(fit.alive))
        dictionary, response = self.features.dictionary, None
        if self.site.dim <= min(RESPONSE_WIDTH, dictionary.raw):
            response = dictionary.response(fit.whole.derivative).cpu()
        return replace(
            base,
            J=curve.J[chosen - 1].cpu(),
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
            effective_dim=float(curve.effective_dim[chosen - 1]),
            sensitive=fit.choice.sensitive,
            carried=fit.carried(chosen),
            rounding=max(SINGULAR, curve.rounding(chosen, torch.finfo(self._dtype).eps)),
            replicates=(replicates + doubt if len(replicates) else replicates).cpu(),
            error_covariance=pack_covariance(errors).cpu(),
            response=response,
            readout=self._linear_readout(fit),
        )

    def _linear_readout(self, fit: Fit) -> Tensor | None:
        """Return S^-1 D [d, P] of the raw activations, without bias for few samples; None for a
        wide layer after the input, and for a sketch."""
        dictionary, statistics = self.features.dictionary, fit.curve.statistics
        wide = self.site.name != INPUT and self.site.dim > READOUT_WIDTH
        if wide or dictionary.kind == "sketch" or self.site.dim > dictionary.raw:
            return None
        W = fit.curve.readout_of(fit.raw)
        if statistics.score is None:  # E[S^-1] is larger than S^-1; a regression has no such bias
            W = W * (1 - (float(fit.curve.effective_dim[fit.raw - 1]) + 1) / statistics.dof)
        full = W.new_zeros(dictionary.raw, W.shape[1])
        full[fit.alive[: fit.raw]] = W
        return dictionary.readout(full).cpu()

    def _taken_by_noise(self, fit: Fit, size: int) -> float:
        """Return the share of J of the first `size` features that noise against rounding has taken:
        without the noise N their readout W alone would have J^2 / (J - W^T N W)."""
        dictionary, index = self.features.dictionary, fit.alive[:size]
        if self._half_steps is None or dictionary.kind == "sketch":
            return 0.0
        raw = index[index < dictionary.raw]
        W = fit.curve.readout_of(size)[: len(raw)]
        J = fit.curve.J[size - 1].diagonal()
        noise = (W * self._half_steps[raw, None]).square().sum(0)
        return float(torch.where(J > 0, noise / J, 0.0).max())


def _at_features(readout: Tensor, index: Tensor, raw: int) -> Tensor:
    """Extend a readout of all raw features [d, P] to the features in index [k], of which the first
    are raw."""
    extended = readout.new_zeros(len(index), readout.shape[1])
    extended[:raw] = readout[index[:raw]]
    return extended


def _with_tails(
    stderr: Tensor, bound: Tensor, curve: FisherCurve, k: int, errors: Tensor
) -> Tensor:
    """Widen the errors [P, P] of the honest bound, which has the tails of the same readout as
    J(k)."""
    more = standard_errors(errors).square() - standard_errors(curve.error_covariance(k)).square()
    J = curve.J[k - 1].diagonal()
    size = torch.where(J > 0, bound.diagonal() / J, 0.0).clamp(0, 1)
    variance = stderr.square()
    return (variance + more * size[:, None] * size).maximum(LEAST_ERROR * variance).sqrt()


def curve_points(raw: int, size: int) -> Tensor:
    """Return the raw dimension, and about `CURVE_POINTS` sizes evenly up to all features."""
    steps = torch.linspace(raw, size, min(CURVE_POINTS, size - raw + 1), dtype=torch.float64)
    return steps.round().long().unique()
