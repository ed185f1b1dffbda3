"""Figures 10 and 11: training beyond the point where the training error meets the bound; and what
the publication says and does not show: the output then transmits less of fresh samples.

Networks with so few training samples that they learn them by heart. Measured after every epoch are
training and validation error in units of 1 / J_input, J_output on held-out samples, and J_output on
samples that are trained on: its gap to the held-out one is what was memorised.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fisherfast._errors import FisherWarning
from fisherfast.data import FiniteDifference
from fisherfast.demos import imaging_task
from fisherfast.demos.published import (
    PUBLISHED_HELD_OUT,
    Size,
    simulated_task,
    sized,
)
from fisherfast.demos.runner import DONE, FAILED, INTERRUPTED
from fisherfast.demos.task import Task
from fisherfast.demos.training import DemoEpoch, DivergenceError
from fisherfast.flow import fisher_information
from fisherfast.problems import GaussianShift, mlp
from fisherfast.problems.published import STOPPING_EXCESS, STOPPING_RISE, STOPPING_WIDTHS
from fisherfast.reproduce.drawing import draw_stopping, draw_transmission
from fisherfast.reproduce.figure import Context, Options, Outcome
from fisherfast.reproduce.trained import Meter, TrainedRun, train_and_measure, with_epochs
from fisherfast.results.plots import crossing_epoch

__all__ = [
    "measure_gaussian_stopping",
    "measure_imaging_stopping",
    "measure_transmission",
    "stopping_facts",
]

GAUSSIAN_SIZES = {
    False: Size(300, 10_000, 60, 3e-5, paired=True, validation=400),
    True: Size(7000, PUBLISHED_HELD_OUT, 400, 1e-7, paired=False),
}
"""The publication does not say after how many epochs it ends."""
GAUSSIAN_VALUES = {False: 31, True: 101}  # of theta in [-1.5, 1.5]
GAUSSIAN_RANGE = 1.5
GAUSSIAN_STEP = 0.06
GAUSSIAN_FEATURES = 64  # a lift of 63 beside the output; the input has its 256 numbers and 8

IMAGING_SAMPLES = {False: 3000, True: 10_000}  # per position
IMAGING_EPOCHS = {False: 24, True: 60}
IMAGING_RATE = {False: 1e-4, True: 3e-5}  # of Adam: small enough to see the crossing
IMAGING_HELD_OUT = 5  # held-out images for each training image per position
ZERO = 1e-3  # values of theta nearer to zero than this are zero, up to rounding
EVERY_SAMPLE = 1  # checked_share: the training error on all of the few training samples


def measure_gaussian_stopping(context: Context) -> Outcome:
    """Figure 10: the Gaussian task, a network that is too large for its training samples."""
    return _stopping(_run(context, "gaussian"), published=True)


def measure_imaging_stopping(context: Context) -> Outcome:
    """Figure 11: the imaging task with few training images."""
    return _stopping(_run(context, "imaging"), published=False)


def measure_transmission(context: Context) -> Outcome:
    """J_output on held-out samples and on training samples, for both trainings.

    Runs that figures 10 and 11 have finished are shown again, not repeated. A run that was
    interrupted or diverged is shown as far as it got.
    """
    runs: list[TrainedRun] = []
    status = DONE
    for name in TASKS:
        try:
            run = _run(context, name)
        except (KeyboardInterrupt, DivergenceError) as error:
            if not runs:
                raise
            status = INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
            break
        runs.append(run)
        status = max(status, run.status)
        if status == INTERRUPTED:
            break
    numbers = {
        "unit": "J_input",
        "settings": {"seed": context.options.seed},
        "runs": [{**run.numbers(), "transmission": _loss(run)} for run in runs],
    }
    return Outcome(status, numbers, lambda: draw_transmission(runs))


def stopping_facts(run: TrainedRun) -> dict[str, float | int | None]:
    """Where the published rule stops, and what going on costs.

    Returns:
        The epoch of the stop and of the least validation error; the validation error at the stop
        and at the end relative to its minimum, minus 1. None where the rule does not stop.
    """
    errors = {record.epoch: record.val_mse for record in run.history}
    least = min(errors.values())
    stop = crossing_epoch(run.history)
    return {
        "stop_epoch": stop,
        "least_validation_epoch": min(errors, key=lambda epoch: errors[epoch]),
        "excess_at_stop": None if stop is None else errors[stop] / least - 1,
        "rise_at_end": errors[run.history[-1].epoch] / least - 1,
    }


def _run(context: Context, name: str) -> TrainedRun:
    """Train a task, or take what another figure has finished with it."""
    if name in context.runs:
        context.stream.write(f"task {name}: trained already\n")
        return context.runs[name]
    options = context.options
    task = with_epochs(TASKS[name](options), options.epochs)
    run = train_and_measure(
        task,
        seed=options.seed,
        stream=context.stream,
        progress=context.progress,
        meter=_training_meter(task),
    )
    if run.status == DONE:
        context.runs[name] = run
    return run


def _training_meter(task: Task) -> Meter:
    """J_output / J_input on the training samples at the two values next to theta = 0."""
    values = task.theta.unique()
    below, above = values[values < -ZERO].max(), values[values > ZERO].min()
    pair = [task.x[task.theta == side] for side in (below, above)]
    step = float(above - below)

    def meter(record: DemoEpoch) -> tuple[float, float]:
        with torch.no_grad():
            minus, plus = (task.model(samples) for samples in pair)
        with warnings.catch_warnings():
            # the step of the training values; the output is one number, nearly linear in theta
            warnings.simplefilter("ignore", FisherWarning)
            output = fisher_information(FiniteDifference(minus, plus, step), max_features=1)
        J_input = record.flow["input"].value
        return output.value / J_input, float(output.stderr) / J_input

    return meter


def _gaussian(options: Options) -> Task:
    """256-1000-500-300-50-1 on N(theta 1, I_256), few samples at values of theta in [-1.5, 1.5]."""
    size = sized(GAUSSIAN_SIZES[options.full], options.samples)
    return simulated_task(
        GaussianShift(torch.ones(STOPPING_WIDTHS[0])),
        size,
        options.seed,
        values=torch.linspace(-GAUSSIAN_RANGE, GAUSSIAN_RANGE, GAUSSIAN_VALUES[options.full]),
        dtheta=GAUSSIAN_STEP,
        layers=(),
        name="gaussian",
        title="Gaussian task",
        story=(),
        model=mlp(STOPPING_WIDTHS, nn.ReLU, seed=options.seed),
        max_features=GAUSSIAN_FEATURES,
        checked_share=EVERY_SAMPLE,
    )


def _imaging(options: Options) -> Task:
    """Few images per position; of a file that has fewer, all."""
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
        title="Imaging task",
        layers=(),
        learning_rate=IMAGING_RATE[options.full],
        epochs=IMAGING_EPOCHS[options.full],
        checked_share=EVERY_SAMPLE,
    )


TASKS: dict[str, Callable[[Options], Task]] = {"gaussian": _gaussian, "imaging": _imaging}


def _stopping(run: TrainedRun, *, published: bool) -> Outcome:
    facts = stopping_facts(run)
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
    numbers = {**run.numbers(), "stopping": facts, "points": points}
    return Outcome(run.status, numbers, lambda: draw_stopping(run, facts, published=published))


def _loss(run: TrainedRun) -> dict[str, Any]:
    """How far the output falls on held-out samples, from its best epoch to the last."""
    shares = [record.transmission for record in run.history]
    errors = [record.transmission_error for record in run.history]
    best = max(range(len(shares)), key=lambda i: shares[i])
    return {
        "best_epoch": run.history[best].epoch,
        "best": shares[best],
        "best_error": errors[best],
        "last": shares[-1],
        "last_error": errors[-1],
    }
