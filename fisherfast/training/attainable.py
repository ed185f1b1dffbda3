r"""`attainable_error`: the least possible mean square error if theta is known to lie in a bounded
range.

1/J is the least error of an *unbiased* estimate at one theta. A network learns from its training
samples which theta are possible, and moves estimates outside this range back into it: near the
edges its error is below 1/J. The least mean square error under a prior is that of the posterior
mean,

.. math:: E_{min} = E_y [ Var(\theta | y) ], \qquad y \sim N(\theta, 1/J).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence

import torch

from fisherfast._validation import check_positive
from fisherfast.estimation.ridge import raw_ridge, relative_rounding
from fisherfast.model.default_device import on_host

Prior = torch.Tensor | Sequence[float]

MOST_VALUES = 256
"""Most different values of theta that count as a grid, which the network can learn."""
CELLS = 64
"""Cells of the histogram of more values, which are treated as a continuous distribution."""
STEPS = 8
"""Points per standard deviation: such sums of Gaussians equal their integrals to 1e-15."""
TAIL = 8.5
"""Standard deviations at which integrals end: the weight outside is 1e-17."""
DEGREE = 6
"""Degree of the polynomial, for ranges of a few standard errors with a few turns of the mean."""
LEAST_DOF = 2  # degrees of freedom per number of a sample, to invert a covariance
DRAWS = 40_000  # of the simulation: 1 % error
WIDEST = 200.0
"""Width of a continuous range, in standard deviations, up to which the error is computed; for wider
ranges the effect of the edges falls as 1 / width."""


@on_host()
def attainable_error(precision: float, prior: Prior) -> float:
    """Compute the mean square error of the posterior mean of theta, given a Gaussian measurement.

    The measurement represents data with this Fisher information at every theta of the prior. If the
    information is the same everywhere, and samples differ more the farther apart their theta are,
    this is the error of the best estimate. It is too low if distant theta give similar samples, as
    in images in which an object has moved by more than its own size.

    Args:
        precision: J, in 1/theta^2.
        prior: (low, high) for theta uniform in this range; or a tensor [n] of theta of the training
            samples: up to 256 different values are treated as a grid that the network can learn,
            more as samples of a continuous distribution.

    Returns:
        The error in theta^2, at most 1/J.

    Raises:
        ValueError: precision is not positive, or the prior is empty, not finite or a single value.

    Example:
        >>> from fisherfast.training.attainable import attainable_error
        >>> round(attainable_error(256.0, (-1.0, 1.0)) * 256, 2)      # of 1 / J
        0.94
    """
    precision = check_positive("precision", precision)
    known = check_prior(prior)
    if isinstance(known, tuple):
        return _continuous(torch.ones(1), *known, precision)
    values = known
    distinct, counts = values.unique(return_counts=True)
    if len(distinct) <= MOST_VALUES:
        return _grid(distinct * math.sqrt(precision), counts / len(values)) / precision
    low, high = float(distinct[0]), float(distinct[-1])
    return _continuous(torch.histc(values, CELLS, low, high), low, high, precision)


@on_host()
def attainable_error_of_samples(
    x: torch.Tensor, theta: torch.Tensor, *, degree: int = DEGREE, seed: int = 0
) -> float:
    r"""Compute the same from labelled samples, also if distant theta give similar samples.

    The mean of x is fitted by a polynomial of theta, its covariance is that of the residuals, and
    theta has the distribution of the samples. The error of the posterior mean of
    :math:`x \sim N(m(\theta), S)` follows by simulation, in the few directions in which m varies;
    the part of the distances that comes from the noise of the fit is subtracted.

    Args:
        x: samples [n, ...], of d numbers each, n well above d.
        theta: [n].
        degree: of the polynomial: the default is enough for a range of theta of some standard
            errors, not for dozens (for these `attainable_error` is right).
        seed: of the simulation; the global random state is not used.

    Returns:
        The error in theta^2, to about 1 %. Too high if information is not in the mean of x, or if
        the noise is not Gaussian.

    Raises:
        ValueError: theta does not have one value per sample, or there are too few samples.

    Cost: n d^2 operations, 16 n d bytes.

    Example:
        >>> import torch
        >>> from fisherfast.training.attainable import attainable_error_of_samples
        >>> generator = torch.Generator().manual_seed(0)
        >>> theta = torch.randint(2, (20_000,), generator=generator) * 2.0 - 1
        >>> x = theta[:, None] + torch.randn(20_000, 4, generator=generator)
        >>> error = attainable_error_of_samples(x, theta, degree=1)      # J = 4
        >>> 0.06 < error < 0.09
        True
    """
    if theta.ndim != 1 or len(theta) != len(x):
        raise ValueError(f"theta must have one value per sample, got shape {tuple(theta.shape)}")
    X, t = x.detach().cpu().flatten(1).double(), theta.detach().cpu().double()
    low, high = float(t.min()), float(t.max())
    n, d = X.shape
    freedom = n - degree - 1
    if freedom < LEAST_DOF * d:
        raise ValueError(
            f"x must hold at least {LEAST_DOF * d + degree + 1} samples of {d} numbers, got {n}"
        )
    if not low < high:
        raise ValueError(f"theta must hold more than one value, got {low}")
    basis = _powers((2 * t - low - high) / (high - low), degree)
    inverse = torch.linalg.inv(basis.T @ basis)
    coefficients = inverse @ (basis.T @ X)
    residuals = X - basis @ coefficients
    covariance = residuals.T @ residuals / freedom
    rounding = relative_rounding(x.dtype) ** 2 * X.square().mean(0)
    covariance.diagonal().mul_(1 + raw_ridge(covariance.diagonal(), rounding))
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), coefficients.T, upper=False
    ).T
    gram = (freedom - d - 1) / freedom * (whitened @ whitened.T) - d * inverse
    values, vectors = torch.linalg.eigh(gram[1:, 1:])  # without the constant
    path = vectors * values.clamp_min(0).sqrt()
    places, weights = _representatives(t)
    means = _powers((2 * places - low - high) / (high - low), degree)[:, 1:] @ path
    return _simulated(places, weights, means, torch.Generator().manual_seed(seed))


def _powers(t: torch.Tensor, degree: int) -> torch.Tensor:
    """Compute Chebyshev polynomials of t in [-1, 1]: [n, degree + 1]."""
    return torch.cos(torch.arange(degree + 1) * t.clamp(-1, 1).acos()[:, None])


def _representatives(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values of theta and their weights: all values of a grid, or quantiles."""
    distinct, counts = t.unique(return_counts=True)
    if len(distinct) <= MOST_VALUES:
        return distinct, counts / len(t)
    shares = (torch.arange(MOST_VALUES, dtype=torch.float64) + 0.5) / MOST_VALUES
    return t.sort().values[(shares * len(t)).long()], torch.full_like(shares, 1 / MOST_VALUES)


def _simulated(
    places: torch.Tensor, weights: torch.Tensor, means: torch.Tensor, generator: torch.Generator
) -> float:
    """Simulate the mean square error of the posterior mean of y ~ N(means[i], 1)."""
    per_place = math.ceil(DRAWS / len(places))
    error = torch.zeros((), dtype=torch.float64)
    for place, weight, mean in zip(places, weights, means, strict=True):
        noise = torch.randn(per_place, len(mean), generator=generator, dtype=torch.float64)
        distances = torch.cdist(mean + noise, means).square()
        posterior = torch.softmax(weights.log() - distances / 2, dim=1)
        error += weight * (posterior @ places - place).square().mean()
    return float(error)


def check_prior(prior: Prior) -> tuple[float, float] | torch.Tensor:
    """Return a prior as (low, high), or as values of theta, float64 [n] on the CPU.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(prior, torch.Tensor):
        try:
            low, high = (float(end) for end in prior)
        except (TypeError, ValueError):
            low = high = math.nan
        if not -math.inf < low < high < math.inf:
            raise ValueError(
                "prior must be (low, high) with low < high, or a tensor of theta, got"
                f" {reprlib.repr(prior)}"
            )
        return low, high
    values = prior.detach().cpu().double().flatten()
    if not len(values) or not bool(torch.isfinite(values).all()):
        raise ValueError(f"prior must hold finite values of theta, got shape {tuple(prior.shape)}")
    if bool((values == values[0]).all()):
        raise ValueError(f"prior must hold more than one value of theta, got {float(values[0])}")
    return values


def _grid(values: torch.Tensor, weights: torch.Tensor) -> float:
    """Compute the error for values [m] in units of the standard deviation, by a sum around each."""
    z = torch.arange(-TAIL, TAIL, 1 / STEPS, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / (STEPS * math.sqrt(2 * math.pi))
    error = torch.zeros((), dtype=torch.float64)
    for value, weight in zip(values, weights, strict=True):
        offsets = values - value  # of every candidate from the truth
        posterior = torch.softmax(-((z[:, None] - offsets) ** 2) / 2 + weights.log(), dim=1)
        mean = posterior @ offsets
        variance = (posterior * (offsets - mean[:, None]) ** 2).sum(1)
        error += weight * (density @ variance)
    return float(error)


def _continuous(histogram: torch.Tensor, low: float, high: float, precision: float) -> float:
    """Compute the error for a density that is constant in each cell, by a sum over all y."""
    width = (high - low) * math.sqrt(precision)
    used = min(width, WIDEST)
    points = max(CELLS // len(histogram), math.ceil(used * STEPS / len(histogram)))
    weights = (histogram / histogram.sum()).double().repeat_interleave(points) / points
    u = ((torch.arange(len(weights), dtype=torch.float64) + 0.5) / len(weights) - 0.5) * used
    y = torch.arange(-used / 2 - TAIL, used / 2 + TAIL, 1 / STEPS, dtype=torch.float64)
    joint = weights * torch.exp(-((y[:, None] - u) ** 2) / 2)
    density = joint.sum(1, keepdim=True)
    posterior = joint / density.clamp_min(torch.finfo(torch.float64).tiny)
    mean = posterior @ u
    variance = (posterior * (u - mean[:, None]) ** 2).sum(1)
    error = float(density[:, 0] @ variance) / (STEPS * math.sqrt(2 * math.pi))
    return (1 - (1 - error) * used / width) / precision
