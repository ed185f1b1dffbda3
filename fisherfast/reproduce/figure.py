"""`Figure`: one published figure, what it needs and who measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from fisherfast.reproduce.trained import TrainedRun

__all__ = ["Context", "Figure", "Options", "Outcome"]


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    Attributes:
        full: the published size.
        seed: of samples, weights and order.
        epochs: to train for; None: what the figure needs.
        samples: for training, per value of theta; for a figure that trains nothing, per condition.
        data: file of the published measurements, instead of the simulated camera.
    """

    full: bool = False
    seed: int = 0
    epochs: int | None = None
    samples: int | None = None
    data: Path | None = None


@dataclass(frozen=True)
class Context:
    """What the figures of one command share.

    Attributes:
        options: of the user.
        stream: where tables and messages go.
        progress: show progress bars.
        runs: finished trainings by name, for the figures that show the same one.
    """

    options: Options
    stream: TextIO
    progress: bool = False
    runs: dict[str, TrainedRun] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a figure found.

    Attributes:
        status: exit status: 0 done, 1 failed, 130 interrupted.
        numbers: for the JSON file: settings, values with errors, published values beside them.
        draw: makes the matplotlib figure.
    """

    status: int
    numbers: dict[str, Any]
    draw: Callable[[], Any]


@dataclass(frozen=True)
class Figure:
    """One published figure.

    Attributes:
        name: as in the command line and of its files.
        title: what it shows.
        reduced: roughly how long it takes on two cores.
        full: the same for the published size.
        least_samples: that a user may ask for.
        trains: whether a network is trained, so that epochs mean something.
        camera: whether it shows the imaging task, so that a file of measurements may be given.
        measure: does the work, and shows as much of it as was finished before Ctrl-C; raises
            KeyboardInterrupt where that is nothing.
    """

    name: str
    title: str
    reduced: str
    full: str
    least_samples: int
    trains: bool
    camera: bool
    measure: Callable[[Context], Outcome]
