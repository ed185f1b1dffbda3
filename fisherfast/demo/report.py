"""The report of a run: figures, numbers as JSON, and one page that holds everything."""

from __future__ import annotations

import base64
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fisherfast._version import __version__
from fisherfast.demo.figures import draw_figures
from fisherfast.demo.imaging import ImagingTask
from fisherfast.demo.training import Task
from fisherfast.results.comparison import unresolved_note
from fisherfast.results.text import number, with_error
from fisherfast.training import EpochRecord
from fisherfast.training.plots import crossing_epoch

PAGE = "index.html"
NUMBERS = "results.json"
TEMPLATE = "report.html"
PACKAGES = ("jinja2", "matplotlib")


def check_packages() -> None:
    """Check that a report can be written, before the training rather than after it.

    Raises:
        ImportError: Jinja2 or matplotlib is not installed.
    """
    for name in PACKAGES:
        if find_spec(name) is None:
            raise ImportError(f"the report needs {name}: pip install 'fisherfast[demo]'")


def write_report(
    out: Path, task: ImagingTask, history: Sequence[EpochRecord], *, complete: bool
) -> Path:
    """Write everything into the folder `out`, over the files of an earlier run.

    Args:
        out: an existing folder.
        task: what was learned.
        history: at least one epoch.
        complete: whether the run came to its end.

    Returns:
        The page.
    """
    images = {}
    for name, figure in draw_figures(task, history).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        images[name] = buffer.getvalue()
        (out / name).write_bytes(images[name])
    numbers = {**run_numbers(task, history), "complete": complete, "versions": versions()}
    for entry, record in zip(numbers["epochs"], history, strict=True):
        entry["flow"] = record.state_dict()["flow"]
    text = json.dumps(_known(numbers), indent=1, allow_nan=False)
    (out / NUMBERS).write_text(text + "\n", encoding="utf-8")
    (out / PAGE).write_text(_page(task, history, images, numbers), encoding="utf-8")
    return out / PAGE


def summary(history: Sequence[EpochRecord]) -> dict[str, Any]:
    """The epochs that matter, and the largest share of the input that the output transmits."""
    best = max(history, key=_transmitted)
    return {
        "stop_epoch": crossing_epoch(history),
        "least_validation_epoch": min(history, key=lambda record: record.row()["val_mse"]).epoch,
        "best_output_epoch": best.epoch,
        "best_output_fraction": best.transmission,
        "best_output_fraction_error": best.transmission_error,
        "last_output_fraction": history[-1].transmission,
    }


def epoch_numbers(record: EpochRecord) -> dict[str, Any]:
    """Errors, and J / J_input of each layer with its standard error."""
    row = record.row()
    fractions, errors = (
        {name.removeprefix(kind): value for name, value in row.items() if name.startswith(kind)}
        for kind in ("fraction/", "fraction_stderr/")
    )
    return {
        "epoch": record.epoch,
        "train_mse": row["train_mse"],
        "val_mse": row["val_mse"],
        "train_mse_times_J_input": record.train_level,
        "val_mse_times_J_input": record.val_level,
        "fractions": fractions,
        "fraction_errors": errors,
        "seconds": record.seconds,
    }


def epoch_header(layers: Sequence[str]) -> list[str]:
    """Names of the columns of a table of epochs; those of layers hold J / J_input."""
    return ["epoch", "train x J", "val x J", *layers, "output +- error", "seconds"]


def epoch_cells(record: EpochRecord, layers: Sequence[str]) -> list[str]:
    """One row of text: errors in units of 1 / J_input, then J / J_input of each layer; "-" where
    J_input is within three errors of zero."""
    row = record.row()
    levels = row["train_level"], row["val_level"], *(row[f"fraction/{name}"] for name in layers)
    return [
        str(record.epoch),
        *map(number, levels),
        with_error(record.transmission, record.transmission_error),
        f"{record.seconds:.1f}",
    ]


def versions() -> dict[str, str]:
    """Versions of the software, and the number of threads."""
    import matplotlib

    return {
        "fisherfast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


def _page(
    task: ImagingTask,
    history: Sequence[EpochRecord],
    images: Mapping[str, bytes],
    numbers: Mapping[str, Any],
) -> str:
    """The page as text, from its template; every value is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fisherfast", "demo"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    flows = {record.epoch: record.flow for record in history if record.flow is not None}
    source = flows[history[0].epoch].layers[0]
    start = history[0].transmission
    return environment.get_template(TEMPLATE).render(
        **numbers,
        input_J=source.value,
        input_error=float(source.stderr),
        unresolved=unresolved_note(source) if math.isnan(start) else None,
        start=round(100 * start, 1) + 0.0,  # no -0.0
        images={name: base64.b64encode(image).decode() for name, image in images.items()},
        epoch_header=epoch_header(task.layers),
        epoch_rows=[epoch_cells(record, task.layers) for record in history],
        layer_table=flows[numbers["summary"]["best_output_epoch"]].table(),
    )


def run_numbers(task: Task, history: Sequence[EpochRecord]) -> dict[str, Any]:
    """Task, settings and summary of a run, and the numbers of each epoch."""
    return {
        "task": task.name,
        "unit": task.unit,
        "settings": {
            **task.settings,
            "learning rate": task.learning_rate,
            "batch size": task.batch_size,
            "epochs": task.epochs,
        },
        "summary": summary(history),
        "epochs": [epoch_numbers(record) for record in history],
    }


def _transmitted(record: EpochRecord) -> float:
    """J_output / J_input, below all others where it is not known."""
    return -math.inf if math.isnan(record.transmission) else record.transmission


def _known(value: Any) -> Any:
    """The value with None, JSON's null, for numbers that are not known."""
    if isinstance(value, dict):
        return {name: _known(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_known(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
