r"""`attainable_error`: the mean square error that nobody can beat when theta is known to lie in a
bounded range.

1/J is the least error of an *unbiased* estimate at one theta. A network knows from its training
samples where theta can be, and pulls what seems to lie outside back into the range: near the edges
its error is below 1/J. The least mean square error under a prior is that of the posterior mean,

.. math:: E_{min} = E_y [ Var(\theta | y) ], \qquad y \sim N(\theta, 1/J).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["Prior", "attainable_error"]

Prior = torch.Tensor | Sequence[float]

MOST_VALUES = 256
"""Different values of theta up to which they count as a grid, of which the network may know."""
CELLS = 64
"""Of the histogram of more values than that: they are taken to be continuous, with this density."""
STEPS = 8
"""Points per standard deviation: integrals of Gaussians by points that dense are exact to 1e-15."""
TAIL = 8.5
"""Standard deviations: what is farther out has a weight of 1e-17."""
WIDEST = 200.0
"""Standard deviations in a continuous range up to which it is computed; beyond, what the edges take
off falls as 1 / width."""


def attainable_error(precision: float, prior: Prior) -> float:
    """Mean square error of the posterior mean of theta, given a Gaussian measurement of it.

    The measurement stands for data of this Fisher information at every theta of the prior. Where
    the information is the same everywhere and samples become the more different the farther their
    theta are apart, this is what the best estimate reaches. It is too low where distant theta look
    alike, as in images in which an object has moved by more than its own size.

    Args:
        precision: J, in 1/theta^2.
        prior: (low, high), theta uniform in this range; or a tensor [n] of theta of the training
            samples: up to 256 different values are taken as a grid that the network can learn, more
            as samples of a continuous distribution.

    Returns:
        The error in theta^2, at most 1/J.

    Raises:
        ValueError: precision is not positive, or the prior is empty, not finite or a single value.

    Example:
        >>> from fisherfast.training.attainable import attainable_error
        >>> round(attainable_error(256.0, (-1.0, 1.0)) * 256, 2)      # of 1/J
        0.96
    """
    if not (math.isfinite(precision) and precision > 0):
        raise ValueError(f"precision must be positive and finite, got {precision}")
    if not isinstance(prior, torch.Tensor):
        return _continuous(torch.ones(1), *_range(prior), precision)
    values = prior.detach().cpu().double().flatten()
    if not len(values) or not bool(torch.isfinite(values).all()):
        raise ValueError(f"prior must hold finite values of theta, got shape {tuple(prior.shape)}")
    distinct, counts = values.unique(return_counts=True)
    if len(distinct) == 1:
        raise ValueError(f"prior must hold more than one value of theta, got {float(distinct)}")
    if len(distinct) <= MOST_VALUES:
        return _grid(distinct * math.sqrt(precision), counts / len(values)) / precision
    low, high = float(distinct[0]), float(distinct[-1])
    return _continuous(torch.histc(values, CELLS, low, high), low, high, precision)


def _range(prior: Sequence[float]) -> tuple[float, float]:
    if len(prior) != 2 or not -math.inf < prior[0] < prior[1] < math.inf:
        raise ValueError(f"prior must be (low, high) with low < high, got {tuple(prior)}")
    return float(prior[0]), float(prior[1])


def _grid(values: torch.Tensor, weights: torch.Tensor) -> float:
    """For values [m] in units of the standard deviation: a sum around each of them."""
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
    """For a density that is constant in each cell: a sum over all y."""
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
