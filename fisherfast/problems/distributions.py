"""Ground truths beyond the Gaussian: log-normal, Poisson, Laplace and the rectified Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fisherfast._validation import check_positive, check_whole
from fisherfast.problems.gaussian import as_shape, standard_normal
from fisherfast.problems.problem import (
    STREAM_PARAMETERS,
    Problem,
    Theta,
    as_matrix,
    seeded_generator,
    whitened_norm,
)

QUANTILE_BLOCK = 2**20  # counts inverted at once: tens of MB of scratch
LEAST_UNIFORM = 2.0**-53  # the step of a float64 uniform number; the normal quantile of 0 is -inf


class LogNormal(Problem):
    """x = exp(B z), z ~ N(theta 1, 1): information that is only partly linear.

        I = d,  J = a^T (exp(K) - 1)^-1 a,  a = B 1,  K = B B^T  (exp elementwise)

    B must be invertible: then x determines z, and z has the FI d.

    Args:
        mixing: B, [d, d].

    Raises:
        ValueError: if B is not square, not finite or not invertible.

    Example:
        >>> from fisherfast.problems import LogNormal
        >>> LogNormal.random(dim=10, seed=0).fisher(0.0).item()
        10.0
    """

    def __init__(self, mixing: np.ndarray | Tensor) -> None:
        self.dim = len(mixing)
        self._mixing = as_matrix("mixing", mixing, (self.dim, self.dim))
        rank = int(torch.linalg.matrix_rank(self._mixing))
        if rank < self.dim:
            raise ValueError(f"mixing must be invertible, got rank {rank} of {self.dim}")
        self._growth = self._mixing.sum(1)
        self._log_covariance = self._mixing @ self._mixing.mT

    @classmethod
    def random(cls, *, dim: int = 10, variance: float = 0.01, seed: int = 0) -> LogNormal:
        """Make the published task: B_ij ~ N(0, variance), d = 10 (Weimar et al. 2025)."""
        generator = seeded_generator(seed, STREAM_PARAMETERS)
        shape = (check_whole("dim", dim, least=1), dim)
        entries = torch.randn(shape, generator=generator, dtype=torch.float64)
        return cls(math.sqrt(check_positive("variance", variance)) * entries)

    def mean(self, theta: Theta) -> Tensor:
        """exp(theta a_i + K_ii / 2), float64 [d]."""
        return torch.exp(self.as_theta(theta) * self._growth + self._log_covariance.diagonal() / 2)

    def mean_derivative(self, theta: Theta) -> Tensor:
        """a_i m_i, float64 [1, d]."""
        return (self._growth * self.mean(theta)).unsqueeze(0)

    def covariance(self, theta: Theta) -> Tensor:
        """m_i m_j (exp(K_ij) - 1), float64 [d, d]."""
        mean = self.mean(theta)
        return torch.outer(mean, mean) * torch.expm1(self._log_covariance)

    def fisher(self, theta: Theta) -> Tensor:
        """d, float64 [1, 1], the same at every theta."""
        return torch.full((1, 1), float(self.dim), dtype=torch.float64)

    def linear_fisher(self, theta: Theta) -> Tensor:
        """a^T (exp(K) - 1)^-1 a, float64 [1, 1], the same at every theta."""
        return whitened_norm(self._growth.unsqueeze(0), torch.expm1(self._log_covariance))

    def sample(self, theta: Theta, n: int, generator: torch.Generator) -> Tensor:
        """exp(B (z + theta)), float32 [n, d]."""
        noise = standard_normal(n, self.dim, generator)
        exponent = noise @ self._mixing.mT.to(noise)
        return torch.exp(exponent + (self.as_theta(theta) * self._growth).to(noise))

    def sample_with_tangent(
        self, theta: Theta, n: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Samples x [n, d] and their derivative a x [n, 1, d]."""
        x = self.sample(theta, n, generator)
        return x, (x * self._growth.to(x)).unsqueeze(1)

    def score(self, x: Tensor, theta: Theta) -> Tensor:
        """sum_i (z_i - theta) with z = B^-1 log x, float64 [n, 1]."""
        hidden = torch.linalg.solve(self._mixing, self._as_samples(x).log().mT)
        return (hidden - self.as_theta(theta)).sum(0).unsqueeze(1)


class Poisson(Problem):
    """Independent counts x_i ~ Poisson(r_i(theta)): photon counting, which has no dx/dtheta.

        I_pq = J_pq = sum_i r_i,p r_i,q / r_i

    A sample is the quantile of a uniform number, so equal noise at two theta gives the closest
    possible counts.

    Args:
        rates: theta [P] -> r [d], expected counts, positive.
        derivative: theta [P] -> dr/dtheta [P, d].
        dim: d.
        parameters: P.

    Raises:
        ValueError: if a function returns another shape, or a rate is not positive.

    Example:
        >>> import torch
        >>> from fisherfast.problems import Poisson
        >>> light = Poisson(
        ...     rates=lambda theta: 5 * theta * torch.ones(4),
        ...     derivative=lambda theta: 5 * torch.ones(1, 4),
        ...     dim=4,
        ... )
        >>> light.fisher(1.0).item()
        20.0
    """

    def __init__(
        self,
        rates: Callable[[Tensor], Tensor],
        derivative: Callable[[Tensor], Tensor],
        *,
        dim: int,
        parameters: int = 1,
    ) -> None:
        self.dim = check_whole("dim", dim, least=1)
        self.parameters = check_whole("parameters", parameters, least=1)
        self._rates, self._derivative = rates, derivative

    def mean(self, theta: Theta) -> Tensor:
        """r(theta), float64 [d]."""
        rates = as_shape("rates", self._rates(self.as_theta(theta)), self.dim)
        if not (rates > 0).all():
            raise ValueError(f"rates must be positive, got {float(rates.min())}")
        return rates

    def mean_derivative(self, theta: Theta) -> Tensor:
        """dr/dtheta, float64 [P, d]."""
        value = self._derivative(self.as_theta(theta))
        return as_shape("derivative", value, self.parameters, self.dim)

    def covariance(self, theta: Theta) -> Tensor:
        """diag(r), float64 [d, d]."""
        return self.mean(theta).diag()

    def fisher(self, theta: Theta) -> Tensor:
        """sum_i r_i,p r_i,q / r_i, float64 [P, P]."""
        derivative = self.mean_derivative(theta)
        return (derivative / self.mean(theta)) @ derivative.mT

    def sample(self, theta: Theta, n: int, generator: torch.Generator) -> Tensor:
        """Draw counts, float32 [n, d]."""
        return poisson_sample(self.mean(theta), n, generator).float()

    def score(self, x: Tensor, theta: Theta) -> Tensor:
        """sum_i (x_i / r_i - 1) r_i,p, float64 [n, P]."""
        ratio = self._as_samples(x) / self.mean(theta) - 1
        return ratio @ self.mean_derivative(theta).mT


def poisson_sample(rates: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw counts of Poisson(rates [d]), float64 [n, d], non-decreasing in the rates at fixed
    noise."""
    shape = (check_whole("n", n, least=1), rates.numel())
    uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    rows = max(1, QUANTILE_BLOCK // rates.numel())
    blocks = [poisson_quantile(block, rates.to(block)) for block in uniform.split(rows)]
    return torch.cat(blocks)


def poisson_quantile(uniform: Tensor, rates: Tensor) -> Tensor:
    """Find the least count k with P(X <= k) >= u for X ~ Poisson(rate).

    P(X <= k) = Q(k + 1, rate), the regularised incomplete gamma function. The search starts at the
    Cornish-Fisher estimate, whose error is one or two counts.

    Args:
        uniform: u in [0, 1), float64 [n, d].
        rates: expected counts, float64 [d], positive.

    Returns:
        k, float64 [n, d].
    """
    normal = torch.special.ndtri(uniform.clamp_min(LEAST_UNIFORM))
    start = (rates + rates.sqrt() * normal + (normal.square() - 1) / 6).floor().clamp_min(0)
    count, u, rate = start.flatten(), uniform.flatten(), rates.expand_as(uniform).flatten()

    active = torch.arange(len(count), device=count.device)
    while len(active):  # upwards until the distribution function reaches u
        active = active[torch.special.gammaincc(count[active] + 1, rate[active]) < u[active]]
        count[active] += 1
    active = torch.nonzero(count > 0).flatten()
    while len(active):  # downwards while one count less is enough
        active = active[torch.special.gammaincc(count[active], rate[active]) >= u[active]]
        count[active] -= 1
        active = active[count[active] > 0]
    return count.view_as(uniform)


class Laplace(Problem):
    """x_i = theta + b l_i, l_i standard Laplace: a score that is a sign, so half of it is linear.

        I = d / b^2,  J = d / (2 b^2)

    The density has a kink, which a finite step smooths: with any features, two conditions dtheta
    apart have at most about [1 - dtheta / (3 b)] I, 0.97 I at dtheta = 0.1 b.

    Args:
        dim: d.
        scale: b, in units of x.

    Raises:
        ValueError: if dim or scale is not positive.

    Example:
        >>> from fisherfast.problems import Laplace
        >>> problem = Laplace(4)
        >>> problem.fisher(0.0).item(), round(problem.linear_fisher(0.0).item(), 9)
        (4.0, 2.0)
    """

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        self.dim = check_whole("dim", dim, least=1)
        self.scale = check_positive("scale", scale)

    def mean(self, theta: Theta) -> Tensor:
        """theta for each entry, float64 [d]."""
        return self.as_theta(theta).expand(self.dim)

    def mean_derivative(self, theta: Theta) -> Tensor:
        """One for each entry, float64 [1, d]."""
        return torch.ones(1, self.dim, dtype=torch.float64)

    def covariance(self, theta: Theta) -> Tensor:
        """2 b^2 1, float64 [d, d]."""
        return 2 * self.scale**2 * torch.eye(self.dim, dtype=torch.float64)

    def fisher(self, theta: Theta) -> Tensor:
        """d / b^2, float64 [1, 1]."""
        return torch.full((1, 1), self.dim / self.scale**2, dtype=torch.float64)

    def sample(self, theta: Theta, n: int, generator: torch.Generator) -> Tensor:
        """theta + b (e1 - e2), the difference of two exponential numbers, float32 [n, d]."""
        uniform = torch.rand(
            (2, check_whole("n", n, least=1), self.dim),
            generator=generator,
            device=generator.device,
            dtype=torch.float64,
        )
        first, second = -torch.log1p(-uniform)
        return (self.as_theta(theta).to(first) + self.scale * (first - second)).float()

    def sample_with_tangent(
        self, theta: Theta, n: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Samples [n, d] and their derivative, ones [n, 1, d]."""
        x = self.sample(theta, n, generator)
        return x, torch.ones_like(x).unsqueeze(1)

    def score(self, x: Tensor, theta: Theta) -> Tensor:
        """sum_i sign(x_i - theta) / b, float64 [n, 1]."""
        residual = self._as_samples(x) - self.as_theta(theta)
        return residual.sign().sum(1, keepdim=True) / self.scale


class RectifiedGaussian(Problem):
    """x_i = max(theta + z_i, 0), z ~ N(0, 1): the information in a unit after a ReLU.

        I = d [Phi - t phi + phi^2 / Phi(-t)],  t = theta
        J = d Phi^2 / v,  v = (t^2 + 1) Phi + t phi - (t Phi + phi)^2

    with phi and Phi the standard normal density and distribution function at t.

    Args:
        dim: d.

    Example:
        >>> from fisherfast.problems import RectifiedGaussian
        >>> round(RectifiedGaussian(1).fisher(0.0).item(), 4)
        0.8183
    """

    def __init__(self, dim: int = 1) -> None:
        self.dim = check_whole("dim", dim, least=1)

    def mean(self, theta: Theta) -> Tensor:
        """t Phi + phi, float64 [d]."""
        t, density, above, _ = self._normal(theta)
        return (t * above + density).expand(self.dim)

    def mean_derivative(self, theta: Theta) -> Tensor:
        """Phi, the share of samples that pass, float64 [1, d]."""
        return self._normal(theta)[2].expand(1, self.dim)

    def covariance(self, theta: Theta) -> Tensor:
        """v 1, float64 [d, d]."""
        t, density, above, _ = self._normal(theta)
        variance = (t**2 + 1) * above + t * density - (t * above + density) ** 2
        return variance * torch.eye(self.dim, dtype=torch.float64)

    def fisher(self, theta: Theta) -> Tensor:
        """d [Phi - t phi + phi^2 / Phi(-t)], float64 [1, 1]."""
        t, density, above, below = self._normal(theta)
        return (self.dim * (above - t * density + density**2 / below)).reshape(1, 1)

    def sample(self, theta: Theta, n: int, generator: torch.Generator) -> Tensor:
        """max(theta + z, 0), float32 [n, d]."""
        noise = standard_normal(n, self.dim, generator)
        return torch.relu(noise + self.as_theta(theta).to(noise))

    def sample_with_tangent(
        self, theta: Theta, n: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Samples x [n, d] and their derivative, one where x > 0, [n, 1, d]."""
        x = self.sample(theta, n, generator)
        return x, (x > 0).to(x).unsqueeze(1)

    def score(self, x: Tensor, theta: Theta) -> Tensor:
        """The sum of x_i - t where x_i > 0 and of -phi / Phi(-t) where x_i = 0, float64 [n, 1]."""
        t, density, _, below = self._normal(theta)
        samples = self._as_samples(x)
        return torch.where(samples > 0, samples - t, -density / below).sum(1, keepdim=True)

    def _normal(self, theta: Theta) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t, phi(t), Phi(t), Phi(-t), float64 [1] each."""
        t = self.as_theta(theta)
        density = torch.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
        return t, density, torch.special.ndtr(t), torch.special.ndtr(-t)
