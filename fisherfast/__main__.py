"""`python -m fisherfast`: run the demo, check this build.

Exit status: 0 when all went well, 1 when a check or a training failed, 2 for a wrong option, 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from fisherfast._validation import check_positive, check_seed, check_whole
from fisherfast._version import __version__
from fisherfast.demo.imaging import EPOCHS, LEARNING_RATE, imaging_task
from fisherfast.demo.report import check_packages
from fisherfast.demo.runner import INTERRUPTED, run_demo

REPORT_FOLDER = Path("fisherfast-report")
WRONG_OPTION = 2


class _Parser(argparse.ArgumentParser):
    """A parser that reports a wrong option in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_OPTION, f"{self.prog}: {message} (--help lists the options)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = _build_parser()
    options = parser.parse_args(arguments)
    if options.verb is None:
        parser.print_help()
        return 0
    if options.verb == "check":
        return _check()
    try:
        return _demo(options)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before the first measurement\n")
        return INTERRUPTED


def _check() -> int:
    from fisherfast.ops.selfcheck import run_selfcheck

    return 0 if run_selfcheck(sys.stdout).passed else 1


def _demo(options: argparse.Namespace) -> int:
    """Prepare the task, then run it. Only errors of the preparation become a one-line message."""
    try:
        check_packages()
        check_whole("--epochs", options.epochs, least=1)
        check_seed(options.seed)
        check_positive("--learning-rate", options.learning_rate)
        task = imaging_task(
            samples=options.samples, seed=options.seed, scene=options.scene, data=options.data
        )
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"fisherfast demo: {' '.join(str(error).split())}\n")
        return WRONG_OPTION
    task = replace(task, epochs=options.epochs, learning_rate=options.learning_rate)
    return run_demo(task, out=options.out, stream=sys.stdout, seed=options.seed, progress=None)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m fisherfast",
        description="Fisher information of every layer of a PyTorch network.",
    )
    parser.add_argument("--version", action="version", version=f"fisherfast {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="verb")
    demo = verbs.add_parser(
        "demo",
        help="train a network, measure its layers, write a report",
        description="Train a network to read the position of an object from noisy camera images,"
        " measure the Fisher information in its layers, and write a report.",
    )
    demo.add_argument("task", nargs="?", choices=["imaging"], help="the only task, may be left out")
    demo.add_argument(
        "--epochs",
        type=int,
        default=EPOCHS,
        help=f"passes over the training images (default {EPOCHS})",
    )
    demo.add_argument("--samples", type=int, help="training images per position")
    demo.add_argument("--seed", type=int, default=0, help="of images and weights (default 0)")
    demo.add_argument(
        "--learning-rate",
        type=float,
        default=LEARNING_RATE,
        metavar="RATE",
        help=f"of Adam (default {LEARNING_RATE:g})",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=REPORT_FOLDER,
        metavar="FOLDER",
        help=f"of the report (default {REPORT_FOLDER})",
    )
    demo.add_argument("--scene", type=Path, metavar="FILE", help="picture to look at")
    demo.add_argument("--data", type=Path, metavar="FILE", help="published measurements, Data1.npz")
    verbs.add_parser("check", help="compare every op with its reference on this machine")
    return parser


if __name__ == "__main__":
    sys.exit(main())
