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
from fisherfast.estimation.dither import HALF_TYPES, dithered
from fisherfast.estimation.pilot import Standardisation
from fisherfast.estimation.ridge import (
    AUTO,
    LIFT_RIDGE,
    RidgeSetting,
    raw_ridge,
)

__all__ = ["FeatureDictionary", "Lift"]

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
    return torch.Generator().manual_seed((seed * stride + stream) % 2**64)
