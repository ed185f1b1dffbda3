"""An image in stationary noise, with a closed form even for too many pixels for a covariance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fisherfast._validation import check_positive, check_whole
from fisherfast.problems.gaussian import standard_normal
from fisherfast.problems.problem import Problem, Theta, angular_frequencies


@dataclass(frozen=True, eq=False)
class CorrelatedImage(Problem):
    """A Gaussian spot in correlated Gaussian noise; theta = (position, amplitude).

    The spot moves along the rows. The noise is stationary on a torus: its covariance is diagonal in
    Fourier space, where it is the power spectrum

        s(k) = white^2 + correlated^2 g(k),   g(k) = 1 / (1 + |k|^2 l^2) scaled to a mean of 1.

    With F_p the transform of the mean's derivative by theta_p,

        I_pq = J_pq = sum_k conj(F_p(k)) F_q(k) / s(k) / d.

    Args:
        shape: (H, W), pixels.
        spot: standard deviation of the spot, in pixels.
        white_std: standard deviation of the noise that is independent in each pixel.
        correlated_std: standard deviation of the correlated noise in each pixel.
        correlation_length: l, in pixels.

    Raises:
        ValueError: if a length or white_std is not positive.

    Example:
        >>> from fisherfast.problems import CorrelatedImage
        >>> image = CorrelatedImage((32, 32), spot=2.0, correlated_std=0.0)
        >>> image.fisher((0.0, 1.0)).diagonal().round(decimals=2)      # white noise: pi s^2, pi / 2
        tensor([ 1.5700, 12.5700], dtype=torch.float64)
    """

    shape: tuple[int, int] = (128, 128)
    spot: float = 8.0
    white_std: float = 1.0
    correlated_std: float = 1.0
    correlation_length: float = 10.0
    dim: int = field(init=False)
    parameters = 2
    additive = True

    def __post_init__(self) -> None:
        for size in self.shape:
            check_whole("shape", size, least=1)
        for name in ("spot", "white_std", "correlation_length"):
            check_positive(name, getattr(self, name))
        if not 0 <= self.correlated_std < math.inf:
            raise ValueError(f"correlated_std must be at least 0, got {self.correlated_std}")
        object.__setattr__(self, "dim", self.shape[0] * self.shape[1])

    @property
    def spectrum(self) -> Tensor:
        """s(k), float64 [H, W]: the noise variance of each Fourier amplitude, per pixel."""
        rows, columns = (angular_frequencies(size, 1.0) for size in self.shape)
        square = rows[:, None].square() + columns.square()
        correlated = 1 / (1 + square * self.correlation_length**2)
        return self.white_std**2 + self.correlated_std**2 * correlated / correlated.mean()

    def mean(self, theta: Theta) -> Tensor:
        """amplitude * spot around the centre displaced by position, float64 [H, W]."""
        position, amplitude = self.as_theta(theta)
        down, right = self._distances(position)
        return amplitude * torch.exp(-(down[:, None] ** 2 + right**2) / (2 * self.spot**2))

    def mean_derivative(self, theta: Theta) -> Tensor:
        """By position and by amplitude, float64 [2, H, W]."""
        position, amplitude = self.as_theta(theta)
        spot = self.mean((float(position), 1.0))
        right = self._distances(position)[1]
        return torch.stack([amplitude * spot * right / self.spot**2, spot])

    def covariance(self, theta: Theta) -> Tensor:
        """C, float64 [d, d], the same at every theta; for small images only."""
        first_row = torch.fft.ifft2(self.spectrum).real
        height, width = self.shape
        down = (torch.arange(height)[:, None] - torch.arange(height)) % height
        right = (torch.arange(width)[:, None] - torch.arange(width)) % width
        blocks = first_row[down[:, None, :, None], right[None, :, None, :]]
        return blocks.reshape(self.dim, self.dim)

    def fisher(self, theta: Theta) -> Tensor:
        """The sum over Fourier amplitudes, float64 [2, 2]."""
        F = torch.fft.fft2(self.mean_derivative(theta)).flatten(1)
        return ((F.conj() / self.spectrum.flatten()) @ F.T).real / self.dim

    def linear_fisher(self, theta: Theta) -> Tensor:
        """The FI itself: a Gaussian with fixed covariance has only linear information."""
        return self.fisher(theta)

    def sample(self, theta: Theta, n: int, generator: torch.Generator) -> Tensor:
        """Mean plus filtered white noise, float32 [n, H, W]."""
        white = standard_normal(n, self.dim, generator).reshape(n, *self.shape)
        spectrum = self.spectrum[:, : self.shape[1] // 2 + 1].sqrt().to(white)
        noise = torch.fft.irfft2(torch.fft.rfft2(white) * spectrum, s=self.shape)
        return noise + self.mean(theta).to(noise)

    def score(self, x: Tensor, theta: Theta) -> Tensor:
        """m'^T C^-1 (x - m), float64 [n, 2]."""
        residual = self._as_samples(x).reshape(-1, *self.shape) - self.mean(theta)
        whitened = torch.fft.ifft2(torch.fft.fft2(residual) / self.spectrum).real
        return whitened.flatten(1) @ self.mean_derivative(theta).flatten(1).T

    def _distances(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Distances from the spot in pixels, down and to the right, float64 [H] and [W]."""
        down, right = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in self.shape)
        return down, right - position
