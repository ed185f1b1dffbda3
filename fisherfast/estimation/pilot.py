"""Scale, offset and rounding of a layer's activations, from the first samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfast.estimation.dither import StepMeter
from fisherfast.estimation.ridge import (
    ROUNDING,
    relative_rounding,
)

PILOT_ROWS = 2
"""Samples per activation needed to estimate the condition of a covariance, which is then twice too
large."""

PILOT_WIDTH = 256
"""Widest layer whose condition the pilot estimates; wider ones are summed in float64."""

FLOAT32_INVERSE = 1e4
"""Largest trace of the inverse correlation matrix for which products may be float32: their relative
error is 3e-8, which then changes J by less than 1e-3 in its worst direction."""


NARROWEST = 1e-9
"""Smallest standard deviation that scales an activation, relative to the largest of its layer: a
softmax has 1e-42, whose inverse float32 does not hold, and may fire later: z^4 must be finite."""

SUBNORMAL = torch.finfo(torch.float32).tiny
"""Numbers below it have fewer digits: an activation that varies by less only shows rounding."""


@dataclass(frozen=True)
class Standardisation:
    """Pilot mean and scale of the activations of one layer: z = (a - mean) * scale.

    Only conditioning depends on the pilot, not the result: features are rescaled by their final
    variance, and an activation that was silent in the pilot but fires later still counts.

    Attributes:
        mean: [d] float64.
        scale: [d] float64, 1 / standard deviation, at most 1e9 times the smallest of the layer; the
            layer's median scale for activations that did not vary in the pilot.
        alive: [d] bool, activations that varied in the pilot; only these enter the lift.
        rounding: relative spread that the precision of the activations does not resolve.
        noise: spread relative to its size that rounding may add to an activation: `rounding`, or
            one unit in the last place of a half type.
        exact: products of the activations must be in float64.
        steps: [d] float64 step between tied values, 0 without ties; None if not searched.
    """

    mean: Tensor
    scale: Tensor
    alive: Tensor
    rounding: float
    noise: float
    exact: bool = True
    steps: Tensor | None = None


class PilotMoments:
    """Mean and variance of the first samples of a layer, in float64, updated batch by batch (Chan's
    update).

    Args:
        units: rounding of an activation in units in the last place.
        ties: finds steps if the samples have tangents, else None.

    Attributes:
        count: number of samples added.
        rounding: relative spread that the precision of the samples does not resolve.
        noise: spread relative to its size that rounding may add to an activation.
    """

    def __init__(self, units: int = ROUNDING, ties: StepMeter | None = None) -> None:
        self._units = units
        self._ties = ties
        self._steps: Tensor | None = None
        self.count = 0
        self._mean = self._square = torch.zeros(())
        self.rounding = 0.0
        self.noise = 0.0
        self._rows: list[Tensor] = []
        self._flags: list[bool | None] = []

    def update(self, activations: Tensor, moving: Tensor | None = None) -> None:
        """Add activations [n, d]; moving bool [n, d] marks those with a derivative, if known."""
        if self._ties is not None:
            self._ties.update(activations, moving)
        pilot = activations.double()
        precision = torch.float64 if activations.dtype == torch.float64 else torch.float32
        self.rounding = max(self.rounding, ROUNDING * torch.finfo(precision).eps)
        self.noise = max(self.noise, relative_rounding(activations.dtype, self._units))
        mean = pilot.mean(0)
        self._add(len(pilot), mean, (pilot - mean).square().sum(0))
        missing = PILOT_ROWS * pilot.shape[1] - sum(map(len, self._rows))
        if pilot.shape[1] <= PILOT_WIDTH and missing > 0 and precision == torch.float32:
            self._rows.append(activations[:missing].clone())

    def _add(self, n: int, mean: Tensor, square: Tensor) -> None:
        total = self.count + n
        delta = mean - self._mean
        self._square = self._square + square + delta.square() * (self.count * n / total)
        self._mean = self._mean + delta * (n / total)
        self.count = total

    def parts(self) -> Tensor:
        """Return mean, sum of squared deviations and steps [3, d] of the added samples."""
        steps = self._found_steps()
        steps = torch.zeros_like(self._mean) if steps is None else steps
        return torch.stack([self._mean, self._square, steps])

    def _found_steps(self) -> Tensor | None:
        """Return the step [d] float64 between tied values, 0 without ties; None if not searched."""
        return self._steps if self._ties is None else self._ties.steps()

    def merge(
        self, count: int, parts: Tensor, rounding: float, noise: float, ill_conditioned: bool | None
    ) -> None:
        """Add samples of another process, given their number, `parts` and the other values."""
        self._flags.append(ill_conditioned)
        self.rounding = max(self.rounding, rounding)
        self.noise = max(self.noise, noise)
        self._add(count, parts[0], parts[1])
        self._steps = parts[2] if self._steps is None else self._steps.maximum(parts[2])

    def standardisation(self) -> Standardisation:
        """Return mean and scale of the added samples."""
        if self.count == 0:
            raise ValueError("pilot must hold at least one batch, got none")
        std = (self._square / self.count).sqrt()
        alive = std > self.rounding * self._mean.abs()
        typical = std[alive].median() if bool(alive.any()) else std.new_ones(())
        narrowest = max(NARROWEST * float(std.max()), SUBNORMAL) if std.numel() else SUBNORMAL
        scale = torch.where(alive, std, typical).clamp_min(narrowest).reciprocal()
        flags = self._flags or [self.ill_conditioned()]
        exact = any(flags) or all(flag is None for flag in flags)
        return Standardisation(
            self._mean, scale, alive, self.rounding, self.noise, exact, self._found_steps()
        )

    def take_condition(self, ill_conditioned: bool | None) -> None:
        """Take from other samples whether products need float64."""
        self._flags = [ill_conditioned]

    def centred_rows(self) -> list[Tensor]:
        """Return the first samples, in the order of their batches, about their mean."""
        return [torch.cat(self._rows) - self._mean.to(self._rows[0])] if self._rows else []

    @staticmethod
    def pooled_condition(pilots: Iterable[PilotMoments]) -> bool | None:
        """Return `ill_conditioned` of samples from several distributions about their means."""
        whole = PilotMoments()
        for row in (row for pilot in pilots for row in pilot.centred_rows()):
            whole.update(row)
        return whole.ill_conditioned() if whole.count else None

    def ill_conditioned(self) -> bool | None:
        """Return whether the covariance needs float64 products; None for too few samples."""
        rows = sum(map(len, self._rows))
        if not 0 < rows >= PILOT_ROWS * len(self._mean):
            return None
        z = torch.cat(self._rows).double()
        z = z - z.mean(0)
        size = z.square().mean(0).sqrt()
        alive = size > self.rounding * self._mean.abs()
        z = z[:, alive] / size[alive]
        correlation = z.T @ z / len(z)
        correlation.diagonal().add_(0.01 / FLOAT32_INVERSE)  # a singular one inverts to far above
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation))
        return float(inverse.diagonal().sum()) > FLOAT32_INVERSE
