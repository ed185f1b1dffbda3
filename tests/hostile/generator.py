"""Random problems with a closed form: Gaussian noise, a mean linear in theta, affine layers.

    x = m + B (z + V theta),  z ~ N(0, 1_d),  I = V^T V at the input and after each layer

B B^T is the covariance of x and B V the derivative of its mean. An invertible affine layer W
replaces B by W B and leaves V, and so the Fisher information, as they are. The noise is Gaussian,
so the linear Fisher information is all there is.

One description of the ranges (`draw`) serves both hypothesis, which shrinks what fails, and plain
seeds (`from_seed`), which a long run counts through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from hypothesis import strategies as st

import fisherfast as ff

T = TypeVar("T")
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
MAGNITUDES = (-2.0, 2.0)  # decades of the information about one parameter
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
LARGE = 16_000  # samples, over conditions and tangents, from which the least features are used


class Chooser(Protocol):
    """Draws one value of a range."""

    def integer(self, least: int, most: int) -> int: ...
    def real(self, least: float, most: float) -> float: ...
    def one_of(self, options: Sequence[T]) -> T: ...


class _Numpy:
    """Uniform in every range."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def integer(self, least: int, most: int) -> int:
        return int(self.rng.integers(least, most + 1))

    def real(self, least: float, most: float) -> float:
        return float(self.rng.uniform(least, most))

    def one_of(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]


class _Hypothesis:
    """As hypothesis likes; shrinks towards the least value and the first option."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def integer(self, least: int, most: int) -> int:
        return self.draw(st.integers(least, most))

    def real(self, least: float, most: float) -> float:
        return self.draw(st.floats(least, most))

    def one_of(self, options: Sequence[T]) -> T:
        return self.draw(st.sampled_from(options))


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
    """A problem and how it is measured; everything else follows from these values.

    ``repr`` is Python source that builds it again.
    """

    seed: int
    source: str
    dtype: str
    dim: int
    parameters: int
    samples: int
    condition: float
    spectrum: str
    rotated: bool
    direction: str
    correlation: float
    units: float
    offset: float
    step: float
    layers: tuple[Layer, ...]
    features: int
    twin: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def names(self) -> list[str]:
        """Of the layers in a flow of `model`, the input first."""
        return ["input", *(str(index) for index in range(len(self.layers)))]

    @cached_property
    def structure(self) -> Structure:
        return Structure(self)

    @property
    def information(self) -> np.ndarray:
        """I [P, P] float64 in 1/theta^2, the same for every layer."""
        V = self.structure.signal
        return V.T @ V

    @property
    def dtheta(self) -> np.ndarray:
        """Full separation of the conditions [P]: `step` in units of the information."""
        return self.step / np.sqrt(np.diag(self.information))

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

    def noise(self, attempt: int = 0, *, more: int = 1, order: Order | None = None) -> list[Any]:
        """Whitened noise z [n, d] of each condition, minus and plus in turn; of one where there are
        no conditions.

        Args:
            attempt: another number gives other noise, and nothing else.
            more: times as many samples.
            order: maps n to a permutation of the samples; None leaves them as they are.
        """
        n = self.samples * more
        kept = slice(None) if order is None else order(n)
        rng = np.random.default_rng([self.seed, 1 + attempt])
        conditions = 2 * self.parameters if self.source in STEPS else 1
        drawn: list[Any] = []
        for condition in range(conditions):
            pair = self.source == "paired" and condition % 2
            drawn.append(drawn[-1] if pair else rng.standard_normal((n, self.dim))[kept])
        return drawn

    def samples_of(self, noise: list[Any]) -> list[torch.Tensor]:
        """x [n, d] of each condition at its own theta, in the dtype of the problem."""
        shifts = [np.zeros(self.dim)]
        if self.source in STEPS:
            halves = (self.structure.signal * self.dtheta / 2).T
            shifts = [shift for half in halves for shift in (-half, half)]
        return [
            self._tensor(self.structure.samples(z + shift))
            for z, shift in zip(noise, shifts, strict=True)
        ]

    def data(self, noise: list[Any], units: Any = 1.0) -> Any:
        """What the library is given; `units` [P]: theta is counted in 1 / units of its unit."""
        xs = self.samples_of(noise)
        if self.source == "score":
            return ff.Score(xs[0], self._tensor(noise[0] @ self.structure.signal / units))
        if self.source == "pathwise":
            tangents = self._tensor((self.structure.derivative / units).T)
            return ff.Pathwise(xs[0], tangents[:, None].expand(-1, len(xs[0]), -1))
        dtheta = (self.dtheta * units).tolist()
        return ff.FiniteDifference(xs[::2], xs[1::2], dtheta, paired=self.source == "paired")

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.torch_dtype)


class Structure:
    """Matrices of a problem, float64.

    Attributes:
        signal: V [d, P], the derivative of the mean in whitened coordinates.
        factors: B [d, d] of the input and after each layer; the covariance is B B^T.
        means: [d] of the input and after each layer.
        weights, biases: of the layers.
    """

    def __init__(self, problem: Problem) -> None:
        rng = np.random.default_rng([problem.seed, 0])
        d = problem.dim
        roots = _roots(problem.spectrum, problem.condition, d)
        rotation = _rotation(rng, d) if problem.rotated else np.eye(d)
        units = _units(rng, problem.units, d)
        self.factors = [units[:, None] * (rotation * roots)]
        self.signal = _signal(rng, problem, rotation, roots)
        self.means = [self._mean(rng, problem)]
        self.weights: list[np.ndarray] = []
        self.biases: list[np.ndarray] = []
        for layer in problem.layers:
            W = self._weight(rng, layer)
            # rounded as the model holds it, so that the closed form is that of the model
            W = W.astype(problem.dtype).astype(np.float64)
            self.weights.append(W)
            self.factors.append(W @ self.factors[-1])
            mean = self._mean(rng, problem)
            bias = (mean - W @ self.means[-1]).astype(problem.dtype).astype(np.float64)
            self.biases.append(bias)
            self.means.append(mean)

    @property
    def derivative(self) -> np.ndarray:
        """Of the mean of the input [d, P]."""
        return self.factors[0] @ self.signal

    def samples(self, z: np.ndarray) -> np.ndarray:
        """x of whitened noise z [n, d]."""
        return self.means[0] + z @ self.factors[0].T

    def _mean(self, rng: np.random.Generator, problem: Problem) -> np.ndarray:
        deviations = np.linalg.norm(self.factors[-1], axis=1)
        return problem.offset * deviations * rng.uniform(-1, 1, problem.dim)

    def _weight(self, rng: np.random.Generator, layer: Layer) -> np.ndarray:
        B = self.factors[-1]
        d = len(B)
        rows = _units(rng, layer.units, d)[:, None] * _rotation(rng, d)
        if layer.kind == "whitening":
            U, s, _ = np.linalg.svd(B)
            return rows @ (U / s).T
        deviations = np.linalg.norm(B, axis=1) if layer.standardised else np.ones(d)
        moved = (B / deviations[:, None]) @ self.signal
        basis = np.concatenate([moved, rng.standard_normal((d, d))], axis=1)
        columns = np.linalg.qr(basis)[0] if layer.kind == "squeezing" else _rotation(rng, d)
        # the small singular values first, where a squeezing layer has the information
        singular = layer.condition ** -np.linspace(1, 0, d) if d > 1 else np.ones(1)
        return (rows * singular) @ (columns / deviations[:, None]).T


def draw(choose: Chooser, *, samples: tuple[float, float] = SAMPLES) -> Problem:
    """One problem: sizes and conditions log-uniform in their ranges, the rest uniform."""

    def log(least: float, most: float) -> float:
        return 10 ** choose.real(math.log10(least), math.log10(most))

    source = choose.one_of(SOURCES)
    parameters = choose.integer(*PARAMETERS)
    n = round(log(*samples))
    layers = [
        Layer(
            kind=choose.one_of(KINDS),
            condition=log(*LAYER_CONDITIONS),
            units=choose.real(*UNIT_DECADES),
            standardised=choose.one_of((True, True, False)),
        )
        for _ in range(choose.integer(*LAYERS))
    ]
    large = n * (1 + parameters if source == "pathwise" else 2 * parameters) > LARGE
    return Problem(
        seed=choose.integer(0, 2**31 - 1),
        source=source,
        dtype=choose.one_of(("float64", "float32")),
        dim=choose.integer(*DIMENSIONS),
        parameters=parameters,
        samples=n,
        condition=log(*CONDITIONS),
        spectrum=choose.one_of(SPECTRA),
        rotated=choose.one_of((False, True, True, True)),
        direction=choose.one_of(DIRECTIONS),
        correlation=choose.real(*CORRELATIONS),
        units=choose.real(*UNIT_DECADES),
        offset=log(*OFFSETS),
        step=choose.real(*STEPS.get(source, (1.0, 1.0))),
        layers=tuple(layers),
        features=FEATURES[0] if large else choose.one_of(FEATURES),
        twin=choose.one_of(TWINS),
    )


def from_seed(seed: int) -> Problem:
    """The problem of a seed."""
    return draw(_Numpy(seed))


@st.composite
def problems(draw_value: Any, *, samples: tuple[float, float] = SAMPLES) -> Problem:
    """Strategy of hypothesis."""
    return draw(_Hypothesis(draw_value), samples=samples)


def _roots(spectrum: str, condition: float, d: int) -> np.ndarray:
    """Standard deviations along the axes of the noise, the largest first."""
    if d == 1:
        return np.ones(1)
    roots = np.ones(d)
    if spectrum == "spread":
        roots = condition ** (-np.linspace(0, 1, d) / 2)
    elif spectrum == "one small":
        roots[-1] = condition**-0.5
    else:
        roots[1:] = condition**-0.5
    return roots


def _signal(
    rng: np.random.Generator, problem: Problem, rotation: np.ndarray, roots: np.ndarray
) -> np.ndarray:
    """V [d, P], in the directions that the problem says and of the magnitudes of `MAGNITUDES`."""
    d, P = problem.dim, problem.parameters
    V = rng.standard_normal((d, P + 1))
    count = min(d, P + d // 8)  # axes that move when it is not all of them
    if problem.direction == "smallest":
        V[: d - count] = 0
    elif problem.direction == "largest":
        V[count:] = 0
    elif problem.direction == "raw":
        V = (rotation.T @ V) / roots[:, None]
    V /= np.linalg.norm(V, axis=0)
    own, common = V[:, :P], V[:, P:]
    own = own * np.where(common.T @ own < 0, -1, 1)  # so that the two never cancel
    V = math.sqrt(1 - problem.correlation) * own + math.sqrt(problem.correlation) * common
    V /= np.linalg.norm(V, axis=0)
    return V * 10 ** (rng.uniform(*MAGNITUDES, P) / 2)


def _rotation(rng: np.random.Generator, d: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def _units(rng: np.random.Generator, decades: float, d: int) -> np.ndarray:
    return 10 ** rng.uniform(-decades, decades, d)
