"""`InformationMap`, the result of `FisherFlow.map`: one matrix per position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch

from fisherfast._fields import AtLeast, Shape, build, plain
from fisherfast._validation import check_whole
from fisherfast.results import table
from fisherfast.results.plots import axes_or_new
from fisherfast.results.text import number, theta

COLOURS = (1, 3)
"""Channels of a picture: grey or RGB."""

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
    J: Annotated[torch.Tensor, Shape(("H", "W", "P", "P"))]
    stderr: Annotated[torch.Tensor, Shape(("H", "W", "P", "P")), AtLeast(0)]

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

    def plot(
        self,
        ax: Any = None,
        *,
        over: Any = None,
        parameter: int = 0,
        unit: str = "1/theta²",
        alpha: float = 0.7,
    ) -> Any:
        """Draw J of one parameter at each position, also over a picture.

        The map is stretched to the picture: exact where a network keeps the edges of its input
        (padding), within its receptive field otherwise. Negative J, which is noise, has the colour
        of zero, and NaN is left out.

        Args:
            ax: matplotlib axes to draw into; None makes a new figure.
            over: picture [H0, W0], [C, H0, W0] or [H0, W0, C] with C of 1 (grey) or 3, a tensor or
                an array of real numbers: usually one sample of the input. Its least value is
                drawn in black and its largest in white.
            parameter: which of the P parameters.
            unit: of J, for the scale of colours.
            alpha: opacity of the largest J over a picture, in [0, 1]; that of other positions falls
                with their J, so that the picture is seen where there is no information.

        Returns:
            The axes, in pixels of the picture or in positions of the map.

        Raises:
            ValueError: a picture of another shape or with numbers that are not finite, a parameter
                that does not exist, or an alpha outside of [0, 1].
            TypeError: a complex picture, or a parameter that is not a whole number.
            ImportError: matplotlib is not installed.

        Example:
            >>> import torch, fisherfast as ff
            >>> picture = torch.rand(1, 12, 16)
            >>> x, dx = picture + 0.1 * torch.randn(200, 1, 12, 16), picture.expand(200, 1, 12, 16)
            >>> model = torch.nn.Conv2d(1, 2, 3, padding=1, stride=2)
            >>> settings = ff.Settings(maps=True)
            >>> flow = ff.fisher_flow(model, ff.Pathwise(x, dx), settings=settings)
            >>> ax = flow.map("output").plot(over=picture)  # doctest: +SKIP
            >>> ax.figure.savefig("map.png")                # doctest: +SKIP
        """
        H, W, parameters = self.J.shape[:3]
        if not 0 <= check_whole("parameter", parameter) < parameters:
            raise ValueError(
                f"parameter must be below {parameters} and at least 0, got {parameter}"
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        picture = None if over is None else _as_picture(over)
        ax = axes_or_new(ax)
        height, width = (H, W) if picture is None else picture.shape[:2]
        place: dict[str, Any] = {"extent": (-0.5, width - 0.5, height - 0.5, -0.5)}
        place |= {"interpolation": "nearest"}
        if picture is not None:
            ax.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, **place)
        J = self.J[..., parameter, parameter]
        top = float(J.nan_to_num(0.0, 0.0, 0.0).max())
        share = (J / (top if top > 0 else 1)).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
        drawn = ax.imshow(
            J.numpy(),
            cmap="viridis",
            vmin=0,
            vmax=top if top > 0 else 1,
            alpha=None if picture is None else alpha * share.numpy(),
            **place,
        )
        of = f" of theta[{parameter}]" if parameters > 1 else ""
        ax.figure.colorbar(drawn, ax=ax, label=f"J{of} at each position ({unit})")
        ax.set_title(f"map of {self.name}", fontsize="medium")
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and nested lists; NaN as "nan"."""
        return plain(self)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> InformationMap:
        """Rebuild a map from the result of `to_dict`. Raises ValueError for anything else."""
        return build(cls, entry)


def _as_picture(over: Any) -> torch.Tensor:
    """Return a picture as [H, W] or [H, W, 3] float64 on the CPU, in [0, 1]."""
    values = over if isinstance(over, torch.Tensor) else torch.as_tensor(np.asarray(over))
    if values.is_complex():
        raise TypeError(f"over must be real, got {values.dtype}")
    picture = values.detach().to("cpu", torch.float64)
    if picture.dim() == 3:
        if picture.shape[0] in COLOURS:
            picture = picture.movedim(0, 2)
        if picture.shape[2] == 1:
            picture = picture[..., 0]
    colours = picture.shape[2:]
    if (
        picture.dim() not in (2, 3)
        or not picture.numel()
        or (colours and colours[0] not in COLOURS)
    ):
        raise ValueError(
            "over must be a picture [H, W], [C, H, W] or [H, W, C] with 1 or 3 colours, got"
            f" {list(values.shape)}: choose one sample, and of other channels one"
        )
    if not bool(picture.isfinite().all()):
        raise ValueError("over must be finite, got NaN or infinity")
    low, high = picture.aminmax()
    return (picture - low) / (high - low) if high > low else torch.zeros_like(picture)


def has_map(shape: tuple[int, ...]) -> bool:
    """Return whether a layer of this shape has positions, and a small enough map."""
    return len(shape) == 3 and shape[1] * shape[2] * shape[0] ** 2 <= MAX_MAP_NUMBERS


def is_mapped(maps: bool | Sequence[str], names: Sequence[str]) -> bool:
    """Return whether the setting maps includes a layer with these names."""
    return maps if isinstance(maps, bool) else any(name in maps for name in names)
