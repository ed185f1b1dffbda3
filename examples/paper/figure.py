"""What a figure is given and what it returns; markers for published values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

PANEL = 5.4  # inches
HEIGHT = 4.0
OPEN: dict[str, Any] = {"ls": "none", "mfc": "none", "ms": 8, "mew": 1.4}
"""Markers of published values."""


@dataclass(frozen=True)
class Options:
    """The options of the command line.

    Attributes:
        full: the published size.
        seed: of samples, weights and order.
        epochs: to train for; None for the number that the figure needs.
        samples: for training, per value of theta; for a figure without training, per condition.
        data: file of the published measurements, instead of the simulated camera.
    """

    full: bool = False
    seed: int = 0
    epochs: int | None = None
    samples: int | None = None
    data: Path | None = None


class Outcome(NamedTuple):
    """A measured figure.

    Attributes:
        status: exit status: 0 done, 1 the training diverged, 130 interrupted.
        numbers: for the JSON file: settings, values with errors, published values.
        draw: makes the matplotlib figure.
    """

    status: int
    numbers: dict[str, Any]
    draw: Callable[[], Any]
