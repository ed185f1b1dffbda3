"""Every source on the same problem: error and time of J, the table of docs/sources.md.

    python benchmarks/accuracy/sources.py [--tiny] [--out FILE]

A pulse of 64 pixels in noise of variance 1, whose position is theta. Each source gets the same
number of samples in total, and the flow of the same network is measured. The information of the
data is known in closed form: the sum over pixels of the squared derivative of the mean.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fisherfast as ff
from fisherfast.data import Data

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness

RESULTS = harness.ROOT / "benchmarks" / "results" / "sources.json"
PIXELS = torch.arange(64.0)
CENTRE, WIDTH, HEIGHT = 32.0, 5.0, 2.0
SAMPLES, RUNS, STEP, RANGE = 20_000, 20, 0.5, 8.0
COLUMNS = ("source", "J / I of the input", "stated error", "J / I after the ReLU", "seconds")


def pulse(theta: torch.Tensor) -> torch.Tensor:
    """Mean [n, 64] at theta [n]."""
    return HEIGHT * torch.exp(-((PIXELS - CENTRE - theta[:, None]) ** 2) / (2 * WIDTH**2))


def slope(theta: torch.Tensor) -> torch.Tensor:
    """Derivative [n, 64] of the mean by theta [n]."""
    return pulse(theta) * (PIXELS - CENTRE - theta[:, None]) / WIDTH**2


def information(theta: torch.Tensor) -> float:
    """Information of the input in pixels^-2, averaged over theta [n]."""
    return float(slope(theta).square().sum(1).mean())


def simulate(theta: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """Samples [n, 64] at theta [1]."""
    return pulse(theta.expand(n)) + torch.randn(n, 64, generator=generator)


def sources(n: int, seed: int) -> dict[str, tuple[Data, float]]:
    """Each source with n samples in total, and the information of its input."""
    g = torch.Generator().manual_seed(seed)
    noise, zero, half = torch.randn(n, 64, generator=g), torch.zeros(n), torch.full((n,), STEP / 2)
    x, at_zero = pulse(zero) + noise, information(zero[:1])
    minus, plus = pulse(-half), pulse(half)
    first = slice(None, n // 2)
    labels = RANGE * (2 * torch.rand(n, generator=g) - 1)
    two = (minus[first] + noise[first], plus[first])
    return {
        "FiniteDifference": (
            ff.FiniteDifference(two[0], two[1] + noise[n // 2 :], dtheta=STEP),
            at_zero,
        ),
        "FiniteDifference, paired": (
            ff.FiniteDifference(two[0], two[1] + noise[first], dtheta=STEP, paired=True),
            at_zero,
        ),
        "Pathwise": (ff.Pathwise(x, slope(zero)), at_zero),
        "Score": (ff.Score(x, (slope(zero) * noise).sum(1)), at_zero),
        "Simulator": (ff.Simulator(simulate, [0.0], samples=n, seed=seed), at_zero),
        "Labelled": (ff.Labelled(pulse(labels) + noise, labels), information(labels)),
    }


def network() -> torch.nn.Module:
    """The same network for all."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))


def measure(tiny: bool) -> list[dict[str, Any]]:
    """J of the input and of one layer by source, in units of the information, with its time."""
    n, runs = (2000, 2) if tiny else (SAMPLES, RUNS)
    model = network()
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for seed in range(runs):
        for name, (data, truth) in sources(n, seed).items():
            start = time.perf_counter()
            flow = ff.fisher_flow(model, data)
            seconds = time.perf_counter() - start
            read = flow["input"].value, float(flow["input"].stderr), flow["1"].value
            found.setdefault(name, []).append((*(value / truth for value in read), seconds))
    return [_row(name, values) for name, values in found.items()]


def _row(name: str, values: list[tuple[float, float, float, float]]) -> dict[str, Any]:
    J, stderr, layer, seconds = zip(*values, strict=True)
    return {
        "source": name,
        "J": statistics.fmean(J),
        "spread": statistics.stdev(J),
        "stderr": statistics.fmean(stderr),
        "layer J": statistics.fmean(layer),
        "layer spread": statistics.stdev(layer),
        "seconds": statistics.median(seconds),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, as in docs/sources.md."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = (
            f"`{row['source'].split(',')[0]}`{row['source'].partition(',')[1]}"
            + row["source"].partition(",")[2],
            f"{row['J']:.3f} +- {row['spread']:.3f}",
            f"{row['stderr']:.3f}",
            f"{row['layer J']:.3f} +- {row['layer spread']:.3f}",
            f"{row['seconds']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore", ff.FisherWarning)
    parts: dict[str, Callable[[bool], Any]] = {"sources": measure}
    harness.main(__doc__ or "", parts, results=RESULTS)
