"""The matrices of a generated problem: its covariance, what theta moves, its layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from hostile import distributions

if TYPE_CHECKING:
    from hostile.generator import Layer, Problem

MAGNITUDES = (-2.0, 2.0)  # decades of the information about one parameter


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
        firing = problem.noises.firing
        if firing is not None:  # silent units are zero
            mean, variance, _ = distributions.rectified(firing)
            self.means = [self.factors[0] @ (mean / np.sqrt(variance))]
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
