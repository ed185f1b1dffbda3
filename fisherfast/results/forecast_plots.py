"""Figures of several panels: credible ellipses of layers, and bounds along theta beside the errors
of a network. They are drawn as those of `results.plots`, and return the figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fisherfast.results.comparison import DIVIDES
from fisherfast.results.estimator import EstimatorErrors
from fisherfast.results.forecast import Ellipse
from fisherfast.results.layer import LayerFisher
from fisherfast.results.plots import (
    BLUE,
    GREEN,
    GREY,
    VERMILION,
    new_figure,
    sequence_colours,
    tidy,
)
from fisherfast.results.profile import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 2.4
"""Side of a panel in inches."""

LEVELS = (0.683, 0.954)
"""Credible levels, as one and two standard deviations of a single parameter."""

LEGEND_CHARACTERS = 12
"""Characters of a legend per inch, with its symbols."""

MARGIN = 1.12
"""Axes reach this much beyond the largest ellipse."""


def axis_names(layer: LayerFisher) -> list[str]:
    """Return a label for each parameter: its name, or theta with its number."""
    many = layer.parameters > 1
    return list(layer.parameter_names) or [
        f"θ[{p}]" if many else "θ" for p in range(layer.parameters)
    ]


def plot_ellipses(
    layers: Sequence[LayerFisher],
    params: Sequence[int | str] | None = None,
    *,
    levels: Sequence[float] = LEVELS,
    center: Sequence[float] | None = None,
) -> Figure:
    """Draw the credible ellipses of every pair of parameters, one panel each.

    Args:
        layers: to compare, each in its own colour and line.
        params: two or more parameters, numbers or names; None for all.
        levels: credible levels; the smallest is filled.
        center: theta of all these parameters; None draws deviations about zero.

    Returns:
        The figure.

    Raises:
        ValueError: there are fewer than two parameters, no layer, no level, or a wrong level.
        ImportError: matplotlib is not installed.
    """
    if not layers:
        raise ValueError("layers must hold at least one layer, got none")
    first = layers[0]
    wanted = list(range(first.parameters) if params is None else params)
    kept = first.marginal(wanted).parameters
    if len(kept) < 2:
        raise ValueError(f"params must hold at least two parameters, got {len(kept)}")
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels must be between 0 and 1, got {list(levels)}")
    place = [0.0] * len(kept) if center is None else [float(value) for value in center]
    if len(place) != len(kept):
        raise ValueError(f"center must hold {len(kept)} numbers, got {len(place)}")
    size = len(kept) - 1
    figure = new_figure(PANEL * size + (2.2 if size == 1 else 0.6), PANEL * size + 0.8)
    grid = figure.add_gridspec(size, size)
    names = [f"{'Δ' if center is None else ''}{axis_names(first)[p]}" for p in kept]
    found = {
        (row, column): [_ellipses(layer, kept, (column, row), place, levels) for layer in layers]
        for row in range(1, size + 1)
        for column in range(row)
    }
    reach = _reach(found, len(kept), place)
    for (row, column), of_layers in found.items():
        ax = figure.add_subplot(grid[row - 1, column])
        _draw(ax, of_layers)
        for limit, p in ((ax.set_xlim, column), (ax.set_ylim, row)):
            if reach[p] > 0:
                limit(place[p] - MARGIN * reach[p], place[p] + MARGIN * reach[p])
        _label(ax, names[column] if row == size else "", names[row] if column == 0 else "")
    _legend(figure, layers, list(found.values()), levels, narrow=size == 1)
    return figure


def _ellipses(
    layer: LayerFisher,
    kept: Sequence[int],
    pair: tuple[int, int],
    place: Sequence[float],
    levels: Sequence[float],
) -> list[Ellipse]:
    """Make the ellipses of one layer, the largest first; none where it does not know both."""
    i, j = pair
    try:
        return [
            layer.ellipse([kept[i], kept[j]], level, center=(place[i], place[j]))
            for level in sorted(levels, reverse=True)
        ]
    except ValueError:  # no information on one of them
        return []


def _reach(
    found: dict[tuple[int, int], list[list[Ellipse]]], parameters: int, place: Sequence[float]
) -> list[float]:
    """Return the largest deviation of each parameter on any ellipse."""
    reach = [0.0] * parameters
    for (row, column), of_layers in found.items():
        for ellipse in (entry for entries in of_layers for entry in entries):
            for p, side in ((column, 0), (row, 1)):
                half = math.sqrt(ellipse.delta_chi2 * float(ellipse.covariance[side, side]))
                reach[p] = max(reach[p], half)
    return reach


def _draw(ax: Axes, of_layers: Sequence[Sequence[Ellipse]]) -> None:
    colours = sequence_colours(len(of_layers))
    for colour, entries in zip(colours, of_layers, strict=True):
        for number, ellipse in enumerate(entries):
            x, y = ellipse.points().T.tolist()
            inner = number == len(entries) - 1
            ax.plot(x, y, color=colour, lw=1.4, ls="-" if inner else "--")
            if inner:
                ax.fill(x, y, color=colour, alpha=0.12, lw=0)


def _label(ax: Axes, below: str, left: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.locator_params(nbins=5)
    ax.tick_params(labelsize="small", labelbottom=bool(below), labelleft=bool(left))
    ax.set_xlabel(below)
    ax.set_ylabel(left)


def _legend(
    figure: Figure,
    layers: Sequence[LayerFisher],
    panels: Sequence[Sequence[Sequence[Ellipse]]],
    levels: Sequence[float],
    *,
    narrow: bool,
) -> None:
    """List layers and levels where no panel is: in the upper right, or beside a single panel."""
    from matplotlib.lines import Line2D

    colours = sequence_colours(len(layers))
    lines = []
    for number, (colour, layer) in enumerate(zip(colours, layers, strict=True)):
        label = layer.name + _unknown([not panel[number] for panel in panels])
        lines.append(Line2D([], [], color=colour, lw=2.5, label=label))
    ordered = sorted(levels)
    for number, level in enumerate(ordered):
        style = "-" if number == 0 else "--"
        lines.append(Line2D([], [], color=GREY, ls=style, lw=1.4, label=f"{100 * level:.3g} %"))
    figure.legend(
        handles=lines,
        title="layer, credible level",
        frameon=False,
        fontsize="small",
        loc="outside right upper" if narrow else "upper right",
    )


def _unknown(missing: Sequence[bool]) -> str:
    """Say in the legend that a layer is not in every place of a figure."""
    if all(missing):
        return " (unbounded)"
    return " (partly unbounded)" if any(missing) else ""


def plot_profile(
    layers: Sequence[LayerFisher], errors: EstimatorErrors | None = None, *, name: str = "network"
) -> Figure:
    """Draw the Cramer-Rao bound of layers along theta, and the errors of a network beside it.

    One column of panels for each parameter. The upper panel shows bounds, with bands (one
    parameter) or bars (several) of one standard error, and the network's RMS error and standard
    deviation; the lower panel its bias. Where the bias falls with theta, the standard deviation may
    be below the bound, which is that of unbiased estimates.

    Args:
        layers: with a profile.
        errors: of `Profile.errors`; None draws the bounds alone.
        name: of the network in the legend.

    Returns:
        The figure.

    Raises:
        ValueError: a layer has no profile, or there is no layer.
        ImportError: matplotlib is not installed.
    """
    if not layers:
        raise ValueError("layers must hold at least one layer, got none")
    bare = [layer.name for layer in layers if layer.profile is None]
    if bare:
        raise ValueError(
            f"layers must have a profile along theta, got none of {bare}: measure with labelled"
            " data, or a simulator at several theta"
        )
    first, columns = layers[0], layers[0].parameters
    rows, tall = (1, 3.2) if errors is None else (2, 4.8)
    figure = new_figure(max(5.2, 3.4 * columns + 0.4), tall)
    grid = figure.add_gridspec(rows, columns, height_ratios=(2.2, 1)[:rows])
    labels = axis_names(first)
    for p, label in enumerate(labels):
        upper = figure.add_subplot(grid[0, p])
        for colour, layer in zip(sequence_colours(len(layers)), layers, strict=True):
            assert layer.profile is not None
            _bound(upper, layer.profile, p, colour, f"bound, {layer.name}")
        upper.set_ylabel(f"error of {label}")
        last = upper
        if errors is not None:
            for what, (style, colour, title) in _SHOWN.items():
                _points(upper, errors, what, p, colour, style, f"{name}, {title}")
            last = figure.add_subplot(grid[1, p], sharex=upper)
            last.axhline(0, color=GREY, lw=1)
            _points(last, errors, "bias", p, GREEN, "s-", "")
            last.set_ylabel("bias")
            tidy(last)
            upper.tick_params(labelbottom=False)
        last.set_xlabel(label)
        upper.set_ylim(bottom=0)
        tidy(upper)
    figure.align_ylabels()
    handles, texts = figure.axes[0].get_legend_handles_labels()
    fitting = int(LEGEND_CHARACTERS * figure.get_figwidth() / max(map(len, texts)))
    figure.legend(
        handles,
        texts,
        loc="outside upper center",
        ncols=min(max(fitting, 1), 3),
        frameon=False,
        fontsize="small",
    )
    return figure


_SHOWN = {"rms": ("o-", VERMILION, "RMS error"), "std": ("^--", BLUE, "standard deviation")}
"""Style, colour and title of the errors beside the bound."""


def _bound(ax: Axes, profile: Profile, p: int, colour: Any, label: str) -> None:
    order = profile.theta[:, p].argsort()
    theta, bound, error = (
        _numbers(values[:, p][order])
        for values in (profile.theta, profile.crlb, profile.crlb_stderr)
    )
    # of J within three errors of zero no bound is known: the error of J^(-1/2) is half as large
    bound = [b if e < b / (2 * DIVIDES) else math.nan for b, e in zip(bound, error, strict=True)]
    label += _unknown([math.isnan(b) for b in bound])
    if profile.theta.shape[1] == 1:
        ax.plot(theta, bound, color=colour, lw=1.8, label=label)
        low, high = ([b + sign * e for b, e in zip(bound, error, strict=True)] for sign in (-1, 1))
        ax.fill_between(theta, low, high, color=colour, alpha=0.2, lw=0)
    else:  # bins differ in the other parameters, too
        ax.errorbar(theta, bound, error, color=colour, fmt="_", ms=9, capsize=2, label=label)


def _points(
    ax: Axes, errors: EstimatorErrors, what: str, p: int, colour: Any, style: str, label: str
) -> None:
    """Draw one kind of errors; without lines between bins that differ in other parameters."""
    order = errors.theta[:, p].argsort()
    values, bars = getattr(errors, what), getattr(errors, f"{what}_stderr")
    theta, y, error = (_numbers(v[:, p][order]) for v in (errors.theta, values, bars))
    single = errors.theta.shape[1] == 1
    fmt = style if single else style[0]
    ax.errorbar(theta, y, error, color=colour, fmt=fmt, ms=4, lw=1.2, capsize=2, label=label)


def _numbers(values: Tensor) -> list[float]:
    """Return numbers for an axis; NaN for infinite ones, which are not drawn."""
    return [value if math.isfinite(value) else math.nan for value in values.tolist()]
