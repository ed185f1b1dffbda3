"""Forecasts from a Fisher matrix: priors, credible ellipses, the bias from a systematic shift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fisherfast.results.marginal import SINGULAR, MarginalFisher, cramer_rao, marginal_fisher

LEVEL = 0.683
"""Probability inside an ellipse: that within one standard deviation of a single parameter."""

CURVE_POINTS = 181
"""Points of an ellipse: one every two degrees."""

ASYMMETRY = 1e-9
"""Difference between an entry of a precision and its mirror image, relative to the information
about both parameters, that is rounding."""


@dataclass(frozen=True, eq=False, repr=False)
class Ellipse:
    r"""Credible region of two parameters with the others unknown.

    .. math:: (\theta - c)^T C^{-1} (\theta - c) = \Delta\chi^2, \qquad
              \Delta\chi^2 = -2 \ln(1 - \text{level})

    with C the covariance of both. It is 2.30 for 68.3 %: the interval of one parameter has 1.

    Attributes:
        parameters: numbers of both parameters.
        names: of both; empty if they have none.
        level: probability inside.
        center: of the ellipse, in the units of theta.
        covariance: [2, 2] float64, the inverse of the marginal information.
    """

    parameters: tuple[int, int]
    names: tuple[str, ...]
    level: float
    center: tuple[float, float]
    covariance: torch.Tensor

    @property
    def delta_chi2(self) -> float:
        """-2 ln(1 - level)."""
        return -2 * math.log1p(-self.level)

    @property
    def semi_axes(self) -> tuple[float, float]:
        """Half the length of the major and of the minor axis, in the units of theta."""
        C = self.covariance
        mean, half = float(C.trace()) / 2, float(C[0, 0] - C[1, 1]) / 2
        longest = mean + math.hypot(half, float(C[0, 1]))
        return (
            math.sqrt(self.delta_chi2 * longest),
            math.sqrt(self.delta_chi2) * self._root_of_determinant / math.sqrt(longest),
        )

    @property
    def angle(self) -> float:
        """Angle of the major axis with the axis of the first parameter, in radians, -pi/2 to
        pi/2."""
        C = self.covariance
        return math.atan2(2 * float(C[0, 1]), float(C[0, 0] - C[1, 1])) / 2

    @property
    def area(self) -> float:
        """pi times both semi-axes, in the product of the units of both parameters."""
        return math.pi * self.delta_chi2 * self._root_of_determinant

    @property
    def _root_of_determinant(self) -> float:
        """Product of the standard deviation of the first parameter, and of that of the second if
        the first is known: no rounding if their units differ much."""
        return float(self._factor[0, 0] * self._factor[1, 1])

    @property
    def _factor(self) -> torch.Tensor:
        return torch.linalg.cholesky(self.covariance)

    def points(self, count: int = CURVE_POINTS) -> torch.Tensor:
        """Compute points [count, 2] float64 on the ellipse; the last is the first."""
        turn = torch.linspace(0, 2 * math.pi, count, dtype=torch.float64, device="cpu")
        circle = torch.stack([turn.cos(), turn.sin()], 1) * math.sqrt(self.delta_chi2)
        return (
            torch.tensor(self.center, dtype=torch.float64, device="cpu") + circle @ self._factor.T
        )

    def __repr__(self) -> str:
        axes = " x ".join(f"{axis:.4g}" for axis in self.semi_axes)
        shown = list(self.names or self.parameters)
        return f"Ellipse({shown}, level={self.level:g}, semi-axes={axes}, angle={self.angle:.3g})"


def credible_ellipse(
    marginal: MarginalFisher,
    J: torch.Tensor,
    rounding: float,
    level: float,
    center: Sequence[float],
) -> Ellipse:
    """Make the ellipse of two parameters from their marginal information.

    Args:
        marginal: of both.
        J: [P, P] of all parameters.
        rounding: information about a parameter is rounding if it is less than this fraction of J.
        level: probability inside.
        center: of the ellipse, two numbers.

    Raises:
        ValueError: level, center or the number of parameters is wrong, or J is not positive
            definite in both parameters.
    """
    if len(marginal.parameters) != 2:
        raise ValueError(f"keep must name two parameters, got {len(marginal.parameters)}")
    first, second = marginal.parameters
    if not 0 < float(level) < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    place = [float(value) for value in center]
    if len(place) != 2 or not all(map(math.isfinite, place)):
        raise ValueError(f"center must be two finite numbers, got {center}")
    names = marginal.names or [f"theta[{p}]" for p in marginal.parameters]
    left = [marginal_fisher(J, None, p, rounding).value for p in marginal.parameters]
    least = (rounding * J.diagonal()[[first, second]]).tolist()
    unknown = [n for n, seen, bar in zip(names, left, least, strict=True) if not seen > bar]
    if unknown:
        raise ValueError(
            "J must be positive definite for an ellipse, got no information on"
            f" {', '.join(unknown)} with the other parameters unknown: add a prior (with_prior)"
        )
    scale = marginal.J.diagonal().sqrt()
    covariance = torch.linalg.inv(marginal.J / scale[:, None] / scale) / scale[:, None] / scale
    return Ellipse(
        (first, second),
        marginal.names,
        float(level),
        (place[0], place[1]),
        (covariance + covariance.T) / 2,
    )


def check_precision(precision: Any, parameters: int) -> torch.Tensor:
    """Return the precision of a prior as a float64 matrix [P, P] on the CPU.

    Args:
        precision: a matrix [P, P], or [P] of 1 / sigma^2, or a number for one parameter.
        parameters: P.

    Raises:
        TypeError: it does not hold real numbers.
        ValueError: it has another shape, is not finite, or not symmetric positive semi-definite.
    """
    given = precision.detach().cpu() if isinstance(precision, torch.Tensor) else precision
    numbers = np.asarray(given)
    if numbers.dtype.kind not in "iuf":
        raise TypeError(f"precision must hold real numbers, got {precision!r}")
    matrix = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    P = parameters
    if matrix.shape not in ((P, P), (P,)) and not (P == 1 and matrix.ndim == 0):
        raise ValueError(
            f"precision must have shape [P, P] = {[P, P]}, or [P] for 1 / sigma^2, got"
            f" {list(matrix.shape)}"
        )
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"precision must be finite, got {matrix.tolist()}")
    if matrix.ndim < 2:
        matrix = matrix.reshape(P).diag()
    scale = matrix.diagonal().abs().sqrt()
    unit = scale[:, None] * scale
    if bool(((matrix - matrix.T).abs() > ASYMMETRY * unit).any()):
        raise ValueError(f"precision must be symmetric, got {matrix.tolist()}")
    correlation = torch.where(unit > 0, matrix / unit.clamp_min(torch.finfo(unit.dtype).tiny), 0.0)
    hidden = bool(matrix[unit == 0].any())  # a covariance with a parameter of no variance
    if hidden or bool((torch.linalg.eigvalsh(correlation) < -SINGULAR).any()):
        raise ValueError(f"precision must be positive semi-definite, got {matrix.tolist()}")
    return (matrix + matrix.T) / 2


def bias_of(
    J: torch.Tensor, readout: torch.Tensor, shape: tuple[int, ...], shift: Any
) -> torch.Tensor:
    """Compute J^-1 W^T shift [P].

    Args:
        J: [P, P].
        readout: W [d, P].
        shape: of the activations of one sample.
        shift: of their mean, of that shape; or of each sample [n, ...].

    Raises:
        TypeError: shift does not hold real numbers.
        ValueError: shift has another shape or is not finite.
    """
    given = shift.detach().cpu() if isinstance(shift, torch.Tensor) else torch.as_tensor(shift)
    if given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"shift must hold real numbers, got {given.dtype}")
    moved = given.double()
    if tuple(moved.shape) == (len(moved) if moved.ndim else 0, *shape) and len(moved):
        moved = moved.mean(0)
    if tuple(moved.shape) != tuple(shape):
        raise ValueError(
            f"shift must have the shape of the activations, {list(shape)}, or [n, ...] of n"
            f" samples, got {list(given.shape)}"
        )
    if not bool(torch.isfinite(moved).all()):
        raise ValueError("shift must be finite, got NaN or infinity")
    if not bool(torch.isfinite(cramer_rao(J)).all()):
        return torch.full((len(J),), math.nan, dtype=torch.float64, device="cpu")
    scale = J.diagonal().sqrt()
    pull = readout.T @ moved.reshape(-1)
    return torch.linalg.solve(J / scale[:, None] / scale, pull / scale) / scale
