"""A layer too wide for its covariance: compressed on each half of its samples, measured on the
other.

The Krylov space that one half has taught (`KrylovSpace`) is a handful of features for the other
half: no number in them has seen the samples that they are measured on, so the measurement is that
of any k features. The halves then change places, and the two results are averaged: half the
variance of one of them, for twice the samples in each pass. See docs/theory.md, 15.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from fisherfast.data import Data
from fisherfast.data.dealing import Place, Tally, folds_of_half
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.choice import choose_features
from fisherfast.estimation.curve import (
    SPARE_DOF,
    FisherCurve,
    independent_features,
)
from fisherfast.estimation.features import MAX_WIDTH
from fisherfast.estimation.fold_moments import FoldMoments
from fisherfast.estimation.krylov import (
    KRYLOV_VECTORS,
    TILE_NUMBERS,
    TILE_ROWS,
    KrylovSpace,
    projected,
)
from fisherfast.estimation.ridge import AUTO, RidgeSetting, raw_ridge
from fisherfast.measurement.checks import carried_by, streams_of, worst_dof
from fisherfast.measurement.cross_fit import (
    HalfFit,
    dealt_to_halves,
    joined,
    leading_curve,
    replicates_of_mean,
)
from fisherfast.measurement.fit import UnmeasuredError
from fisherfast.measurement.layer import (
    NO_TANGENTS,
    NOT_CARRIED,
    curve_points,
    in_turn,
)
from fisherfast.measurement.memory import DOUBLE, moment_bytes, pilot_bytes
from fisherfast.measurement.meter import Meter, rows_of
from fisherfast.measurement.replicates import HeldSamples
from fisherfast.measurement.settings import MeasurementSettings
from fisherfast.measurement.without_estimate import no_information
from fisherfast.model.sites import Site
from fisherfast.results.layer import LayerFisher, finite_step_note

__all__ = ["CompressedMeter", "too_wide"]

NO_PROBE = "no probe: the layer is too wide for a covariance, and compressed"

LEAST_DOF = 1.1
"""Degrees of freedom per activation below which a layer is compressed: above, its whole covariance
says more."""


def too_wide(dim: int, data: Data, max_features: int, folds: int) -> bool:
    """Whether a layer of dim activations is to be compressed: it has too many for a covariance, or
    too few samples to invert one. Only for data that can be read again and again."""
    if not data.repeatable:
        return False
    if dim > MAX_WIDTH:
        return True
    if data.sharded and dim <= max_features:  # other ranks have samples too
        return False
    dof = worst_dof(data, folds)
    return dof is not None and dof < max(LEAST_DOF * dim, dim + SPARE_DOF)


def fewest_samples(dim: int, data: Data, folds: int) -> int:
    """Samples per condition that a layer of dim activations needs: to be compressed, two in every
    fold of each half and a quarter that carries the readouts of the bound; or so many that it is
    not too wide."""
    own, conditions = folds_of_half(folds), data.conditions
    inflation = conditions if data.paired else 1
    in_quarter = own / 2 + (data.parameters + SPARE_DOF) * inflation / conditions
    compressed = max(4 * own, 4 * math.ceil(in_quarter))
    if dim > MAX_WIDTH:
        return compressed
    freedom = max(LEAST_DOF * dim, dim + SPARE_DOF) * inflation
    return min(compressed, max(2 * folds, math.ceil(freedom / conditions + folds)))


class CompressedMeter(Meter):
    """A layer that is compressed: Krylov spaces of both halves, then moments in them.

    Args:
        site: the layer.
        start: `for_next` of an earlier measurement of it with the same samples; None for none.

    Attributes:
        spaces: what the samples of even and of odd folds of each condition teach.
        measured: moments of the features in these spaces, each of the other samples; empty while
            the spaces are learned.
    """

    rounded = False
    unit = "Krylov vectors"
    spaces: list[KrylovSpace]
    measured: list[FoldMoments]

    def __init__(self, site: Site, start: Sequence[torch.Tensor] | None = None) -> None:
        super().__init__(site)
        self._start = start
        self._projections: list[torch.Tensor] = []

    def for_next(self) -> list[torch.Tensor]:
        """Weights [k, d] of the vectors that each half has taught."""
        return self._projections

    @property
    def seen(self) -> list[int]:
        """Samples of each condition in this pass."""
        return list(self._seen.tolist())

    @property
    def reads_carried(self) -> bool:
        """Products of the covariance with vectors are made of the samples alone."""
        return self._seen_before is None or bool(self.measured)

    @property
    def parts(self) -> list[FoldMoments]:
        """Moments of different samples, together of all: those of even folds first."""
        return self.measured[::-1]

    def prepare(self, data: Data, settings: MeasurementSettings) -> None:
        """Fix the pilot; from here on `observe` counts."""
        standardisation = self.pilot.standardisation()
        self._mean, self._rounding = standardisation.mean, standardisation.rounding
        self._noise_variance = standardisation.noise**2 * (
            standardisation.mean.square() + standardisation.scale.square().reciprocal()
        )
        self._probe = settings.probe
        self._data, self._paired, self._carried = data, data.paired, carried_by(data)
        self._conditions, self._parameters = data.conditions, data.parameters
        self._all_folds, self._folds = settings.folds, folds_of_half(settings.folds)
        steps = max(min(KRYLOV_VECTORS, settings.max_features // data.parameters), 1)
        self.spaces = [
            KrylovSpace(
                standardisation,
                conditions=data.conditions,
                parameters=data.parameters,
                steps=steps,
                dtype=self._dtype,
                scored=bool(self._carried["score"]),
                start=start,
            )
            for start in self._start or (None, None)
        ]
        self._start = None
        self.measured = []
        self._halves_held: list[HeldSamples] = []
        self._seen = torch.zeros(data.conditions, dtype=torch.int64)
        self._seen_before: list[int] | None = None
        self._waiting: list[list[torch.Tensor]] = [[], []]
        streams = streams_of(data, settings.folds)
        self._prepare_map(standardisation, data.conditions, settings, streams)

    def observe(
        self,
        condition: int,
        activations: torch.Tensor,
        *,
        tangents: torch.Tensor | None = None,
        score: torch.Tensor | None = None,
        place: Place | None = None,
    ) -> torch.Tensor:
        """Add activations [n, ...] of a condition, with what they carry; see `LayerMeter`."""
        if place is None:
            place, activations, tangents, score = in_turn(
                self.seen[condition], self._all_folds, activations, tangents, score
            )
        if self.map is not None and self._seen_before is None:
            carried = score if tangents is None else tangents
            self.map.update(condition, activations, carried, place)
        rows = rows_of(activations)
        moved = None if tangents is None else rows_of(tangents, 1)
        self._seen[condition] += len(rows)
        finite = []
        for half, own in enumerate(dealt_to_halves(place, rows, moved, score)):
            if self.measured:
                finite.append(self._measure(half, condition, place, *own))
            else:
                self.spaces[half].observe(condition, *own)
                finite.append(self.spaces[half].finite(condition))
        return torch.stack(finite).all()

    def shared_sums(self) -> list[torch.Tensor]:
        """Views of all that this pass adds up over processes."""
        sources = self.measured or self.spaces
        sums = [self._seen, *(part for source in sources for part in source.shared_sums())]
        first_pass = self._seen_before is None
        return sums + self.map.shared_sums() if self.map is not None and first_pass else sums

    def shared_samples(self) -> list[KeptSamples]:
        """Samples kept in this pass, to be joined with those of the other processes."""
        kept = [store for held in self._halves_held for store in held.stores]
        first_pass = self._seen_before is None
        return [*kept, self.map.kept] if self.map is not None and first_pass else kept

    def end_pass(self, contrast: torch.Tensor, ridge: RidgeSetting) -> bool:
        """Return whether another pass over the same samples must follow."""
        if self._seen_before not in (None, self.seen):
            raise ValueError(
                f"samples must be the same at every pass, got {self.seen} after"
                f" {self._seen_before} per condition"
            )
        if self.measured:
            return False
        self._seen_before, self._seen = self.seen, torch.zeros_like(self._seen)
        more = [space.advance(contrast) for space in self.spaces]  # both: no short cut
        if not any(more):
            self._prepare_measurement()
        return True

    def estimate(self, data: Data, contrast: torch.Tensor, ridge: RidgeSetting) -> LayerFisher:
        """J, its errors and bounds: means over the two halves."""
        dead = int((~(self.spaces[0].alive | self.spaces[1].alive)).sum())
        base = no_information(self.site, data, samples=sum(self.seen), dropped=dead)
        if dead == self.site.dim:
            return replace(base, notes=(f"all {dead} activations are constant: J = 0",))
        if not all(map(len, self.spaces)):
            still = "no activation moves with theta: J = 0"
            return replace(base, notes=(NO_TANGENTS if self._carried["tangents"] else still,))
        self._check_samples(contrast)
        halves = self.halves(contrast, ridge)
        if not halves:
            return replace(base, notes=("no activation varies in both halves: J = 0",))
        size = max(len(half.curve) for half in halves)
        points = curve_points(min(self._parameters, size), size)
        layer = joined(base, halves, self.measured, contrast, points)
        layer = replace(
            layer,
            linear=layer.J,
            linear_stderr=layer.stderr,
            feature_kind="krylov",
            compressed=True,
        )
        notes = [f"{dead} constant activations left out"] if dead else []
        notes += [] if layer.carried else [NOT_CARRIED]
        notes += [warning] if (warning := finite_step_note(layer)) else []
        notes += [NO_PROBE] if self._probe is not None else []
        return replace(layer, notes=tuple(notes))

    def _prepare_measurement(self) -> None:
        """From here on each half is read in the space that the other has taught."""
        self._projections = [space.projection() for space in self.spaces]
        groups = self._data.groups
        tally = None if groups is None else Tally.of_groups(len(groups), self._all_folds)
        self.measured = [
            FoldMoments(
                len(projection),
                self._conditions,
                folds=self._folds,
                paired=self._paired,
                groups=None if tally is None else tally.of_half(1 - half, self._folds),
                **self._carried,
                device=self._mean.device,
            )
            for half, projection in enumerate(self._projections)
        ]
        self._halves_held = [
            HeldSamples(self._data, self._folds, len(projection), torch.float64)
            for projection in self._projections
        ]

    def _measure(
        self,
        half: int,
        condition: int,
        whole: Place,
        rows: torch.Tensor,
        tangents: torch.Tensor | None,
        score: torch.Tensor | None,
    ) -> torch.Tensor:
        """Measure samples of a half, of a batch in this place, in the space of the other half.
        Returns whether all was finite, as a 0-d tensor."""
        other = 1 - half
        moments, projection = self.measured[other], self._projections[other]
        place, order = whole.half(half, self._folds)
        features = projected(rows, projection, self._mean).double()[order]
        carried = None if score is None else score[order]
        if tangents is not None:
            moved = [projected(tangent, projection)[order] for tangent in tangents]
            carried = torch.stack(moved)
        self._halves_held[other].add(condition, features, carried, place, whole=whole)
        moments.update(condition, features, carried=carried, place=place)
        if self._paired:
            waiting = self._waiting[other]
            waiting.append(features)
            if len(waiting) == self._conditions:
                moments.update_products(waiting)
                waiting.clear()
        finite = torch.isfinite(moments.sums[condition]).all()
        if moments.carried is not None:
            finite = finite & torch.isfinite(moments.carried.sums).all()
        return finite

    def _check_samples(self, contrast: torch.Tensor) -> None:
        """Two samples in every fold, and a quarter of all must carry the readouts of the bound."""
        freedom = self._parameters + SPARE_DOF
        inflation = float(self._conditions) if self._paired else 1.0  # at worst
        fewest = min(moments.fewest for moments in self.measured)
        if fewest >= 2:
            quarters = [m.statistics(contrast, half) for m in self.measured for half in (0, 1)]
            least = min(quarter.dof for quarter in quarters)
            if least >= freedom:
                return
            samples = sum(n // 4 for n in self.seen)
            inflation = max((samples - self._conditions * self._folds / 2) / least, 1.0)
        in_quarter = self._folds / 2 + freedom * inflation / self._conditions
        needed = max(4 * self._folds, 4 * math.ceil(in_quarter))
        raise UnmeasuredError(
            f"layer {self.site.name!r} must see at least {needed} samples per condition to be"
            f" compressed on one half and measured on the other, got {min(self.seen)}"
        )

    def halves(self, contrast: torch.Tensor, ridge: RidgeSetting) -> list[HalfFit]:
        """What was measured in the space of each half, and the size at which it is to be read.
        Empty where a space has no feature that varies in the other half.

        That size is chosen on the *other* curve, where its noise is another one: the best of many
        sizes on the same curve would be the luckiest one.
        """
        wholes = [moments.statistics(contrast) for moments in self.measured]
        indices = [self._affordable(half, whole.dof) for half, whole in enumerate(wholes)]
        if not all(map(len, indices)):
            return []
        ridges = [self._ridge(half, ridge) for half in range(2)]
        if ridge == AUTO:
            for half, (whole, index) in enumerate(zip(wholes, indices, strict=True)):
                kept, _ = independent_features(whole.select(index), ridges[half][index])
                indices[half] = index[kept]
        fits = [leading_curve(*one) for one in zip(wholes, indices, ridges, strict=True)]
        sizes = [choose_features(c, min(self._parameters, len(c))) for c, _ in fits]
        halves = []
        for half, ((curve, index), (chosen, plateau, *_)) in enumerate(
            zip(fits, reversed(sizes), strict=True)
        ):
            chosen = min(chosen, len(index))
            replicates = self._replicates(half, curve, index[:chosen])
            own = ridges[half][index]
            halves.append(HalfFit(curve, index, chosen, plateau, own, 1 - half, replicates))
        return halves

    def _replicates(self, half: int, curve: FisherCurve, index: torch.Tensor) -> torch.Tensor:
        """J of the features in index without each fold of a half."""
        W = curve.readout_of(len(index))

        def read(
            features: torch.Tensor, tangents: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            return features[:, index] @ W, None if tangents is None else tangents[..., index] @ W

        samples = self.measured[half].units
        return self._halves_held[half].replicates(curve, len(index), read, samples)

    @property
    def held(self) -> list[HeldSamples]:
        """Kept samples that errors are read from."""
        return self._halves_held

    def nbytes(self, data: Data, settings: MeasurementSettings, number: int) -> tuple[int, int]:
        """Bytes kept of the layer, and bytes more while it is estimated."""
        P, C, d = data.parameters, data.conditions, self.site.dim
        k = max(min(KRYLOV_VECTORS, settings.max_features // P), 1) * P
        vectors = 2 * 2 * k * d * number  # of both halves, and once more scaled
        sums = 2 * DOUBLE * d * (C + 2 * P + 3)  # means, products with S, scales
        tiles = 3 * number * max(TILE_NUMBERS, TILE_ROWS * d)
        moments, estimate = moment_bytes(k, data, settings.folds)
        map_kept, map_extra = self._map_bytes(data, settings)
        orthogonal = DOUBLE * d * (3 * P + C + 4)  # new vectors before they are orthonormal
        kept = pilot_bytes(d) + vectors + sums + tiles + moments + map_kept
        return kept, max(orthogonal, estimate, map_extra)

    def replicates_of_score(self, V: torch.Tensor) -> torch.Tensor:
        """V of the score without each fold [F, P, P]."""
        parts = [
            held.replicates_of_score(V.to(self._mean), moments.units).cpu()
            for held, moments in zip(self._halves_held, self.measured, strict=True)
        ]
        return replicates_of_mean(parts[::-1])

    def _ridge(self, half: int, setting: RidgeSetting) -> torch.Tensor:
        """The ridge [k] of the features in the space of a half, relative to their variances: the
        rounding of the activations, and of the products that make features of them."""
        moments = self.measured[half]
        variance = moments.variances()
        if setting != AUTO:
            return torch.full_like(variance, setting)
        size = self._noise_variance.sqrt() / 4  # products are off by a few units in the last place
        weights = self._projections[half]
        products = torch.stack([weight.abs().double() @ size for weight in weights]).square()
        return raw_ridge(variance, self._of_activations(half, self._noise_variance) + products)

    def _affordable(self, half: int, dof: float) -> torch.Tensor:
        """Numbers of the features in the space of a half that vary; not more than samples carry."""
        varied = self.measured[half].variances() > self._rounding_variance(half)
        return varied.nonzero()[: max(self._parameters, int(dof / 2)), 0]

    def _rounding_variance(self, half: int) -> torch.Tensor:
        """Variance of each feature [k] below which it is rounding: of the activations, or of the
        squares of a feature that the other half keeps far from zero."""
        moments = self.measured[half]
        mean = moments.sums.sum((0, 1)) / sum(moments.seen)
        own = self._of_activations(half, (self._rounding * self._mean).square())
        return own + self._rounding * mean.square()

    def _of_activations(self, half: int, variance: torch.Tensor) -> torch.Tensor:
        """Variance [k] of the features in the space of a half, from that of activations [d]."""
        weights = self._projections[half]  # one vector at a time in float64: they are long
        return torch.stack([weight.double().square() @ variance for weight in weights])
