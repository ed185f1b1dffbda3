"""What the moments of a layer say: the features used, their curve, and what rounding may hide."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from fisherfast.estimation.choice import Choice, choose_features
from fisherfast.estimation.curve import (
    FisherCurve,
)
from fisherfast.estimation.fold_moments import FoldStatistics
from fisherfast.estimation.ridge import (
    HIDDEN_SHARE,
    LIFT_RIDGE,
)

__all__ = ["UnmeasuredError"]

LIFT_ROUNDING = 1e-7
"""Error of the float32 products of raw and lifted features, relative to their spreads."""

LIFT_ERROR = 0.003
"""Part of J that these errors may add before the lift is measured in float64."""


class UnmeasuredError(ValueError):
    """A layer cannot be measured with these samples or settings; others may."""


@dataclass(frozen=True)
class Fit:
    """What the moments of a layer say.

    Attributes:
        whole: statistics of all features.
        alive: int64 [k] numbers of the features that vary, that are not copies of others and that
            the samples carry.
        raw: how many of these are raw activations.
        ridge: [k] theirs.
        curve: over these features.
        lost: [P] information that raw activations may have which are left out as rounding.
        notes: why features were left out.
    """

    whole: FoldStatistics
    alive: torch.Tensor
    raw: int
    ridge: torch.Tensor
    curve: FisherCurve
    lost: torch.Tensor
    notes: tuple[str, ...]

    @cached_property
    def choice(self) -> Choice:
        """How many features are used, and what that choice adds to the error."""
        return choose_features(self.curve, self.raw)

    def carried(self, chosen: int) -> bool:
        """Whether the arithmetic carries the covariance: what its rounding may hide is little."""
        hidden = self.lost + self.curve.hidden[self.raw - 1]
        return not bool((hidden > HIDDEN_SHARE * self.curve.J[chosen - 1].diagonal()).any())

    def inverse(self) -> float:
        """Trace of R^-1 of the raw activations."""
        spread = self.whole.covariance.diagonal()[self.alive[: self.raw]].sqrt()
        return float((self.curve.readout[: self.raw, : self.raw] * spread).square().sum())

    def exact_features(self) -> int:
        """Features up to which float32 products of raw and lifted features are good enough.

        An error e in the covariance of a lifted feature with the raw ones changes its derivative,
        less what they explain, by e W, and J by (e W)^2 times the squared row of L^-1; and its
        variance by e^2 tr R^-1, R that of the raw ones, which must be far below its ridge.
        """
        if self.inverse() * LIFT_ROUNDING**2 > LIFT_ERROR * LIFT_RIDGE:
            return self.raw
        spread = self.whole.covariance.diagonal()[self.alive[: self.raw]].sqrt()
        W = self.curve.readout_of(self.raw) * spread[:, None]
        share = self.curve.ridge_share.clone()
        share[: self.raw] = 0.0
        size = W.square().sum(0) * (LIFT_ROUNDING**2 / LIFT_RIDGE)
        J = self.curve.J[self.raw - 1].diagonal().clamp_min(0)
        error = self.curve.stderr[self.raw - 1].diagonal()
        exact = share.cumsum(0)[:, None] * size <= LIFT_ERROR * (J + error)
        return max(int(exact.all(1).sum()), self.raw)
