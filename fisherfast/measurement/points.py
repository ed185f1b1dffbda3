"""`PointsMeter` measures one layer at several theta: one meter for each, and the mean of them.

A batch of labelled samples is dealt to the bins of theta by its labels; the conditions of a
simulator belong to one theta each. Either way one pass over the samples serves all points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from fisherfast.data import Batch, Data
from fisherfast.data.dealing import Place
from fisherfast.data.points import AtPoint
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.derivatives import LabelMoments, LabelsError
from fisherfast.estimation.fold_moments import FoldMoments
from fisherfast.estimation.pilot import PilotMoments, Standardisation
from fisherfast.measurement.meter import Meter
from fisherfast.measurement.moments import UnmeasuredError
from fisherfast.measurement.replicates import HeldSamples
from fisherfast.measurement.settings import MeasurementSettings
from fisherfast.measurement.without_estimate import not_measured
from fisherfast.model.sites import Site
from fisherfast.results.layer import LayerFisher
from fisherfast.results.mean import averaged

LEAST_PILOT = 64
"""Samples of a point in the pilot below which those of all points fix its scale."""

SAMPLES_PER_FEATURE = 16
"""Samples of a point per feature: more features would add more noise to J along theta, and cost
more, than they add information."""

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
        self._split = lru_cache(maxsize=1)(self._split_labels)
        self.outside = 0

    def __call__(
        self, condition: int, labels: Tensor | None, place: Place | None
    ) -> tuple[Part, ...]:
        """Return the parts of a batch of a condition, with its labels [n, P]."""
        if self._data.source != "labelled":
            point, own = divmod(condition, self._data.at_each)
            return (Part(point, own, None, None, place),)
        assert labels is not None
        return self._split(labels, place)

    def notes(self) -> list[str]:
        """Return a remark if samples were left out that nobody knew before."""
        known = any("outside" in note for note in self._data.notes())
        if not self.outside or known:
            return []
        return [f"{self.outside} samples outside of the edges left out"]

    def _split_labels(self, labels: Tensor, place: Place | None) -> tuple[Part, ...]:
        theta = labels.cpu()  # a few numbers per sample; folds are dealt on the CPU, too
        points = self._data.point_of(theta)
        parts = []
        for point in points.unique().tolist():
            rows = (points == point).nonzero()[:, 0]
            if point < 0:
                self.outside += len(rows) if place is not None else 0
                continue
            own = None if place is None else place.rows(rows)
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
        return averaged(layers, self._theta(), failed=self._failures)

    def _theta(self) -> Tensor:
        """Return theta [Q, P] of each point: the mean of its labels, if it has some."""
        theta = self._data.centres.clone()
        for point, child in enumerate(self._children):
            for part in child.parts:
                if isinstance(part.carried, LabelMoments) and (samples := sum(child.seen)):
                    theta[point] += part.carried.theta_sums().cpu() / samples
        return theta


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
