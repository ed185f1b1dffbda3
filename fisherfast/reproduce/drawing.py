"""The reproduced figures: what was measured with error bars, what was published as open markers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fisherfast.demos.figures import published_label
from fisherfast.demos.training import DemoEpoch
from fisherfast.problems.published import LIFT_FISHER, STOPPING_EXCESS, STOPPING_RISE
from fisherfast.reproduce.trained import TrainedRun
from fisherfast.results.plots import (
    BLUE,
    GREEN,
    GREY,
    VERMILION,
    crossing_epoch,
    new_figure,
    plot_training,
    sequence_colours,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fisherfast.reproduce.lift import LiftPoint

__all__ = ["draw_flows", "draw_lift", "draw_stopping", "draw_transmission"]

PANEL = 5.4  # inches
HEIGHT = 4.0
OPEN: dict[str, Any] = {"ls": "none", "mfc": "none", "ms": 8, "mew": 1.4}
"""Markers of published values."""
MARKERS = "osD^v"
SHARE_CEILING = 1.75  # of J_output / J_input: what was learned by heart has no end


def draw_lift(points: Sequence[LiftPoint]) -> Any:
    """J against the number of lifted features: both lifts, and the published values."""
    figure = new_figure(PANEL + 1.2, HEIGHT)
    ax = figure.add_subplot()
    lifted = [point.lifted for point in points]
    ax.axhline(LIFT_FISHER, color=GREY, ls="--", lw=1, label="Fisher information")
    widest = points[-1].ours
    raw = points[0].ours.dim
    if points[-1].lifted:
        k = (widest.curve_k - raw).tolist()
        J, error = widest.curve_J[:, 0, 0], widest.curve_stderr[:, 0, 0]
        inside = [i for i, count in enumerate(k) if count >= 0]
        shown = [k[i] for i in inside]
        low, high = (J - error)[inside].tolist(), (J + error)[inside].tolist()
        ax.fill_between(shown, low, high, color=BLUE, alpha=0.2, lw=0)
        ax.plot(shown, J[inside].tolist(), color=BLUE, lw=1.2)
    series = (
        ("lift of fisherfast", BLUE, "o", [point.ours for point in points]),
        ("published lift, measured here", VERMILION, "D", [point.theirs for point in points]),
    )
    for label, color, marker, layers in series:
        ax.errorbar(
            lifted,
            [layer.value for layer in layers],
            [float(layer.stderr) for layer in layers],
            label=label,
            color=color,
            marker=marker,
            ms=4.5,
            ls="none",
            capsize=3,
        )
    theirs = [point.theirs.value for point in points]
    ax.plot(lifted, theirs, color=VERMILION, lw=1.2, ls=":")
    published = [point.published for point in points]
    ax.plot(lifted, published, "s", color="black", label="published", **OPEN)
    ax.set_xlabel("lifted features")
    ax.set_ylabel("linear Fisher information J (1/theta²)")
    ax.set_title("x ~ N(0, theta² 1), 50 numbers, theta = 1", fontsize="medium")
    ax.set_ylim(-4, 1.08 * LIFT_FISHER)
    tidy(ax)
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    return figure


def draw_flows(run: TrainedRun, chosen: Mapping[int, DemoEpoch]) -> Any:
    """Left: share of the input in each layer, for the epochs that were published. Right: the same
    over the share at the output, which needs no epochs to be matched."""
    figure = new_figure(2 * PANEL, HEIGHT + 0.8)
    left, right = figure.subplots(1, 2)
    _draw_epochs(left, run, chosen)
    _draw_against_output(right, run)
    return figure


def _draw_epochs(ax: Axes, run: TrainedRun, chosen: Mapping[int, DemoEpoch]) -> None:
    names = [*run.layers, "output"]
    ax.axhline(1, color=GREY, ls="--", lw=1)
    for color, (epoch, values) in zip(
        sequence_colours(len(run.published)), run.published.items(), strict=True
    ):
        record = chosen[epoch]
        shares, errors = record.flow.fractions(), record.flow.fraction_errors()
        ax.errorbar(
            range(len(names) + 1),
            [1.0, *(shares[name] for name in names)],
            [0.0, *(errors[name] for name in names)],
            label=f"epoch {record.epoch} (published: {published_label(epoch)})",
            color=color,
            marker="o",
            ms=4,
            lw=1.3,
            capsize=3,
        )
        ax.plot(range(1, len(names) + 1), values, "s", color=color, **OPEN)
    ax.plot([], [], "s", color=GREY, label="published", **OPEN)
    ax.set_xticks(range(len(names) + 1), ["input", *names])
    ax.set_xlabel("layer")
    ax.set_ylabel("J / J$_{input}$")
    ax.set_ylim(bottom=-0.04)
    tidy(ax)
    _legend_above(ax)


def _draw_against_output(ax: Axes, run: TrainedRun) -> None:
    colours = sequence_colours(len(run.layers))
    output = [record.transmission for record in run.history]
    ax.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1, label="no loss behind the layer")
    for index, (layer, color) in enumerate(zip(run.layers, colours, strict=True)):
        marker = MARKERS[index % len(MARKERS)]
        shares = [record.flow.fractions()[layer] for record in run.history]
        errors = [record.flow.fraction_errors()[layer] for record in run.history]
        ax.errorbar(
            output,
            shares,
            errors,
            label=layer,
            color=color,
            marker=marker,
            ms=4,
            lw=1,
            capsize=2,
        )
        ax.plot(
            [values[-1] for values in run.published.values()],
            [values[index] for values in run.published.values()],
            marker,
            color=color,
            **OPEN,
        )
    ax.plot([], [], MARKERS[0], color=GREY, label="published (open)", **OPEN)
    ax.set_xlabel("J$_{output}$ / J$_{input}$")
    ax.set_ylabel("J / J$_{input}$ of the layer")
    tidy(ax)
    _legend_above(ax)


def _legend_above(ax: Axes) -> None:
    """Two columns above the axes: the lines go everywhere inside of them."""
    ax.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize="small"
    )


def draw_stopping(
    run: TrainedRun, facts: Mapping[str, float | int | None], *, published: bool
) -> Any:
    """Left: errors and what the output transmits. Right: the validation error above its minimum."""
    figure = new_figure(2 * PANEL, HEIGHT)
    left, right = figure.subplots(1, 2)
    plot_training(run.history, left)
    epochs = [record.epoch for record in run.history]
    least = min(record.val_mse for record in run.history)
    ratios = [record.val_mse / least for record in run.history]
    stop, last = facts["stop_epoch"], epochs[-1]
    right.plot(epochs, ratios, color=GREEN, marker="^", ms=4, label="validation MSE / its minimum")
    if stop is not None:
        right.axvline(stop, color=VERMILION, lw=1, ls=":", alpha=0.8)
        right.plot(
            [stop],
            [ratios[epochs.index(int(stop))]],
            "*",
            color=VERMILION,
            ms=14,
            mec="white",
            label="published stop",
        )
        if published:
            right.plot(
                [stop],
                [1 + STOPPING_EXCESS],
                "v",
                color="black",
                label=f"published: stop within {100 * STOPPING_EXCESS:.0f} %",
                **OPEN,
            )
    if published:
        right.plot(
            [last],
            [1 + STOPPING_RISE],
            "s",
            color="black",
            label="published: a third more at the end",
            **OPEN,
        )
    right.set_ylim(0.98, max(1.1, 1 + STOPPING_RISE * published, ratios[-1]) + 0.06)
    right.set_xlabel("epoch")
    right.set_ylabel("validation MSE / its minimum")
    tidy(right)
    right.legend(frameon=False, fontsize="small", loc="upper center")
    return figure


def draw_transmission(runs: Sequence[TrainedRun]) -> Any:
    """For each training: J_output on held-out and on training samples, against the epoch."""
    figure = new_figure(PANEL * len(runs), HEIGHT)
    for index, run in enumerate(runs):
        ax = figure.add_subplot(1, len(runs), index + 1)
        epochs = [record.epoch for record in run.history]
        held_out = [record.transmission for record in run.history]
        errors = [record.transmission_error for record in run.history]
        ax.axhline(1, color=GREY, ls="--", lw=1, label="all of the input")
        ax.errorbar(
            epochs, held_out, errors, color=BLUE, marker="o", ms=4, capsize=3, label="held-out"
        )
        ax.errorbar(
            epochs,
            [share for share, _ in run.training],
            [error for _, error in run.training],
            color=VERMILION,
            marker="s",
            ms=4,
            capsize=3,
            label=f"training samples ({run.training[-1][0]:.3g} at the end)",
        )
        best = max(range(len(epochs)), key=lambda i: held_out[i])
        ax.plot(
            [epochs[best]], [held_out[best]], "o", color=BLUE, mfc="none", ms=11, label="best epoch"
        )
        stop = crossing_epoch(run.history)
        if stop is not None:
            ax.axvline(stop, color=VERMILION, lw=1, ls=":", label="published stop")
        ax.set_title(f"{run.name.capitalize()} task", fontsize="medium")
        ax.set_xlabel("epoch")
        ax.set_ylabel("J$_{output}$ / J$_{input}$")
        ax.set_ylim(0, min(SHARE_CEILING, ax.get_ylim()[1]))
        tidy(ax)
        ax.legend(frameon=False, fontsize="small", loc="lower center")
    return figure
