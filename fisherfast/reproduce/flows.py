"""Figures 4, 5 and 6: how the information flows through a network while it learns.

The tasks are those of the demonstrations. A reduced run goes through the published states at other
epochs, so each published epoch is compared with the epoch of the run whose output transmits the
nearest share; the full run is compared epoch by epoch where the number of the epoch is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fisherfast.demos import gaussian_task, imaging_task, lognormal_task
from fisherfast.demos.figures import published_label
from fisherfast.demos.published import GAUSSIAN_SIZES
from fisherfast.demos.task import Task
from fisherfast.demos.training import DemoEpoch, nearest_epoch
from fisherfast.problems.published import FIRST, IMAGING_FLOW
from fisherfast.reproduce.drawing import draw_flows
from fisherfast.reproduce.figure import Context, Options, Outcome
from fisherfast.reproduce.trained import TrainedRun, train_and_measure, with_epochs

__all__ = ["compared_epochs", "measure_gaussian", "measure_imaging", "measure_lognormal"]

LOGNORMAL_RATE, LOGNORMAL_EPOCHS = 1e-3, 12  # reduced: as far as twelve epochs go

IMAGING_SAMPLES = {False: 10_000, True: 20_000}  # per position, simulated; a file has its own
IMAGING_EPOCHS = {False: 5, True: 15}
IMAGING_RATE = 3e-5  # of Adam: the states between the first and the last epoch are seen


def measure_gaussian(context: Context) -> Outcome:
    """Figure 4: the mean of Gaussian noise, N(theta 1, I_256)."""
    return _measure(context, _gaussian)


def measure_lognormal(context: Context) -> Outcome:
    """Figure 5: a log-normal distribution, exp(B z) with z ~ N(theta 1, I_10)."""
    return _measure(context, _lognormal)


def measure_imaging(context: Context) -> Outcome:
    """Figure 6: the position of an object in camera images."""
    return _measure(context, _imaging)


def compared_epochs(run: TrainedRun, full: bool) -> dict[int, DemoEpoch]:
    """The epoch of a run that each published epoch is compared with.

    Before training there is nothing to match; the same number otherwise, where the run has the
    published size and the number is known; else the epoch with the nearest output.
    """
    by_number = {record.epoch: record for record in run.history}
    chosen = {}
    for epoch, values in run.published.items():
        number = 0 if epoch == FIRST else epoch
        known = number in by_number and (full or number == 0)
        chosen[epoch] = by_number[number] if known else nearest_epoch(run.history, values[-1])
    return chosen


def _gaussian(options: Options) -> Task:
    """Reduced: the published learning rate times what an epoch has fewer samples, so that an epoch
    goes about as far as a published one."""
    task = gaussian_task(samples=options.samples, seed=options.seed, full=options.full)
    if options.full:
        return task
    samples = int(task.settings["training samples per theta"])
    published = GAUSSIAN_SIZES[True]
    rate = published.learning_rate * published.samples / samples
    return replace(task, learning_rate=rate, epochs=published.epochs)


def _lognormal(options: Options) -> Task:
    task = lognormal_task(samples=options.samples, seed=options.seed, full=options.full)
    if options.full:
        return task
    return replace(task, learning_rate=LOGNORMAL_RATE, epochs=LOGNORMAL_EPOCHS)


def _imaging(options: Options) -> Task:
    samples = options.samples
    if samples is None and options.data is None:
        samples = IMAGING_SAMPLES[options.full]
    task = imaging_task(samples=samples, seed=options.seed, data=options.data)
    return replace(
        task,
        published=IMAGING_FLOW,
        learning_rate=IMAGING_RATE,
        epochs=IMAGING_EPOCHS[options.full],
    )


def _measure(context: Context, make: Callable[[Options], Task]) -> Outcome:
    options = context.options
    task = with_epochs(make(options), options.epochs)
    run = train_and_measure(
        task, seed=options.seed, stream=context.stream, progress=context.progress
    )
    chosen = compared_epochs(run, options.full)
    numbers = {**run.numbers(), "points": _points(run, chosen)}
    return Outcome(run.status, numbers, lambda: draw_flows(run, chosen))


def _points(run: TrainedRun, chosen: dict[int, DemoEpoch]) -> list[dict[str, Any]]:
    """Every published value beside the one of the epoch it is compared with."""
    points = []
    for epoch, values in run.published.items():
        flow = chosen[epoch].flow
        shares, errors = flow.fractions(), flow.fraction_errors()
        for layer, published in zip((*run.layers, "output"), values, strict=True):
            points.append(
                {
                    "published_epoch": published_label(epoch),
                    "epoch": chosen[epoch].epoch,
                    "layer": layer,
                    "fraction": shares[layer],
                    "fraction_error": errors[layer],
                    "published": published,
                }
            )
    return points
