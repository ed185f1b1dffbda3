"""Figures 10 and 11: training beyond the point where the training error meets the bound. And a
figure that the publication describes without showing it: the output then transmits less of fresh
samples.

The networks have so few training samples that they memorise them. Measured after every epoch are
training and validation error in units of 1 / J_input, J_output on held-out samples, and J_output on
samples that are trained on: the gap between these two is what the network memorises.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from figure import HEIGHT, OPEN, PANEL, Options, Outcome
from published import STOPPING_EXCESS, STOPPING_RISE, STOPPING_WIDTHS
from tasks import PUBLISHED_HELD_OUT, Size, simulated_task, sized
from torch import nn
from trained import Meter, TrainedRun, train_and_measure

import fisherfast as ff
from fisherfast.demo import Task, imaging_task
from fisherfast.demo.runner import DONE
from fisherfast.problems import GaussianShift, mlp
from fisherfast.results.plots import (
    BLUE,
    GREEN,
    GREY,
    VERMILION,
    new_figure,
    tidy,
)
from fisherfast.training import EpochRecord
from fisherfast.training.plots import crossing_epoch, plot_training

GAUSSIAN_SIZES = {
    False: Size(300, 10_000, 60, 3e-5, paired=True, validation=400),
    True: Size(7000, PUBLISHED_HELD_OUT, 400, 1e-7, paired=False),
}
"""The publication does not say after how many epochs it ends."""
GAUSSIAN_VALUES = {False: 31, True: 101}  # of theta in [-1.5, 1.5]
GAUSSIAN_RANGE = 1.5
GAUSSIAN_STEP = 0.06
GAUSSIAN_FEATURES = 64  # the output and a lift of 63; the input has its 256 numbers and 8

IMAGING_SAMPLES = {False: 3000, True: 10_000}  # per position
IMAGING_EPOCHS = {False: 24, True: 60}
IMAGING_RATE = {False: 1e-4, True: 3e-5}  # of Adam: small enough to see the crossing
IMAGING_HELD_OUT = 5  # held-out images for each training image per position
ZERO = 1e-3  # values of theta nearer to zero than this are zero, up to rounding
EVERY_SAMPLE = 1  # checked_share: the training error on all of the few training samples
SHARE_CEILING = 1.75  # of J_output / J_input in the figure: it has no limit on memorised samples


def measure_gaussian_stopping(options: Options) -> Outcome:
    """Figure 10: the Gaussian task, a network that is too large for its training samples."""
    return _stopping(_run(options, "gaussian"), published=True)


def measure_imaging_stopping(options: Options) -> Outcome:
    """Figure 11: the imaging task with few training images."""
    return _stopping(_run(options, "imaging"), published=False)


def measure_transmission(options: Options) -> Outcome:
    """J_output on held-out samples and on training samples, for both trainings."""
    runs: list[TrainedRun] = []
    for name in TASKS:
        runs.append(_run(options, name))
        if runs[-1].status != DONE:
            break
    numbers = {
        "unit": "J_input",
        "settings": {"seed": options.seed},
        "runs": [{**run.numbers, "transmission": _loss(run)} for run in runs],
    }
    return Outcome(runs[-1].status, numbers, lambda: _draw_transmission(runs))


def stopping_facts(history: Sequence[EpochRecord]) -> dict[str, float | int | None]:
    """Where the published rule stops, and what further training costs.

    Returns:
        The epoch of the stop and of the least validation error; the validation error at the stop
        and at the end relative to its minimum, minus 1. None where the rule does not stop.
    """
    errors = {record.epoch: record.val_mse[0] for record in history}
    least = min(errors.values())
    stop = crossing_epoch(history)
    return {
        "stop_epoch": stop,
        "least_validation_epoch": min(errors, key=lambda epoch: errors[epoch]),
        "excess_at_stop": None if stop is None else errors[stop] / least - 1,
        "rise_at_end": errors[history[-1].epoch] / least - 1,
    }


@functools.cache
def _run(options: Options, name: str) -> TrainedRun:
    """Train a task once; several figures show the same training."""
    task = TASKS[name](options)
    return train_and_measure(task, options, _training_meter(task))


def _training_meter(task: Task) -> Meter:
    """J_output / J_input on the training samples at the two values next to theta = 0."""
    values = task.theta.unique()
    below, above = values[values < -ZERO].max(), values[values > ZERO].min()
    pair = [task.x[task.theta == side] for side in (below, above)]
    step = float(above - below)

    def meter(record: EpochRecord) -> tuple[float, float]:
        with torch.no_grad():
            minus, plus = (task.model(samples) for samples in pair)
        with warnings.catch_warnings():
            # the step of the training values; the output is one number, nearly linear in theta
            warnings.simplefilter("ignore", ff.FisherWarning)
            output = ff.fisher_information(ff.FiniteDifference(minus, plus, step), max_features=1)
        J_input = record.flow["input"].value
        return output.value / J_input, float(output.stderr) / J_input

    return meter


def _gaussian(options: Options) -> Task:
    """256-1000-500-300-50-1 on N(theta 1, I_256), few samples at values of theta in [-1.5, 1.5]."""
    return simulated_task(
        "gaussian",
        GaussianShift(torch.ones(STOPPING_WIDTHS[0])),
        mlp(STOPPING_WIDTHS, nn.ReLU, seed=options.seed),
        sized(GAUSSIAN_SIZES[options.full], options.samples),
        options.seed,
        values=torch.linspace(-GAUSSIAN_RANGE, GAUSSIAN_RANGE, GAUSSIAN_VALUES[options.full]),
        dtheta=GAUSSIAN_STEP,
        layers=(),
        max_features=GAUSSIAN_FEATURES,
        checked_share=EVERY_SAMPLE,
    )


def _imaging(options: Options) -> Task:
    """Few images per position; all of them where a file has fewer."""
    few = options.samples or IMAGING_SAMPLES[options.full]
    task = imaging_task(
        samples=options.samples if options.data else few,
        seed=options.seed,
        data=options.data,
        held_out_factor=IMAGING_HELD_OUT,
    )
    positions = len(task.theta.unique())
    x, theta = (
        values.unflatten(0, (positions, -1))[:, :few].flatten(0, 1)
        for values in (task.x, task.theta)
    )
    return replace(
        task,
        x=x,
        theta=theta,
        settings={**task.settings, "training images per position": len(theta) // positions},
        layers=(),
        learning_rate=IMAGING_RATE[options.full],
        epochs=IMAGING_EPOCHS[options.full],
        checked_share=EVERY_SAMPLE,
    )


TASKS: dict[str, Callable[[Options], Task]] = {"gaussian": _gaussian, "imaging": _imaging}


def _stopping(run: TrainedRun, *, published: bool) -> Outcome:
    facts = stopping_facts(run.history)
    points = [
        {
            "what": "validation error at the stop above its minimum",
            "value": facts["excess_at_stop"],
        },
        {"what": "validation error at the end above its minimum", "value": facts["rise_at_end"]},
    ]
    if published:
        points[0]["published_at_most"] = STOPPING_EXCESS
        points[1]["published"] = STOPPING_RISE
    numbers = {**run.numbers, "stopping": facts, "points": points}
    return Outcome(run.status, numbers, lambda: _draw_stopping(run, facts, published=published))


def _loss(run: TrainedRun) -> dict[str, Any]:
    """How far the output falls on held-out samples, from its best epoch to the last."""
    best = max(run.history, key=lambda record: record.transmission)
    last = run.history[-1]
    return {
        "best_epoch": best.epoch,
        "best": best.transmission,
        "best_error": best.transmission_error,
        "last": last.transmission,
        "last_error": last.transmission_error,
    }


def _draw_stopping(
    run: TrainedRun, facts: Mapping[str, float | int | None], *, published: bool
) -> Any:
    """Left: errors and what the output transmits. Right: the validation error above its minimum."""
    figure = new_figure(2 * PANEL, HEIGHT)
    left, right = figure.subplots(1, 2)
    plot_training(run.history, left)
    epochs = [record.epoch for record in run.history]
    least = min(record.val_mse[0] for record in run.history)
    ratios = [record.val_mse[0] / least for record in run.history]
    stop = facts["stop_epoch"]
    right.plot(epochs, ratios, color=GREEN, marker="^", ms=4, label="validation MSE / its minimum")
    if stop is not None:
        right.axvline(stop, color=VERMILION, lw=1, ls=":", alpha=0.8)
        at_stop = [ratios[epochs.index(int(stop))]]
        star = {"color": VERMILION, "ms": 14, "mec": "white", "label": "published stop"}
        right.plot([stop], at_stop, "*", **star)
    if stop is not None and published:
        label = f"published: stop within {100 * STOPPING_EXCESS:.0f} %"
        right.plot([stop], [1 + STOPPING_EXCESS], "v", color="black", label=label, **OPEN)
    if published:
        label = "published: a third more at the end"
        right.plot([epochs[-1]], [1 + STOPPING_RISE], "s", color="black", label=label, **OPEN)
    right.set_ylim(0.98, max(1.1, 1 + STOPPING_RISE * published, ratios[-1]) + 0.06)
    right.set_xlabel("epoch")
    right.set_ylabel("validation MSE / its minimum")
    tidy(right)
    right.legend(frameon=False, fontsize="small", loc="upper center")
    return figure


def _draw_transmission(runs: Sequence[TrainedRun]) -> Any:
    """For each training: J_output on held-out and on training samples, against the epoch."""
    figure = new_figure(PANEL * len(runs), HEIGHT)
    bars: dict[str, Any] = {"ms": 4, "capsize": 3}
    for index, run in enumerate(runs):
        ax = figure.add_subplot(1, len(runs), index + 1)
        epochs = [record.epoch for record in run.history]
        held_out = [record.transmission for record in run.history]
        errors = [record.transmission_error for record in run.history]
        ax.axhline(1, color=GREY, ls="--", lw=1, label="all of the input")
        ax.errorbar(epochs, held_out, errors, color=BLUE, marker="o", label="held-out", **bars)
        training, training_errors = zip(*run.training, strict=True)
        label = f"training samples ({training[-1]:.3g} at the end)"
        ax.errorbar(
            epochs, training, training_errors, color=VERMILION, marker="s", label=label, **bars
        )
        best = max(range(len(epochs)), key=lambda i: held_out[i])
        ax.plot(
            [epochs[best]], [held_out[best]], "o", color=BLUE, mfc="none", ms=11, label="best epoch"
        )
        stop = crossing_epoch(run.history)
        if stop is not None:
            ax.axvline(stop, color=VERMILION, lw=1, ls=":", label="published stop")
        ax.set_title(f"{run.numbers['task'].capitalize()} task", fontsize="medium")
        ax.set_xlabel("epoch")
        ax.set_ylabel("J$_{output}$ / J$_{input}$")
        ax.set_ylim(0, min(SHARE_CEILING, ax.get_ylim()[1]))
        tidy(ax)
        ax.legend(frameon=False, fontsize="small", loc="lower center")
    return figure
