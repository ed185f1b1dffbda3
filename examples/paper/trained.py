"""`TrainedRun`: a finished training without its samples."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from figure import Options

from fisherfast.demo import Task
from fisherfast.demo.report import run_numbers
from fisherfast.demo.runner import INTERRUPTED, collect, verdict
from fisherfast.demo.training import DivergenceError, train
from fisherfast.training import EpochRecord

Meter = Callable[[EpochRecord], tuple[float, float]]
"""Called after each epoch, with the model as it is then; returns a value and its error."""


@dataclass(frozen=True)
class TrainedRun:
    """A training that reached its end, was interrupted or diverged.

    Attributes:
        history: at least one epoch.
        status: exit status: 0 done, 1 diverged, 130 interrupted.
        numbers: for the JSON file: task, settings, summary, each epoch.
        training: J_output / J_input on samples that are trained on, with its error, by epoch; empty
            without a meter.
    """

    history: list[EpochRecord]
    status: int
    numbers: dict[str, Any] = field(default_factory=dict)
    training: list[tuple[float, float]] = field(default_factory=list)


def train_and_measure(task: Task, options: Options, meter: Meter | None = None) -> TrainedRun:
    """Train the model of a task and print a table.

    Raises:
        KeyboardInterrupt: Ctrl-C before the first measurement.
        DivergenceError: the error is not finite before the first measurement.
    """
    if options.epochs is not None:
        task = replace(task, epochs=options.epochs)
    history: list[EpochRecord] = []
    training: list[tuple[float, float]] = []

    def epochs() -> Iterator[EpochRecord]:
        for record in train(task, seed=options.seed):
            if meter is not None:
                training.append(meter(record))
            yield record

    print(f"task {task.name}: {len(task.x)} training samples, {task.epochs} epochs")
    status = collect(epochs(), history, task, sys.stdout)
    if not history:
        raise KeyboardInterrupt if status == INTERRUPTED else DivergenceError("nothing measured")
    print(verdict(history))
    numbers = run_numbers(task, history)
    for entry, (share, error) in zip(numbers["epochs"], training, strict=False):
        entry["training_output_fraction"] = share
        entry["training_output_fraction_error"] = error
    source = history[0].flow["input"]
    numbers |= {"J_input": source.value, "J_input_error": float(source.stderr)}
    return TrainedRun(history, status, numbers, training)
