"""The figures of Weimar et al., Phys. Rev. X 15, 031072 (2025), measured again.

    make paper                                       # all of them, about six minutes on two cores
    python examples/paper/reproduce.py fig3 fig5     # some of them

Each is written as a picture and as numbers in JSON, with the published values.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from figure import Options, Outcome
from flows import measure_gaussian, measure_imaging, measure_lognormal
from lift import measure_lift
from published import CITATION
from stopping import measure_gaussian_stopping, measure_imaging_stopping, measure_transmission

from fisherfast.demo.report import versions
from fisherfast.demo.runner import DONE, FAILED, INTERRUPTED
from fisherfast.results.plots import new_figure

FOLDER = Path("fisherfast-figures")


class Figure(NamedTuple):
    """One published figure; how long it takes on two cores, reduced and at the published size."""

    title: str
    measure: Callable[[Options], Outcome]
    reduced: str
    full: str


FIGURES = {
    "fig3": Figure(
        "J against the number of lifted features, N(0, theta^2 1)", measure_lift, "15 s", "1 min"
    ),
    "fig4": Figure(
        "flow through the layers while training, Gaussian task", measure_gaussian, "1 min", "10 min"
    ),
    "fig5": Figure(
        "flow through the layers while training, log-normal task",
        measure_lognormal,
        "1 min",
        "5 min",
    ),
    "fig6": Figure(
        "flow through the layers while training, imaging task", measure_imaging, "1 min", "5 min"
    ),
    "fig10": Figure(
        "early stopping, Gaussian task", measure_gaussian_stopping, "2 min", "ten hours"
    ),
    "fig11": Figure("early stopping, imaging task", measure_imaging_stopping, "1 min", "10 min"),
    "transmission": Figure(
        "J_output on held-out samples falls while training goes on",
        measure_transmission,
        "3 min, seconds after fig10 and fig11",
        "ten hours, seconds after fig10 and fig11",
    ),
}
"""By name, in the order of the publication; the last one shows the trainings of two others."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write figures, one JSON and one PNG file each.

    After Ctrl-C, or when a training diverges, a figure shows the finished epochs. After Ctrl-C no
    other figure is begun; after any other failure the next one is.

    Returns:
        The exit status: 0, 1 when a figure failed, 130 after Ctrl-C.
    """
    parser = _parser()
    chosen = parser.parse_args(arguments)
    for name in chosen.figures:
        if name not in FIGURES:
            parser.error(f"figure must be one of {', '.join(FIGURES)}, got {name}")
    if chosen.data is not None and not chosen.data.is_file():
        parser.error(f"--data must be a file, got {chosen.data}")
    options = Options(chosen.full, chosen.seed, chosen.epochs, chosen.samples, chosen.data)
    new_figure()  # fail now, not after the first training
    chosen.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in [name for name in FIGURES if name in (chosen.figures or FIGURES)]:
        print(f"\n{name}: {FIGURES[name].title}")
        try:
            status = _write(name, options, chosen.out)
        except KeyboardInterrupt:
            print("\ninterrupted")
            status = INTERRUPTED
        except Exception:  # the other figures do not depend on this one
            traceback.print_exc()
            status = FAILED
        if status == INTERRUPTED:
            return INTERRUPTED
        if status != DONE:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return FAILED if failed else DONE


def _write(name: str, options: Options, out: Path) -> int:
    """Measure a figure; the numbers are written first: they can be drawn again."""
    start = time.perf_counter()
    outcome = FIGURES[name].measure(options)
    seconds = time.perf_counter() - start
    content: dict[str, Any] = {
        "figure": name,
        "title": FIGURES[name].title,
        "complete": outcome.status == DONE,
        "full": options.full,
        "source": CITATION,
        "versions": versions(),
        "seconds": round(seconds, 1),
        **outcome.numbers,
    }
    numbers, image = out / f"{name}.json", out / f"{name}.png"
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    numbers.write_text(text + "\n", encoding="utf-8")
    outcome.draw().savefig(image, format="png")
    print(f"{image}, {numbers.name} ({seconds:.0f} s)")
    return outcome.status


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, FIGURES))
    times = "\n".join(
        f"  {name:<{width}}  {figure.title}\n"
        f"  {'':<{width}}  {figure.reduced}; --full: {figure.full}"
        for name, figure in FIGURES.items()
    )
    parser = argparse.ArgumentParser(
        description=f"Measure figures of {CITATION}, again: each as a picture and as numbers in"
        " JSON, with the published values.",
        epilog="figures, and roughly how long they take on two cores (--full: estimated):\n"
        f"{times}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "figures", nargs="*", metavar="figure", help=f"some of {', '.join(FIGURES)}; default all"
    )
    parser.add_argument("--full", action="store_true", help="the published size (long)")
    parser.add_argument("--seed", type=int, default=0, help="of samples and weights (default 0)")
    parser.add_argument("--epochs", type=int, help="passes over the training samples")
    parser.add_argument(
        "--samples",
        type=int,
        help="training samples per value of theta; for fig3 samples per condition",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="published measurements, Data1.npz"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=FOLDER,
        metavar="FOLDER",
        help=f"of figures and numbers (default {FOLDER})",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
