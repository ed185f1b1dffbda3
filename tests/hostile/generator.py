"""Random problems with a closed form: noise moved by theta, affine layers.

    x = m + B (z + V theta),  z ~ N(0, 1_d),  I = V^T V at the input and after each layer

B B^T is the covariance of x and B V the derivative of its mean. An invertible affine layer W
replaces B by W B and leaves V, and so the Fisher information, as they are. Gaussian noise has
linear Fisher information alone; that of other noise (distributions.py) lies in known bounds.
Samples may also be rounded, sorted, or depend on each other.

`from_seed` draws a problem from the ranges below; the suite takes a few seeds, a long run counts
through thousands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from hostile import distributions
from hostile.distributions import SOURCES_OF, Distribution, Noise
from hostile.structure import Structure

import fisherfast as ff

Order = Callable[[int], np.ndarray]

DIMENSIONS = (1, 60)
PARAMETERS = (1, 4)
SAMPLES = (100.0, 20_000.0)  # of each condition
CONDITIONS = (1.0, 1e8)  # of the covariance of the data, before their units
LAYERS = (0, 2)
LAYER_CONDITIONS = (1.0, 1e6)  # of a weight that is not of the whitening kind
UNIT_DECADES = (0.0, 3.0)  # units of activations lie within 10^-u to 10^u
OFFSETS = (0.1, 100.0)  # means of activations in their standard deviations
CORRELATIONS = (0.0, 0.95)  # of the parameters: how much they share of the direction that moves
STEPS = {
    # dtheta sqrt(I): half of it is at most 0.25 (the step then adds less than 0.4 % to J) for
    # independent conditions, where a smaller one drowns in noise, and 0.1 for pairs.
    "independent": (0.2, 0.5),
    "paired": (0.02, 0.2),
}
SOURCES = ("pathwise", "score", "paired", "independent")
SPECTRA = ("spread", "one small", "one large")
DIRECTIONS = ("any", "smallest", "largest", "raw")
KINDS = ("random", "squeezing", "whitening")
TWINS = ("unit", "permutation")
FEATURES = (128, 256, 512)
RAW_ONLY = 1  # features: the activations alone ...
NARROW = 7  # ... of so many, at most
DISTRIBUTIONS = ("Gaussian",) * 9 + distributions.KINDS[1:] + tuple(SOURCES_OF)[2:] * 2
LATTICE = (0.01, 1.0)  # steps of rounded activations in their standard deviations
ORDERS = ("any",) * 9 + ("value", "blocks", "score")  # what a file is sorted by
BLOCKS = 8
COPIES = ("none",) * 4 + ("twice", "antithetic")  # of samples, Gaussian and in any order
GROUPED = ("neighbours", "far", "unsaid")  # how far copies lie, with groups= or without
TESTED = 1000  # samples among which a dependence that is not said is found
FOLDS = 16  # of the library, by default
LARGE = 16_000  # samples, over conditions and tangents, from which the least features are used


@dataclass(frozen=True)
class Layer:
    """An invertible affine layer.

    Attributes:
        kind: "random"; "squeezing", its small singular values where the information is; or
            "whitening", the inverse root of the covariance that it receives.
        condition: of the weight (unused by "whitening").
        units: decades u, rows are scaled by 10^-u to 10^u.
        standardised: the weight expects inputs of unit variance and allows for their units.
    """

    kind: str
    condition: float
    units: float
    standardised: bool


@dataclass(frozen=True)
class Problem:
    """A problem and how it is measured; everything else follows from these values, which are those
    of an easy problem.

    ``repr`` is Python source that builds it again.
    """

    seed: int = 3
    source: str = "pathwise"
    dtype: str = "float64"
    dim: int = 3
    parameters: int = 1
    samples: int = 4000
    condition: float = 4.0
    spectrum: str = "spread"
    rotated: bool = False
    direction: str = "any"
    correlation: float = 0.0
    units: float = 1.0
    offset: float = 1.0
    step: float = 0.2
    layers: tuple[Layer, ...] = (Layer("random", 3.0, 1.0, True),)
    features: int = 128
    twin: str = "unit"
    distribution: str = "Gaussian"
    lattice: float = 0.0
    order: str = "any"
    copies: str = "none"
    grouped: str = "neighbours"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @cached_property
    def structure(self) -> Structure:
        return Structure(self)

    @cached_property
    def noises(self) -> Distribution:
        """Of the components before they are mixed."""
        rng = np.random.default_rng([self.seed, 0, 1])
        kind = "Gaussian" if self.distribution == "lattice" else self.distribution
        return distributions.of(kind, rng, self.dim, self.samples, self.source)

    @property
    def linear(self) -> np.ndarray:
        """Linear Fisher information [P, P] float64 in 1/theta^2, the same for every layer."""
        return self._weighed(self.noises.linear)

    @property
    def least(self) -> np.ndarray:
        """Of the linear information what must be found [P, P]: rounding and its dither add a third
        of the square of a step, and the covariance of antithetic groups is taken too large."""
        if self.lattice:
            B = self.structure.factors[0] / self.deviations[:, None]
            A = B @ self.structure.signal
            return A.T @ np.linalg.solve(B @ B.T + self.lattice**2 / 3 * np.eye(self.dim), A)
        if self.copies == "antithetic":
            return self.linear * max(1 - FOLDS / (self.samples // 2), 0)
        return self.linear

    @property
    def information(self) -> np.ndarray:
        """What J must not exceed [P, P]: I, or a bound; the linear information, where the
        activations are all features."""
        if self.features == RAW_ONLY or self.distribution == "Gaussian":
            return self.linear
        # (p+ - p-)^2 / (p+ + p-) is below I, but the covariance within the conditions is smaller
        finite = 1 - self.step**2 / 4 if self.source in STEPS else 1.0
        return self._weighed(self.noises.full) / finite

    @property
    def dtheta(self) -> np.ndarray:
        """Full separation of the conditions [P]: `step` in units of the information."""
        full = self._weighed(self.noises.full)
        return self.step / np.sqrt(np.diag(full if np.isfinite(full).all() else self.linear))

    @property
    def deviations(self) -> np.ndarray:
        """Of the input [d]."""
        return np.linalg.norm(self.structure.factors[0], axis=1)

    @property
    def usual(self) -> bool:
        """Gaussian, independent, in no order."""
        return (self.distribution, self.order, self.copies) == ("Gaussian", "any", "none")

    @property
    def unsaid(self) -> bool:
        """Samples depend on each other, and the library is not told."""
        return self.copies != "none" and self.grouped == "unsaid"

    def independent_samples(self, more: int = 1) -> int:
        """Samples, or groups of them."""
        return self.samples * more // (1 if self.copies == "none" else 2)

    def _weighed(self, ratios: np.ndarray) -> np.ndarray:
        V = self.structure.signal
        if np.isinf(ratios).any():
            return np.full((self.parameters, self.parameters), np.inf)
        return V.T @ (ratios[:, None] * V)

    def model(self) -> torch.nn.Module:
        """The affine layers, in the dtype of the problem."""
        modules = []
        for W, b in zip(self.structure.weights, self.structure.biases, strict=True):
            module = torch.nn.Linear(self.dim, self.dim).to(self.torch_dtype)
            with torch.no_grad():
                module.weight.copy_(torch.from_numpy(W))
                module.bias.copy_(torch.from_numpy(b))
            modules.append(module)
        return torch.nn.Sequential(*modules)

    def noise(self, attempt: int = 0, *, more: int = 1, order: Order | None = None) -> list[Noise]:
        """Noise of each condition, minus and plus in turn; of one where there are no conditions.

        Args:
            attempt: another number gives other noise, and nothing else.
            more: times as many samples.
            order: maps n to a permutation of the samples; None leaves them as they are.
        """
        n = self.independent_samples(more)
        rng = np.random.default_rng([self.seed, 1 + attempt])
        conditions = 2 * self.parameters if self.source in STEPS else 1
        drawn: list[Noise] = []
        for condition in range(conditions):
            if self.source == "paired" and condition % 2:
                drawn.append(drawn[-1])
                continue
            noise = Noise.draw(rng, n, self.noises, self.parameters)
            noise = self._sorted(self._copied(noise))
            drawn.append(noise if order is None else noise[order(len(noise.u))])
        return drawn

    def _copied(self, noise: Noise) -> Noise:
        if self.copies == "none":
            return noise
        n = len(noise.u)
        rows = np.tile(np.arange(n), 2)
        signs = np.repeat([1.0, -1.0 if self.copies == "antithetic" else 1.0], n)
        if self.grouped != "far":
            rows, signs = np.arange(n).repeat(2), signs.reshape(2, n).T.ravel()
        noise = noise[rows]
        return Noise(noise.u * signs[:, None], noise.size, noise.hidden)

    def _sorted(self, noise: Noise) -> Noise:
        if self.order == "any":
            return noise
        if self.order == "score":
            values = self.noises.scores(noise, self.structure.signal)[:, 0]
        else:
            values = self.noises.values(noise, np.zeros(self.dim)) @ self.structure.factors[0][0]
        if self.order == "blocks":
            values = values.argsort().argsort() * BLOCKS // len(values)
        return noise[np.argsort(values, kind="stable")]

    def groups(self, n: int) -> np.ndarray | None:
        """Labels of n samples for the library."""
        if self.copies == "none" or self.unsaid:
            return None
        labels = np.arange(n // 2)
        return np.tile(labels, 2) if self.grouped == "far" else labels.repeat(2)

    def samples_of(self, noise: list[Noise]) -> list[torch.Tensor]:
        """x [n, d] of each condition at its own theta, in the dtype of the problem."""
        shifts = [np.zeros(self.dim)]
        if self.source in STEPS:
            halves = (self.structure.signal * self.dtheta / 2).T
            shifts = [shift for half in halves for shift in (-half, half)]
        B, mean = self.structure.factors[0], self.structure.means[0]
        drawn = []
        for part, shift in zip(noise, shifts, strict=True):
            x = mean + self.noises.values(part, shift) @ B.T
            if self.lattice:
                steps = self.lattice * self.deviations
                x = np.round(x / steps) * steps
            drawn.append(self._tensor(x))
        return drawn

    def data(self, noise: list[Noise], units: Any = 1.0) -> Any:
        """What the library is given; `units` [P]: theta is counted in 1 / units of its unit."""
        xs = self.samples_of(noise)
        groups = self.groups(len(xs[0]))
        if self.source == "score":
            scores = self.noises.scores(noise[0], self.structure.signal)
            return ff.Score(xs[0], self._tensor(scores / units), groups=groups)
        if self.source == "pathwise":
            slopes = self.noises.slopes(noise[0])
            moved = (self.structure.signal / units).T * slopes[:, None]  # [n, P, d]
            return ff.Pathwise(
                xs[0], self._tensor(moved @ self.structure.factors[0].T), groups=groups
            )
        dtheta = (self.dtheta * units).tolist()
        return ff.FiniteDifference(
            xs[::2], xs[1::2], dtheta, paired=self.source == "paired", groups=groups
        )

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.torch_dtype)


def from_seed(seed: int, *, samples: tuple[float, float] = SAMPLES) -> Problem:
    """The problem of a seed: sizes and conditions log-uniform in their ranges, the rest uniform."""
    rng = np.random.default_rng(seed)

    def integer(least: int, most: int) -> int:
        return int(rng.integers(least, most + 1))

    def real(least: float, most: float) -> float:
        return float(rng.uniform(least, most))

    def one_of(options: Sequence[Any]) -> Any:
        return options[int(rng.integers(len(options)))]

    def log(least: float, most: float) -> float:
        return 10 ** real(math.log10(least), math.log10(most))

    source = one_of(SOURCES)
    parameters = integer(*PARAMETERS)
    n = round(log(*samples))
    layers = [
        Layer(
            kind=one_of(KINDS),
            condition=log(*LAYER_CONDITIONS),
            units=real(*UNIT_DECADES),
            standardised=one_of((True, True, False)),
        )
        for _ in range(integer(*LAYERS))
    ]
    distribution = one_of([k for k in DISTRIBUTIONS if source in SOURCES_OF.get(k, SOURCES)])
    order = one_of([o for o in ORDERS if o != "score" or source == "score"])
    gaussian = distribution == "Gaussian"
    copies = one_of(COPIES) if gaussian and order == "any" else "none"
    grouped = one_of(GROUPED) if copies != "none" else GROUPED[0]
    if copies != "none":
        n = max(n, TESTED if grouped == "unsaid" else 4 * FOLDS) // 2 * 2
    raw = not gaussian and one_of((False, True))
    dim = integer(1, NARROW if raw else DIMENSIONS[1])
    if source == "score" and distribution in ("brightness", "rare") and not layers:
        layers = [Layer("random", 1.0, 0.0, True)]  # the input's J is that of the score
    large = n * (1 + parameters if source == "pathwise" else 2 * parameters) > LARGE
    return Problem(
        seed=integer(0, 2**31 - 1),
        source=source,
        dtype=one_of(("float64", "float32")),
        dim=dim,
        parameters=parameters,
        samples=n,
        condition=log(*CONDITIONS),
        spectrum=one_of(SPECTRA),
        rotated=distribution != "rare" and one_of((False, True, True, True)),
        direction=one_of(DIRECTIONS),
        correlation=real(*CORRELATIONS),
        units=real(*UNIT_DECADES),
        offset=log(*OFFSETS),
        step=real(*STEPS.get(source, (1.0, 1.0))),
        layers=tuple(layers),
        features=RAW_ONLY if raw else FEATURES[0] if large else one_of(FEATURES),
        # another order changes the folds of groups, and the noise added to a lattice
        twin="unit" if copies != "none" or distribution == "lattice" else one_of(TWINS),
        distribution=distribution,
        lattice=log(*LATTICE) if distribution == "lattice" else 0.0,
        order=order,
        copies=copies,
        grouped=grouped,
    )
