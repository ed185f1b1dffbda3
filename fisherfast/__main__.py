"""`python -m fisherfast`: run a demonstration, measure the published figures, check this build.

Exit status: 0 when all went well, 1 when a check or a training failed, 2 for a wrong option, 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fisherfast._validation import check_positive, check_whole
from fisherfast._version import __version__
from fisherfast.reproduce.command import SEEDS, add_reproduce, run_reproduce

if TYPE_CHECKING:
    from fisherfast.demos import Task

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
        if options.verb == "reproduce":
            return run_reproduce(options, progress=_show_progress())
        return _demo(options)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before the first measurement\n")
        return 130


def _check() -> int:
    from fisherfast.ops.selfcheck import run_selfcheck

    return 0 if run_selfcheck(sys.stdout).passed else 1


def _demo(options: argparse.Namespace) -> int:
    """Prepare the task, then run it. Only a wrong option is reported as a message; errors of the
    run itself are raised."""
    from fisherfast.demos import run_demo

    try:
        _check_numbers(options)
        task = _with_overrides(_make_task(options), options)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"fisherfast demo {options.task}: {' '.join(str(error).split())}\n")
        return WRONG_OPTION
    return run_demo(
        task, out=options.out, stream=sys.stdout, seed=options.seed, progress=_show_progress()
    )


def _check_numbers(options: argparse.Namespace) -> None:
    if options.epochs is not None:
        check_whole("--epochs", options.epochs, least=1)
    check_whole("--seed", options.seed, least=0)
    if options.seed >= SEEDS:
        raise ValueError(f"--seed must be below {SEEDS}, got {options.seed}")
    if options.learning_rate is not None:
        check_positive("--learning-rate", options.learning_rate)


def _make_task(options: argparse.Namespace) -> Task:
    from fisherfast.demos import gaussian_task, imaging_task, lognormal_task

    common = {"samples": options.samples, "seed": options.seed}
    if options.task == "imaging":
        return imaging_task(**common, scene=options.scene, data=options.data)
    make = gaussian_task if options.task == "gaussian" else lognormal_task
    return make(**common, full=options.full)


def _with_overrides(task: Task, options: argparse.Namespace) -> Task:
    if options.epochs is not None:
        task = replace(task, epochs=options.epochs)
    if options.learning_rate is not None:
        task = replace(task, learning_rate=options.learning_rate)
    return task


def _show_progress() -> bool:
    """Return whether to show progress: only on a TTY with tqdm installed."""
    if not sys.stderr.isatty():
        return False
    try:
        import tqdm  # noqa: F401
    except ImportError:
        return False
    return True


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m fisherfast",
        description="Fisher information of every layer of a PyTorch network.",
    )
    parser.add_argument("--version", action="version", version=f"fisherfast {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="verb")
    demo = verbs.add_parser("demo", help="train a network, measure its layers, write a report")
    tasks = demo.add_subparsers(dest="task", metavar="task", required=True)
    imaging = tasks.add_parser("imaging", help="the position of an object in noisy camera images")
    _add_common_options(imaging, samples="training images per position")
    imaging.add_argument("--scene", type=Path, metavar="FILE", help="picture to look at")
    imaging.add_argument(
        "--data", type=Path, metavar="FILE", help="published measurements, Data1.npz"
    )
    for name, text in (
        ("gaussian", "a mean in Gaussian noise, 256 numbers"),
        ("lognormal", "a log-normal distribution, 10 numbers"),
    ):
        task = tasks.add_parser(name, help=text)
        _add_common_options(task, samples="training samples per value of theta")
        task.add_argument("--full", action="store_true", help="the published size (long)")
    add_reproduce(verbs)
    verbs.add_parser("check", help="compare every op with its reference on this machine")
    return parser


def _add_common_options(parser: argparse.ArgumentParser, *, samples: str) -> None:
    parser.add_argument("--epochs", type=int, help="passes over the training samples")
    parser.add_argument("--samples", type=int, help=samples)
    parser.add_argument("--seed", type=int, default=0, help="of samples and weights (default 0)")
    parser.add_argument("--learning-rate", type=float, metavar="RATE", help="of Adam")
    parser.add_argument(
        "--out",
        type=Path,
        default=REPORT_FOLDER,
        metavar="FOLDER",
        help=f"of the report (default {REPORT_FOLDER})",
    )


if __name__ == "__main__":
    sys.exit(main())
