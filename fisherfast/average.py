"""The mean of two curves of J that were measured on different samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fisherfast.estimators import FisherCurve

__all__ = ["MeanCurve", "average_curves"]


@dataclass(frozen=True)
class MeanCurve(FisherCurve):
    """The mean of two independent curves; its statistics are those of the first.

    Attributes:
        parts: the two.
    """

    parts: tuple[FisherCurve, FisherCurve]

    def error_covariance(self, k: int) -> torch.Tensor:
        """Covariance [P, P, P, P] of the errors of the entries of J(k)."""
        first, second = (part.error_covariance(min(k, len(part))) for part in self.parts)
        return (first + second) / 4


def average_curves(first: FisherCurve, second: FisherCurve) -> MeanCurve:
    """The mean of two independent curves of the same parameters.

    A curve that ends before the other stays at its last value: it has no more features. The folds
    of both make one jackknife, whose deviations are scaled so that the variance of the mean,
    (V_1 + V_2) / 4, follows from all F_1 + F_2 of them.
    """
    size = max(len(first), len(second))
    folds = first.left_out.shape[1] + second.left_out.shape[1]
    index = torch.arange(size, device=first.J.device)

    def both(name: str) -> list[torch.Tensor]:
        return [getattr(c, name)[index.clamp_max(len(c) - 1)] for c in (first, second)]

    def mean(name: str) -> torch.Tensor:
        return sum(both(name), start=first.J.new_zeros(())) / 2

    def jackknife(name: str) -> torch.Tensor:
        deviations = []
        for values in both(name):
            own = values.shape[1]
            weight = math.sqrt(folds * (own - 1) / (4 * own * (folds - 1)))
            deviations.append(weight * (values - values.mean(1, keepdim=True)))
        return torch.cat(deviations, 1)

    errors, useless = both("stderr"), both("useless")
    ratio = first.statistics.dof / second.statistics.dof
    return MeanCurve(
        J=mean("J"),
        stderr=torch.hypot(errors[0], errors[1]) / 2,
        naive=mean("naive"),
        effective_dim=mean("effective_dim"),
        left_out=torch.diagonal(mean("J"), dim1=1, dim2=2)[:, None] + jackknife("left_out"),
        useless=torch.hypot(useless[0], ratio * useless[1]) / 2,  # per nu of the first
        replicates=mean("J")[:, None] + jackknife("replicates"),
        statistics=first.statistics,
        condition=max(first.condition, second.condition),
        parts=(first, second),
    )
