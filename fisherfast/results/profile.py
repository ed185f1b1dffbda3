"""`Profile`: the Fisher information of one layer at several values of theta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch

from fisherfast._fields import AtLeast, Shape, build, plain
from fisherfast.results.marginal import SINGULAR, cramer_rao


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """Fisher information along theta: of Q bins of a labelled data set, or of a simulator at Q
    values of theta. Float64 on the CPU.

    Attributes:
        theta: [Q, P] mean of theta of the samples of each bin, or the simulator's theta; for one
            parameter in ascending order.
        J: [Q, P, P] bias-corrected linear Fisher information, in 1/theta^2.
        stderr: [Q, P, P] standard errors of J.
        samples: [Q] int64 samples of each bin, over all conditions.
        rounding: as in `LayerFisher`, the largest of the bins.
    """

    theta: Annotated[torch.Tensor, Shape(("Q", "P"))]
    J: Annotated[torch.Tensor, Shape(("Q", "P", "P"))]
    stderr: Annotated[torch.Tensor, Shape(("Q", "P", "P")), AtLeast(0)]
    samples: Annotated[torch.Tensor, Shape(("Q",), torch.int64), AtLeast(0)]
    rounding: Annotated[float, AtLeast(0)] = SINGULAR

    @property
    def crlb(self) -> torch.Tensor:
        """Cramer-Rao bound [Q, P] in the unit of theta, as in `LayerFisher.crlb`."""
        return torch.stack([cramer_rao(J, self.rounding) for J in self.J])

    def __len__(self) -> int:
        return len(self.theta)

    def __repr__(self) -> str:
        return f"Profile(bins={len(self)}, parameters={self.theta.shape[1]})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and nested lists; NaN as "nan"."""
        return plain(self)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Profile:
        """Rebuild a profile from the result of `to_dict`.

        Raises:
            ValueError: an entry is missing or of the wrong kind.
        """
        return build(cls, entry)
