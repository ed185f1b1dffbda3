"""`TrainedRun`: what is left of a training once it is over, without its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from fisherfast.demos.report import epoch_numbers, summary
from fisherfast.demos.runner import INTERRUPTED, collect, verdict
from fisherfast.demos.task import Task
from fisherfast.demos.training import DemoEpoch, DivergenceError, train

__all__ = ["TrainedRun", "train_and_measure", "with_epochs"]

Meter = Callable[[DemoEpoch], tuple[float, float]]
"""From an epoch, while the model is as it was then, to a value and its error."""


@dataclass(frozen=True)
class TrainedRun:
    """A training that came to its end, or as far as it got.

    Attributes:
        name, layers, unit, settings: of the task.
        history: at least one epoch.
        status: exit status: 0 done, 1 diverged, 130 interrupted.
        published: J / J_input by epoch, from the publication.
        training: J_output / J_input on samples that are trained on, with its error, by epoch; empty
            where it was not measured.
    """

    name: str
    layers: tuple[str, ...]
    unit: str
    settings: Mapping[str, Any]
    history: list[DemoEpoch]
    status: int
    published: Mapping[int, tuple[float, ...]]
    training: list[tuple[float, float]] = field(default_factory=list)

    def numbers(self) -> dict[str, Any]:
        """For the JSON file: settings, summary, every epoch."""
        epochs = [epoch_numbers(record) for record in self.history]
        for entry, (share, error) in zip(epochs, self.training, strict=False):
            entry["training_output_fraction"] = share
            entry["training_output_fraction_error"] = error
        return {
            "task": self.name,
            "unit": self.unit,
            "settings": dict(self.settings),
            "summary": summary(self.history),
            "J_input": self.history[0].flow["input"].value,
            "J_input_error": float(self.history[0].flow["input"].stderr),
            "epochs": epochs,
        }


def train_and_measure(
    task: Task, *, seed: int, stream: TextIO, progress: bool, meter: Meter | None = None
) -> TrainedRun:
    """Train the model of a task, a table on the stream, as far as it gets.

    Args:
        task: what to learn.
        seed: of the order of the samples.
        stream: where table and messages go.
        progress: show progress bars.
        meter: called after every epoch, for `TrainedRun.training`.

    Raises:
        KeyboardInterrupt: Ctrl-C before anything was measured.
        DivergenceError: the error is not finite before anything was measured.
    """
    history: list[DemoEpoch] = []
    training: list[tuple[float, float]] = []

    def epochs() -> Iterator[DemoEpoch]:
        for record in train(task, seed=seed, progress=progress):
            if meter is not None:
                training.append(meter(record))
            yield record

    stream.write(f"task {task.name}: {len(task.x)} training samples, {task.epochs} epochs\n")
    status = collect(epochs(), history, task, stream)
    if not history and status == INTERRUPTED:
        raise KeyboardInterrupt
    if not history:
        raise DivergenceError("nothing was measured")
    stream.write(verdict(history) + "\n")
    return TrainedRun(
        task.name,
        task.layers,
        task.unit,
        {
            **task.settings,
            "learning rate": task.learning_rate,
            "batch size": task.batch_size,
            "epochs": task.epochs,
        },
        history,
        status,
        task.published,
        training,
    )


def with_epochs(task: Task, epochs: int | None) -> Task:
    """The task with another number of epochs, where one is given."""
    return task if epochs is None else replace(task, epochs=epochs)
