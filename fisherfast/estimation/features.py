"""The dictionary of features of a layer's activations (docs/theory.md, 9).

    features = [z | leaky_relu(W z + b) - pilot],      z the standardised activations

The raw activations come first, so that the linear Fisher information is a point on the curve. Half
of the lifted rows use one activation each, half a dense unit-norm mixture, all with a random bias:
without it a lift cannot represent odd non-linear scores (a Laplace location keeps half its
information). Rows are drawn in blocks, each with its own seed, so more features extend the same
lift, on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfast.estimation.dither import HALF_TYPES, dithered
from fisherfast.estimation.pilot import SUBNORMAL, Standardisation
from fisherfast.estimation.ridge import (
    AUTO,
    LIFT_RIDGE,
    RidgeSetting,
    raw_ridge,
)

LIFT_SLOPE = -1.0
"""Slope of the leaky ReLU below zero; -1 is the absolute value |W z + b|.

Together with the raw activations every slope spans the same functions, but with the published 0.7
most of a feature is linear, and the ridge suppresses the small non-linear rest (measured by
`benchmarks/accuracy/dictionary.py`)."""

BIAS_SCALE = 1.0
"""Standard deviation of the biases in units of a standardised activation (same measurement)."""

MIN_LIFT_SHARE = 8
"""A layer wider than max_features gets max_features / 8 lifted features, to detect a plateau."""

MAX_WIDTH = 4096
"""Widest layer whose activations all become features: its covariance takes 2 x 134 MB in float64.
Wider layers are compressed if the data can be read again."""

BLOCK_ROWS = 64
"""Rows of the lift drawn from one seed; the first 64 features do not depend on the total number."""


@dataclass(frozen=True)
class Lift:
    """Random features leaky_relu(weight z + bias) - pilot of raw features z [n, d].

    Attributes:
        weight: [k, d].
        bias: [k].
        pilot: [k], roughly the mean of the lifted features.
        slope: of the leaky ReLU below zero.
    """

    weight: Tensor
    bias: Tensor
    pilot: Tensor
    slope: float = LIFT_SLOPE

    @classmethod
    def none(cls, z: Tensor) -> Lift:
        """Make a lift without features, for raw features like z [n, d]."""
        empty = z.new_empty(0)
        return cls(z.new_empty(0, z.shape[1]), empty, empty)

    def __len__(self) -> int:
        return len(self.bias)

    def __call__(self, z: Tensor) -> Tensor:
        """Compute lifted features [n, k] of raw features [n, d]."""
        return F.leaky_relu(z @ self.weight.T + self.bias, self.slope) - self.pilot

    def slopes(self, z: Tensor) -> Tensor:
        """Compute the derivatives [n, k] of the leaky ReLU at raw features [n, d], at the kink as
        in PyTorch."""
        above = torch.addmm(self.bias, z, self.weight.T) > 0
        return torch.where(above, 1.0, self.slope).to(z)

    def to(self, dtype: torch.dtype) -> Lift:
        """Convert to another dtype."""
        return Lift(self.weight.to(dtype), self.bias.to(dtype), self.pilot.to(dtype), self.slope)

    def leading(self, count: int) -> Lift:
        """Return the first `count` lifted features."""
        return self._part(slice(count))

    def following(self, count: int) -> Lift:
        """Return the lifted features after the first `count`."""
        return self._part(slice(count, None))

    def _part(self, rows: slice) -> Lift:
        return Lift(self.weight[rows], self.bias[rows], self.pilot[rows], self.slope)


class FeatureDictionary:
    """Features [n, k] of the activations [n, d] of one layer.

    Args:
        standardisation: pilot statistics of the layer.
        max_features: desired number of features k. All d activations are always among them (up to
            `MAX_WIDTH`), and at least max_features / 8 lifted features are added.
        dtype: float32 or float64, of the lifted features. Raw features are float64 if
            `standardisation.exact`.
        seed: determines the lift, on every device.
        slope: of the leaky ReLU.
        groups: number of random groups whose signed sums replace the activations; None for none.

    Attributes:
        raw: number of leading features that are linear in the activations.
        size: number of features k.
        kind: "raw + lift", or "sketch" with groups: signed sums of the standardised activations in
            random groups. A sketch gives a valid but loose lower bound.
        lift: the lifted features that follow the raw ones.

    Streaming statistics use `raw_features` and `lift`, so that the features of many samples are
    never in memory; a call computes the features themselves, in 2 n d (k - d) operations.
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
        #: Half a step of each activation [d], in its standard deviations; None if none is tied.
        self.half_steps: Tensor | None = None
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
        offset = offset.maximum(SUBNORMAL / standardisation.rounding * standardisation.scale)
        if groups is not None:
            offset = offset.new_zeros(groups).index_add_(0, self._bucket, offset)
        self._offset = offset
        #: Variance of each feature [k] below which it is rounding error of the subtracted offset.
        self.rounding_variance = torch.cat(
            [(standardisation.rounding * offset).square(), offset.new_zeros(lifted)]
        )

    def raw_features(self, activations: Tensor) -> Tensor:
        """Compute the leading features [n, raw], in `raw_dtype`, of activations [n, d] of any
        floating dtype."""
        mean, scale = self._mean.to(self.raw_dtype), self._scale.to(self.raw_dtype)
        z = torch.sub(activations, mean).to(self.raw_dtype).mul_(scale)
        return self._grouped(z)

    def dithered(
        self, raw: Tensor, activations: Tensor, tangents: Tensor, numbers: Tensor, *key: Any
    ) -> Tensor:
        """Add noise of half a step to raw features [n, d] of rounded activations [n, d] that have a
        non-zero tangent. Those of a sketch mix many activations and are returned unchanged.

        Args:
            raw: from `raw_features`.
            activations: of any floating dtype; the step of half types is that of their rounding.
            tangents: [P, n, d] of the activations.
            numbers: int64 [n] of the samples.
            key: different keys give independent noise.
        """
        if self.kind == "sketch":
            return raw
        size = None if self.half_steps is None else self.half_steps.to(raw)
        if activations.dtype in HALF_TYPES:
            unit = torch.finfo(activations.dtype).eps / 2
            own = unit * activations.abs().to(raw) * self._scale.to(raw)
            size = own if size is None else own.maximum(size)
        return raw if size is None else dithered(raw, size, tangents, numbers, *key)

    def ridge(self, setting: RidgeSetting, variances: Tensor) -> Tensor:
        """Return the ridge [k] of the first k features, relative to their variances [k]."""
        if setting != AUTO:
            return torch.full_like(variances, setting)
        raw = min(self.raw, len(variances))
        noise = self._noise**2 * (self._offset[:raw].square() + variances[:raw])
        ridge = torch.full_like(variances, LIFT_RIDGE)
        ridge[:raw] = raw_ridge(variances[:raw], noise)
        return ridge

    def raw_tangents(self, tangents: Tensor, raw: Tensor | None = None) -> Tensor:
        """Compute the tangents [P, n, raw] of the leading features from those of the activations,
        [P, n, d]. `raw` is the result of `raw_features`, not needed for linear features."""
        return self._grouped(tangents.to(self.dtype) * self._scale.to(self.dtype))

    @property
    def scale(self) -> Tensor:
        """Scale [d] of each activation in the raw features."""
        return self._scale

    def response(self, derivative: Tensor) -> Tensor:
        """Convert the derivative of the mean features [k, P] to that of the mean activations
        [d, P]; not for a sketch."""
        return derivative[: self.raw] / self._scale.to(derivative)[:, None]

    def readout(self, weights: Tensor) -> Tensor:
        """Convert weights of the raw features [raw, P] to those of the activations [d, P]; not for
        a sketch."""
        return weights * self._scale.to(weights)[:, None]

    def __call__(self, activations: Tensor) -> Tensor:
        """Compute all features [n, k] of activations [n, d] of any floating dtype, about their
        pilot."""
        raw = self.raw_features(activations).to(self.dtype)
        return torch.cat([raw, self.lift(raw)], 1)

    def _grouped(self, z: Tensor) -> Tensor:
        """Add up standardised activations [..., d] in the groups of a sketch [..., raw]."""
        if self.kind != "sketch":
            return z
        groups = z.new_zeros(*z.shape[:-1], self.raw)
        return groups.index_add_(-1, self._bucket, z * self._sign.to(z))


def draw_lift(alive: Tensor, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw weights [rows, d] and biases [rows] of the lift, float64 on the CPU.

    Even rows use one activation (every live one in turn, in random order), odd rows a dense mixture
    of unit norm.

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


def mean_of_leaky_relu(bias: Tensor, slope: float) -> Tensor:
    r"""Compute the mean of leaky_relu(b + z), z ~ N(0, 1): the pilot of the lifted features.

    .. math:: a b + (1 - a) (b \Phi(b) + \varphi(b)), \quad a = \text{slope}

    It is exact for Gaussian activations and close enough for others, since it only keeps float32
    sums of products small.
    """
    normal_cdf = 0.5 * (1 + torch.erf(bias / math.sqrt(2)))
    normal_pdf = torch.exp(-0.5 * bias.square()) / math.sqrt(2 * math.pi)
    return slope * bias + (1 - slope) * (bias * normal_cdf + normal_pdf)


def _draw_sketch(d: int, groups: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = _generator(seed, 0)
    bucket = torch.randint(groups, (d,), generator=generator)
    sign = 2.0 * torch.randint(2, (d,), generator=generator) - 1.0
    return bucket, sign


def _generator(seed: int, stream: int) -> torch.Generator:
    """Make a generator, since the global random state is the user's."""
    stride = 1_000_003  # a prime, so that (seed, stream) pairs met in practice do not collide
    return torch.Generator().manual_seed((seed * stride + stream) % 2**64)
