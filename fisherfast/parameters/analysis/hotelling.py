"""Hotelling's T^2, which tests whether the mean of some numbers per sample is zero.

With mean z [q] and covariance S of n samples,

    T^2 = n z^T S^-1 z,    (n - q) / (q (n - 1)) T^2 ~ F(q, n - q)

for normal samples (Hotelling 1931), and for others in the limit of many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RANK = 1e-10
"""Eigenvalue of a correlation matrix below which a direction depends on others: what rounding in
float32 leaves of one is about 1e-14."""

CERTAIN = 1e-4
"""Share of its root mean square that the mean of numbers without variance must exceed: rounding in
float32 leaves 1e-7."""


@dataclass(frozen=True)
class TSquared:
    """One test of a mean.

    Attributes:
        statistic: T^2.
        degrees: (q, n - q) of the F distribution; (0, n) where no number ever differs from zero.
        p_value: chance of a statistic at least as large if the mean is zero.
    """

    statistic: float
    degrees: tuple[int, int]
    p_value: float


class Moments:
    """Mean and covariance of rows [n, m], batch by batch (Chan, Golub and LeVeque 1983)."""

    def __init__(self, numbers: int, device: torch.device) -> None:
        self.samples = 0
        self.mean = torch.zeros(numbers, dtype=torch.float64, device=device)
        self._sum = torch.zeros(numbers, numbers, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows [n, m]."""
        rows = rows.double()
        before, self.samples = self.samples, self.samples + len(rows)
        mean = rows.mean(0)
        centred, shift = rows - mean, mean - self.mean
        weight = before * len(rows) / self.samples
        self._sum += centred.T @ centred + weight * shift[:, None] * shift
        self.mean += shift * (len(rows) / self.samples)

    @property
    def covariance(self) -> Tensor:
        """[m, m], with n - 1."""
        return self._sum / (self.samples - 1)


def t_squared(mean: Tensor, covariance: Tensor, samples: int) -> TSquared:
    """Test whether a mean [m] is zero; numbers that depend on the others count once.

    Args:
        mean: of the samples, [m].
        covariance: [m, m] of one sample, with n - 1.
        samples: n, more than m.
    """
    from scipy.special import fdtrc

    size = (covariance.diagonal() + mean.square()).sqrt()
    seen = size > 0
    if not bool(seen.any()):
        return TSquared(0.0, (0, samples), 1.0)
    mean, size = mean[seen], size[seen]
    values, vectors = torch.linalg.eigh(covariance[seen][:, seen] / size[:, None] / size)
    part = vectors.T @ (mean / size)
    free = values > RANK
    rank = int(free.sum())
    degrees = (rank, samples - rank)
    if bool((part[~free].abs() > CERTAIN).any()):
        return TSquared(math.inf, degrees, 0.0)
    statistic = samples * float((part[free].square() / values[free]).sum())
    if rank == 0:
        return TSquared(0.0, degrees, 1.0)
    ratio = statistic * (samples - rank) / (rank * (samples - 1))
    return TSquared(statistic, degrees, float(fdtrc(*degrees, ratio)))
