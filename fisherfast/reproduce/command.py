"""The verb `reproduce` of the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fisherfast.demos import imaging_task
from fisherfast.reproduce.figure import Context, Figure, Options
from fisherfast.reproduce.runner import FIGURES, run_figures

__all__ = ["SEEDS", "add_reproduce", "run_reproduce"]

FOLDER = Path("fisherfast-figures")
ALL = "all"
WRONG_OPTION = 2
SEEDS = 2**32  # what NumPy takes; figures count on from there


def add_reproduce(verbs: Any) -> None:
    """Add the verb to the parsers of the command line."""
    width = max(map(len, FIGURES))
    times = "\n".join(
        f"  {name:<{width}}  {figure.title}\n"
        f"  {'':<{width}}  {figure.reduced}; --full: {figure.full}"
        for name, figure in FIGURES.items()
    )
    parser = verbs.add_parser(
        "reproduce",
        help="measure the published figures again",
        description="Measure figures of Weimar et al., Phys. Rev. X 15, 031072 (2025), again: each"
        " as a picture and as numbers in JSON, with the published values beside them.",
        epilog="figures, and roughly how long they take on two cores (--full: estimated):\n"
        f"{times}\n  {ALL:<{width}}  all of them; goes on after a failure",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "figures",
        nargs="+",
        choices=[*FIGURES, ALL],
        metavar="figure",
        help=f"one or more of {', '.join(FIGURES)}, {ALL}",
    )
    parser.add_argument("--full", action="store_true", help="the published size (long)")
    parser.add_argument(
        "--out",
        type=Path,
        default=FOLDER,
        metavar="FOLDER",
        help=f"of figures and numbers (default {FOLDER})",
    )
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


def run_reproduce(arguments: argparse.Namespace, *, progress: bool) -> int:
    """Check the options, then run the figures: only a wrong option may end in a message."""
    chosen = arguments.figures
    names = list(FIGURES) if ALL in chosen else [name for name in FIGURES if name in chosen]
    options = Options(
        full=arguments.full,
        seed=arguments.seed,
        epochs=arguments.epochs,
        samples=arguments.samples,
        data=arguments.data,
    )
    context = Context(options, sys.stdout, progress)
    try:
        _check([FIGURES[name] for name in names], options)
        arguments.out.mkdir(parents=True, exist_ok=True)
        return run_figures(names, context, arguments.out)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"fisherfast reproduce: {' '.join(str(error).split())}\n")
        return WRONG_OPTION


def _check(figures: list[Figure], options: Options) -> None:
    """Every option against every figure that is asked for.

    Raises:
        ValueError: one is out of its range, or none of the figures uses it.
        OSError: the file of measurements cannot be read.
    """
    if options.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {options.seed}")
    if options.seed >= SEEDS:
        raise ValueError(f"--seed must be below {SEEDS}, got {options.seed}")
    names = ", ".join(figure.name for figure in figures)
    if options.epochs is not None:
        if options.epochs < 1:
            raise ValueError(f"--epochs must be at least 1, got {options.epochs}")
        if not any(figure.trains for figure in figures):
            raise ValueError(f"--epochs must be given with a figure that trains, got {names}")
    if options.samples is not None:
        for figure in figures:
            if options.samples < figure.least_samples:
                raise ValueError(
                    f"--samples must be at least {figure.least_samples} for {figure.name},"
                    f" got {options.samples}"
                )
    if options.data is not None:
        if not any(figure.camera for figure in figures):
            raise ValueError(f"--data must be given with a figure of the camera, got {names}")
        imaging_task(samples=options.samples, seed=options.seed, data=options.data)
