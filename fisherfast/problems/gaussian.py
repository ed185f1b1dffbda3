"""Gaussian ground truths: a shifted mean, a changing scale, and the general family."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fisherfast._validation import check_positive, check_whole
from fisherfast.problems.problem import Problem, Theta, as_matrix, cholesky_factor, whitened_norm


def standard_normal(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """Draw N(0, 1) numbers, float32 [n, dim], on the generator's device."""
    n = check_whole("n", n, least=1)
    return torch.randn(n, dim, generator=generator, device=generator.device, dtype=torch.float32)


class GaussianShift(Problem):
    """x ~ N(A theta, S): a mean that depends on theta, with fixed noise.

        I = J = A^T S^-1 A,  and W x has the FI A^T W^T (W S W^T)^-1 W A

    The mean is linear in theta and S fixed: finite differences are exact for any step dtheta.

    Args:
        direction: A, [d] for one parameter or [d, P], in units of x per unit of theta.
        covariance: S, [d, d], in units of x squared; the identity if None.

    Raises:
        ValueError: if the shapes do not match or S is not symmetric positive definite.

    Example:
        >>> import torch
        >>> from fisherfast.problems import GaussianShift
        >>> GaussianShift(torch.ones(256)).fisher(0.0).item()
        256.0
    """

    additive = True

    def __init__(
        self, direction: np.ndarray | Tensor, covariance: np.ndarray | Tensor | None = None
    ) -> None:
        matrix = torch.as_tensor(direction, dtype=torch.float64)
        if matrix.ndim not in (1, 2) or matrix.numel() == 0:
            raise ValueError(f"direction must have shape [d] or [d, P], got {tuple(matrix.shape)}")
        matrix = matrix.reshape(len(matrix), -1)
        self.dim, self.parameters = matrix.shape
        self._direction = as_matrix("direction", matrix, (self.dim, self.parameters))
        self._covariance: Tensor | None = None
        if covariance is not None:
            self._covariance = as_matrix("covariance", covariance, (self.dim, self.dim))
            self._factor = cholesky_factor(self._covariance)

    def mean(self, theta: Theta) -> Tensor:
        """A theta, float64 [d]."""
        return self._direction @ self.as_theta(theta)

    def mean_derivative(self, theta: Theta) -> Tensor:
        """A^T, float64 [P, d], the same at every theta."""
        return self._direction.mT.clone()

    def covariance(self, theta: Theta) -> Tensor:
        """S, float64 [d, d], the same at every theta."""
        if self._covariance is None:
            return torch.eye(self.dim, dtype=torch.float64)
        return self._covariance.clone()

    def fisher(self, theta: Theta) -> Tensor:
        """A^T S^-1 A, float64 [P, P]."""
        half = self._whiten(self._direction)
        return half.mT @ half

    def linear_fisher(self, theta: Theta) -> Tensor:
        """The FI itself: a Gaussian with fixed covariance has only linear information."""
        return self.fisher(theta)

    def fisher_after(self, weight: np.ndarray | Tensor) -> Tensor:
        """FI of W x, A^T W^T (W S W^T)^-1 W A, for W [k, d] of full row rank, float64 [P, P]."""
        rows = as_rows(weight, self.dim)
        spread = rows if self._covariance is None else rows @ self._factor
        return whitened_norm((rows @ self._direction).mT, spread @ spread.mT)

    def sample(self, theta: Theta, n: int, generator: torch.Generator) -> Tensor:
        """A theta + S^(1/2) z, float32 [n, d]."""
        noise = standard_normal(n, self.dim, generator)
        if self._covariance is not None:
            noise = noise @ self._factor.mT.to(noise)
        return noise + self.mean(theta).to(noise)

    def score(self, x: Tensor, theta: Theta) -> Tensor:
        """A^T S^-1 (x - A theta), float64 [n, P]."""
        residual = self._as_samples(x) - self.mean(theta)
        return self._whiten(residual.mT).mT @ self._whiten(self._direction)

    def _whiten(self, columns: Tensor) -> Tensor:
        """L^-1 columns, with L L^T = S."""
        if self._covariance is None:
            return columns
        return torch.linalg.solve_triangular(self._factor, columns, upper=False)


class NoisyLinear(GaussianShift):
    """y = W x + s e, with x ~ N(A theta, S) and e ~ N(0, 1): a layer that adds noise.

        I = A^T W^T (W S W^T + s^2 1)^-1 W A

    Args:
        direction: A, [d] or [d, P].
        noise_std: s, the standard deviation of the added noise, in units of y.
        weight: W, [k, d]; the identity if None.
        covariance: S, [d, d]; the identity if None.

    Raises:
        ValueError: if the shapes do not match, s is not positive, or S not positive definite.

    Example:
        >>> import torch
        >>> from fisherfast.problems import NoisyLinear
        >>> round(NoisyLinear(torch.ones(4), noise_std=1.0).fisher(0.0).item(), 9)
        2.0
    """

    def __init__(
        self,
        direction: np.ndarray | Tensor,
        *,
        noise_std: float,
        weight: np.ndarray | Tensor | None = None,
        covariance: np.ndarray | Tensor | None = None,
    ) -> None:
        clean = GaussianShift(direction, covariance)
        identity = torch.eye(clean.dim, dtype=torch.float64)
        rows = identity if weight is None else as_rows(weight, clean.dim)
        spread = rows @ clean.covariance(0.0) @ rows.mT
        noise = check_positive("noise_std", noise_std) ** 2 * torch.eye(len(rows)).to(spread)
        super().__init__(rows @ clean.mean_derivative(0.0).mT, (spread + spread.mT) / 2 + noise)


class GaussianScale(Problem):
    """x ~ N(0, theta^2 1): all information is in the spread, none in the mean.

        I = 2 d / theta^2,  J = 0

    Args:
        dim: d.

    Example:
        >>> from fisherfast.problems import GaussianScale
        >>> GaussianScale(50).fisher(1.0).item()
        100.0
    """

    def __init__(self, dim: int) -> None:
        self.dim = check_whole("dim", dim, least=1)

    def as_theta(self, theta: Theta) -> Tensor:
        """theta, the standard deviation, as a positive float64 tensor [1]."""
        scale = super().as_theta(theta)
        if not (scale > 0).all():
            raise ValueError(f"theta must be positive, got {scale.item()}")
        return scale

    def mean(self, theta: Theta) -> Tensor:
        """Zero, float64 [d]."""
        return torch.zeros(self.dim, dtype=torch.float64)

    def mean_derivative(self, theta: Theta) -> Tensor:
        """Zero, float64 [1, d]."""
        return torch.zeros(1, self.dim, dtype=torch.float64)

    def covariance(self, theta: Theta) -> Tensor:
        """theta^2 1, float64 [d, d]."""
        return self.as_theta(theta) ** 2 * torch.eye(self.dim, dtype=torch.float64)

    def fisher(self, theta: Theta) -> Tensor:
        """2 d / theta^2, float64 [1, 1]."""
        return (2 * self.dim / self.as_theta(theta) ** 2).reshape(1, 1)

    def sample(self, theta: Theta, n: int, generator: torch.Generator) -> Tensor:
        """theta z, float32 [n, d]."""
        noise = standard_normal(n, self.dim, generator)
        return noise * self.as_theta(theta).to(noise)

    def sample_with_tangent(
        self, theta: Theta, n: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Samples theta z [n, d] and their derivative z [n, 1, d]."""
        noise = standard_normal(n, self.dim, generator)
        return noise * self.as_theta(theta).to(noise), noise.unsqueeze(1)

    def score(self, x: Tensor, theta: Theta) -> Tensor:
        """|x|^2 / theta^3 - d / theta, float64 [n, 1]."""
        scale = self.as_theta(theta)
        power = self._as_samples(x).square().sum(1, keepdim=True)
        return power / scale**3 - self.dim / scale


class GaussianFamily(Problem):
    """x ~ N(m(theta), C(theta)): the general Gaussian, P parameters.

        I_pq = m_p^T C^-1 m_q + tr(C^-1 C_p C^-1 C_q) / 2,  J_pq = the first term

    with m_p, C_p the derivatives to theta_p (Kay 1993, Estimation Theory, eq. 3.31).

    Args:
        mean: theta [P] -> m [d].
        covariance: theta [P] -> C [d, d].
        mean_derivative: theta [P] -> [P, d].
        covariance_derivative: theta [P] -> [P, d, d].
        dim: d.
        parameters: P.

    Raises:
        ValueError: if a function returns another shape, or C is not positive definite.

    Example:
        >>> import torch
        >>> from fisherfast.problems import GaussianFamily
        >>> eye = torch.eye(3, dtype=torch.float64)
        >>> family = GaussianFamily(
        ...     mean=lambda theta: theta * torch.ones(3),
        ...     covariance=lambda theta: theta**2 * eye,
        ...     mean_derivative=lambda theta: torch.ones(1, 3),
        ...     covariance_derivative=lambda theta: 2 * theta * eye[None],
        ...     dim=3,
        ... )
        >>> family.fisher(1.0).item(), family.linear_fisher(1.0).item()
        (9.0, 3.0)
    """

    def __init__(
        self,
        mean: Callable[[Tensor], Tensor],
        covariance: Callable[[Tensor], Tensor],
        mean_derivative: Callable[[Tensor], Tensor],
        covariance_derivative: Callable[[Tensor], Tensor],
        *,
        dim: int,
        parameters: int = 1,
    ) -> None:
        self.dim = check_whole("dim", dim, least=1)
        self.parameters = check_whole("parameters", parameters, least=1)
        self._mean, self._mean_derivative = mean, mean_derivative
        self._covariance, self._covariance_derivative = covariance, covariance_derivative

    def mean(self, theta: Theta) -> Tensor:
        """m(theta), float64 [d]."""
        return as_shape("mean", self._mean(self.as_theta(theta)), self.dim)

    def mean_derivative(self, theta: Theta) -> Tensor:
        """d m / d theta, float64 [P, d]."""
        value = self._mean_derivative(self.as_theta(theta))
        return as_shape("mean_derivative", value, self.parameters, self.dim)

    def covariance(self, theta: Theta) -> Tensor:
        """C(theta), float64 [d, d]."""
        return as_shape("covariance", self._covariance(self.as_theta(theta)), self.dim, self.dim)

    def covariance_derivative(self, theta: Theta) -> Tensor:
        """d C / d theta, float64 [P, d, d]."""
        value = self._covariance_derivative(self.as_theta(theta))
        return as_shape("covariance_derivative", value, self.parameters, self.dim, self.dim)

    def fisher(self, theta: Theta) -> Tensor:
        """m_p^T C^-1 m_q + tr(C^-1 C_p C^-1 C_q) / 2, float64 [P, P]."""
        change = self._whitened_change(theta)
        return self.linear_fisher(theta) + torch.einsum("pij,qij->pq", change, change) / 2

    def sample(self, theta: Theta, n: int, generator: torch.Generator) -> Tensor:
        """m + L z, L L^T = C, float32 [n, d]."""
        noise = standard_normal(n, self.dim, generator)
        factor = cholesky_factor(self.covariance(theta))
        return noise @ factor.mT.to(noise) + self.mean(theta).to(noise)

    def sample_with_tangent(
        self, theta: Theta, n: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Samples m + L z [n, d] and their derivative m_p + L_p z [n, P, d].

        L_p = L tril'(L^-1 C_p L^-T), tril' the lower triangle with half the diagonal (Murray 2016,
        arXiv 1602.07527, eq. 8).
        """
        noise = standard_normal(n, self.dim, generator)
        factor = cholesky_factor(self.covariance(theta))
        change = self._whitened_change(theta)
        lower = change.tril(-1) + change.diagonal(dim1=1, dim2=2).diag_embed() / 2
        x = noise @ factor.mT.to(noise) + self.mean(theta).to(noise)
        tangent = noise @ (factor @ lower).mT.to(noise)
        return x, tangent.movedim(0, 1) + self.mean_derivative(theta).to(noise)

    def score(self, x: Tensor, theta: Theta) -> Tensor:
        """m_p^T C^-1 r + [r^T C^-1 C_p C^-1 r - tr(C^-1 C_p)] / 2, r = x - m, float64 [n, P]."""
        factor = cholesky_factor(self.covariance(theta))
        change = self._whitened_change(theta)
        residual = self._as_samples(x) - self.mean(theta)
        white = torch.linalg.solve_triangular(factor, residual.mT, upper=False)
        shift = torch.linalg.solve_triangular(factor, self.mean_derivative(theta).mT, upper=False)
        power = torch.einsum("in,pij,jn->np", white, change, white)
        return white.mT @ shift + (power - change.diagonal(dim1=1, dim2=2).sum(1)) / 2

    def _whitened_change(self, theta: Theta) -> Tensor:
        """L^-1 C_p L^-T, float64 [P, d, d]."""
        factor = cholesky_factor(self.covariance(theta))
        half = torch.linalg.solve_triangular(factor, self.covariance_derivative(theta), upper=False)
        return torch.linalg.solve_triangular(factor, half.mT, upper=False)


def as_rows(weight: np.ndarray | Tensor, dim: int) -> Tensor:
    """Return the weight [k, dim] of a layer as float64, or raise a ValueError."""
    rows = torch.as_tensor(weight, dtype=torch.float64)
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise ValueError(f"weight must have shape [k, {dim}], got {tuple(rows.shape)}")
    return rows


def as_shape(name: str, value: Tensor, *shape: int) -> Tensor:
    """Return the result of a user's function as float64 of the given shape, or raise a
    ValueError."""
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must return shape {shape}, got {tuple(tensor.shape)}")
    return tensor
