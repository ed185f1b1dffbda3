"""Figures 4, 5 and 6: how the information flows through a network while it learns.

A reduced run goes through the published states at other epochs, so each published epoch is compared
with the epoch of the run whose output transmits the nearest share; the full run is compared epoch
by epoch where the number of the epoch is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from figure import HEIGHT, OPEN, PANEL, Options, Outcome
from published import FIRST, GAUSSIAN_FLOW, IMAGING_FLOW, LOGNORMAL_FLOW, epoch_label
from tasks import flow_imaging_task, gaussian_task, lognormal_task
from trained import TrainedRun, train_and_measure

from fisherfast.results.plots import GREY, new_figure, sequence_colours, tidy
from fisherfast.training import EpochRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fisherfast.demo import Task

Published = Mapping[int, tuple[float, ...]]
"""J / J_input of the hidden layers and the output, by epoch."""
MARKERS = "osD^v"


def measure_gaussian(options: Options) -> Outcome:
    """Figure 4: the mean of Gaussian noise, N(theta 1, I_256)."""
    return _measure(gaussian_task(options), options, GAUSSIAN_FLOW)


def measure_lognormal(options: Options) -> Outcome:
    """Figure 5: a log-normal distribution, exp(B z) with z ~ N(theta 1, I_10)."""
    return _measure(lognormal_task(options), options, LOGNORMAL_FLOW)


def measure_imaging(options: Options) -> Outcome:
    """Figure 6: the position of an object in camera images."""
    return _measure(flow_imaging_task(options), options, IMAGING_FLOW)


def compared_epochs(run: TrainedRun, published: Published, full: bool) -> dict[int, EpochRecord]:
    """The epoch of a run that each published epoch is compared with.

    Epoch 0 with epoch 0; the same number where the run has the published size and the number is
    known; else the epoch with the nearest output.
    """
    by_number = {record.epoch: record for record in run.history}
    chosen = {}
    for epoch, values in published.items():
        number = 0 if epoch == FIRST else epoch
        if number in by_number and (full or number == 0):
            chosen[epoch] = by_number[number]
        else:
            chosen[epoch] = min(
                run.history, key=lambda record: abs(record.transmission - values[-1])
            )
    return chosen


def _measure(task: Task, options: Options, published: Published) -> Outcome:
    run = train_and_measure(task, options)
    chosen = compared_epochs(run, published, options.full)
    numbers = {**run.numbers, "points": _points(published, chosen)}
    return Outcome(run.status, numbers, lambda: _draw(run, published, chosen))


def _points(published: Published, chosen: Mapping[int, EpochRecord]) -> list[dict[str, Any]]:
    """Every published value with the measured one of the epoch it is compared with."""
    points = []
    for epoch, values in published.items():
        shares, errors = chosen[epoch].flow.fractions(), chosen[epoch].flow.fraction_errors()
        for layer, value in zip(_layers(chosen[epoch]), values, strict=True):
            points.append(
                {
                    "published_epoch": epoch_label(epoch),
                    "epoch": chosen[epoch].epoch,
                    "layer": layer,
                    "fraction": shares[layer],
                    "fraction_error": errors[layer],
                    "published": value,
                }
            )
    return points


def _layers(record: EpochRecord) -> list[str]:
    """Hidden layers and the output."""
    return record.flow.names[1:]


def _draw(run: TrainedRun, published: Published, chosen: Mapping[int, EpochRecord]) -> Any:
    """Left: share of the input in each layer, for the published epochs. Right: the same over the
    share at the output, without a choice of epochs."""
    figure = new_figure(2 * PANEL, HEIGHT + 0.8)
    left, right = figure.subplots(1, 2)
    _draw_epochs(left, published, chosen)
    _draw_against_output(right, run, published)
    for ax in (left, right):
        tidy(ax)
        # two columns above the axes: the lines go everywhere inside them
        ax.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize="small"
        )
    return figure


def _draw_epochs(ax: Axes, published: Published, chosen: Mapping[int, EpochRecord]) -> None:
    ax.axhline(1, color=GREY, ls="--", lw=1)
    for color, (epoch, values) in zip(
        sequence_colours(len(published)), published.items(), strict=True
    ):
        record = chosen[epoch]
        names = _layers(record)
        shares, errors = record.flow.fractions(), record.flow.fraction_errors()
        ax.errorbar(
            range(len(names) + 1),
            [1.0, *(shares[name] for name in names)],
            [0.0, *(errors[name] for name in names)],
            label=f"epoch {record.epoch} (published: {epoch_label(epoch)})",
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


def _draw_against_output(ax: Axes, run: TrainedRun, published: Published) -> None:
    layers = _layers(run.history[0])[:-1]
    output = [record.transmission for record in run.history]
    ax.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1, label="no loss behind the layer")
    for index, (layer, color) in enumerate(zip(layers, sequence_colours(len(layers)), strict=True)):
        marker = MARKERS[index % len(MARKERS)]
        ax.errorbar(
            output,
            [record.flow.fractions()[layer] for record in run.history],
            [record.flow.fraction_errors()[layer] for record in run.history],
            label=layer,
            color=color,
            marker=marker,
            ms=4,
            lw=1,
            capsize=2,
        )
        ax.plot(
            [values[-1] for values in published.values()],
            [values[index] for values in published.values()],
            marker,
            color=color,
            **OPEN,
        )
    ax.plot([], [], MARKERS[0], color=GREY, label="published (open)", **OPEN)
    ax.set_xlabel("J$_{output}$ / J$_{input}$")
    ax.set_ylabel("J / J$_{input}$ of the layer")
