"""`Fit`: J of one layer as a function of the number of features, and the errors of J at one size.

The features that vary are fitted, raw activations first, as far as the samples can carry them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fisherfast.estimation.choice import Choice, choose_features
from fisherfast.estimation.curve import (
    FisherCurve,
    SingularCovarianceError,
    fisher_curve,
    independent_features,
)
from fisherfast.estimation.derivatives import ScoreMoments
from fisherfast.estimation.fold_moments import FoldStatistics, SampleFeatures
from fisherfast.estimation.ridge import AUTO, HIDDEN_SHARE, LIFT_RIDGE, MOSTLY_RIDGE, RidgeSetting
from fisherfast.measurement.moments import LayerMoments
from fisherfast.measurement.replicates import Readout

LIFT_ROUNDING = 1e-7
"""Error of the float32 products of raw and lifted features, relative to their spreads."""

LIFT_ERROR = 0.003
"""Part of J that these errors may add before the lift is measured in float64."""

LEVERAGE_NUMBERS = 2**18
"""Features of samples whose leverage is computed at all sizes: 512 samples of 512 features, from
which its mean is known to 1 %. Twice as many with a score, whose residuals may depend on it."""

MIN_LEVERAGE_SAMPLES = 256
"""For any number of features."""

ERROR_NUMBERS = 2**19
"""Features of the samples from which the error of J is computed: 1024 samples of 512 features."""

NARROW = 128
"""Features whose whitening costs little in float64."""

RIDGE_LOSS = 0.02
"""Part of J that a ridge given as a number may take before a note says so."""


@dataclass(frozen=True)
class Fit:
    """The curve of J over the features of one layer.

    Attributes:
        features: moments of the features.
        whole: statistics of all features.
        alive: int64 [k] numbers of the fitted features: those that vary, are not copies of others
            and that the samples carry.
        raw: how many of these are raw activations.
        ridge: [k] of the fitted features.
        curve: over the fitted features.
        lost: [P] information that may be in raw activations that are left out as rounding.
        notes: why features were left out.
        given: a choice that others have made, for all points of theta; None for that of this curve.
    """

    features: LayerMoments
    whole: FoldStatistics
    alive: Tensor
    raw: int
    ridge: Tensor
    curve: FisherCurve
    lost: Tensor
    notes: tuple[str, ...] = ()
    given: Choice | None = None

    @cached_property
    def choice(self) -> Choice:
        """How many features are used, and what that choice adds to the error."""
        return choose_features(self.curve, self.raw) if self.given is None else self.given

    def carried(self, chosen: int) -> bool:
        """Return whether the arithmetic carries the covariance: its rounding hides little of J."""
        hidden = self.lost + self.curve.hidden[self.raw - 1]
        J, error = self.curve.J[chosen - 1].diagonal(), self.curve.stderr[chosen - 1].diagonal()
        return not bool((hidden > HIDDEN_SHARE * J.maximum(error)).any())

    def _spread(self) -> Tensor:
        """Return the standard deviation of each raw activation."""
        return self.whole.covariance.diagonal()[self.alive[: self.raw]].sqrt()

    def inverse(self) -> float:
        """Return the trace of R^-1 of the raw activations."""
        return float((self.curve.readout[: self.raw, : self.raw] * self._spread()).square().sum())

    def exact_features(self) -> int:
        """Return the number of features up to which float32 products of raw and lifted features are
        good enough.

        An error e in the covariance of a lifted feature with the raw ones changes its derivative,
        less what they explain, by e W, and J by (e W)^2 times the squared row of L^-1; and its
        variance by e^2 tr R^-1, with R that of the raw ones, which must be far below its ridge.
        """
        if self.inverse() * LIFT_ROUNDING**2 > LIFT_ERROR * LIFT_RIDGE:
            return self.raw
        W = self.curve.readout_of(self.raw) * self._spread()[:, None]
        share = self.curve.ridge_share.clone()
        share[: self.raw] = 0.0
        size = W.square().sum(0) * (LIFT_ROUNDING**2 / LIFT_RIDGE)
        J = self.curve.J[self.raw - 1].diagonal().clamp_min(0)
        error = self.curve.stderr[self.raw - 1].diagonal()
        exact = share.cumsum(0)[:, None] * size <= LIFT_ERROR * (J + error)
        return max(int(exact.all(1).sum()), self.raw)

    def readout(self, size: int) -> Readout:
        """Return a function that reads the first `size` fitted features from raw ones."""
        raw, index = self.features.dictionary.raw, self.alive[:size]
        lift, W = self.features.leading_lift(index), self.curve.readout_of(size)
        full = W.new_zeros(raw + len(lift), W.shape[1])
        full[index] = W
        lifted = bool(full[raw:].any())

        def read(z: Tensor, tangents: Tensor | None) -> tuple[Tensor, Tensor | None]:
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

    def replicates(self, size: int) -> Tensor:
        """Return J of the first `size` features without each fold [F, P, P]."""
        units = self.features.moments.units
        return self.features.held.replicates(self.curve, size, self.readout(size), units)

    def error_covariance(self, size: int) -> Tensor:
        """Return the covariance [P, P, P, P] of the errors of J of the first `size` features."""
        samples, most = self.curve.statistics.samples, leverage_samples(self.features)
        if ERROR_NUMBERS // size > most:
            most = ERROR_NUMBERS // size
            samples = sample_features(self.features, self.alive[:size], most)
        elif samples is not None:
            samples = samples.select(torch.arange(size))
        read = self.readout(size)
        return self.features.held.error_covariance(self.curve, size, samples, read, most)

    def loss_by_ridge(self) -> list[str]:
        """Return a note if a ridge given as a number takes much of the linear information."""
        index = self.alive[: self.raw]
        linear, least = self.whole.select(index), self.features.ridges(AUTO)[index]
        kept, _ = independent_features(linear, least)
        J = fisher_curve(linear.select(kept), least[kept]).J[-1].diagonal()
        loss = 1 - self.curve.J[self.raw - 1].diagonal() / J
        worst = float(torch.where(J > 0, loss, 0.0).max())
        if worst <= RIDGE_LOSS:
            return []
        return [f'the ridge takes {worst:.0%} of the linear information: ridge="auto" takes none']


def choose_together(fits: Sequence[Fit], weight: Tensor) -> list[Choice]:
    """Choose how many lifted features to use at several points, the same number at all, on the mean
    of their curves: it shows gains that are noise at each point.

    Args:
        fits: of the points, from independent samples.
        weight: [Q] float64 of each in the mean.
    """
    sizes = min(len(fit.curve) - fit.raw for fit in fits) + 1  # after 0, 1, ... lifted features
    weight = weight.to(fits[0].curve.J)

    def values(name: str) -> Tensor:
        rows = [getattr(fit.curve, name)[fit.raw - 1 : fit.raw - 1 + sizes] for fit in fits]
        return torch.stack(rows)

    def mean(found: Tensor) -> Tensor:
        return torch.einsum("q,q...->...", weight, found)

    def size(found: Tensor) -> Tensor:
        return torch.einsum("q,q...->...", weight.square(), found.square()).sqrt()

    statistics = fits[0].curve.statistics
    dofs = weight.new_tensor([fit.curve.statistics.dof for fit in fits])
    noise = size(torch.stack([fit.curve.statistics.noise for fit in fits]))
    shape = [-1, *[1] * (fits[0].curve.useless.ndim)]
    useless = size(values("useless") * (dofs.mean() / dofs).reshape(shape))
    curve = replace(
        fits[0].curve,
        J=mean(values("J")),
        variance=size(values("variance").sqrt()).square(),
        replicates=mean(values("replicates")),
        left_out=mean(values("left_out")),
        effective_dim=mean(values("effective_dim")),
        useless=useless,
        statistics=replace(statistics, dof=float(dofs.mean()), noise=noise, samples=None),
    )
    chosen, plateau, doubt, sensitive = choose_features(curve, 1)
    return [Choice(fit.raw - 1 + chosen, plateau, doubt, sensitive) for fit in fits]


def fitted(features: LayerMoments, contrast: Tensor, ridge: RidgeSetting) -> Fit:
    """Fit the features that vary.

    Args:
        features: moments of the features.
        contrast: [C, P] float64 weights of the conditions.
        ridge: setting of the measurement. With "auto", raw activations that are linear in others
            are left out.

    Raises:
        SingularCovarianceError: raw activations are linear in each other, and no ridge separates
            them.
    """
    whole, ridges = features.moments.statistics(contrast), features.ridges(ridge)
    alive, raw = features.alive()
    try:
        fit = _fit(features, whole, alive, raw, ridges)
    except SingularCovarianceError:
        if ridge != AUTO:
            raise
    else:
        if ridge != AUTO or not bool((fit.curve.ridge_share[:raw] > MOSTLY_RIDGE).any()):
            return fit
    linear = alive[:raw]
    kept, lost = independent_features(whole.select(linear), ridges[linear])
    alive = torch.cat([linear[kept], alive[raw:]])
    return replace(_fit(features, whole, alive, len(kept), ridges), lost=lost)


def _fit(
    features: LayerMoments, whole: FoldStatistics, alive: Tensor, raw: int, ridges: Tensor
) -> Fit:
    """Fit as many of the features `alive` as can be used, raw ones first."""
    notes = []
    size = affordable(len(alive), raw, whole.dof)
    if size < len(alive):
        notes.append(f"features limited to {size} of {len(alive)} by the number of samples")
    while True:
        index = alive[:size]
        samples = sample_features(features, index, leverage_samples(features))
        try:
            curve = fisher_curve(replace(whole.select(index), samples=samples), ridges[index])
        except SingularCovarianceError as error:
            if error.feature <= raw:
                raise
            size = error.feature - 1
            notes.append(f"features limited to {size}: the next is linear in these")
        else:
            lost = whole.derivative.new_zeros(whole.derivative.shape[1])
            ridge = ridges[index]
            return Fit(features, whole, index, raw, ridge, curve, lost, tuple(notes))


def affordable(size: int, raw: int, dof: float) -> int:
    """Return how many features the samples can carry: lifted ones only up to half the degrees of
    freedom."""
    return min(size, max(raw, int(dof / 2)))


def leverage_samples(features: LayerMoments) -> int:
    """Return the number of samples for leverages: the same while the dictionary grows."""
    scored = isinstance(features.moments.carried, ScoreMoments)
    numbers = LEVERAGE_NUMBERS * (2 if scored else 1)
    return max(numbers // features.dictionary.size, MIN_LEVERAGE_SAMPLES)


def sample_features(features: LayerMoments, index: Tensor, most: int) -> SampleFeatures | None:
    """Compute the features in index [k] of at most `most` kept samples; None if none are kept."""
    lift = features.leading_lift(index)
    exact = len(index) <= NARROW or features.dictionary.raw_dtype == torch.float64
    dtype = torch.float64 if exact else torch.float32

    def compute(raw: Tensor) -> Tensor:
        return torch.cat([raw.to(dtype), lift(raw.to(lift.weight.dtype)).to(dtype)], 1)

    return features.held.samples(compute, features.moments, index, most)
