"""`ff.jvp` and `ff.fisher_flow` on forty architectures that other people wrote.

    python benchmarks/peers/architectures.py [--only NAME ...] [--limit SECONDS] [--out FILE]
    python benchmarks/peers/architectures.py --table

Install the libraries by `architectures.txt`; one that is missing is skipped by name.

Of each: the largest error of the tangents in float64 against central differences, relative to their
norm, and of those in float32; then a flow of 100 samples with tangents at default settings in
float32: layers, processor seconds, and the overhead over a plain pass of the same samples. Every
result is stored at once, so a run may be repeated for some names.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisherfast as ff

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness
from benchmarks.peers import architecture_zoo as zoo

RESULTS = harness.ROOT / "benchmarks" / "results" / "architectures.json"
LIMIT = 120.0  # seconds of one architecture
SAMPLES = 100
COMPARED = 3  # samples whose tangents are compared
# Of central differences of fourth order: the best one counts. Kinks spoil the large ones, and the
# small ones a softmax that x-transformers computes in float32 also for float64.
STEPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
PASSES = 3  # plain passes, of which the median counts


class OverTimeError(BaseException):
    """The time limit; no `except Exception` on the way catches it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise after that many seconds."""

    def stop(*_: Any) -> None:
        raise OverTimeError

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def built(architecture: zoo.Architecture, dtype: torch.dtype) -> nn.Module:
    """The same network in each dtype, in eval mode, with parameters that are not zero."""
    torch.manual_seed(0)
    model = architecture.build().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.numel() and not tensor.any():
            tensor.data.normal_(std=0.1)  # zeros, as of a last layer, would hide the rest
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.data = tensor.data.to(dtype.to_complex() if tensor.is_complex() else dtype)
    return model


def samples(shape: tuple[int, ...], n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """White noise [n, ...], and one direction for all of them, smooth along each axis."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    direction = torch.linspace(0, 3, x[0].numel(), dtype=torch.float64).sin().view(shape)
    return x.to(dtype), direction.expand_as(x).to(dtype)


def joint(output: Any) -> Tensor:
    """All floating tensors of an output, side by side."""
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value.flatten())
        for item in value.values() if isinstance(value, dict) else value:
            if not isinstance(value, Tensor):
                collect(item)

    collect(output)
    return torch.cat([t for t in found if t.is_floating_point()])


def difference(model: nn.Module, x: Tensor, dx: Tensor, step: float) -> Tensor:
    """Derivative along dx by central differences of fourth order."""
    near, far = (joint(model(x + h * dx)) - joint(model(x - h * dx)) for h in (step, 2 * step))
    return (8 * near - far) / (12 * step)


def derivative_errors(architecture: zoo.Architecture) -> dict[str, float]:
    """Relative errors of the tangents in float64 and float32 against differences in float64."""
    model = built(architecture, torch.float64)
    x, dx = samples(architecture.shape, COMPARED, torch.float64)
    with zoo.fields(torch.float64):
        _, tangents = ff.jvp(model, x, dx[None])
        exact = joint(tangents)
        with torch.no_grad():
            differences = [difference(model, x, dx, step) for step in STEPS]
    error = min(float((exact - d).norm() / d.norm()) for d in differences)
    model = built(architecture, torch.float32)
    _, tangents = ff.jvp(model, x.float(), dx.float()[None])
    single = joint(tangents)
    return {"error": error, "error in float32": float((single - exact).norm() / exact.norm())}


def flow(architecture: zoo.Architecture) -> dict[str, Any]:
    """A flow of 100 samples: layers, those without a number, processor seconds, overhead."""
    model = built(architecture, torch.float32)
    x, dx = samples(architecture.shape, SAMPLES, torch.float32)
    with torch.no_grad():
        plain = sorted(seconds(lambda: model(x))[1] for _ in range(PASSES))[PASSES // 2]
    found, spent = seconds(lambda: ff.fisher_flow(model, ff.Pathwise(x, dx)))
    return {
        "layers": len(found.layers),
        "layers without a number": sum(not bool(each.J.isfinite().all()) for each in found.layers),
        "seconds": round(spent, 2),
        "plain pass": round(plain, 4),
        "overhead": round(spent - plain, 2),
    }


def seconds(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the processor seconds it takes: of the process, so that others on
    the machine do not count."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def measured(name: str, limit: float) -> dict[str, Any]:
    """The row of an architecture; what fails is named in it."""
    architecture = zoo.ARCHITECTURES[name]
    row: dict[str, Any] = {"library": architecture.library, "shape": list(architecture.shape)}
    for part in (derivative_errors, flow):
        try:
            with limited(limit), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row |= part(architecture)
        except OverTimeError:
            row[f"{part.__name__} failed"] = f"not within {limit:.0f} s"
        except Exception as error:  # whatever fails is a result
            reason = (str(error).splitlines() or [""])[0]
            row[f"{part.__name__} failed"] = f"{type(error).__name__}: {reason}"
    return row


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for name in zoo.PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown: a line for each library, with the worst of its architectures."""
    lines = [
        "| library | architectures | refused | error | in float32 | layers | overhead of a flow |",
        "|---|---|---|---|---|---|---|",
    ]
    found = list(results["architectures"].values())
    for library in dict.fromkeys(row["library"] for row in found):
        rows = [row for row in found if row["library"] == library]
        refused = [row for row in rows if any(key.endswith("failed") for key in row)]
        cells = [
            f"{library} {results['versions'].get(library, '')}",
            str(len(rows)),
            str(len(refused)),
            f"{_largest(rows, 'error'):.0e}",
            f"{_largest(rows, 'error in float32'):.0e}",
            f"{_largest(rows, 'layers'):.0f}",
            f"{_largest(rows, 'overhead'):.0f} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    machine = results["machine"]
    note = (
        f"Largest of each column. {machine['processor']}, {machine['threads']} thread(s), torch"
        f" {machine['torch']}."
    )
    return "\n".join([*lines, "", note])


def _largest(rows: list[dict[str, Any]], key: str) -> float:
    return max((row[key] for row in rows if key in row), default=float("nan"))


def main() -> None:
    """Measure and store, or print the table of what is stored."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", nargs="+", choices=list(zoo.ARCHITECTURES), metavar="NAME")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of one architecture")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to add the results to")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.table:
        print(table(results))
        return
    rows = results.get("architectures", {})
    skipped = zoo.missing()
    for name in skipped:
        print(f"skipped: {name} is not installed")
    for name in options.only or zoo.ARCHITECTURES:
        if zoo.ARCHITECTURES[name].library in skipped:
            continue
        rows[name] = measured(name, options.limit)
        print(name, rows[name], flush=True)
        results = {"machine": harness.machine(), "versions": versions(), "skipped": skipped}
        options.out.write_text(json.dumps(results | {"architectures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
