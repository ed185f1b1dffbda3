"""Figures of the Fisher information, against layers and against features.

Every function draws into the given axes, or into a new figure without a window or backend state,
and returns the axes; ``ax.figure.savefig("flow.png")`` writes the file. matplotlib is imported when
the first figure is drawn; its settings and its pyplot figures are never changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from fisherfast.results.comparison import ratio
from fisherfast.results.layer import LayerFisher

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008): distinguishable with every common colour vision.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"

SIZE = (6.0, 4.0)  # inches
DPI = 160
MAP_RANGE = (0.05, 0.85)  # part of viridis; its yellow end is too pale on white
LAYER_WIDTH = 0.22  # inches for a layer at least, so that names at 45 degrees stay apart
LEGEND_ENTRIES = 12  # most lines of a legend; further ones are left out


class FlowLike(Protocol):
    """The attributes of a `FisherFlow` that figures use."""

    @property
    def layers(self) -> tuple[LayerFisher, ...]: ...
    @property
    def names(self) -> list[str]: ...
    @property
    def parameters(self) -> int: ...
    def __contains__(self, name: object) -> bool: ...
    def fractions(self) -> dict[str, float]: ...
    def fraction_errors(self) -> dict[str, float]: ...


def new_figure(width: float = SIZE[0], height: float = SIZE[1]) -> Any:
    """Make a matplotlib figure, with its size in inches, outside of pyplot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'fisherfast[plots]'") from None
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_flow(
    flow: FlowLike,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    fraction: bool = False,
    unit: str = "1/θ²",
    color: Any = BLUE,
) -> Axes:
    """Plot J against the layers, with error bars of one standard error and the honest lower bound.

    The line goes through the cuts, the layers that everything passes. Hollow points are layers of
    branches, which hold a part of the information.

    Args:
        flow: a measurement. For several parameters there is one line per diagonal entry of J.
        ax: axes to draw into; None makes a new figure.
        label: for the legend.
        fraction: draw J / J_input, for several parameters the mean over them.
        unit: of J, for the axis.
        color: any matplotlib colour.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch, fisherfast as ff
        >>> from fisherfast.results import plots
        >>> x = torch.randn(2, 2000, 4)
        >>> data = ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2)
        >>> flow = ff.fisher_flow(torch.nn.Linear(4, 2), data)
        >>> plots.plot_flow(flow).get_ylabel()  # doctest: +SKIP
        'Fisher information J (1/θ²)'
    """
    ax = new_figure(_width(flow)).add_subplot() if ax is None else ax
    places = range(len(flow.layers))
    for order, (suffix, values, errors, lower) in enumerate(_lines(flow, fraction)):
        shade = color if order == 0 else f"C{order}"
        name = f"{label or 'J'}{suffix}"
        _draw_line(ax, flow, values, errors, label=name, color=shade, ms=4, capsize=3)
        bound = "honest lower bound" if order == 0 else None
        ax.plot(places, lower, "_", label=bound, color=shade, alpha=0.6, ms=12, mew=1.5)
    _label_layers(ax, flow, fraction, unit)
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_flows(
    flows: Mapping[Any, FlowLike],
    ax: Axes | None = None,
    *,
    fraction: bool = False,
    unit: str = "1/θ²",
    title: str = "",
) -> Axes:
    """Plot J against the layers, one line per flow in the given order, from dark to bright.

    Args:
        flows: measurements of the same layers by their label, for instance the epoch.
        ax: axes to draw into; None makes a new figure.
        fraction: draw J / J_input.
        unit: of J, for the axis.
        title: of the legend.

    Returns:
        The axes.

    Raises:
        ValueError: there is no flow, or one of them does not know a layer of the first.
        ImportError: matplotlib is not installed.
    """
    if not flows:
        raise ValueError("flows must hold at least one flow, got none")
    first = next(iter(flows.values()))
    for flow in flows.values():
        if any(name not in flow for name in first.names):
            raise ValueError(f"flows must have the same layers, got {first.names} and {flow.names}")
    shared = set.intersection(*(set(flow.names) for flow in flows.values()))
    flows = {label: _restricted(flow, shared) for label, flow in flows.items()}
    first = next(iter(flows.values()))
    ax = axes_or_new(ax)
    named = thinned(list(flows))
    for color, (label, flow) in zip(sequence_colours(len(flows)), flows.items(), strict=True):
        for suffix, values, errors, _ in _lines(flow, fraction):
            name = f"{label}{suffix}" if label in named else None
            style = {"label": name, "color": color, "ms": 3.5, "capsize": 2}
            _draw_line(ax, flow, values, errors, branches=None, **style)
    _label_layers(ax, first, fraction, unit)
    ax.legend(
        title=title or None,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),  # beside the axes, where nothing is drawn
        frameon=False,
        fontsize="small",
    )
    return ax


def plot_curve(layer: LayerFisher, ax: Axes | None = None, *, unit: str = "1/θ²") -> Axes:
    """Plot J of the first k features against k, with a band of one standard error.

    The ring marks the k used for `J`, the dashed line the honest lower bound there. For several
    parameters there is one curve per diagonal entry of J.

    Args:
        layer: of a flow, or the result of `fisher_information`.
        ax: axes to draw into; None makes a new figure.
        unit: of J, for the axis.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ax = axes_or_new(ax)
    widths = layer.curve_k.tolist()
    for p in range(layer.parameters):
        color = (BLUE, VERMILION, GREEN, GREY)[p % 4]
        suffix = _suffix(layer, p)
        J, error = layer.curve_J[:, p, p], layer.curve_stderr[:, p, p]
        ax.fill_between(widths, (J - error).tolist(), (J + error).tolist(), color=color, alpha=0.25)
        ax.plot(widths, J.tolist(), color=color, label=f"J{suffix}")
        chosen = float(layer.J[p, p])
        ax.plot([layer.features], [chosen], "o", color=color, mfc="none", ms=9, label="chosen")
        bound = float(layer.lower[p, p])
        ax.axhline(bound, color=color, ls="--", lw=1, alpha=0.7, label="honest lower bound")
    ax.set_xlabel("features k")
    ax.set_ylabel(f"Fisher information J ({unit})")
    ax.set_title(layer.name, fontsize="medium")
    tidy(ax)
    ax.legend(frameon=False, fontsize="small")
    return ax


def _lines(
    flow: FlowLike, fraction: bool
) -> Iterator[tuple[str, list[float], list[float], list[float]]]:
    """Yield the line of a flow, or one per parameter for J of several parameters: a suffix that
    names it, and values, standard errors and honest lower bounds by layer."""
    if fraction:
        lower = [ratio(replace(layer, J=layer.lower), flow.layers[0])[0] for layer in flow.layers]
        yield "", [*flow.fractions().values()], [*flow.fraction_errors().values()], lower
        return
    for p in range(flow.parameters):
        J, errors, lower = (
            [float(getattr(layer, name)[p, p]) for layer in flow.layers]
            for name in ("J", "stderr", "lower")
        )
        yield _suffix(flow.layers[0], p), J, errors, lower


def _restricted(flow: Any, names: set[str]) -> FlowLike:
    """Return a flow of some layers only: a copy of another layer has a row of its own from the
    epoch in which one of its scales is zero."""
    shown: FlowLike = replace(
        flow, layers=tuple(each for each in flow.layers if each.name in names)
    )
    return shown


def _suffix(layer: LayerFisher, parameter: int) -> str:
    """Name a parameter of several: "[x]", or "[0]" if it has no name."""
    shown = layer.parameter_names[parameter] if layer.parameter_names else parameter
    return f"[{shown}]" if layer.parameters > 1 else ""


def _draw_line(
    ax: Axes,
    flow: FlowLike,
    values: list[float],
    errors: list[float],
    branches: str | None = "inside a branch",
    **style: Any,
) -> None:
    """Draw a line through the cuts, and hollow points, named in the legend, for other layers."""
    inside = [layer.cut is False for layer in flow.layers]
    for is_branch in (False, True):
        places = [place for place, branch in enumerate(inside) if branch is is_branch]
        if is_branch:
            style |= {"ls": "none", "mfc": "white", "label": branches}
        if places or not is_branch:
            J, error = ([numbers[place] for place in places] for numbers in (values, errors))
            ax.errorbar(places, J, error, marker="o", lw=1.3, **style)


def _width(flow: FlowLike) -> float:
    """Return a width in inches in which the names of all layers can be read."""
    return max(SIZE[0], LAYER_WIDTH * len(flow.layers))


def _label_layers(ax: Axes, flow: FlowLike, fraction: bool, unit: str) -> None:
    names = [layer.label or layer.name for layer in flow.layers]
    ax.set_xticks(range(len(names)), names)
    if len(names) > 6 or max(map(len, names)) > 8:
        ax.tick_params(axis="x", rotation=45, labelsize="small")
        for tick in ax.get_xticklabels():
            tick.set(horizontalalignment="right", rotation_mode="anchor")
    ax.set_xlabel("layer")
    ax.set_ylabel("J / J$_{input}$" if fraction else f"Fisher information J ({unit})")
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    tidy(ax)


def thinned(items: Sequence[Any]) -> list[Any]:
    """Select at most `LEGEND_ENTRIES` items, evenly spaced, with the first and the last."""
    last, steps = len(items) - 1, LEGEND_ENTRIES - 1
    if last < LEGEND_ENTRIES:
        return list(items)
    return [items[round(i * last / steps)] for i in range(LEGEND_ENTRIES)]


def sequence_colours(count: int) -> list[Any]:
    """Return colours from dark to bright that keep their order in grey."""
    import matplotlib

    start, end = MAP_RANGE
    colours = matplotlib.colormaps["viridis"]
    return [colours(start + (end - start) * i / max(1, count - 1)) for i in range(count)]


def tidy(ax: Axes) -> None:
    """Apply the common style of all figures: no box, faint horizontal lines."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", lw=0.8)
    ax.set_axisbelow(True)


def axes_or_new(ax: Axes | None) -> Axes:
    return new_figure().add_subplot() if ax is None else ax
