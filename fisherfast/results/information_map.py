"""`InformationMap`, the result of `FisherFlow.map`: one matrix per position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fisherfast.results import table
from fisherfast.results.text import number, theta

MAX_MAP_NUMBERS = 2**27
"""H W C^2 of the largest map that is measured: its covariances take 1 GiB."""


@dataclass(frozen=True, eq=False, repr=False)
class InformationMap:
    """Linear Fisher information of the channels at each position of a feature map.

    Neighbouring positions share information, so J of a layer is not the sum of its map. Print it
    for a table.

    Attributes:
        name: of the layer.
        J: [H, W, P, P] float64 in 1/theta^2, bias-corrected, not clipped; NaN where the covariance
            of a position is singular (ridge 0 only).
        stderr: [H, W, P, P] its standard errors.
    """

    name: str
    J: torch.Tensor
    stderr: torch.Tensor

    @property
    def value(self) -> torch.Tensor:
        """J [H, W] for one parameter."""
        parameters = self.J.shape[-1]
        if parameters != 1:
            raise ValueError(f"value needs exactly one parameter, got {parameters}: use .J")
        return self.J[..., 0, 0]

    def table(self) -> list[list[str]]:
        """Return the header and one row of text per parameter: the J of its positions."""
        rows = [["parameter", "min", "median", "max", "+-", "at"]]
        width = self.J.shape[1]
        for p in range(self.J.shape[-1]):
            J, stderr = (part[..., p, p].flatten() for part in (self.J, self.stderr))
            known = J[~J.isnan()]
            if not len(known):
                rows.append([theta(f"[{p}]"), *"-----"])
                continue
            top = int(J.nan_to_num(-math.inf).argmax())
            numbers = (known.min(), known.median(), J[top], stderr[top])
            at = f"[{top // width}, {top % width}]"
            rows.append([theta(f"[{p}]"), *(number(float(value)) for value in numbers), at])
        return rows

    def __repr__(self) -> str:
        return table.as_text(self.table(), [self._footnote()])

    def _repr_html_(self) -> str:
        return table.as_html(self.table(), [self._footnote()])

    def _footnote(self) -> str:
        H, W = self.J.shape[:2]
        return f"map of {self.name}, [{H}, {W}] positions; J per unit of {theta('²')}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and nested lists; NaN as "nan"."""
        return {
            "name": self.name,
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
        return cls(entry["name"], J, stderr)


def has_map(shape: tuple[int, ...]) -> bool:
    """Return whether a layer of this shape has positions, and a small enough map."""
    return len(shape) == 3 and shape[1] * shape[2] * shape[0] ** 2 <= MAX_MAP_NUMBERS


def is_mapped(maps: bool | Sequence[str], names: Sequence[str]) -> bool:
    """Return whether the setting maps includes a layer with these names."""
    return maps if isinstance(maps, bool) else any(name in maps for name in names)
