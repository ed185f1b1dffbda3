"""`Meter`: the interface of the statistics of one layer, collected while samples stream by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fisherfast.data import Batch, Data
from fisherfast.data.dealing import Place
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.dither import StepMeter
from fisherfast.estimation.fold_moments import FoldMoments
from fisherfast.estimation.maps import MapMoments
from fisherfast.estimation.pilot import PilotMoments, Standardisation
from fisherfast.estimation.ridge import INPUT_ROUNDING, ROUNDING
from fisherfast.measurement.memory import DOUBLE, MAP_COPIES, streamed_sums
from fisherfast.measurement.moments import streams_of
from fisherfast.measurement.replicates import HeldSamples
from fisherfast.measurement.settings import MeasurementSettings
from fisherfast.model.sites import INPUT, Site
from fisherfast.results.information_map import has_map, is_mapped
from fisherfast.results.layer import LayerFisher

DEPENDENT = 5.0
"""Standard errors from zero beyond which neighbouring samples count as dependent: 6e-7 by
chance."""


class Meter(ABC):
    """Statistics that a measurement keeps of one layer.

    A measurement calls `observe_pilot` for the first samples and `prepare` once; then, for each
    pass, `observe` for every batch and `end_pass`, until no further pass is needed; then
    `estimate`.

    Args:
        site: the layer.
        data: the samples.
        settings: of the measurement.

    Attributes:
        site: the layer.
        pilot: scale and offset of its activations, from the first samples.
        map: moments of the information map; None if none is measured.
        largest_step: largest step between rounded activations, in their standard deviations.
        finds_steps: search the pilot for the steps of rounded activations if samples have tangents.
        unit: what takes most memory, for messages.
    """

    map: MapMoments | None = None
    largest_step = 0.0
    finds_steps = True
    unit = "moments"
    _half_steps: Tensor | None = None
    _seen_before: list[int] | None = None

    def __init__(self, site: Site, data: Data, settings: MeasurementSettings) -> None:
        self.site, self._data, self._settings = site, data, settings
        self._contrast = data.contrast()
        self._dtype = torch.float32
        units = INPUT_ROUNDING if site.name == INPUT else ROUNDING
        searches = self.finds_steps and data.source == "pathwise"
        self.pilot = PilotMoments(units, StepMeter() if searches else None)

    def note_steps(self, steps: Tensor) -> None:
        """Note that activations are rounded to steps [d], against which noise was added."""
        relative = steps * self.pilot.standardisation().scale
        self._half_steps = relative / 2
        self.largest_step = max(self.largest_step, float(relative.max()))

    @property
    def leaves(self) -> Sequence[Meter]:
        """The meters that have a pilot: this one, or those of several points of theta."""
        return (self,)

    def observe_pilot(
        self,
        activations: Tensor,
        moving: Tensor | None = None,
        *,
        condition: int = 0,
        labels: Tensor | None = None,
    ) -> None:
        """Add activations [n, ...] to the pilot statistics.

        Args:
            moving: bool [n, ...] marks those with a derivative; None if that is unknown.
            condition: of the samples; read by `PointsMeter` only, as are
            labels: theta [n, P] of the samples, if they have some.
        """
        if activations.dtype == torch.float64:
            self._dtype = torch.float64
        self.pilot.update(rows_of(activations), None if moving is None else rows_of(moving))

    def prepare(self) -> None:
        """Fix the features from the pilot. From here on `observe` counts."""
        standardisation = self.pilot.standardisation()
        if self._has_map():
            streams = streams_of(self._data, self._settings.folds)
            shape, conditions = self.site.shape, self._data.conditions
            self.map = MapMoments(standardisation, shape, conditions, **streams)
        self._prepare(standardisation)

    @abstractmethod
    def _prepare(self, standardisation: Standardisation) -> None:
        """Fix the features."""

    def observe(self, condition: int, batch: Batch) -> Tensor:
        """Add a batch of a condition, sorted by its place: activations [n, ...] with their tangents
        [P, n, ...] (None for zero) or score [n, P].

        Returns:
            Whether all values of that condition were finite so far, a 0-d tensor.
        """
        x, tangents, score, place = batch.x, batch.tangents, batch.score, batch.place
        assert place is not None  # every batch of a measurement is dealt to folds
        if self.map is not None and self._first_pass:
            self.map.update(condition, x, score if tangents is None else tangents, place)
        moved = None if tangents is None else rows_of(tangents, 1)
        return self._observe(condition, Batch(rows_of(x), moved, score, place), place)

    @abstractmethod
    def _observe(self, condition: int, batch: Batch, place: Place) -> Tensor:
        """As `observe`, for activations [n, d] and tangents [P, n, d]."""

    def end_pass(self) -> bool:
        """Return whether another pass over the same samples must follow.

        Raises:
            ValueError: this pass had other samples than the one before.
            UnmeasuredError: the samples are too few.
        """
        seen = self.seen
        if self._seen_before not in (None, seen):
            raise ValueError(
                f"samples must be the same at every pass, got {seen} after {self._seen_before} per"
                " condition"
            )
        more = self._end_pass()
        self._seen_before = seen
        return more

    @abstractmethod
    def _end_pass(self) -> bool:
        """Prepare for another pass if one is needed, and return whether it is."""

    @property
    def _first_pass(self) -> bool:
        return self._seen_before is None

    @property
    @abstractmethod
    def seen(self) -> list[int]:
        """Samples of each condition in this pass."""

    @property
    def reads_carried(self) -> bool:
        """True if this pass reads the tangents or the score of the samples."""
        return True

    @property
    @abstractmethod
    def parts(self) -> list[FoldMoments]:
        """Moments of disjoint sets of samples that are all samples together."""

    @property
    @abstractmethod
    def held(self) -> list[HeldSamples]:
        """Samples kept for the errors, of each of these sets."""

    @abstractmethod
    def estimate(self) -> LayerFisher:
        """Estimate J, its errors and bounds after the last pass.

        Raises:
            UnmeasuredError: the samples are too few.
        """

    @abstractmethod
    def nbytes(self, number: int) -> tuple[int, int]:
        """Return the bytes kept for the layer, and the additional bytes while it is estimated.

        Args:
            number: bytes of a number of the statistics, 4 or 8.
        """

    def shared_sums(self) -> list[Tensor]:
        """Return views of all sums of this pass, to be added up over processes: here of the map."""
        return self.map.shared_sums() if self.map is not None and self._first_pass else []

    def shared_samples(self) -> list[KeptSamples]:
        """Return the samples kept in this pass, to be joined with those of other processes: here of
        the map."""
        return [self.map.kept] if self.map is not None and self._first_pass else []

    def learned(self) -> list[Tensor]:
        """Return what was learned between passes and may differ between processors: every process
        takes that of the first."""
        return []

    def for_next(self) -> list[Tensor]:
        """Return projections from which the next measurement of this layer may start; empty for
        none."""
        return []

    def independent(self) -> bool:
        """Return whether neighbouring kept samples look independent."""
        return all(held.dependence <= DEPENDENT for held in self.held)

    def _map_bytes(self) -> tuple[int, int]:
        """As `nbytes`, for the map; zero without one."""
        if not self._has_map():
            return 0, 0
        P, F, d = self._data.parameters, self._settings.folds, self.site.dim
        channels = self.site.shape[0]
        covariance = DOUBLE * d * channels
        solved, folds = d * (F + 1) * P, d // channels * F * P * P
        estimate = MAP_COPIES * (covariance + DOUBLE * (solved + folds))
        return covariance + DOUBLE * d * streamed_sums(self._data, F), estimate

    def _has_map(self) -> bool:
        return is_mapped(self._settings.maps, self.site.names) and has_map(self.site.shape)


def rows_of(activations: Tensor, leading: int = 0) -> Tensor:
    """Flatten activations [n, ...] to [n, d], after `leading` other dimensions; one number per
    sample has d = 1."""
    rows = leading + 1
    return activations.flatten(rows) if activations.ndim > rows else activations[..., None]
