"""Write what a run found: figures, numbers as JSON, and one page that holds everything."""

from __future__ import annotations

import io
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fisherfast._version import __version__
from fisherfast.demos.figures import draw_figures
from fisherfast.demos.page import render_page
from fisherfast.demos.task import Task
from fisherfast.demos.training import DemoEpoch
from fisherfast.results.plots import crossing_epoch

__all__ = ["epoch_numbers", "summary", "versions", "write_report"]

PAGE = "index.html"
NUMBERS = "results.json"


def write_report(out: Path, task: Task, history: Sequence[DemoEpoch], *, complete: bool) -> Path:
    """Write everything into the folder `out`, over what an earlier run left there.

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
    numbers = _numbers(task, history, complete)
    text = json.dumps(_known(numbers), indent=1, allow_nan=False)
    (out / NUMBERS).write_text(text + "\n", encoding="utf-8")
    page = render_page(task, history, images, numbers)
    (out / PAGE).write_text(page, encoding="utf-8")
    return out / PAGE


def summary(history: Sequence[DemoEpoch]) -> dict[str, Any]:
    """The epochs that matter, and what the output transmits at its best."""
    best = max(history, key=_transmitted)
    return {
        "stop_epoch": crossing_epoch(history),
        "least_validation_epoch": min(history, key=lambda record: record.val_mse).epoch,
        "best_output_epoch": best.epoch,
        "best_output_fraction": best.transmission,
        "best_output_fraction_error": best.transmission_error,
        "last_output_fraction": history[-1].transmission,
    }


def _numbers(task: Task, history: Sequence[DemoEpoch], complete: bool) -> dict[str, Any]:
    return {
        "task": task.name,
        "complete": complete,
        "unit": task.unit,
        "settings": {
            **task.settings,
            "learning rate": task.learning_rate,
            "batch size": task.batch_size,
            "epochs": task.epochs,
        },
        "versions": versions(),
        "summary": summary(history),
        "epochs": [{**epoch_numbers(record), "flow": record.flow.to_dict()} for record in history],
    }


def _transmitted(record: DemoEpoch) -> float:
    """J_output / J_input, below all others where it is not known."""
    return -math.inf if math.isnan(record.transmission) else record.transmission


def _known(value: Any) -> Any:
    """With None, JSON's null, for numbers that are not known."""
    if isinstance(value, dict):
        return {name: _known(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_known(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def epoch_numbers(record: DemoEpoch) -> dict[str, Any]:
    """Errors, and J / J_input of each layer with its standard error."""
    return {
        "epoch": record.epoch,
        "train_mse": record.train_mse,
        "val_mse": record.val_mse,
        "train_mse_times_J_input": record.train_level,
        "val_mse_times_J_input": record.val_level,
        "fractions": record.flow.fractions(),
        "fraction_errors": record.flow.fraction_errors(),
        "seconds": record.seconds,
    }


def versions() -> dict[str, str]:
    """Of what the numbers were made with."""
    import matplotlib

    return {
        "fisherfast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
