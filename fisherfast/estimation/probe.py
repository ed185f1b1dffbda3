r"""A small network that predicts the score from the activations of a layer, for layers where a
random lift is too weak. Its outputs are additional features for samples it was not trained on.

Among all functions f of the activations the score s has the largest linear Fisher information, and

.. math:: E|f|^2 - 2\, \mathrm{tr}\, \partial_\theta E[f] = E|f - s|^2 - \mathrm{tr}\, I

is smallest for f = s. The score is not always known, but every source gives the derivative of a
mean: so the left side is minimised. For samples with a score this is a regression on it; for C
conditions with contrast w it is a regression on the targets C w, whose mean at equal activations is
the score; for tangents each sample becomes a pair of conditions, half a step to either side of it.
See docs/training.md, "A network as probe", for the gain from each choice below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fisherfast import ops
from fisherfast.estimation.features import FeatureDictionary, Lift
from fisherfast.estimation.ridge import AUTO, LIFT_RIDGE, RidgeSetting

WIDTH = 128
"""Units of each hidden layer."""

BLOCKS = 3
"""Hidden layers after the first, each added to its input."""

STEPS = 4000
"""Most optimisation steps, which bounds the cost of a probe for any number of samples."""

LEAST_STEPS = 300
"""Fewest optimisation steps."""

EPOCHS = 20
"""Passes over the kept samples, if the steps are between these two limits."""

BATCH_ROWS = 512
"""Samples of a step; fewer if each gives more than two points."""

BATCH_POINTS = 1024
"""Activations that a step evaluates, over all conditions."""

LEARNING_RATE = 6e-3
"""Peak learning rate for a known score; it rises in a warm-up and falls to zero as a cosine."""

CAREFUL_RATE = 3e-3
"""The same for an unknown score."""

WARM_UP = 0.05
"""Fraction of the steps in which the learning rate rises."""

LARGEST_GRADIENT = 1.0
"""Norm above which gradients are clipped."""

NOISE = 0.05
"""Standard deviation of the noise added to whitened activations, the same for a pair, if the score
is not known: without it the loss favours a network that is steep at the samples and flat between
them."""

DECAY = 1.0
"""Weight decay, for the same reason."""

DECAY_SAMPLES = 50_000
"""Number of samples above which the weight decay falls as one over their number."""

VALIDATION = 8
"""Every eighth kept sample is held out, to find the best step."""

EVALUATIONS = 20
"""Number of evaluations on the held-out samples."""

PATIENCE = 9
"""Evaluations without improvement after which training ends."""

LEAST_GAIN = 1e-3
"""Least improvement that counts, relative to the loss."""

PAIR_STEP = 0.4
"""Separation of the pair made of a sample with tangents, in units of 1 / sqrt(J)."""

WHITENING_RIDGE = 1e-3
"""Least ridge of the whitened activations; larger for few samples."""

LIMIT = 10.0
"""Standard deviations at which activations are clipped for a probe: one far outlier would dominate
the gradients. The other features are not clipped."""

TILE_ROWS = 4096
"""Samples with hidden activations in memory at a time, outside training: 2 MB per layer."""


@dataclass(frozen=True)
class Probe:
    """A network of `BLOCKS` residual layers with GELU, in parallel with a linear readout.

    Attributes:
        enter: weight [w, d] and bias [w] of the first layer.
        blocks: weights [w, w] and biases [w] of the residual layers.
        leave: weight [P, w] and bias [P] of the last layer.
        skip: [P, d] linear readout of the raw features.
    """

    enter: tuple[Tensor, Tensor]
    blocks: tuple[tuple[Tensor, Tensor], ...]
    leave: tuple[Tensor, Tensor]
    skip: Tensor

    def __len__(self) -> int:
        return len(self.skip)

    def parameters(self) -> list[Tensor]:
        """Return all tensors, the weights of layers first."""
        layers = (self.enter, *self.blocks, self.leave)
        return [w for w, _ in layers] + [b for _, b in layers] + [self.skip]

    def to(self, dtype: torch.dtype) -> Probe:
        """Convert to another dtype."""
        return self.like([parameter.to(dtype) for parameter in self.parameters()])

    def like(self, parameters: list[Tensor]) -> Probe:
        """Make a network with other `parameters`."""
        layers = list(zip(parameters, parameters[BLOCKS + 2 : -1], strict=False))
        return Probe(layers[0], tuple(layers[1:-1]), layers[-1], parameters[-1])

    def __call__(self, z: Tensor) -> Tensor:
        """Compute the outputs [n, P] from raw features [n, d], roughly the score in units of its
        standard deviation."""
        return torch.cat([self.read(part.clamp(-LIMIT, LIMIT)) for part in z.split(TILE_ROWS)])

    def read(self, z: Tensor) -> Tensor:
        """Compute the outputs [..., P] from clipped features [..., d]."""
        hidden = functional.gelu(functional.linear(z, *self.enter))
        for block in self.blocks:
            hidden = hidden + functional.gelu(functional.linear(hidden, *block))
        return functional.linear(hidden, *self.leave) + z @ self.skip.T

    def tangents(self, z: Tensor, tangents: Tensor) -> Tensor:
        """Compute the tangents [Q, n, P] of the outputs from raw features z [n, d] and their
        tangents [Q, n, d]."""
        rows = max(TILE_ROWS // (1 + len(tangents)), 1)
        parts = zip(z.split(rows), tangents.split(rows, 1), strict=True)
        return torch.cat([self._moved(part, moved) for part, moved in parts], 1)

    def _moved(self, z: Tensor, tangents: Tensor) -> Tensor:
        moved = tangents * (z.abs() <= LIMIT)
        read = torch.cat([z.clamp(-LIMIT, LIMIT)[None], moved])
        hidden = _dual_layer(read, *self.enter)
        for block in self.blocks:
            hidden = hidden + _dual_layer(hidden, *block)
        return hidden[1:] @ self.leave[0].T + moved @ self.skip.T


def _dual_layer(stack: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer and GELU to a stack of primal and tangents [1 + Q, n, w]."""
    stack = stack @ weight.T
    stack[0] += bias
    return ops.dual_activation(stack, "gelu")


class ProbedDictionary(FeatureDictionary):
    """The features of another dictionary, with the outputs of a probe between raw and lifted ones.

    Args:
        base: raw and lifted features.
        probe: takes the raw features.
        lifted: number of lifted features.
    """

    def __init__(self, base: FeatureDictionary, probe: Probe, lifted: int) -> None:
        lift, outputs = base.lift.leading(lifted), len(probe)
        self.base, self.probe = base, probe.to(base.dtype)
        self.dtype, self.kind = base.dtype, "probe"
        self.linear, self.raw = base.raw, base.raw + outputs
        self.size = self.raw + len(lift)
        padded = functional.pad(lift.weight, (0, outputs))
        self.lift = Lift(padded, lift.bias, lift.pilot, lift.slope)
        rounding = base.rounding_variance
        self.rounding_variance = torch.cat(
            [rounding[: base.raw], rounding.new_zeros(self.size - base.raw)]
        )

    def raw_features(self, activations: Tensor) -> Tensor:
        """Compute the features [n, raw] before the lift: linear ones and the probe's outputs."""
        z = self.base.raw_features(activations)
        return torch.cat([z, self.probe(z.to(self.dtype)).to(z)], 1)

    def ridge(self, setting: RidgeSetting, variances: Tensor) -> Tensor:
        """Return the ridge [k] of the base; outputs of the probe have that of lifted features."""
        if setting != AUTO:
            return torch.full_like(variances, setting)
        ridge = torch.full_like(variances, LIFT_RIDGE)
        ridge[: self.linear] = self.base.ridge(setting, variances[: self.linear])
        return ridge

    def raw_tangents(self, tangents: Tensor, raw: Tensor | None = None) -> Tensor:
        """Compute the tangents [P, n, raw] of `raw`, the result of `raw_features`."""
        if raw is None:
            raise ValueError("raw must be given: the tangents of a network depend on its input")
        dz = self.base.raw_tangents(tangents)
        z = raw[:, : self.linear].to(self.dtype)
        return torch.cat([dz, self.probe.tangents(z, dz)], 2)


@dataclass(frozen=True)
class Regression:
    """The training data of a probe: each sample gives some points with targets.

    Attributes:
        z: [n, C, d] raw features under each condition.
        targets: [n or 1, C, P] regression targets of the outputs, per unit of theta.
        tangents: [n, P, d] of the raw features (C = 1); then `targets` are not used.
    """

    z: Tensor
    targets: Tensor
    tangents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.z)

    @property
    def exact(self) -> bool:
        """Whether the targets are the score, so that the loss favours no steep network."""
        return len(self.targets) > 1

    def points(self) -> int:
        """Return the number of points of one sample."""
        return self.z.shape[1] if self.tangents is None else 2 * self.tangents.shape[1]

    def batch(self, rows: Tensor | slice, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the points [m, C, d] and targets [m or 1, C, P] of some samples.

        Args:
            rows: of the samples.
            scale: [P] unit of the outputs, about sqrt(J).
        """
        if self.tangents is None:
            targets = self.targets[rows] if self.exact else self.targets
            return self.z[rows], targets / scale
        half = self.tangents[rows] * (PAIR_STEP / 2 / scale)[:, None]
        points = torch.cat([self.z[rows] - half, self.z[rows] + half], 1)
        weight = torch.eye(len(scale)).to(scale) * (2 * len(scale) / PAIR_STEP)
        return points, torch.cat([-weight, weight])[None]


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        probe: None if the loss on held-out samples did not improve.
        steps: number of steps taken.
        rows: number of training samples per condition.
        diverged: the loss was not finite.
    """

    probe: Probe | None
    steps: int
    rows: int
    diverged: bool = False


def train_probe(
    regression: Regression,
    covariance: Tensor,
    readout: Tensor,
    scale: Tensor,
    *,
    dof: float,
    seed: int,
) -> Trained:
    """Train a probe on some samples, and keep the step that was best on every eighth of them.

    Args:
        regression: the samples.
        covariance: [d, d] of the raw features; zero for features to ignore.
        readout: [d, P] linear prediction of the score that training starts from.
        scale: [P] approximate standard deviation of the score.
        dof: degrees of freedom of the covariance.
        seed: of weights, order and noise. The global random state is not used.

    Cost: up to `STEPS` steps of `BATCH_POINTS` points, 6 w (d + 3 w) operations per point.
    """
    device = regression.z.device.type
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        whitening = _whitening(covariance, max(WHITENING_RIDGE, len(covariance) / dof))
        mean = regression.z.clamp(-LIMIT, LIMIT).mean((0, 1)).double()
        return _Training(regression, whitening, mean, readout, scale, seed).run()


def _whitening(covariance: Tensor, ridge: float) -> Tensor:
    """Compute M [d, m] with Cov(M^T z) = 1, apart from the ridge, for the m features that vary."""
    variance = covariance.diagonal()
    alive = (variance > 0).nonzero()[:, 0]
    scale = variance[alive].rsqrt()
    correlation = scale[:, None] * covariance[alive][:, alive] * scale
    eye = torch.eye(len(alive), dtype=covariance.dtype, device=covariance.device)
    factor = torch.linalg.cholesky((correlation + ridge * eye) / (1 + ridge))
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    whitening = covariance.new_zeros(len(covariance), len(alive))
    whitening[alive] = scale[:, None] * inverse.T
    return whitening


class _Training:
    """The state of one training: the network in whitened coordinates, its samples and generator."""

    def __init__(
        self,
        regression: Regression,
        whitening: Tensor,
        mean: Tensor,
        readout: Tensor,
        scale: Tensor,
        seed: int,
    ) -> None:
        self._regression, self._scale = regression, scale.float()
        self._whitening, self._mean = whitening, mean
        self._device = regression.z.device
        self._random = torch.Generator(self._device).manual_seed(seed % 2**64)
        held_out = torch.arange(len(regression), device=self._device) % VALIDATION == 0
        self._train_rows = (~held_out).nonzero()[:, 0]
        self._test_rows = held_out.nonzero()[:, 0]
        start = torch.linalg.lstsq(whitening, readout / scale).solution
        self._probe = self._initial(start.T.float())

    def run(self) -> Trained:
        """Train, and return the network that was best on the held-out samples."""
        points = self._regression.points()
        rows = min(BATCH_ROWS, max(BATCH_POINTS // points, 1), len(self._train_rows))
        total = round(EPOCHS * len(self._train_rows) / rows)
        total = min(max(total, LEAST_STEPS), STEPS)
        parameters = [p.requires_grad_() for p in self._probe.parameters()]
        probe = self._probe.like(parameters)
        exact = self._regression.exact
        decay = DECAY * min(DECAY_SAMPLES / len(self._train_rows), 1.0)
        rate, decay = (LEARNING_RATE, 0.0) if exact else (CAREFUL_RATE, decay)
        optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
        best, kept, since, step = self._held_out(probe), None, 0, 0
        for step, batch in enumerate(self._batches(rows, total), start=1):
            for group in optimiser.param_groups:
                group["lr"] = rate * schedule(step / total)
            optimiser.zero_grad()
            self._loss(probe, batch, noisy=True).backward()
            torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
            optimiser.step()
            if step % max(total // EVALUATIONS, 1) and step < total:
                continue
            value, since = self._held_out(probe), since + 1
            if not math.isfinite(value):
                return Trained(None, step, len(self._train_rows), diverged=True)
            if value < best - LEAST_GAIN * abs(best):
                best, kept, since = value, [p.detach().clone() for p in parameters], 0
            if since >= PATIENCE:
                break
        found = None if kept is None else self._unwhitened(self._probe.like(kept))
        return Trained(found, step, len(self._train_rows))

    def _initial(self, skip: Tensor) -> Probe:
        """Draw random weights of variance 2 / inputs, with a last layer of zeros."""

        def layer(outputs: int, inputs: int, gain: float) -> tuple[Tensor, Tensor]:
            weight = torch.randn(outputs, inputs, generator=self._random, device=self._device)
            return weight * (gain / inputs) ** 0.5, weight.new_zeros(outputs)

        blocks = tuple(layer(WIDTH, WIDTH, 1 / BLOCKS) for _ in range(BLOCKS))
        outputs, inputs = skip.shape
        return Probe(layer(WIDTH, inputs, 2.0), blocks, layer(outputs, WIDTH, 0.0), skip.clone())

    def _batches(self, rows: int, total: int) -> Iterator[Tensor]:
        """Yield the rows of each step, in a new random order for each pass over all rows."""
        order, start = self._train_rows[:0], 0
        for _ in range(total):
            if start + rows > len(order):
                shuffled = torch.randperm(
                    len(self._train_rows), generator=self._random, device=self._device
                )
                order, start = self._train_rows[shuffled], 0
            yield order[start : start + rows]
            start += rows

    def _loss(self, probe: Probe, rows: Tensor, *, noisy: bool) -> Tensor:
        """Compute the mean of f^2 - 2 f t."""
        points, targets = self._regression.batch(rows, self._scale)
        white = self._whitened(points)
        if noisy and not self._regression.exact:
            shape = (len(white), 1, white.shape[2])
            draw = torch.randn(shape, generator=self._random, device=self._device)
            white = white + NOISE * draw
        out = probe.read(white)
        return (out.square() - 2 * out * targets).sum(-1).mean()

    def _held_out(self, probe: Probe) -> float:
        """Compute the loss on the held-out samples."""
        with torch.no_grad():
            parts = self._test_rows.split(max(TILE_ROWS // self._regression.points(), 1))
            losses = [self._loss(probe, rows, noisy=False) * len(rows) for rows in parts]
            return float(torch.stack(losses).sum()) / len(self._test_rows)

    def _whitened(self, points: Tensor) -> Tensor:
        cut = points.clamp(-LIMIT, LIMIT) - self._mean.float()
        return cut @ self._whitening.float()

    def _unwhitened(self, probe: Probe) -> Probe:
        """Convert to a network for raw features, with whitening and mean absorbed in its layers."""
        weight, bias = (tensor.double() for tensor in probe.enter)
        weight, skip = weight @ self._whitening.T, probe.skip.double() @ self._whitening.T
        last, constant = probe.leave
        return Probe(
            (weight.float(), (bias - weight @ self._mean).float()),
            probe.blocks,
            (last, (constant.double() - skip @ self._mean).float()),
            skip.float(),
        )


def schedule(progress: float) -> float:
    """Return the learning rate in units of its peak, at a progress between 0 and 1."""
    return min(progress / WARM_UP, 1.0) * (1 + math.cos(math.pi * progress)) / 2
