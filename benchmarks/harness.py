"""What all benchmarks share: contenders are checked, warmed up, timed in turns; results are stored.

pytest-benchmark times one function after the other. On shared cores the speed drifts by more than
what is to be measured, so here the contenders take turns (a, b, c, a, b, c, ...): a slow minute
slows all of them, and the ratios of their medians stay.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fisherfast
from fisherfast import _native

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"

OURS = "fisherfast"
COPY = "copy"  # a contender that only copies: the limit of memory
TORCH = "torch"  # the family of what torch offers for the purpose

WARM_UPS = 3
TOO_SLOW = 3.0  # times the fastest in the warm-up: such a contender cannot become the best
WAKE_ELEMENTS = 1 << 18  # enough for torch to start its threads

Clock = Callable[[Callable[[], Any], int], float]


@dataclass(frozen=True)
class Effort:
    """How long to measure: turns, seconds of one turn at least, seconds of a case at most."""

    turns: int = 15
    turn_seconds: float = 0.02
    case_seconds: float = 12.0
    least_turns: int = 5


TINY = Effort(turns=3, turn_seconds=0.0, case_seconds=1.0, least_turns=3)


@dataclass(frozen=True)
class Contender:
    """One way to compute the result.

    Attributes:
        name: what the results call it.
        call: computes and returns the result; None when there is nothing to check.
        threads: of torch; None for as many as the benchmark runs with.
        family: the fastest of each family counts; "" for `OURS` and the copy.
    """

    name: str
    call: Callable[[], Any]
    threads: int | None = None
    family: str = TORCH


@dataclass
class Comparison:
    """Seconds of one call of each contender, the largest error seen, and who was left out why."""

    families: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    turns: int = 0

    def against(self) -> dict[str, dict[str, Any]]:
        """The fastest of each family, and how many times longer than `OURS` it takes."""
        results = {}
        for family in dict.fromkeys(self.families.values()):
            names = [name for name in self.seconds if self.families[name] == family]
            if family and names:
                best = min(names, key=self.seconds.__getitem__)
                results[family] = {
                    "best": best,
                    "ratio": self.seconds[best] / self.seconds[OURS],
                }
        return results

    def as_dict(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "against": self.against(),
            "seconds": self.seconds,
            "quartile spread": self.spread,
            "errors": self.errors,
            "left out": self.left_out,
            "turns": self.turns,
        }


def on_one_thread_too(contenders: Sequence[Contender]) -> list[Contender]:
    """Each contender as it is, and on one thread: small work may be faster without company."""
    if torch.get_num_threads() == 1:
        return list(contenders)
    alone = [Contender(f"{c.name}, 1 thread", c.call, 1, c.family) for c in contenders]
    return [*contenders, *alone]


def compare(
    contenders: Sequence[Contender],
    error_of: Callable[[Any], float],
    tolerance: float,
    effort: Effort,
    clock: Clock | None = None,
) -> Comparison:
    """Check every contender, warm it up, then time all in turns; every timed result is checked too.

    A contender that raises, is wrong at any time or is hopeless in the warm-up is left out and
    named. `OURS` must not be: that is an error.

    Args:
        contenders: `OURS` among them; a result of None (the copy) is not checked.
        error_of: relative error of a result against float64.
        tolerance: above it a result is wrong.
        effort: how long to measure.
        clock: seconds a call over a number of calls; None for the wall clock.
    """
    clock = clock or wall_clock
    result = Comparison({c.name: c.family for c in contenders})
    with silent_libraries(), restored_threads() as threads:
        estimates = _warm_up(contenders, error_of, tolerance, result, clock, threads)
        alive = [c for c in contenders if c.name in estimates]
        repeats = {name: max(1, round(effort.turn_seconds / t)) for name, t in estimates.items()}
        round_seconds = sum(estimates[name] * count for name, count in repeats.items())
        turns = int(effort.case_seconds / max(round_seconds, 1e-9))
        result.turns = min(effort.turns, max(effort.least_turns, turns))
        _take_turns(alive, repeats, error_of, tolerance, result, clock, threads)
    if OURS in result.left_out:
        raise AssertionError(f"{OURS} must give right results, got {result.left_out[OURS]}")
    return result


def _warm_up(
    contenders: Sequence[Contender],
    error_of: Callable[[Any], float],
    tolerance: float,
    result: Comparison,
    clock: Clock,
    threads: int,
) -> dict[str, float]:
    """Seconds a call of those that are right and not hopeless."""
    estimates: dict[str, float] = {}
    for contender in contenders:
        set_threads(contender.threads or threads)
        attempts = [_attempt(contender, 1, error_of, clock) for _ in range(WARM_UPS)]
        if not _note(contender.name, [error for _, error in attempts], tolerance, result):
            continue
        estimates[contender.name] = min(seconds for seconds, _ in attempts)
    for family in set(result.families.values()) - {""}:
        _drop_hopeless([n for n in estimates if result.families[n] == family], estimates, result)
    return estimates


def _drop_hopeless(names: list[str], estimates: dict[str, float], result: Comparison) -> None:
    """Leave out those of a family that are far behind its fastest."""
    fastest = min((estimates[name] for name in names), default=0.0)
    for name in names:
        if estimates[name] > TOO_SLOW * fastest:
            ratio = estimates.pop(name) / fastest
            result.left_out[name] = f"{ratio:.1f} times the best of its family in the warm-up"


def _take_turns(
    contenders: Sequence[Contender],
    repeats: dict[str, int],
    error_of: Callable[[Any], float],
    tolerance: float,
    result: Comparison,
    clock: Clock,
    threads: int,
) -> None:
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    for _ in range(result.turns):
        for contender in contenders:
            if contender.name in result.left_out:
                continue
            set_threads(contender.threads or threads)
            seconds, error = _attempt(contender, repeats[contender.name], error_of, clock)
            if _note(contender.name, [error], tolerance, result):
                times[contender.name].append(seconds)
    for name, values in times.items():
        if name not in result.left_out:
            result.seconds[name] = statistics.median(values)
            low, _, high = statistics.quantiles(values, n=4)
            result.spread[name] = high - low


def _attempt(
    contender: Contender, repeats: int, error_of: Callable[[Any], float], clock: Clock
) -> tuple[float, float | str]:
    """Seconds a call, and the error of its last result: a number, or what was raised."""
    kept: list[Any] = [None]

    def call() -> None:
        kept[0] = contender.call()

    try:
        seconds = clock(call, repeats)
    except Exception as raised:  # whatever a contender raises, the others go on
        return float("nan"), f"raised {type(raised).__name__}: {str(raised)[:200]}"
    return seconds, 0.0 if kept[0] is None else error_of(kept[0])


def _note(name: str, errors: Sequence[float | str], tolerance: float, result: Comparison) -> bool:
    """Record the errors of a contender; whether all its results were right."""
    for error in errors:
        if isinstance(error, str):
            result.left_out[name] = error
        elif not error <= tolerance:  # a NaN is wrong
            result.left_out[name] = f"wrong: relative error {error:.1e}"
        else:
            result.errors[name] = max(error, result.errors.get(name, 0.0))
    return name not in result.left_out


def wall_clock(call: Callable[[], Any], repeats: int) -> float:
    """Seconds a call, by the wall clock."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def cuda_clock(call: Callable[[], Any], repeats: int) -> float:
    """Seconds a call on the current CUDA stream, by events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def set_threads(threads: int) -> None:
    """Give torch this many threads, and wake them: starting them is not what is measured."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
        torch.ones(WAKE_ELEMENTS).add_(1)


@contextlib.contextmanager
def restored_threads() -> Iterator[int]:
    """The number of threads, which is set again afterwards."""
    threads = torch.get_num_threads()
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def silent_libraries() -> Iterator[None]:
    """Drop what libraries write to the terminal: a failing MKL prints thousands of lines."""
    streams = {1: sys.stdout, 2: sys.stderr}
    for stream in streams.values():
        stream.flush()
    flush_c_streams()
    saved, null = {number: os.dup(number) for number in streams}, os.open(os.devnull, os.O_WRONLY)
    try:
        for number in streams:
            os.dup2(null, number)
        yield
    finally:
        flush_c_streams()
        for number, copy in saved.items():
            os.dup2(copy, number)
            os.close(copy)
        os.close(null)


def flush_c_streams() -> None:
    """Write out what C libraries hold back, which Python does not see."""
    ctypes.CDLL(None).fflush(None)


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """max |got - truth| / max |truth|; NaN where there is one."""
    return float((got.double() - truth).abs().max() / truth.abs().max())


def machine() -> dict[str, Any]:
    """What ran this, so that the figures can be repeated."""
    build = _native.build_info()
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "commit": commit(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "fisherfast": fisherfast.__version__,
        "compiler": build.get("compiler"),
        "simd": build.get("simd"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "mkl": torch.backends.mkl.is_available(),
        "platform": platform.platform(),
    }
    if torch.cuda.is_available():
        facts["card"] = torch.cuda.get_device_name(0)
        facts["cuda"] = torch.version.cuda
    return facts


def processor() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in names if line.startswith("model name")]
    return models[0] if models else platform.processor()


def commit() -> str | None:
    """The commit, with "+" when files differ from it; None outside of a repository. The results
    themselves may differ: they are being written."""
    changes = ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
    try:
        name, changed = (
            subprocess.run(["git", *verb], cwd=ROOT, capture_output=True, text=True, check=True)
            for verb in (["rev-parse", "--short", "HEAD"], changes)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def store(part: str, what: str, figures: Any, seconds: float, out: Path) -> None:
    """Write one part of the results beside the parts already stored there."""
    results = json.loads(out.read_text()) if out.exists() else {}
    entry = {"what": what, "seconds": round(seconds, 1), "machine": machine(), "figures": figures}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results | {part: entry}, indent=1) + "\n")


def main(doc: str, parts: dict[str, Callable[[bool], Any]], *, results: Path = RESULTS) -> None:
    """The command line of a benchmark: run its parts and store them.

    Args:
        doc: of the benchmark.
        parts: name -> function of whether sizes and efforts are tiny, returning the figures.
        results: file that they are added to, unless another is given.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(parts)}")
    parser.add_argument("--out", type=Path, default=results, help="JSON to add the results to")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    for name in options.parts:
        if name not in parts:
            parser.error(f"part must be one of {', '.join(parts)}, got {name}")
    for name in options.parts or parts:
        run = parts[name]
        start = time.perf_counter()
        figures = run(options.tiny)
        what = (run.__doc__ or name).splitlines()[0]
        store(name, what, figures, time.perf_counter() - start, options.out)
        print(f"{name}: stored in {options.out}", flush=True)
