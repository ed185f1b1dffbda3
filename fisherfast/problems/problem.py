"""The base class of the ground truths: distributions with known Fisher information.

A problem draws samples at any theta, and has closed forms of the Fisher information (FI) I(theta)
of its samples, their mean m(theta) and their covariance C(theta), hence also of the linear FI

    J(theta) = m'(theta)^T C(theta)^-1 m'(theta)  <=  I(theta).

Every sampler transforms one stream of noise that does not depend on theta into x, so that the same
generator state at two values of theta gives the same noise at both (paired conditions).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fisherfast._validation import check_positive, check_seed
from fisherfast.data import FiniteDifference, Pathwise, Score

Theta = float | Sequence[float] | np.ndarray | Tensor

# Independent streams of random numbers, so that one user seed serves several purposes.
STREAM_CONDITIONS = 1
STREAM_TRAINING = 2
STREAM_PARAMETERS = 3


def seeded_generator(seed: int, stream: int) -> torch.Generator:
    """Make a CPU generator for one stream: equal seeds in different streams are independent."""
    state = np.random.SeedSequence((check_seed(seed) % 2**64, stream))
    return torch.Generator().manual_seed(int(state.generate_state(1, np.uint64)[0]))


def as_matrix(name: str, value: np.ndarray | Tensor, shape: tuple[int, int]) -> Tensor:
    """Return `value` as a finite float64 tensor of the given shape, or raise a ValueError."""
    matrix = torch.as_tensor(value, dtype=torch.float64)
    if tuple(matrix.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite, got nan or inf")
    return matrix


def cholesky_factor(covariance: Tensor) -> Tensor:
    """Compute the lower L with L L^T = covariance [d, d]; ValueError unless positive definite."""
    if not torch.allclose(covariance, covariance.mT):
        raise ValueError(
            "covariance must be symmetric, got a matrix that differs from its transpose"
        )
    factor, failed_row = torch.linalg.cholesky_ex(covariance)
    if failed_row:
        raise ValueError(
            "covariance must be positive definite, got a matrix whose leading "
            f"{int(failed_row)} x {int(failed_row)} block is not"
        )
    return factor


def whitened_norm(derivative: Tensor, covariance: Tensor) -> Tensor:
    """Compute D C^-1 D^T for D [P, d] and C [d, d]: the linear FI [P, P]."""
    half = torch.linalg.solve_triangular(cholesky_factor(covariance), derivative.mT, upper=False)
    return half.mT @ half


def angular_frequencies(size: int, spacing: float, *, half: bool = False) -> Tensor:
    """Return k of a discrete Fourier transform, float64 [size] or half of it, per unit length."""
    frequencies = torch.fft.rfftfreq if half else torch.fft.fftfreq
    return 2 * math.pi * frequencies(size, d=spacing, dtype=torch.float64)


class Problem(ABC):
    """A family p(x | theta) whose Fisher information is known in closed form.

    Attributes:
        dim: d, numbers in one sample.
        parameters: P, entries of theta.
        additive: x = m(theta) + noise: theta moves all samples alike.
    """

    dim: int
    parameters: int = 1
    additive: bool = False

    @abstractmethod
    def mean(self, theta: Theta) -> Tensor:
        """E[x] at theta, float64 of the shape of one sample, in units of x."""

    @abstractmethod
    def mean_derivative(self, theta: Theta) -> Tensor:
        """d E[x] / d theta, float64 [P, *sample], in units of x per unit of theta."""

    @abstractmethod
    def covariance(self, theta: Theta) -> Tensor:
        """Cov(x) of the flattened sample at theta, float64 [d, d], in units of x squared."""

    @abstractmethod
    def fisher(self, theta: Theta) -> Tensor:
        """The Fisher information I(theta), float64 [P, P], per unit of theta squared."""

    @abstractmethod
    def sample(self, theta: Theta, n: int, generator: torch.Generator) -> Tensor:
        """Draw samples at theta, float32 [n, *sample], from random numbers of `generator` only."""

    def linear_fisher(self, theta: Theta) -> Tensor:
        """The linear FI m'^T C^-1 m' of x itself, float64 [P, P], per unit of theta squared."""
        derivative = self.mean_derivative(theta).reshape(self.parameters, self.dim)
        return whitened_norm(derivative, self.covariance(theta))

    def finite_step_fisher(self, theta: Theta, dtheta: float | Sequence[float]) -> Tensor:
        """Compute the linear FI of conditions a finite step apart.

            J_pq = delta_p^T S^-1 delta_q,  delta_p = [m(theta + h_p) - m(theta - h_p)] / dtheta_p

        with h_p = dtheta_p e_p / 2 and S the covariance averaged over all 2 P conditions. An
        unbiased estimate from `finite_difference` converges to this, not to `linear_fisher`.

        Args:
            theta: the centre, [P].
            dtheta: the FULL separation of the two conditions, one number or P of them.

        Returns:
            J, float64 [P, P], per unit of theta squared.

        Raises:
            ValueError: if dtheta is not positive or has not 1 or P entries.

        Example:
            >>> import torch
            >>> from fisherfast.problems import GaussianShift
            >>> GaussianShift(torch.ones(4)).finite_step_fisher(0.0, dtheta=0.5).item()
            4.0
        """
        centre, steps = self.as_theta(theta), self._as_steps(dtheta)
        derivative, covariance = [], torch.zeros(self.dim, self.dim, dtype=torch.float64)
        for half_step, step in zip(torch.diag(steps / 2), steps, strict=True):
            lower, upper = centre - half_step, centre + half_step
            derivative.append(((self.mean(upper) - self.mean(lower)) / step).flatten())
            covariance += self.covariance(lower) + self.covariance(upper)
        return whitened_norm(torch.stack(derivative), covariance / (2 * self.parameters))

    def sample_with_tangent(
        self, theta: Theta, n: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw samples and their derivative at fixed noise: x [n, *sample], dx/dtheta [n, P,
        *sample], a view of that of the mean if the noise is additive.

        Raises:
            NotImplementedError: if x is not a differentiable function of theta and noise.
        """
        if not self.additive:
            raise NotImplementedError(
                f"{type(self).__name__} has no pathwise derivative; use score or finite_difference"
            )
        x = self.sample(theta, n, generator)
        return x, self.mean_derivative(theta).to(x).expand(n, -1, *x.shape[1:])

    def score(self, x: Tensor, theta: Theta) -> Tensor:
        """Compute the score d log p(x | theta) / d theta of samples x [n, *sample], float64 [n, P].

        Raises:
            NotImplementedError: if the density has no closed form.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no closed-form score; use finite_difference"
        )

    def conditions(
        self,
        theta: Theta,
        dtheta: float | Sequence[float],
        n: int,
        *,
        seed: int = 0,
        paired: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Draw samples at theta - dtheta/2 and theta + dtheta/2, for each parameter in turn.

        Args:
            theta: the centre, [P].
            dtheta: the FULL separation of the two conditions, one number or P of them.
            n: samples per condition.
            seed: of the random numbers; other seeds give independent samples.
            paired: use the same noise in both conditions instead of independent noise.

        Returns:
            minus, plus: P tensors each, float32 [n, *sample].

        Raises:
            ValueError: if dtheta is not positive or has not 1 or P entries.

        Example:
            >>> from fisherfast.problems import GaussianScale
            >>> minus, plus = GaussianScale(3).conditions(1.0, 0.1, 5, paired=True)
            >>> bool((plus[0] / minus[0] - 1.05 / 0.95).abs().max() < 1e-6)
            True
        """
        centre, steps = self.as_theta(theta), self._as_steps(dtheta)
        generator = seeded_generator(seed, STREAM_CONDITIONS)
        minus, plus = [], []
        for half_step in torch.diag(steps / 2):
            start = generator.get_state()
            minus.append(self.sample(centre - half_step, n, generator))
            if paired:
                generator.set_state(start)
            plus.append(self.sample(centre + half_step, n, generator))
        return minus, plus

    def finite_difference(
        self,
        theta: Theta,
        dtheta: float | Sequence[float],
        n: int,
        *,
        seed: int = 0,
        paired: bool = False,
    ) -> FiniteDifference:
        """Return the samples of `conditions` as data for `fisher_information` and `fisher_flow`."""
        minus, plus = self.conditions(theta, dtheta, n, seed=seed, paired=paired)
        return FiniteDifference(minus, plus, self._as_steps(dtheta).tolist(), paired=paired)

    def pathwise(self, theta: Theta, n: int, *, seed: int = 0) -> Pathwise:
        """Draw n samples at theta with their derivative at fixed noise, as data for `fisher_flow`.

        Raises:
            NotImplementedError: if x is not a differentiable function of theta and noise.

        Example:
            >>> from fisherfast.problems import GaussianScale
            >>> GaussianScale(3).pathwise(1.0, 100)
            Pathwise(parameters=1, samples=100)
        """
        generator = seeded_generator(seed, STREAM_CONDITIONS)
        return Pathwise(*self.sample_with_tangent(theta, n, generator))

    def scored(self, theta: Theta, n: int, *, seed: int = 0) -> Score:
        """Draw n samples at theta with their score, as data for `fisher_flow`.

        Raises:
            NotImplementedError: if the density has no closed form.

        Example:
            >>> from fisherfast.problems import Laplace
            >>> Laplace(3).scored(0.0, 100)
            Score(parameters=1, samples=100)
        """
        x = self.sample(theta, n, seeded_generator(seed, STREAM_CONDITIONS))
        return Score(x, self.score(x, theta))

    def as_theta(self, theta: Theta) -> Tensor:
        """Return theta as a finite float64 tensor [P], differentiable if theta is a tensor."""
        vector = torch.as_tensor(theta, dtype=torch.float64)
        if vector.numel() != self.parameters or vector.ndim > 1:
            raise ValueError(
                f"theta must have shape ({self.parameters},), got {tuple(vector.shape)}"
            )
        if not torch.isfinite(vector).all():
            raise ValueError(f"theta must be finite, got {vector.tolist()}")
        return vector.reshape(self.parameters)

    def _as_steps(self, dtheta: float | Sequence[float]) -> Tensor:
        """Return dtheta as P positive full separations, float64 [P]."""
        steps = torch.as_tensor(dtheta, dtype=torch.float64)
        if steps.ndim > 1 or steps.numel() not in (1, self.parameters):
            raise ValueError(
                f"dtheta must be one number or {self.parameters}, got shape {tuple(steps.shape)}"
            )
        for step in steps.reshape(-1).tolist():
            check_positive("dtheta", step)
        return steps.reshape(-1).expand(self.parameters)

    def _as_samples(self, x: Tensor) -> Tensor:
        """Flatten samples [n, *sample] to float64 [n, d]."""
        flat = torch.as_tensor(x, dtype=torch.float64).flatten(1)
        if flat.shape[1] != self.dim:
            raise ValueError(f"x must have {self.dim} numbers per sample, got {flat.shape[1]}")
        return flat
