"""Run a task from its first measurement to the report, also after Ctrl-C or a divergence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from fisherfast.demo.imaging import ImagingTask
from fisherfast.demo.report import epoch_cells, epoch_header, summary, write_report
from fisherfast.demo.training import DivergenceError, Task, train
from fisherfast.training import EpochRecord

DONE, FAILED, INTERRUPTED = 0, 1, 130
"""Exit statuses; 130 is what shells give a command that Ctrl-C ended."""
LEAST_WIDTH = 7  # of a column of the table


def run_demo(
    task: ImagingTask, *, out: Path, stream: TextIO, seed: int = 0, progress: bool | None = False
) -> int:
    """Train, measure, show a table, and write the report into `out`.

    After Ctrl-C, or when the training diverges, the report shows the finished epochs.

    Args:
        task: what to learn.
        out: an existing folder, for the report.
        stream: for table and messages.
        seed: of the order of the samples.
        progress: as of `fisher_flow`.

    Returns:
        The exit status of the command.
    """
    history: list[EpochRecord] = []
    status = collect(train(task, seed=seed, progress=progress), history, task, stream)
    if not history:
        stream.write("nothing was measured: no report\n")
        return status
    page = write_report(out, task, history, complete=status == DONE)
    stream.write(f"\n{verdict(history)}\nreport: {page}\n")
    return status


def collect(
    epochs: Iterator[EpochRecord], history: list[EpochRecord], task: Task, stream: TextIO
) -> int:
    """Fill the history and write a table, one line per epoch, until the end, Ctrl-C or divergence.

    Returns:
        `DONE`, `INTERRUPTED` after Ctrl-C, or `FAILED` when the training diverged.
    """
    header = epoch_header(task.layers)

    def write(cells: Sequence[str]) -> None:
        pairs = zip(cells, header, strict=True)
        stream.write("  ".join(f"{c:>{max(len(name), LEAST_WIDTH)}}" for c, name in pairs) + "\n")
        stream.flush()

    write(header)
    try:
        for record in epochs:
            history.append(record)
            write(epoch_cells(record, task.layers))
    except KeyboardInterrupt:
        stream.write("\ninterrupted\n")
        return INTERRUPTED
    except DivergenceError as error:
        stream.write(f"\nstopped: {error}; try a smaller --learning-rate\n")
        return FAILED
    return DONE


def verdict(history: Sequence[EpochRecord]) -> str:
    """The result of a run in two lines."""
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
