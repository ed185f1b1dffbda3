"""`CompressedMeter` measures a layer too wide for its covariance: compressed on each half of the
samples, measured on the other.

The Krylov space learned from one half (`KrylovSpace`) gives a few features for the other half.
They do not depend on the samples that they are measured on, so the measurement is that of any k
features. The halves then change places and the two results are averaged, which has half the
variance of one of them. See docs/theory.md, 15.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fisherfast.data import Batch, Data
from fisherfast.data.dealing import Place, folds_of_half
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.curve import SPARE_DOF, independent_features
from fisherfast.estimation.features import MAX_WIDTH
from fisherfast.estimation.fold_moments import FoldMoments
from fisherfast.estimation.krylov import (
    KRYLOV_VECTORS,
    TILE_NUMBERS,
    TILE_ROWS,
    KrylovSpace,
    projected,
)
from fisherfast.estimation.pilot import Standardisation
from fisherfast.estimation.ridge import AUTO, raw_ridge
from fisherfast.measurement.cross_fit import (
    HalfFit,
    crossed,
    joined,
    leading_curve,
    replicates_of_mean,
)
from fisherfast.measurement.fit import affordable
from fisherfast.measurement.layer import NO_TANGENTS, NOT_CARRIED, curve_points
from fisherfast.measurement.memory import DOUBLE, moment_bytes, pilot_bytes
from fisherfast.measurement.meter import Meter
from fisherfast.measurement.moments import UnmeasuredError, all_finite, streams_of, worst_dof
from fisherfast.measurement.replicates import HeldSamples
from fisherfast.measurement.settings import MeasurementSettings
from fisherfast.measurement.without_estimate import no_information
from fisherfast.model.sites import Site
from fisherfast.results.layer import LayerFisher, finite_step_note

NO_PROBE = "no probe: the layer is too wide for a covariance, and compressed"

LEAST_DOF = 1.1
"""Degrees of freedom per activation below which a layer is compressed; above, its whole covariance
shows more."""


def too_wide(dim: int, data: Data, max_features: int, folds: int) -> bool:
    """Return whether a layer of dim activations is compressed: it has too many for a covariance, or
    too few samples to invert one. Only for data that can be read several times."""
    if not data.repeatable:
        return False
    if dim > MAX_WIDTH:
        return True
    if data.sharded and dim <= max_features:  # other ranks have samples too
        return False
    dof = worst_dof(data, folds)
    return dof is not None and dof < max(LEAST_DOF * dim, dim + SPARE_DOF)


def fewest_samples(dim: int, data: Data, folds: int) -> int:
    """Return the samples per condition that a layer of dim activations needs to be measured,
    compressed or as a whole."""
    conditions = data.conditions
    inflation = conditions if data.paired else 1
    compressed = fewest_to_compress(data, folds_of_half(folds), inflation)
    if dim > MAX_WIDTH:
        return compressed
    freedom = max(LEAST_DOF * dim, dim + SPARE_DOF) * inflation
    return min(compressed, max(2 * folds, math.ceil(freedom / conditions + folds)))


def fewest_to_compress(data: Data, folds: int, inflation: float) -> int:
    """Return the samples per condition that a compressed layer needs: two in every fold of each
    half, and a quarter of all that carries the readouts of the bound.

    Args:
        folds: of each half.
        inflation: samples per degree of freedom, more than 1 for paired conditions.
    """
    in_quarter = folds / 2 + (data.parameters + SPARE_DOF) * inflation / data.conditions
    return max(4 * folds, 4 * math.ceil(in_quarter))


class CompressedMeter(Meter):
    """A layer that is compressed: Krylov spaces of both halves, then moments in them.

    Args:
        site: the layer.
        data: the samples.
        settings: of the measurement.
        start: `for_next` of an earlier measurement of the layer with the same samples; None for
            none.

    Attributes:
        spaces: those learned from the samples of even and of odd folds of each condition.
        measured: moments of the features in these spaces, each of the other samples; empty while
            the spaces are learned.
    """

    finds_steps = False
    unit = "Krylov vectors"
    spaces: list[KrylovSpace]
    measured: list[FoldMoments]

    def __init__(
        self, site: Site, data: Data, settings: MeasurementSettings, start: Sequence[Tensor] = ()
    ) -> None:
        super().__init__(site, data, settings)
        self._start = start
        self._projections: list[Tensor] = []
        self._folds = folds_of_half(settings.folds)
        self._held: list[HeldSamples] = []
        self._seen = torch.zeros(data.conditions, dtype=torch.int64)
        self.measured = []

    def for_next(self) -> list[Tensor]:
        """Return the weights [k, d] of the vectors learned from each half."""
        return self._projections

    @property
    def seen(self) -> list[int]:
        """Samples of each condition in this pass."""
        return list(self._seen.tolist())

    @property
    def reads_carried(self) -> bool:
        """True if this pass reads tangents or score. Products of the covariance with vectors need
        only the samples."""
        return self._first_pass or bool(self.measured)

    @property
    def parts(self) -> list[FoldMoments]:
        """Moments of the samples of even folds, and of those of odd folds."""
        return self.measured[::-1]

    @property
    def held(self) -> list[HeldSamples]:
        """Samples kept for the errors, of each of these sets."""
        return self._held[::-1]

    def _prepare(self, standardisation: Standardisation) -> None:
        """Begin the spaces."""
        data, most = self._data, self._settings.max_features
        self._mean, self._rounding = standardisation.mean, standardisation.rounding
        self._noise_variance = standardisation.noise**2 * (
            standardisation.mean.square() + standardisation.scale.square().reciprocal()
        )
        self.spaces = [
            KrylovSpace(
                standardisation,
                conditions=data.conditions,
                parameters=data.parameters,
                steps=steps_of(data.parameters, most),
                dtype=self._dtype,
                scored=data.source in ("score", "labelled"),
                start=start,
            )
            for start in self._start or (None, None)
        ]
        self._start = ()

    def _observe(self, condition: int, batch: Batch, place: Place) -> Tensor:
        self._seen[condition] += len(batch)
        finite = []
        for half, rows in enumerate(place.halves):
            own, space = batch.part(rows.start, rows.stop), self.spaces[half]
            if self.measured:
                finite.append(self._measure(half, condition, place, own))
            else:
                space.observe(condition, own.x, own.tangents, own.score)
                finite.append(space.finite(condition))
        return torch.stack(finite).all()

    def _measure(self, half: int, condition: int, whole: Place, batch: Batch) -> Tensor:
        """Measure the samples of a half, of a batch with place `whole`, in the space of the other
        half. Returns whether all values were finite, a 0-d tensor."""
        other = 1 - half
        moments, projection = self.measured[other], self._projections[other]
        features, tangents = projected(batch.x, projection, self._mean).double(), batch.tangents
        if tangents is not None:
            tangents = torch.stack([projected(tangent, projection) for tangent in tangents])
        place, order = whole.half(half, self._folds)
        own = Batch(features, tangents, batch.score).sorted(place, order)
        carried = own.score if own.tangents is None else own.tangents
        self._held[other].add(condition, own.x, carried, place)
        moments.update(condition, own.x, carried=carried, place=place)
        if moments.paired:
            moments.update_products(moments.abreast(own.x))
        return all_finite(moments, condition)

    def shared_sums(self) -> list[Tensor]:
        """Return views of all sums of this pass."""
        own = [part for source in self.measured or self.spaces for part in source.shared_sums()]
        return [*super().shared_sums(), self._seen, *own]

    def shared_samples(self) -> list[KeptSamples]:
        """Return the samples kept in this pass."""
        return super().shared_samples() + [s for held in self._held for s in held.stores]

    def _end_pass(self) -> bool:
        """Ask for passes until the spaces are learned, and one more to measure in them."""
        if self.measured:
            return False
        self._seen = torch.zeros_like(self._seen)
        more = [space.advance(self._contrast) for space in self.spaces]
        if not any(more):
            self._prepare_measurement()
        return True

    def _prepare_measurement(self) -> None:
        """From here on measure each half in the space of the other."""
        data, folds = self._data, self._folds
        self._projections = [space.projection() for space in self.spaces]
        for half, projection in enumerate(self._projections):
            streams = streams_of(data, self._settings.folds, 1 - half, folds)
            size, device = len(projection), self._mean.device
            self.measured.append(FoldMoments(size, data.conditions, device=device, **streams))
            self._held.append(HeldSamples(data, folds, size, torch.float64))

    def estimate(self) -> LayerFisher:
        """Estimate J, its errors and bounds: means over the two halves."""
        dead = int((~(self.spaces[0].alive | self.spaces[1].alive)).sum())
        base = no_information(self.site, self._data, samples=sum(self.seen), dropped=dead)
        if dead == self.site.dim:
            return replace(base, notes=(f"all {dead} activations are constant: J = 0",))
        if not all(map(len, self.spaces)):
            still = "no activation moves with theta: J = 0"
            return replace(base, notes=(NO_TANGENTS if self._data.source == "pathwise" else still,))
        self._check_samples()
        halves = self.halves()
        if not halves:
            return replace(base, notes=("no activation varies in both halves: J = 0",))
        size = max(len(half.curve) for half in halves)
        points = curve_points(min(self._data.parameters, size), size)
        layer = joined(base, halves, self.measured, self._contrast, points)
        layer = replace(
            layer,
            linear=layer.J,
            linear_stderr=layer.stderr,
            feature_kind="krylov",
            compressed=True,
            replicates=replicates_of_mean(
                [self._replicates(half, fit) for half, fit in enumerate(halves)][::-1]
            ),
        )
        notes = [f"{dead} constant activations left out"] if dead else []
        notes += [] if layer.carried else [NOT_CARRIED]
        notes += [warning] if (warning := finite_step_note(layer)) else []
        notes += [NO_PROBE] if self._settings.probe is not None else []
        return replace(layer, notes=tuple(notes))

    def _check_samples(self) -> None:
        """Raise UnmeasuredError unless every fold has two samples and a quarter of all carries the
        readouts of the bound."""
        data, freedom = self._data, self._data.parameters + SPARE_DOF
        inflation = float(data.conditions) if data.paired else 1.0  # at worst
        if min(moments.fewest for moments in self.measured) >= 2:
            quarters = [
                m.statistics(self._contrast, half) for m in self.measured for half in (0, 1)
            ]
            least = min(quarter.dof for quarter in quarters)
            if least >= freedom:
                return
            samples = sum(n // 4 for n in self.seen)
            inflation = max((samples - data.conditions * self._folds / 2) / least, 1.0)
        needed = fewest_to_compress(data, self._folds, inflation)
        raise UnmeasuredError(
            f"layer {self.site.name!r} must see at least {needed} samples per condition to be"
            f" compressed on one half and measured on the other, got {min(self.seen)}"
        )

    def halves(self) -> list[HalfFit]:
        """Fit what was measured in the space of each half. Empty if a space has no feature that
        varies in the other half by more than rounding."""
        wholes = [moments.statistics(self._contrast) for moments in self.measured]
        indices = [self._affordable(half, whole.dof) for half, whole in enumerate(wholes)]
        if not all(map(len, indices)):
            return []
        ridges = [self._ridge(half) for half in range(2)]
        if self._settings.ridge == AUTO:
            for half, (whole, index) in enumerate(zip(wholes, indices, strict=True)):
                kept, _ = independent_features(whole.select(index), ridges[half][index])
                indices[half] = index[kept]
            if not all(map(len, indices)):
                return []
        fits = [leading_curve(*one) for one in zip(wholes, indices, ridges, strict=True)]
        return crossed(fits, ridges, self._data.parameters)

    def _replicates(self, half: int, fit: HalfFit) -> Tensor:
        """Return J in the space of a half without each fold of the other."""
        index = fit.index[: fit.chosen]
        W = fit.curve.readout_of(fit.chosen)

        def read(features: Tensor, tangents: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return features[:, index] @ W, None if tangents is None else tangents[..., index] @ W

        samples = self.measured[half].units
        return self._held[half].replicates(fit.curve, fit.chosen, read, samples)

    def _ridge(self, half: int) -> Tensor:
        """Return the ridge [k] of the features in the space of a half, relative to their variances:
        the rounding of the activations, and of the products that make features of them."""
        variance, setting = self.measured[half].variances(), self._settings.ridge
        if setting != AUTO:
            return torch.full_like(variance, setting)
        size = self._noise_variance.sqrt() / 4  # products are off by a few units in the last place
        weights = self._projections[half]
        products = torch.stack([weight.abs().double() @ size for weight in weights]).square()
        return raw_ridge(variance, self._of_activations(half, self._noise_variance) + products)

    def _affordable(self, half: int, dof: float) -> Tensor:
        """Return the numbers of the features in the space of a half that vary, at most as many as
        the samples carry."""
        varied = self.measured[half].variances() > self._rounding_variance(half)
        index = varied.nonzero()[:, 0]
        return index[: affordable(len(index), self._data.parameters, dof)]

    def _rounding_variance(self, half: int) -> Tensor:
        """Return the variance of each feature [k] below which it is rounding: of the activations,
        or of the squares of a feature whose mean in the other half is far from zero."""
        moments = self.measured[half]
        mean = moments.sums.sum((0, 1)) / sum(moments.seen)
        own = self._of_activations(half, (self._rounding * self._mean).square())
        return own + self._rounding * mean.square()

    def _of_activations(self, half: int, variance: Tensor) -> Tensor:
        """Return the variance [k] of the features in the space of a half, from that of activations
        [d]."""
        weights = self._projections[half]  # one vector at a time in float64: they are long
        return torch.stack([weight.double().square() @ variance for weight in weights])

    def nbytes(self, number: int) -> tuple[int, int]:
        """Return the bytes kept for the layer, and the additional bytes while it is estimated."""
        data, settings = self._data, self._settings
        P, C, d = data.parameters, data.conditions, self.site.dim
        k = steps_of(P, settings.max_features) * P
        vectors = 2 * 2 * k * d * number  # of both halves, and once more scaled
        sums = 2 * DOUBLE * d * (C + 2 * P + 3)  # means, products with S, scales
        tiles = 3 * number * max(TILE_NUMBERS, TILE_ROWS * d)
        moments, estimate = moment_bytes(k, data, settings.folds)
        map_kept, map_extra = self._map_bytes()
        orthogonal = DOUBLE * d * (3 * P + C + 4)  # new vectors before they are orthonormal
        kept = pilot_bytes(d) + vectors + sums + tiles + moments + map_kept
        return kept, max(orthogonal, estimate, map_extra)


def steps_of(parameters: int, max_features: int) -> int:
    """Return the Krylov vectors per parameter."""
    return max(min(KRYLOV_VECTORS, max_features // parameters), 1)
