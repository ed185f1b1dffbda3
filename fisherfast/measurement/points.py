"""`PointsMeter` measures one layer at several theta: one meter for each, and the mean of them.

A batch of labelled samples is dealt to the bins of theta by its labels; the conditions of a
simulator belong to one theta each. Either way one pass over the samples serves all points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherfast.data import Batch, Data
from fisherfast.data.dealing import Place
from fisherfast.data.points import AtPoint
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.curve import linear_readout
from fisherfast.estimation.derivatives import LabelMoments, LabelsError
from fisherfast.estimation.fold_moments import FoldMoments
from fisherfast.estimation.pilot import PilotMoments, Standardisation
from fisherfast.measurement.fit import choose_together
from fisherfast.measurement.layer import LayerMeter
from fisherfast.measurement.meter import Meter
from fisherfast.measurement.moments import UnmeasuredError
from fisherfast.measurement.replicates import HeldSamples
from fisherfast.measurement.settings import MeasurementSettings
from fisherfast.measurement.without_estimate import not_measured
from fisherfast.model.sites import INPUT, Site
from fisherfast.results.layer import LayerFisher
from fisherfast.results.mean import averaged

LEAST_PILOT = 64
"""Samples of a point in the pilot below which those of all points fix its scale."""

SAMPLES_PER_FEATURE = 16
"""Samples of a point per feature: more features would add more noise to J along theta, and cost
more, than they add information."""

TOLERABLE = 0.3
"""Relative error of J in a bin above which a note asks for fewer bins. It grows with the number of
bins to the power of 3/2 (docs/theory.md, 23)."""

LEAST_FEATURES = 64
"""Features of a point with few samples."""


@dataclass(frozen=True)
class Part:
    """The samples of a batch at one point.

    Attributes:
        point: its number.
        condition: theirs, among those at this point.
        rows: int64 numbers of these samples in the batch; None for all.
        labels: their theta [m, P] about the centre of the point; None without labels.
        place: their folds; None in the pilot.
    """

    point: int
    condition: int
    rows: Tensor | None
    labels: Tensor | None
    place: Place | None

    def of(self, values: Tensor, dim: int = 0) -> Tensor:
        """Return the values of these samples."""
        return (
            values if self.rows is None else values.index_select(dim, self.rows.to(values.device))
        )


class Splitter:
    """Deals the samples of a batch to the points of theta, once for all layers.

    Args:
        data: at several points.

    Attributes:
        outside: samples that belong to no point, in this pass.
    """

    def __init__(self, data: Data) -> None:
        self._data = data
        self._centres = data.centres
        self._last: tuple[Tensor, Place | None, tuple[Part, ...]] | None = None
        self.outside = 0

    def __call__(
        self, condition: int, labels: Tensor | None, place: Place | None
    ) -> tuple[Part, ...]:
        """Return the parts of a batch of a condition, with its labels [n, P]."""
        if self._data.source != "labelled":
            point, own = divmod(condition, self._data.at_each)
            return (Part(point, own, None, None, place),)
        assert labels is not None
        last = self._last
        if last is None or last[0] is not labels or last[1] is not place:
            self._last = last = (labels, place, self._split(labels, place))
        return last[2]

    def notes(self) -> list[str]:
        """Return a remark if samples were left out that nobody knew before."""
        known = any("outside" in note for note in self._data.notes())
        if not self.outside or known:
            return []
        return [f"{self.outside} samples outside of the edges left out"]

    def _split(self, labels: Tensor, place: Place | None) -> tuple[Part, ...]:
        theta = labels.cpu()  # a few numbers per sample; folds are dealt on the CPU, too
        points = self._data.point_of(theta)
        parts = []
        for point in points.unique().tolist():
            rows = (points == point).nonzero()[:, 0]
            if point < 0:
                self.outside += len(rows) if place is not None else 0
                continue
            own = None if place is None else place.rows(rows, self._data.first_at(point))
            centred = (theta[rows] - self._centres[point]).to(labels.device)
            parts.append(Part(point, 0, rows, centred, own))
        return tuple(parts)


class PointsMeter(Meter):
    """The meters of one layer at each point of theta.

    Args:
        site: the layer.
        data: at several points.
        settings: of the measurement.
        make: makes the meter of one point.
        split: deals batches to points, shared by all layers.
    """

    def __init__(
        self,
        site: Site,
        data: Data,
        settings: MeasurementSettings,
        make: Callable[[int, Data, MeasurementSettings], Meter],
        split: Splitter,
    ) -> None:
        super().__init__(site, data, settings)
        self._splitter = split
        self._failures: dict[int, str] = {}
        self._fitted: dict[int, LayerMeter] = {}
        self._children = []
        for point in range(data.points):
            own = AtPoint(data, point)
            most = features_at(own, settings.max_features, data.points)
            self._children.append(
                make(point, own, replace(settings, max_features=most, maps=False))
            )
        self._growing = list(range(data.points))
        self.unit = self._children[0].unit

    @property
    def leaves(self) -> list[Meter]:
        """The meters of the points."""
        return self._children

    def _still(self) -> list[Meter]:
        return [self._children[point] for point in self._growing]

    def note_steps(self, steps: Tensor) -> None:
        """Note at each point that activations are rounded."""
        for child in self._children:
            child.note_steps(steps)

    def observe_pilot(
        self,
        activations: Tensor,
        moving: Tensor | None = None,
        *,
        condition: int = 0,
        labels: Tensor | None = None,
    ) -> None:
        """Add activations to the pilots of their points."""
        for part in self._splitter(condition, labels, None):
            moved = None if moving is None else part.of(moving)
            self._children[part.point].observe_pilot(part.of(activations), moved)

    def prepare(self) -> None:
        """Fix the features of each point. A point with few samples in the pilot takes its scale
        from all."""
        pilots = [child.pilot for child in self._children]
        if any(child._dtype == torch.float64 for child in self._children):
            for child in self._children:
                child._dtype = torch.float64
        for child in self._children:
            if child.pilot.count < LEAST_PILOT:
                child.pilot = _joined([pilot for pilot in pilots if pilot.count])
        few = [child for child in self._children if child.pilot.ill_conditioned() is None]
        ill_conditioned = PilotMoments.pooled_condition(pilots) if few else None
        for child in few:
            child.pilot.take_condition(ill_conditioned)
        for child in self._children:
            child.prepare()

    def _prepare(self, standardisation: Standardisation) -> None:
        raise NotImplementedError  # each point has its own

    def observe(self, condition: int, batch: Batch) -> Tensor:
        """Add a batch of a condition to the meters of its points."""
        finite = torch.ones((), dtype=torch.bool, device=batch.x.device)
        for part in self._splitter(condition, batch.score, batch.place):
            if part.point not in self._growing:
                continue
            if part.rows is None:
                own = batch
            else:
                tangents = None if batch.tangents is None else part.of(batch.tangents, 1)
                own = Batch(part.of(batch.x), tangents, part.labels, part.place)
            finite = finite & self._children[part.point].observe(part.condition, own)
        return finite

    def _observe(self, condition: int, batch: Batch, place: Place) -> Tensor:
        raise NotImplementedError

    def _end_pass(self) -> bool:
        growing = []
        for point in self._growing:
            try:
                if self._children[point].end_pass():
                    growing.append(point)
            except (UnmeasuredError, LabelsError) as error:
                self._failures[point] = str(error)
        self._growing = growing
        return bool(growing)

    @property
    def seen(self) -> list[int]:
        """Samples of each condition at each point."""
        return [n for child in self._children for n in child.seen]

    @property
    def reads_carried(self) -> bool:
        """True if a point reads tangents or labels in this pass."""
        return any(child.reads_carried for child in self._still())

    @property
    def parts(self) -> list[FoldMoments]:
        """Moments of all points."""
        return [part for child in self._children for part in child.parts]

    @property
    def held(self) -> list[HeldSamples]:
        """Samples kept for the errors, of all points."""
        return [held for child in self._children for held in child.held]

    def shared_sums(self) -> list[Tensor]:
        """Return views of all sums of this pass."""
        return [part for child in self._still() for part in child.shared_sums()]

    def shared_samples(self) -> list[KeptSamples]:
        """Return the samples kept in this pass."""
        return [kept for child in self._still() for kept in child.shared_samples()]

    def learned(self) -> list[Tensor]:
        """Return what the points have learned between passes."""
        return [part for child in self._still() for part in child.learned()]

    def nbytes(self, number: int) -> tuple[int, int]:
        """Return the bytes kept for the layer, and the additional bytes while it is estimated."""
        sizes = [child.nbytes(number) for child in self._children]
        return sum(kept for kept, _ in sizes), max(extra for _, extra in sizes)

    def for_next(self) -> list[Tensor]:
        """Return the projections of all points, if each has some."""
        found = [child.for_next() for child in self._children]
        return [part for own in found for part in own] if all(found) else []

    def independent(self) -> bool:
        """Return whether neighbouring samples look independent at every point."""
        return all(child.independent() for child in self._children)

    def estimate(self) -> LayerFisher:
        """Estimate J at each point, and its mean over the samples."""
        self._choose()
        layers: list[LayerFisher] = []
        for point, child in enumerate(self._children):
            try:
                if point in self._failures:
                    raise UnmeasuredError(self._failures[point])
                layers.append(child.estimate())
                self.largest_step = max(self.largest_step, child.largest_step)
            except (UnmeasuredError, LabelsError) as error:
                samples, reason = sum(child.seen), str(error)
                failed = not_measured(self.site, child._data, samples=samples, reason=reason)
                layers.append(failed)
                self._failures[point] = reason
        if len(self._failures) == len(layers):
            raise UnmeasuredError(self._failures[0])
        layer = averaged(layers, self._theta(), failed=self._failures)
        if self._data.source != "labelled":
            return layer
        return replace(layer, notes=(*layer.notes, *self._of_bins(layer)))

    def _of_bins(self, layer: LayerFisher) -> list[str]:
        """Return notes about bins in which the mean bends, and about too many bins."""
        notes = []
        bent = [point for point, child in self._fitted.items() if child.bends()]
        if bent:
            names = ", ".join(map(str, bent))
            notes.append(
                f"the mean bends inside bins {names}: J is that of its mean slope; more"
                " bins follow it"
            )
        assert layer.profile is not None
        J, errors = (m.diagonal(dim1=1, dim2=2) for m in (layer.profile.J, layer.profile.stderr))
        relative = float((errors / J.clamp_min(0)).amax(1).nanmedian())
        if self.site.name != INPUT or not relative > TOLERABLE:
            return notes
        bins = max(int(len(J) * (TOLERABLE / relative) ** (2 / 3)), 1)
        if bins < len(J):
            size = f"{relative:.0%} of J" if relative < 1 else "as large as J"
            notes.append(f"errors are {size} in a bin: the samples carry about {bins} bins")
        return notes

    def _choose(self) -> None:
        """Choose the number of lifted features on the mean of the curves."""
        for point, child in enumerate(self._children):
            if type(child) is not LayerMeter or point in self._failures:
                continue
            try:
                if child.features.check():
                    child.fit()
                    self._fitted[point] = child
            except (UnmeasuredError, LabelsError) as error:
                self._failures[point] = str(error)
        meters = list(self._fitted.values())
        if len(meters) < 2:
            return
        samples = torch.tensor([sum(meter.seen) for meter in meters], dtype=torch.float64)
        weight = samples / samples.sum()
        choices = choose_together([meter.fit() for meter in meters], weight)
        for meter, choice in zip(meters, choices, strict=True):
            meter.choose(choice)
        if self._data.source == "labelled" and not meters[0].sketched:
            _share_readouts(meters, weight)

    def _theta(self) -> Tensor:
        """Return theta [Q, P] of each point: the mean of its labels, if it has some."""
        theta = self._data.centres.clone()
        for point, child in enumerate(self._children):
            for part in child.parts:
                if isinstance(part.carried, LabelMoments) and (samples := sum(child.seen)):
                    theta[point] += part.carried.theta_sums().cpu() / samples
        return theta


def _share_readouts(meters: Sequence[LayerMeter], weight: Tensor) -> None:
    """Let the honest bound of each bin also read what the same half of all bins has learned: the
    readout of a narrow bin alone is mostly noise."""
    fits = [meter.fit() for meter in meters]
    kept = [torch.isin(fits[0].alive, fit.alive[: fit.raw]) for fit in fits]
    index = fits[0].alive[torch.stack(kept).all(0)]
    scales = [meter.features.dictionary.scale for meter in meters]
    units = [scale[index] for scale in scales]
    learned = []
    for half in (0, 1):
        parts = [meter.half_statistics()[half].select(index) for meter in meters]
        each = list(zip(weight.tolist(), parts, units, strict=True))
        S = sum(w * part.covariance / (unit[:, None] * unit) for w, part, unit in each)
        D = sum(w * part.derivative / unit[:, None] for w, part, unit in each)
        learned.append(linear_readout(replace(parts[0], covariance=S, derivative=D)))
    for meter, scale, unit in zip(meters, scales, units, strict=True):
        full = [scale.new_zeros(len(scale), readout.shape[1]) for readout in learned]
        for own, readout in zip(full, learned, strict=True):
            own[index] = readout / unit[:, None]
        meter.read_also(full)


def features_at(data: Data, max_features: int, points: int) -> int:
    """Return the most features of a layer at one of several points."""
    counts = [data.samples(c) for c in range(data.conditions)]
    known = [n for n in counts if n is not None]
    affordable = sum(known) // SAMPLES_PER_FEATURE if known else max_features // points
    return min(max(affordable, LEAST_FEATURES), max_features)


def _joined(pilots: Sequence[PilotMoments]) -> PilotMoments:
    """Merge the pilots of several points."""
    whole = PilotMoments()
    for pilot in pilots:
        whole.merge(
            pilot.count, pilot.parts(), pilot.rounding, pilot.noise, pilot.ill_conditioned()
        )
    return whole
