"""`Profile`: the Fisher information of one layer at several values of theta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from fisherfast._fields import AtLeast, Shape, build, plain
from fisherfast.results.estimator import EstimatorErrors, errors_along
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

    @property
    def crlb_stderr(self) -> torch.Tensor:
        """Standard errors [Q, P] of `crlb` to first order, as if the entries of J had independent
        errors; NaN where the bound is infinite."""
        bound = self.crlb
        known = torch.isfinite(bound).all(1)
        unit = torch.eye(self.J.shape[1], dtype=torch.float64, device="cpu")
        column = torch.linalg.inv(torch.where(known[:, None, None], self.J, unit)).square()
        variance = self.stderr.square()
        crossed = 2 * torch.einsum("qip,qij,qjp->qp", column, variance, column)
        crossed -= torch.einsum("qip,qii,qip->qp", column, variance, column)
        return torch.where(known[:, None], crossed.sqrt() / (2 * bound), torch.nan)

    def errors(self, model: nn.Module, x: Any, theta: Any) -> EstimatorErrors:
        """Compute RMS error, bias and standard deviation of a network that estimates theta, at the
        theta of this profile, to be compared with `crlb`.

        Each sample belongs to the nearest theta of the profile, in units of the spread of theta.

        Args:
            model: returns estimates [n, P], or [n]. It runs in eval mode without gradients.
            x: samples [n, ...], tensor or array; a tuple or dict of these for several inputs.
            theta: true theta [n, P], or [n] for one parameter.

        Raises:
            ValueError: theta or the estimates have another shape or are not finite.
            TypeError: x or theta are no tensors or arrays.

        Example:
            >>> import torch
            >>> from fisherfast.results.profile import Profile
            >>> at, J = torch.tensor([[-1.0], [0.0], [1.0]]).double(), torch.ones(3, 1, 1).double()
            >>> profile = Profile(at, J, J / 10, J[:, 0, 0])
            >>> theta = torch.rand(3000) * 3 - 1.5
            >>> halved = torch.nn.Linear(1, 1)                       # bias towards the middle
            >>> _ = halved.weight.data.fill_(0.5), halved.bias.data.zero_()
            >>> errors = profile.errors(halved, theta[:, None] + torch.randn(3000, 1), theta)
            >>> (errors.bias[[0, 2], 0] > 0).tolist(), (errors.std < profile.crlb).all().item()
            ([True, False], True)
        """
        return errors_along(self.theta, model, x, theta)

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
