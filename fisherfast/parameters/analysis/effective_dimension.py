"""The effective dimension: how many parameters the data can tell apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfast.parameters.checks import check_number


@dataclass(frozen=True, eq=False)
class EffectiveDimension:
    r"""The effective dimension of a network for n samples.

    .. math::
        d_{\gamma,n} = \frac{2 \log \langle \sqrt{\det(1 + \kappa \hat F(w))} \rangle_w}
                            {\log \kappa}, \qquad
        \kappa = \frac{\gamma n}{2 \pi \log n}, \qquad
        \hat F(w) = \frac{P F(w)}{\langle \mathrm{tr} F(w) \rangle_w}

    The mean < > goes over Fisher matrices. One alone gives that of the parameters the network has
    (the local effective dimension); those of networks drawn at random that of the architecture. It
    is a mean of exponentials in P: with few matrices the largest determinant decides, and d is too
    low. As n grows, d tends to the largest rank of F.

    Attributes:
        value: d, between 0 and the number of parameters (larger only where log kappa is near 0).
        n: samples that the network would be trained on.
        gamma: share of them that counts.
        parameters: P.
        traces: [m] of the m Fisher matrices, in 1 / w^2.
        log_determinants: [m] log det(1 + kappa F^), F^ the normalised Fisher matrix.

    References: Abbas, Sutter, Zoufal, Lucchi, Figalli, Woerner (2021), "The power of quantum neural
    networks", Nature Computational Science 1, 403, equations 2 and 3; of one matrix: Abbas, Sutter,
    Figalli, Woerner (2021), arXiv:2112.04807, definition 1.
    """

    value: float
    n: float
    gamma: float
    parameters: int
    traces: Tensor
    log_determinants: Tensor

    @property
    def share(self) -> float:
        """value / P, the normalised effective dimension."""
        return self.value / self.parameters

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return (
            f"EffectiveDimension({self.value:.6g} of {self.parameters} parameters"
            f" ({100 * self.share:.3g} %), n={self.n:g}, gamma={self.gamma:g},"
            f" matrices={len(self.traces)})"
        )


def effective_dimension(
    traces: Sequence[float],
    log_det_one_plus: Sequence[Callable[[float], float]],
    *,
    parameters: int,
    n: float,
    gamma: float,
) -> EffectiveDimension:
    """The effective dimension of m Fisher matrices, from their traces and log det(1 + c F) of c.

    See `ParameterFisher.effective_dimension`.
    """
    kappa = _kappa(n, gamma)
    many = len(traces)
    mean = sum(traces) / many
    if not 0 < mean < math.inf:
        raise ValueError(f"the Fisher matrix must have a positive trace, got {mean}")
    found = [log_det(kappa * parameters / mean) for log_det in log_det_one_plus]
    halves = 0.5 * torch.tensor(found, dtype=torch.float64, device="cpu")
    mean_root = float(halves.logsumexp(0)) - math.log(many)
    return EffectiveDimension(
        value=2 * mean_root / math.log(kappa),
        n=float(n),
        gamma=float(gamma),
        parameters=parameters,
        traces=torch.tensor(traces, dtype=torch.float64, device="cpu"),
        log_determinants=2 * halves,
    )


def _kappa(n: float, gamma: float) -> float:
    check_number("gamma", gamma)
    check_number("n", n)
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}")
    kappa = gamma * n / (2 * math.pi * math.log(n)) if 1 < n < math.inf else 0.0
    if kappa <= 1:
        raise ValueError(
            f"n must be so large that gamma n / (2 pi log n) is above 1, got n = {n} with"
            f" gamma = {gamma}; n = 20 is enough for gamma = 1"
        )
    return kappa
