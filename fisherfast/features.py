"""The dictionary of features that a layer's activations are read out with (docs/theory.md, 9).

    features = [z | leaky_relu(W z + b) - pilot],      z the standardised activations

The raw activations come first, so that the linear Fisher information is a point on the curve. Half
of the lifted rows look at one activation each, half at a dense unit-norm mixture, all with a random
bias: without it a lift cannot represent odd non-linear scores (a Laplace location stays at half its
information). Rows are drawn in blocks with a seed of their own, so asking for more features only
appends, on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fisherfast import ops
from fisherfast.dither import HALF_TYPES, StepMeter, dithered
from fisherfast.ridge import (
    AUTO,
    LIFT_RIDGE,
    ROUNDING,
    RidgeSetting,
    raw_ridge,
    relative_rounding,
)

__all__ = ["FeatureDictionary", "Lift", "PilotMoments", "Standardisation"]

LIFT_SLOPE = -1.0
"""Slope of the leaky ReLU below zero; -1 is the absolute value |W z + b|.

Beside the raw activations every slope spans the same functions, but the published 0.7 leaves most
of a feature linear, and the ridge then eats the small non-linear rest (measured by
`benchmarks/dictionary.py`)."""

BIAS_SCALE = 1.0
"""Standard deviation of the biases in units of a standardised activation (same measurement)."""

MIN_LIFT_SHARE = 8
"""A layer wider than max_features gets an eighth as many lifted ones, to judge a plateau by."""

MAX_WIDTH = 4096
"""Widest layer whose activations all become features: its covariance takes 2 x 134 MB in
float64. Wider ones are compressed where the data can be read again."""

BLOCK_ROWS = 64
"""Rows of the lift drawn from one seed; the first 64 features are the same whatever their final
number."""


PILOT_ROWS = 2
"""Samples per activation that tell the condition of a covariance: twice too large from so few."""

PILOT_WIDTH = 256
"""Widest layer whose condition the pilot tells; wider ones are summed in float64."""

FLOAT32_INVERSE = 1e4
"""Largest trace of the inverse correlation matrix whose products may be float32: these are off by
3e-8 of it, which then changes J by less than 1e-3 in its worst direction."""


@dataclass(frozen=True)
class Standardisation:
    """Pilot mean and scale of the activations of one layer: z = (a - mean) * scale.

    Only conditioning depends on the pilot, not the result: features are rescaled by their final
    variance, and an activation that was silent in the pilot but fires later still counts.

    Attributes:
        mean: [d] float64.
        scale: [d] float64, 1 / standard deviation; the layer's median scale where the pilot saw no
            variation.
        alive: [d] bool, activations that varied in the pilot; only these enter the lift.
        rounding: relative spread that the precision of the activations does not resolve.
        noise: spread relative to its size that rounding may add to an activation: `rounding`, or
            one unit in the last place of a half type.
        exact: products of the activations must be of float64.
        steps: [d] float64 between values that are tied, 0 where none are; None for none.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    alive: torch.Tensor
    rounding: float
    noise: float
    exact: bool = True
    steps: torch.Tensor | None = None


class PilotMoments:
    """Mean and variance of the first samples of a layer, in float64, a batch at a time (Chan's
    update).

    Args:
        units: in the last place, that the rounding of an activation may be.
        ties: finds steps, where the samples carry tangents.
    """

    def __init__(self, units: int = ROUNDING, ties: StepMeter | None = None) -> None:
        self._units = units
        self._ties = ties
        self._steps: torch.Tensor | None = None
        self._count = 0
        self._mean: torch.Tensor | None = None
        self._square = torch.zeros(())
        self._rounding = 0.0
        self._noise = 0.0
        self._rows: list[torch.Tensor] = []
        self._told: list[bool | None] = []

    def update(self, activations: torch.Tensor, moving: torch.Tensor | None = None) -> None:
        """Add activations [n, d]; moving bool [n, d]: those with a derivative, if that is known."""
        if self._ties is not None:
            self._ties.update(activations, moving)
        pilot = activations.double()
        precision = torch.float64 if activations.dtype == torch.float64 else torch.float32
        self._rounding = max(self._rounding, ROUNDING * torch.finfo(precision).eps)
        self._noise = max(self._noise, relative_rounding(activations.dtype, self._units))
        mean = pilot.mean(0)
        self._add(len(pilot), mean, (pilot - mean).square().sum(0))
        missing = PILOT_ROWS * pilot.shape[1] - sum(map(len, self._rows))
        if pilot.shape[1] <= PILOT_WIDTH and missing > 0 and precision == torch.float32:
            self._rows.append(activations[:missing].clone())

    def _add(self, n: int, mean: torch.Tensor, square: torch.Tensor) -> None:
        if self._mean is None:
            self._count, self._mean, self._square = n, mean, square
            return
        total = self._count + n
        delta = mean - self._mean
        self._square = self._square + square + delta.square() * (self._count * n / total)
        self._mean = self._mean + delta * (n / total)
        self._count = total

    @property
    def count(self) -> int:
        """Samples that were added."""
        return self._count

    @property
    def rounding(self) -> float:
        """Relative spread that the precision of what was added does not resolve."""
        return self._rounding

    def parts(self) -> torch.Tensor:
        """Mean, sum of squared deviations and steps [3, d] of what was added."""
        if self._mean is None:
            raise ValueError("pilot must hold at least one batch, got none")
        steps = self._found_steps()
        steps = torch.zeros_like(self._mean) if steps is None else steps
        return torch.stack([self._mean, self._square, steps])

    def _found_steps(self) -> torch.Tensor | None:
        """[d] float64 between values that are tied, 0 where none are; None where none were
        sought."""
        return self._steps if self._ties is None else self._ties.steps()

    @property
    def noise(self) -> float:
        """Spread relative to its size that rounding may add to an activation."""
        return self._noise

    def merge(
        self,
        count: int,
        parts: torch.Tensor,
        rounding: float,
        noise: float,
        ill_conditioned: bool | None,
    ) -> None:
        """Add other samples, of which only number, `parts` and the rest are known."""
        self._told.append(ill_conditioned)
        self._rounding = max(self._rounding, rounding)
        self._noise = max(self._noise, noise)
        self._add(count, parts[0], parts[1])
        self._steps = parts[2] if self._steps is None else self._steps.maximum(parts[2])

    def standardisation(self) -> Standardisation:
        """Mean and scale of what was added."""
        if self._mean is None:
            raise ValueError("pilot must hold at least one batch, got none")
        std = (self._square / self._count).sqrt()
        alive = std > self._rounding * self._mean.abs()
        typical = std[alive].median() if bool(alive.any()) else std.new_ones(())
        scale = torch.where(alive, std, typical).reciprocal()
        told = self._told or [self.ill_conditioned()]
        exact = any(told) or all(one is None for one in told)
        return Standardisation(
            self._mean, scale, alive, self._rounding, self._noise, exact, self._found_steps()
        )

    def ill_conditioned(self) -> bool | None:
        """Whether float32 products do not carry the covariance; None for too few samples."""
        rows = sum(map(len, self._rows))
        if self._mean is None or not 0 < rows >= PILOT_ROWS * len(self._mean):
            return None
        z = torch.cat(self._rows).double()
        z = z - z.mean(0)
        size = z.square().mean(0).sqrt()
        alive = size > self._rounding * self._mean.abs()
        z = z[:, alive] / size[alive]
        correlation = z.T @ z / len(z)
        correlation.diagonal().add_(0.01 / FLOAT32_INVERSE)  # positive definite, and far above
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation))
        return float(inverse.diagonal().sum()) > FLOAT32_INVERSE


@dataclass(frozen=True)
class Lift:
    """Random features leaky_relu(weight z + bias) - pilot of raw ones z [n, d].

    Attributes:
        weight: [k, d].
        bias: [k].
        pilot: [k], roughly the mean of the lifted features.
        slope: of the leaky ReLU below zero.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    pilot: torch.Tensor
    slope: float = LIFT_SLOPE

    @classmethod
    def none(cls, z: torch.Tensor) -> Lift:
        """No lifted feature of raw ones like z [n, d]."""
        empty = z.new_empty(0)
        return cls(z.new_empty(0, z.shape[1]), empty, empty)

    def __len__(self) -> int:
        return len(self.bias)

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """Lifted features [n, k] of raw ones [n, d]."""
        return ops.lift(z @ self.weight.T, self.bias, self.pilot, slope=self.slope)[0]

    def slopes(self, z: torch.Tensor) -> torch.Tensor:
        """Derivatives [n, k] of the leaky ReLU at raw features [n, d]: PyTorch's at the kink."""
        above = torch.addmm(self.bias, z, self.weight.T) > 0
        return torch.where(above, 1.0, self.slope).to(z)

    def to(self, dtype: torch.dtype) -> Lift:
        """The same features in another dtype."""
        return Lift(self.weight.to(dtype), self.bias.to(dtype), self.pilot.to(dtype), self.slope)

    def leading(self, count: int) -> Lift:
        """The first `count` lifted features."""
        return self._part(slice(count))

    def following(self, count: int) -> Lift:
        """The lifted features behind the first `count`."""
        return self._part(slice(count, None))

    def _part(self, rows: slice) -> Lift:
        return Lift(self.weight[rows], self.bias[rows], self.pilot[rows], self.slope)


class FeatureDictionary:
    """Features [n, k] of the activations [n, d] of one layer.

    Args:
        standardisation: pilot statistics of the layer.
        max_features: number of features k aimed at. All d activations are always among them (up to
            `MAX_WIDTH`), and at least max_features / 8 lifted ones are added.
        dtype: float32 or float64, of the lifted features. Raw ones are float64 where the
            standardisation says so.
        seed: fixes the lift, on every device.
        slope: of the leaky ReLU.
        groups: random groups whose signed sums take the place of the activations; None for none.

    Attributes:
        raw: number of leading features that are linear in the activations.
        size: number of features k.
        kind: "raw + lift", or "sketch" with groups: signed sums of its
            standardised activations in random groups. A sketch is a valid but loose lower bound.

        lift: the lifted features that follow the raw ones.

    Streaming statistics take `raw_features` and `lift`, and never have the features of many
    samples; a call gives the features themselves, 2 n d (k - d) operations.
    """

    def __init__(
        self,
        standardisation: Standardisation,
        max_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        slope: float = LIFT_SLOPE,
        groups: int | None = None,
    ) -> None:
        device = standardisation.mean.device
        d = len(standardisation.mean)
        self.dtype = dtype
        self._mean, self._scale = standardisation.mean, standardisation.scale
        #: Half a step of each activation [d], in its standard deviations; None where none is tied.
        self.half_steps: torch.Tensor | None = None
        if standardisation.steps is not None and bool(standardisation.steps.any()):
            self.half_steps = standardisation.steps * standardisation.scale / 2
        self._noise = standardisation.noise
        self.raw_dtype = torch.float64 if standardisation.exact else dtype
        self.kind = "raw + lift" if groups is None else "sketch"
        if groups is not None:
            self.raw = groups
            self._bucket, self._sign = (t.to(device) for t in _draw_sketch(d, groups, seed))
        else:
            self.raw = d
        alive = standardisation.alive
        lifted = 0
        if self.kind != "sketch" and bool(alive.any()):
            lifted = max(max_features - d, max_features // MIN_LIFT_SHARE)
        self.size = self.raw + lifted
        weight, bias = draw_lift(alive.cpu(), lifted, seed)
        weight = weight if lifted else weight.new_empty(0, self.raw)
        pilot = mean_of_leaky_relu(bias, slope)
        self.lift = Lift(
            weight.to(device, dtype), bias.to(device, dtype), pilot.to(device, dtype), slope
        )
        offset = (standardisation.mean * standardisation.scale).abs()
        if self.kind == "sketch":
            offset = self._group(offset[None])[0]
        self._offset = offset
        #: Variance of each feature [k] below which it is rounding of what was subtracted from it.
        self.rounding_variance = torch.cat(
            [(standardisation.rounding * offset).square(), offset.new_zeros(lifted)]
        )

    def raw_features(self, activations: torch.Tensor) -> torch.Tensor:
        """The leading features [n, raw] of activations [n, d] of any floating dtype, in
        `raw_dtype`."""
        mean, scale = self._mean.to(self.raw_dtype), self._scale.to(self.raw_dtype)
        z = torch.sub(activations, mean).to(self.raw_dtype).mul_(scale)
        return self._group(z * self._sign.to(z)) if self.kind == "sketch" else z

    def dithered(
        self,
        raw: torch.Tensor,
        activations: torch.Tensor,
        tangents: torch.Tensor,
        numbers: torch.Tensor,
        *key: Any,
    ) -> torch.Tensor:
        """Raw features [n, d] of rounded activations [n, d], with noise of half a step where they
        move; those of a sketch mix many, and stay.

        Args:
            raw: from `raw_features`.
            activations: of any floating dtype; those of a half type are dithered by its rounding.
            tangents: [P, n, d] theirs.
            numbers: int64 [n] of the samples.
            key: tells streams of noise apart.
        """
        if self.kind == "sketch":
            return raw
        size = None if self.half_steps is None else self.half_steps.to(raw)
        if activations.dtype in HALF_TYPES:
            unit = torch.finfo(activations.dtype).eps / 2
            own = unit * activations.abs().to(raw) * self._scale.to(raw)
            size = own if size is None else own.maximum(size)
        return raw if size is None else dithered(raw, size, tangents, numbers, *key)

    def ridge(self, setting: RidgeSetting, variances: torch.Tensor) -> torch.Tensor:
        """The ridge [k] of the first k features, relative to their variances [k]."""
        if setting != AUTO:
            return torch.full_like(variances, setting)
        raw = min(self.raw, len(variances))
        noise = self._noise**2 * (self._offset[:raw].square() + variances[:raw])
        ridge = torch.full_like(variances, LIFT_RIDGE)
        ridge[:raw] = raw_ridge(variances[:raw], noise)
        return ridge

    def raw_tangents(self, tangents: torch.Tensor, raw: torch.Tensor | None = None) -> torch.Tensor:
        """Tangents [P, n, raw] of the leading features, of tangents [P, n, d] of the activations.
        `raw` is what `raw_features` returned: not needed where they are linear."""
        z = tangents.to(self.dtype) * self._scale.to(self.dtype)
        if self.kind != "sketch":
            return z
        grouped = self._group((z * self._sign.to(self.dtype)).flatten(0, 1))
        return grouped.unflatten(0, z.shape[:2])

    def response(self, derivative: torch.Tensor) -> torch.Tensor:
        """Derivative [d, P] of the mean activations from that of the mean features [k, P]; not for
        a sketch."""
        return derivative[: self.raw] / self._scale.to(derivative)[:, None]

    def __call__(self, activations: torch.Tensor) -> torch.Tensor:
        """All features [n, k] of activations [n, d] of any floating dtype, about their pilot."""
        raw = self.raw_features(activations).to(self.dtype)
        return torch.cat([raw, self.lift(raw)], 1)

    def _group(self, z: torch.Tensor) -> torch.Tensor:
        groups = z.new_zeros(len(z), self.raw)
        return groups.index_add_(1, self._bucket, z)


def draw_lift(alive: torch.Tensor, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, d] and biases [rows] of the lift, float64 on the CPU.

    Even rows read one activation (every live one in turn, in random order), odd rows a dense
    mixture of unit norm.

    Args:
        alive: [d] bool; weights of the others are zero.
        rows: number of lifted features.
        seed: two calls with the same seed agree in all rows that both have.
    """
    axes = alive.nonzero()[:, 0]
    weight = torch.zeros(rows, len(alive), dtype=torch.float64)
    bias = torch.zeros(rows, dtype=torch.float64)
    if rows == 0:
        return weight, bias
    order = axes[torch.randperm(len(axes), generator=_generator(seed, 0))]
    for start in range(0, rows, BLOCK_ROWS):
        generator = _generator(seed, 1 + start // BLOCK_ROWS)
        dense = torch.randn(BLOCK_ROWS // 2, len(axes), generator=generator, dtype=torch.float64)
        dense /= dense.norm(dim=1, keepdim=True)
        block = torch.zeros(BLOCK_ROWS, len(alive), dtype=torch.float64)
        turn = (start // 2 + torch.arange(BLOCK_ROWS // 2)) % len(order)
        block[torch.arange(0, BLOCK_ROWS, 2), order[turn]] = 1.0
        block[1::2, axes] = dense
        shift = BIAS_SCALE * torch.randn(BLOCK_ROWS, generator=generator, dtype=torch.float64)
        count = min(BLOCK_ROWS, rows - start)
        weight[start : start + count] = block[:count]
        bias[start : start + count] = shift[:count]
    return weight, bias


def mean_of_leaky_relu(bias: torch.Tensor, slope: float) -> torch.Tensor:
    r"""Mean of leaky_relu(b + z), z ~ N(0, 1): the pilot that lifted features are centred about.

    .. math:: a b + (1 - a) (b \Phi(b) + \varphi(b)), \quad a = \text{slope}

    Exact for Gaussian activations and near enough for any: it only keeps float32 sums of products
    small.
    """
    normal_cdf = 0.5 * (1 + torch.erf(bias / math.sqrt(2)))
    normal_pdf = torch.exp(-0.5 * bias.square()) / math.sqrt(2 * math.pi)
    return slope * bias + (1 - slope) * (bias * normal_cdf + normal_pdf)


def _draw_sketch(d: int, groups: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = _generator(seed, 0)
    bucket = torch.randint(groups, (d,), generator=generator)
    sign = 2.0 * torch.randint(2, (d,), generator=generator) - 1.0
    return bucket, sign


def _generator(seed: int, stream: int) -> torch.Generator:
    """An own random stream: the global one is the user's."""
    stride = 1_000_003  # a prime, so that (seed, stream) pairs met in practice do not collide
    return torch.Generator().manual_seed(seed * stride + stream)
