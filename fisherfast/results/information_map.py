"""`InformationMap`, the result of `FisherFlow.map`: one matrix per position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["InformationMap", "has_map", "is_mapped"]

MAX_MAP_NUMBERS = 2**27
"""H W C^2 of the largest map that is measured: its covariances take 1 GiB."""


@dataclass(frozen=True, eq=False)
class InformationMap:
    """Linear Fisher information of the channels at each position of a feature map.

    Neighbouring positions share information, so J of a layer is not the sum of its map.

    Attributes:
        J: [H, W, P, P] float64 in 1/theta^2, bias-corrected, not clipped; NaN where the covariance
            of a position is singular (ridge 0 only).
        stderr: [H, W, P, P] its standard errors.
    """

    J: torch.Tensor
    stderr: torch.Tensor

    @property
    def value(self) -> torch.Tensor:
        """J [H, W] for one parameter."""
        parameters = self.J.shape[-1]
        if parameters != 1:
            raise ValueError(f"value needs exactly one parameter, got {parameters}: use .J")
        return self.J[..., 0, 0]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and nested lists; NaN as "nan"."""
        return {
            "shape": list(self.J.shape),
            "J": [str(v) if v != v else v for v in self.J.flatten().tolist()],
            "stderr": [str(v) if v != v else v for v in self.stderr.flatten().tolist()],
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> InformationMap:
        """Rebuild a map from the result of `to_dict`."""
        J, stderr = (
            torch.from_numpy(np.array(entry[name], dtype=np.float64).reshape(entry["shape"]))
            for name in ("J", "stderr")
        )
        return cls(J, stderr)


def has_map(shape: tuple[int, ...]) -> bool:
    """Return whether a layer of this shape has positions, and a small enough map."""
    return len(shape) == 3 and shape[1] * shape[2] * shape[0] ** 2 <= MAX_MAP_NUMBERS


def is_mapped(maps: bool | Sequence[str], names: Sequence[str]) -> bool:
    """Return whether the setting maps includes a layer with these names."""
    return maps if isinstance(maps, bool) else any(name in maps for name in names)
