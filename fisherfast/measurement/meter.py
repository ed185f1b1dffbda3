"""The interface of a layer's meter: what is kept of one layer while samples stream by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from fisherfast.data import Data
from fisherfast.data.dealing import Place
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.dither import StepMeter
from fisherfast.estimation.fold_moments import FoldMoments
from fisherfast.estimation.maps import MapMoments
from fisherfast.estimation.pilot import PilotMoments, Standardisation
from fisherfast.estimation.ridge import INPUT_ROUNDING, ROUNDING, RidgeSetting
from fisherfast.measurement.memory import DOUBLE, MAP_COPIES, streamed_sums
from fisherfast.measurement.replicates import HeldSamples
from fisherfast.measurement.settings import MeasurementSettings
from fisherfast.model.sites import INPUT, Site
from fisherfast.results.information_map import has_map, is_mapped
from fisherfast.results.layer import LayerFisher

__all__ = ["Meter", "rows_of"]

DEPENDENT = 5.0
"""Standard errors from zero beyond which neighbouring samples count as dependent: 6e-7 by
chance."""


class Meter(ABC):
    """What a measurement keeps of one layer.

    The measurement calls, in this order: `observe_pilot` for the first samples, `prepare`, then for
    each pass `observe` for every batch and `end_pass`, until no pass is needed, then `estimate`.

    Attributes:
        site: the layer.
        pilot: scale and offset of its activations, from the first samples.
        map: moments of the information map; None where none is asked for.
        largest_step: the largest step between rounded activations, in their standard deviations.
        rounded: whether steps of rounded activations are searched for.
        unit: what takes most memory, for messages.
    """

    map: MapMoments | None = None
    largest_step = 0.0
    rounded = True
    _half_steps: torch.Tensor | None = None
    unit = "moments"

    def __init__(self, site: Site) -> None:
        self.site = site
        self._dtype = torch.float32
        self.find_steps(None)

    def find_steps(self, ties: StepMeter | None) -> None:
        """Begin the pilot statistics; ties finds the steps of rounded activations."""
        units = INPUT_ROUNDING if self.site.name == INPUT else ROUNDING
        self.pilot = PilotMoments(units, ties)

    def note_steps(self, steps: torch.Tensor) -> None:
        """Remember that activations are rounded to steps [d], which noise was added against."""
        relative = steps * self.pilot.standardisation().scale
        self._half_steps = relative / 2
        self.largest_step = max(self.largest_step, float(relative.max()))

    def observe_pilot(self, activations: torch.Tensor, moving: torch.Tensor | None = None) -> None:
        """Add activations [n, ...] to the pilot statistics.

        Args:
            moving: bool [n, ...], which of them have a derivative; None if that is not known.
        """
        if activations.dtype == torch.float64:
            self._dtype = torch.float64
        self.pilot.update(rows_of(activations), None if moving is None else rows_of(moving))

    @property
    @abstractmethod
    def seen(self) -> list[int]:
        """Samples of each condition in this pass."""

    @property
    def reads_carried(self) -> bool:
        """Whether this pass reads what the samples carry, tangents or a score."""
        return True

    @property
    @abstractmethod
    def parts(self) -> list[FoldMoments]:
        """Moments of disjoint samples, together of all."""

    @property
    @abstractmethod
    def held(self) -> list[HeldSamples]:
        """Kept samples that errors are read from."""

    @abstractmethod
    def prepare(self, data: Data, settings: MeasurementSettings) -> None:
        """Fix the features from the pilot; from here on `observe` counts."""

    @abstractmethod
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
            condition: number of the condition.
            tangents: [P, n, ...] of the activations; None for none, or for zero.
            score: [n, P] of the samples.
            place: folds and halves of the samples, which are sorted by them; None to deal them in
                turn.

        Returns:
            Whether all values of that condition were finite so far, as a 0-d tensor.
        """

    @abstractmethod
    def end_pass(self, contrast: torch.Tensor, ridge: RidgeSetting) -> bool:
        """Return whether another pass over the same samples must follow."""

    @abstractmethod
    def estimate(self, data: Data, contrast: torch.Tensor, ridge: RidgeSetting) -> LayerFisher:
        """J, its errors and bounds, after the last pass."""

    @abstractmethod
    def replicates_of_score(self, V: torch.Tensor) -> torch.Tensor:
        """V of the score without each fold [F, P, P]; empty where no samples were kept."""

    @abstractmethod
    def nbytes(self, data: Data, settings: MeasurementSettings, number: int) -> tuple[int, int]:
        """Bytes kept of the layer, and bytes more while it is estimated.

        Args:
            data: the samples.
            settings: of the measurement.
            number: bytes of a number of the statistics, 4 or 8.
        """

    @abstractmethod
    def shared_sums(self) -> list[torch.Tensor]:
        """Views of all that this pass adds up over processes: counts and sums of samples."""

    @abstractmethod
    def shared_samples(self) -> list[KeptSamples]:
        """Samples kept in this pass, to be joined with those of the other processes."""

    def learned(self) -> list[torch.Tensor]:
        """What was learned between passes in a way that processors may differ in: all processes
        take that of the first."""
        return []

    def for_next(self) -> list[torch.Tensor]:
        """Projections from which the next measurement of this layer may start; empty for none."""
        return []

    def independent(self) -> bool:
        """Whether neighbouring samples look independent in the kept samples."""
        return all(held.dependence <= DEPENDENT for held in self.held)

    def _map_bytes(self, data: Data, settings: MeasurementSettings) -> tuple[int, int]:
        """The same of the map; zero where none is asked for."""
        if not self._has_map(settings):
            return 0, 0
        P, F, d, channels = data.parameters, settings.folds, self.site.dim, self.site.shape[0]
        covariance = DOUBLE * d * channels
        solved, folds = d * (F + 1) * P, d // channels * F * P * P
        estimate = MAP_COPIES * (covariance + DOUBLE * (solved + folds))
        return covariance + DOUBLE * d * streamed_sums(data, F), estimate

    def _has_map(self, settings: MeasurementSettings) -> bool:
        return is_mapped(settings.maps, self.site.names) and has_map(self.site.shape)

    def _prepare_map(
        self,
        standardisation: Standardisation,
        conditions: int,
        settings: MeasurementSettings,
        streams: dict[str, Any],
    ) -> None:
        if self._has_map(settings):
            self.map = MapMoments(standardisation, self.site.shape, conditions, **streams)


def rows_of(activations: torch.Tensor, leading: int = 0) -> torch.Tensor:
    """Activations [n, ...] of one layer as [n, d], one number per sample as d = 1; after leading
    dimensions."""
    rows = leading + 1
    return activations.flatten(rows) if activations.ndim > rows else activations[..., None]
