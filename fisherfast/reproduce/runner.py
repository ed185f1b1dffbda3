"""Run figures one after the other; a failure of one does not stop the others."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisherfast.demos.imaging import LEAST_SAMPLES as LEAST_IMAGES
from fisherfast.demos.published import LEAST_SAMPLES
from fisherfast.demos.report import versions
from fisherfast.demos.runner import DONE, FAILED, INTERRUPTED
from fisherfast.problems.published import CITATION
from fisherfast.reproduce import flows, lift, stopping
from fisherfast.reproduce.figure import Context, Figure, Outcome
from fisherfast.results.plots import new_figure

__all__ = ["FIGURES", "run_figures"]

_LIST = (
    Figure(
        "fig3",
        "J against the number of lifted features, N(0, theta^2 1)",
        reduced="15 s",
        full="1 min",
        least_samples=lift.LEAST_SAMPLES,
        trains=False,
        camera=False,
        measure=lift.measure_lift,
    ),
    Figure(
        "fig4",
        "flow through the layers while training, Gaussian task",
        reduced="1 min",
        full="10 min",
        least_samples=LEAST_SAMPLES,
        trains=True,
        camera=False,
        measure=flows.measure_gaussian,
    ),
    Figure(
        "fig5",
        "flow through the layers while training, log-normal task",
        reduced="1 min",
        full="5 min",
        least_samples=LEAST_SAMPLES,
        trains=True,
        camera=False,
        measure=flows.measure_lognormal,
    ),
    Figure(
        "fig6",
        "flow through the layers while training, imaging task",
        reduced="1 min",
        full="5 min",
        least_samples=LEAST_IMAGES,
        trains=True,
        camera=True,
        measure=flows.measure_imaging,
    ),
    Figure(
        "fig10",
        "early stopping, Gaussian task",
        reduced="2 min",
        full="ten hours",
        least_samples=LEAST_SAMPLES,
        trains=True,
        camera=False,
        measure=stopping.measure_gaussian_stopping,
    ),
    Figure(
        "fig11",
        "early stopping, imaging task",
        reduced="1 min",
        full="10 min",
        least_samples=LEAST_IMAGES,
        trains=True,
        camera=True,
        measure=stopping.measure_imaging_stopping,
    ),
    Figure(
        "transmission",
        "J_output on held-out samples falls while training goes on",
        reduced="3 min, seconds after fig10 and fig11",
        full="ten hours, seconds after fig10 and fig11",
        least_samples=max(LEAST_SAMPLES, LEAST_IMAGES),
        trains=True,
        camera=True,
        measure=stopping.measure_transmission,
    ),
)
FIGURES = {figure.name: figure for figure in _LIST}
"""By name, in the order of the publication."""


def run_figures(names: Sequence[str], context: Context, out: Path) -> int:
    """Measure and write figures into the folder `out`, one JSON and one PNG file each.

    After Ctrl-C, or when a training diverges, a figure shows what was finished; after Ctrl-C no
    further one is begun. Any other failure is reported, and the next figure is begun.

    Args:
        names: of figures, each a key of `FIGURES`.
        context: options and stream.
        out: made where it does not exist.

    Returns:
        The exit status of the command: 0, 1 when a figure failed, 130 after Ctrl-C.

    Raises:
        OSError: the folder cannot be made.
        ImportError: matplotlib is not installed.
    """
    new_figure()  # fail now, not after the first training
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        context.stream.write(f"\n{name}: {FIGURES[name].title}\n")
        status = _run_one(FIGURES[name], context, out)
        if status == INTERRUPTED:
            return INTERRUPTED
        if status != DONE:
            failed.append(name)
    if failed:
        context.stream.write(f"\nfailed: {', '.join(failed)}\n")
    return FAILED if failed else DONE


def _run_one(figure: Figure, context: Context, out: Path) -> int:
    start = time.perf_counter()
    try:
        outcome = figure.measure(context)
        seconds = time.perf_counter() - start
        numbers, image = _write(figure, context, outcome, seconds, out)
    except KeyboardInterrupt:
        context.stream.write("\ninterrupted\n")
        return INTERRUPTED
    except (ValueError, ArithmeticError, OSError, MemoryError) as error:
        context.stream.write(f"{figure.name} failed: {' '.join(str(error).split())}\n")
        return FAILED
    except Exception:  # a fault of the program: the others go on, and the report is complete
        traceback.print_exc(file=sys.stderr)
        context.stream.write(f"{figure.name} failed\n")
        return FAILED
    context.stream.write(f"{image}, {numbers.name} ({seconds:.0f} s)\n")
    return outcome.status


def _write(
    figure: Figure, context: Context, outcome: Outcome, seconds: float, out: Path
) -> tuple[Path, Path]:
    """The numbers first: they can be drawn again, not measured again."""
    content: dict[str, Any] = {
        "figure": figure.name,
        "title": figure.title,
        "complete": outcome.status == DONE,
        "full": context.options.full,
        "source": CITATION,
        "versions": versions(),
        "seconds": round(seconds, 1),
        **outcome.numbers,
    }
    numbers, image = out / f"{figure.name}.json", out / f"{figure.name}.png"
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    numbers.write_text(text + "\n", encoding="utf-8")
    outcome.draw().savefig(image, format="png")
    return numbers, image
