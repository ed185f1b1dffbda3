"""Everything that needs a GPU, in one command that needs no network; ONE JSON holds what it found.

    make check-gpu PYTHON=python3 [ARGS="--output gpu.json --total 540"]
    python3 benchmarks/gpu/check.py [--output FILE] [--total SECONDS] [--commit NAME] [step ...]

Steps: build (in place, CUDA on), self-check, cuda tests, benchmarks, sanitizers, other tests. It
uses the Python that runs it, with the packages that are there: torch, pytest, pytest-timeout,
pytest-benchmark, scipy, matplotlib, pybind11, cmake, ninja, and nvcc. Every step has a time limit
and runs whether or not the others passed; the JSON is written after each, so that whatever ends
this early leaves the rest. Exit status: 0 when all steps passed, 1 otherwise, or without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TAIL = 4000  # characters of a step's output that are kept
MESSAGE = 600  # characters of a failed test's message that are kept
GRACE = 30  # seconds that an interrupted step has to write its report
BENCHMARK_PARTS = ("fisher_solve", "moments", "spatial_moments", "dual_ops", "curve")
SANITIZER_ERROR = 99  # exit status of compute-sanitizer when it finds something
# Kernels at edges: odd sizes, strides, both sides of a limit, systems that fail.
SANITIZED = "strided_input or both_sides or failures_stay or batches_add_up or empty_input"

Outcome = dict[str, Any]


def main() -> int:
    """Run the steps asked for; returns the exit status."""
    options = parse()
    facts = card()
    if facts is None:
        sys.stderr.write(
            f"check-gpu needs torch with a CUDA device: {sys.executable} finds none, so nothing was"
            " checked\n"
        )
        return 1
    slug = re.sub(r"\W+", "-", facts["card"].lower()).strip("-")
    output = options.output or RESULTS / f"gpu-{slug}.json"
    machine = facts | sources(options.commit)
    report = {"machine": machine, "steps": earlier_steps(machine, output)}
    end = time.monotonic() + options.total
    for name in options.steps or STEPS:
        limit, run = STEPS[name]
        left = end - time.monotonic()
        print(f"{name} ...", flush=True)
        if left < GRACE:
            outcome: Outcome = {"status": "skipped", "why": "no time was left"}
        else:
            outcome = run(min(limit, left - GRACE))
        report["steps"][name] = outcome
        write(report, output)
        print(f"{name}: {outcome['status']}", flush=True)
    print(f"written to {output}")
    return 0 if all(passed(step) for step in report["steps"].values()) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="step", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--output", type=Path, help="JSON; default benchmarks/results/gpu-CARD")
    parser.add_argument("--total", type=float, default=7200, help="seconds for all steps")
    parser.add_argument("--commit", help="where the files are not in a git repository")
    options = parser.parse_args()
    unknown = set(options.steps) - set(STEPS)
    if unknown:
        parser.error(f"step must be one of {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    return options


def earlier_steps(machine: dict[str, Any], output: Path) -> dict[str, Any]:
    """Steps that ran before with the same sources on the same card: time may not do for all."""
    if not output.exists():
        return {}
    earlier = json.loads(output.read_text())
    same = all(earlier["machine"].get(k) == machine[k] for k in ("card", "sources sha256"))
    return earlier["steps"] if same else {}


def write(report: dict[str, Any], output: Path) -> None:
    """Write the report so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")


def passed(step: Outcome) -> bool:
    """Whether a step passed, or had nothing to run it with."""
    return step["status"] in ("passed", "not installed")


def card() -> dict[str, Any] | None:
    """Facts about the GPU and the software; None without a GPU that torch can use."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory GB": round(properties.total_memory / 1e9, 1),
        "driver": first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "nvcc": release(first_line(["nvcc", "--version"], last=True)),
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }


def release(text: str | None) -> str | None:
    """What nvcc says last, without what it says besides the release."""
    return text.split("/")[0] if text else None


def first_line(command: list[str], last: bool = False) -> str | None:
    """First (or last) line that a command prints; None where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=GRACE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1 if last else 0] if lines and done.returncode == 0 else None


def sources(commit: str | None) -> dict[str, Any]:
    """The commit, and a digest of the sources that names them where there is no repository."""
    digest = hashlib.sha256()
    for folder, pattern in (("csrc", "*"), ("fisherfast", "*.py")):
        for path in sorted((ROOT / folder).rglob(pattern)):
            if path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    found = first_line(["git", "rev-parse", "--short", "HEAD"])
    status = ["git", "status", "--porcelain", "--untracked-files=no", "--", "."]
    changed = first_line([*status, ":!benchmarks/results"]) if found else None
    name = commit or (f"{found}+" if changed else found)
    return {"commit": name, "sources sha256": digest.hexdigest()[:16]}


# --- steps ---------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    """Of every step: this checkout is what is imported, from any folder, and cmake and ninja are
    found where pip puts them."""
    folders = {"PYTHONPATH": ROOT, "PATH": Path(sys.executable).parent}
    paths = {
        name: os.pathsep.join(filter(None, [str(folder), os.environ.get(name)]))
        for name, folder in folders.items()
    }
    return os.environ | paths | {"PYTHONUNBUFFERED": "1"} | more


def run_command(command: list[str], limit: float, **variables: str) -> Outcome:
    """Run a command in the root folder; interrupted at the limit, killed a little later."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(**variables),
            start_new_session=True,  # so that its children end with it
        )
        timed_out = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            timed_out = True
            stop(process)
        log.seek(0)
        text = log.read().decode(errors="replace")
    status = "timed out" if timed_out else "passed" if process.returncode == 0 else "failed"
    return {
        "status": status,
        "exit status": process.returncode,
        "seconds": round(time.monotonic() - start, 1),
        "limit": round(limit, 1),
        "command": " ".join(command),
        "output": text[-TAIL:],
    }


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and its children, and kill them when they do not end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE / 2)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def build(limit: float) -> Outcome:
    """The native module in place, with CUDA kernels for the card that is here."""
    import torch

    architecture = "{}{}".format(*torch.cuda.get_device_capability(0))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return run_command(command, limit, FISHERFAST_CUDA="ON", CUDAARCHS=architecture)


def self_check(limit: float) -> Outcome:
    """Every op against its float64 reference on every device."""
    outcome = run_command([sys.executable, "-m", "fisherfast", "check"], limit)
    if outcome["status"] == "passed" and "cuda:0 " not in outcome["output"]:
        outcome |= {"status": "failed", "why": "no op ran on the GPU"}
    return outcome


def run_tests(limit: float, marker: str) -> Outcome:
    """The tests of a marker, in counts and failures."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        outcome = run_command([*command, "-m", marker, f"--junitxml={report}"], limit)
        if report.exists():
            outcome |= junit(report.read_text())
    if outcome["status"] == "passed" and not outcome.get("passed"):
        outcome |= {"status": "failed", "why": "no test ran"}
    return outcome


def junit(text: str) -> Outcome:
    """Counts and failures of a JUnit report."""
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    failures, skipped = [], []
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        for kind in ("failure", "error"):
            for found in case.findall(kind):
                message = f"{found.get('message') or ''}\n{found.text or ''}".strip()
                failures.append({"test": name, "kind": kind, "message": message[-MESSAGE:]})
        skipped += [str(found.get("message")) for found in case.findall("skipped")]
    failed = len({failure["test"] for failure in failures})
    return {
        "tests": len(cases),
        "passed": len(cases) - failed - len(skipped),
        "failed": failed,
        "skipped": {reason: skipped.count(reason) for reason in dict.fromkeys(skipped)},
        "failures": failures,
    }


def benchmarks(limit: float) -> Outcome:
    """The kernels against torch, each part in a process of its own: an error of a kernel can leave
    the card unusable for the process that met it."""
    end = time.monotonic() + limit
    script = str(ROOT / "benchmarks" / "gpu" / "speed.py")
    runs: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "gpu.json"
        for part in BENCHMARK_PARTS:
            left = max(1.0, end - time.monotonic())
            command = [sys.executable, script, part, "--out", str(figures)]
            runs[part] = run_command(command, left)
        parts = json.loads(figures.read_text()) if figures.exists() else {}
    for part, results in parts.items():
        if runs[part]["status"] == "passed" and any("failed" in r for r in results["figures"]):
            runs[part]["status"] = "failed"
    return {"status": worst_of(runs), "runs": runs, "parts": parts}


def worst_of(runs: dict[str, Outcome]) -> str:
    """The status of a step from those of its runs."""
    statuses = {outcome["status"] for outcome in runs.values()}
    return next((s for s in ("failed", "timed out") if s in statuses), "passed")


def sanitizers(limit: float) -> Outcome:
    """memcheck and racecheck on the self-check and on a few tests."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"status": "not installed"}
    python = [sys.executable, "-m"]
    programs = {
        "self-check": [*python, "fisherfast", "check"],
        "tests": [
            *[*python, "pytest", "-q", "-p", "no:cacheprovider", "--timeout=0", "tests/ops"],
            *["-m", "cuda and not slow", "-k", SANITIZED],
        ],
    }
    runs: dict[str, Outcome] = {}
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", str(SANITIZER_ERROR)]
        for name, program in programs.items():
            # torch's allocator would hand out one large block, in which no bound is visible
            runs[f"{kind}, {name}"] = run_command(
                [*command, *program], limit / 4, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
            )
    for outcome in runs.values():
        outcome["summary"] = re.findall(r"[A-Z]+ SUMMARY: .*", outcome["output"])
    return {"status": worst_of(runs), "runs": runs}


STEPS: dict[str, tuple[float, Callable[[float], Outcome]]] = {
    "build": (900, build),
    "self-check": (120, self_check),
    "cuda-tests": (600, lambda limit: run_tests(limit, "cuda")),
    "benchmarks": (600, benchmarks),
    "sanitizers": (600, sanitizers),
    "other-tests": (3600, lambda limit: run_tests(limit, "not cuda")),
}

if __name__ == "__main__":
    sys.exit(main())
