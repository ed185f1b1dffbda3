"""Figures of the analyses of a network's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisherfast.results.plots import BLUE, GREY, VERMILION, new_figure, sequence_colours, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (10.0, 4.0)  # inches, of two axes side by side
LINES = 12
"""Layers with a line of their own among the members; networks with more show the whole alone."""
POINTS = 500
"""Points of a line: more are not visible at this size."""


def plot_importance(
    values: Mapping[str, Tensor], per: str, axes: tuple[Axes, Axes] | None = None
) -> tuple[Axes, Axes]:
    """Left the importance of each layer, summed over what it was measured per; right how unequal
    its members are: the importance of each, sorted, against the share of members.

    Args:
        values: importance by name, in nats.
        per: what each entry belongs to: "parameter", "unit" or "layer".
        axes: two axes to draw into; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch, fisherfast as ff
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(50, 4)
        >>> F = ff.parameters.fisher(model, "categorical", x)
        >>> left, right = F.importance(per="unit").plot()  # doctest: +SKIP
        >>> left.figure.savefig("importance.png")  # doctest: +SKIP
    """
    if axes is None:
        figure = new_figure(*SIZE)
        axes = (figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2))
    left, right = axes
    names = [name or "(model)" for name in values]
    totals = [float(value.sum()) for value in values.values()]
    places = range(len(names))
    left.barh(places, totals, color=BLUE)
    left.set_yticks(places, names, fontsize="small")
    left.invert_yaxis()
    summed = "" if per == "layer" else f", summed over {per}s"
    left.set_xlabel(f"importance{summed} (nats)")
    tidy(left)
    left.grid(axis="y", visible=False)
    _draw_members(right, [value.flatten() for value in values.values()], names, per)
    return left, right


def plot_spectrum(
    eigenvalues: Tensor,
    effective_rank: float,
    participation_ratio: float,
    *,
    label: str,
    ax: Axes | None = None,
) -> Axes:
    """Eigenvalues against their number, with the effective rank and the participation ratio.

    Args:
        eigenvalues: [k], descending.
        effective_rank, participation_ratio: NaN where unknown: not drawn.
        label: of the eigenvalues, in the legend.
        ax: axes to draw into; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if ax is None:
        ax = new_figure().add_subplot()
    values = eigenvalues.tolist()
    ax.plot(range(1, len(values) + 1), values, label=label, color=BLUE)
    marks = (
        ("effective rank", effective_rank, VERMILION),
        ("participation ratio", participation_ratio, GREY),
    )
    for what, place, shade in marks:
        if place == place:
            ax.axvline(place, label=f"{what} {place:.3g}", color=shade, lw=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("direction of the parameters, stiffest first")
    ax.set_ylabel("eigenvalue of the Fisher matrix (1/w²)")
    ax.legend(frameon=False, fontsize="small")
    tidy(ax)
    return ax


def _draw_members(ax: Axes, values: list[Tensor], names: list[str], per: str) -> None:
    """Sorted importances, one line per layer where there are few, and of all together."""
    if per != "layer" and 1 < len(values) <= LINES:
        for name, value, colour in zip(names, values, sequence_colours(len(values)), strict=True):
            ax.plot(*_sorted(value), color=colour, label=name, lw=1.2)
    ax.plot(*_sorted(torch.cat(values)), color="black", label="all", lw=1.8)
    ax.set_yscale("log")
    ax.set_xlabel(f"share of {per}s")
    ax.set_ylabel("importance (nats)")
    ax.legend(frameon=False, fontsize="small")
    tidy(ax)


def _sorted(values: Tensor) -> tuple[list[float], list[float]]:
    """Share of members and their importance, ascending; zeros, which a logarithm has no place for,
    count in the share and are not drawn."""
    ordered = values.sort().values
    count = len(ordered)
    places = torch.linspace(0, count - 1, min(count, POINTS), device=ordered.device).round().long()
    shown = ordered[places]
    seen = shown > 0
    return ((places[seen] + 1) / count).tolist(), shown[seen].tolist()
