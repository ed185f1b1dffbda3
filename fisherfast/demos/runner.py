"""Run a task from its first measurement to the report, whatever happens on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from fisherfast.demos.report import summary, write_report
from fisherfast.demos.table import LiveTable
from fisherfast.demos.task import Task
from fisherfast.demos.training import DemoEpoch, DivergenceError, train
from fisherfast.results.plots import new_figure

__all__ = ["DONE", "FAILED", "INTERRUPTED", "collect", "run_demo", "verdict"]

DONE, FAILED, INTERRUPTED = 0, 1, 130
"""Exit statuses; 130 is what shells give a command that Ctrl-C ended."""


def run_demo(
    task: Task, *, out: Path, stream: TextIO, seed: int = 0, progress: bool = False
) -> int:
    """Train, measure, show a table, and write the report into `out`.

    After Ctrl-C, or when the training diverges, the report shows the epochs that were finished.

    Args:
        task: what to learn.
        out: folder of the report, made where it does not exist.
        stream: where table and messages go.
        seed: of the order of the samples.
        progress: show progress bars.

    Returns:
        The exit status of the command.

    Raises:
        OSError: the folder cannot be made.
        ImportError: matplotlib is not installed.
    """
    new_figure()  # fail now, not after the training
    out.mkdir(parents=True, exist_ok=True)
    history: list[DemoEpoch] = []
    status = collect(train(task, seed=seed, progress=progress), history, task, stream)
    if not history:
        stream.write("nothing was measured: no report\n")
        return status
    page = write_report(out, task, history, complete=status == DONE)
    stream.write(f"\n{verdict(history)}\nreport: {page}\n")
    return status


def collect(
    epochs: Iterator[DemoEpoch], history: list[DemoEpoch], task: Task, stream: TextIO
) -> int:
    """Fill the history, one line of the table at a time, as far as it goes.

    Returns:
        `DONE`, `INTERRUPTED` after Ctrl-C, or `FAILED` when the training diverged.
    """
    table = LiveTable(task.layers, stream)
    table.begin()
    try:
        for record in epochs:
            history.append(record)
            table.add(record)
    except KeyboardInterrupt:
        stream.write("\ninterrupted\n")
        return INTERRUPTED
    except DivergenceError as error:
        stream.write(f"\nstopped: {error}; try a smaller --learning-rate\n")
        return FAILED
    return DONE


def verdict(history: Sequence[DemoEpoch]) -> str:
    """What a run found, in two lines."""
    facts = summary(history)
    stop = facts["stop_epoch"]
    crossing = "not reached" if stop is None else f"in epoch {stop}"
    return (
        f"best output: {100 * facts['best_output_fraction']:.1f} %"
        f" (+- {100 * facts['best_output_fraction_error']:.1f}) of the input,"
        f" in epoch {facts['best_output_epoch']}\n"
        f"training error at the Cramer-Rao bound: {crossing};"
        f" least validation error in epoch {facts['least_validation_epoch']}"
    )
