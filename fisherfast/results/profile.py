"""`Profile`: the Fisher information of one layer at several values of theta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

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

    theta: torch.Tensor
    J: torch.Tensor
    stderr: torch.Tensor
    samples: torch.Tensor
    rounding: float = SINGULAR

    @property
    def crlb(self) -> torch.Tensor:
        """Cramer-Rao bound [Q, P] in the unit of theta, as in `LayerFisher.crlb`."""
        return torch.stack([cramer_rao(J, self.rounding) for J in self.J])

    def __len__(self) -> int:
        return len(self.theta)

    def __repr__(self) -> str:
        return f"Profile(bins={len(self)}, parameters={self.theta.shape[1]})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and nested lists."""
        tensors = {name: getattr(self, name).tolist() for name in (*_NUMBERS, "samples")}
        return {**tensors, "rounding": self.rounding}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Profile:
        """Rebuild a profile from the result of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing or of the wrong kind.
        """
        bins, parameters = len(entry["theta"]), len(entry["theta"][0])
        shapes = dict.fromkeys(_NUMBERS, (bins, parameters, parameters)) | {
            "theta": (bins, parameters)
        }
        numbers = {
            name: torch.from_numpy(np.array(entry[name], dtype=np.float64).reshape(shapes[name]))
            for name in _NUMBERS
        }
        samples = torch.tensor(entry["samples"], dtype=torch.int64, device="cpu").reshape(bins)
        return cls(**numbers, samples=samples, rounding=float(entry["rounding"]))


_NUMBERS = ("theta", "J", "stderr")
