"""Measures the accuracy that docs/benchmarks.md and docs/theory.md quote: the estimator against the
truth.

    python benchmarks/accuracy/validation.py [--out benchmarks/results/validation.json] [part ...]
    python benchmarks/accuracy/validation.py --table

Parts: seeds bias coverage figure3 untrained chain memory, and those of validation_derivatives.py:
tangents error_bars score camera wide operations (all without arguments). The bounds that must hold
are asserted by tests/montecarlo; this prints and stores the figures themselves.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import fisherfast as ff
from fisherfast.problems import (
    GaussianScale,
    GaussianShift,
    Laplace,
    LogNormal,
    gaussian_network,
    invertible_chain,
)

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from montecarlo.test_bias import CASES
from montecarlo.test_memory import peak_kilobytes

from benchmarks.accuracy import validation_derivatives as derivatives
from benchmarks.accuracy.validation_table import table

ROOT = Path(__file__).resolve().parents[2]

SEEDS = range(5)
MEMORY_SAMPLES = (10_000, 1_000_000)
MEMORY_SOURCES = ("two conditions", "pathwise", "score")


def seeds() -> dict[str, Any]:
    """J / I and lower / J over 5 seeds, 100 000 samples per condition, 400 features."""
    problems = {
        "log-normal d=10 dtheta=0.2": (LogNormal.random(dim=10, variance=0.01), 0.0, 0.2, 10.0),
        "scale d=20 dtheta=0.1": (GaussianScale(20), 1.0, 0.1, 40.0),
        "laplace d=4 dtheta=0.1": (Laplace(4, 1.0), 0.0, 0.1, 4.0),
    }
    results = {}
    for name, (problem, theta, dtheta, truth) in problems.items():
        infos = [
            ff.fisher_information(
                problem.finite_difference(theta, dtheta, 100_000, seed=s), max_features=400, seed=s
            )
            for s in SEEDS
        ]
        results[name] = {
            "mean J / I": sum(i.value for i in infos) / len(infos) / truth,
            "J / I": [i.value / truth for i in infos],
            "stderr / I": float(infos[0].stderr) / truth,
            "lower / J": [float(i.lower) / i.value for i in infos],
            "features": [i.features for i in infos],
        }
    return results


def bias() -> dict[str, Any]:
    """Mean and standard error over replications of J by each formula, right and wrong."""
    results = {}
    for name in ("shift", "scale"):
        case = CASES[name]
        runs = [case.once(seed) for seed in range(case.count)]
        values = {key: torch.tensor([run[key] for run in runs]) for key in runs[0]}
        results[f"{name}, I = {case.truth:g}"] = {
            key: [float(v.mean()), float(v.std() / case.count**0.5)] for key, v in values.items()
        }
    return results


def coverage() -> dict[str, Any]:
    """Share of 400 replications whose J +- 1.96 stderr holds the truth; Gaussian shift, d = 20, T =
    2000."""
    problem, results = GaussianShift(torch.ones(20)), {}
    for paired in (False, True):
        infos = [
            ff.fisher_information(
                problem.finite_difference(0.0, 0.1, 2000, seed=seed, paired=paired),
                max_features=100,
                seed=seed,
            )
            for seed in range(400)
        ]
        J = torch.tensor([i.value for i in infos])
        stderr = torch.tensor([float(i.stderr) for i in infos])
        results["paired" if paired else "independent"] = {
            "coverage": float(((J - 20).abs() < 1.96 * stderr).float().mean()),
            "mean J": float(J.mean()),
            "spread of J": float(J.std()),
            "mean stderr": float(stderr.mean()),
        }
    return results


def figure3() -> dict[str, Any]:
    """J against lifted features: N(0, theta^2 1_50), I = 100, dtheta = 0.1, T = 20 000."""
    data = GaussianScale(50).finite_difference(1.0, 0.1, 20_000, seed=0)
    info = ff.fisher_information(data, max_features=1350)
    rows = zip(
        info.curve_k.tolist(), info.curve_J[:, 0, 0], info.curve_stderr[:, 0, 0], strict=True
    )
    return {str(k - 50): [float(J), float(error)] for k, J, error in rows}


def untrained() -> dict[str, Any]:
    """J / I after each hidden ReLU and at the output of the untrained Gaussian network, 5
    initialisations."""
    data = GaussianShift(torch.ones(256)).finite_difference(0.0, 0.06, 20_000, seed=0)
    flows = [
        ff.fisher_flow(gaussian_network(seed=s), data, layers="relu", max_features=400)
        for s in SEEDS
    ]
    names = flows[0].names[1:]
    return {n: sum(f[n].value for f in flows) / 256 / len(flows) for n in names}


def chain() -> dict[str, Any]:
    """J / I and linear / I behind six square orthogonal layers with leaky ReLU 0.6, d = 16, T = 60
    000."""
    data = GaussianShift(torch.ones(16)).finite_difference(0.0, 0.1, 60_000, seed=0)
    flow = ff.fisher_flow(
        invertible_chain(16, depth=6, slope=0.6), data, layers="leakyrelu", max_features=400
    )
    return {i.name: [i.value / 16, float(i.linear) / 16, float(i.stderr) / 16] for i in flow}


def memory() -> dict[str, Any]:
    """Peak resident memory of a process that streams 10^4 and 10^6 samples per condition, in MB, by
    source."""
    return {
        source: {str(n): peak_kilobytes(source, n)[0] / 1024 for n in MEMORY_SAMPLES}
        for source in MEMORY_SOURCES
    }


PARTS = (seeds, bias, coverage, figure3, untrained, chain, memory, *derivatives.PARTS)


def machine() -> dict[str, Any]:
    """What ran this, so that the figures can be repeated."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "commit": commit.stdout.strip() or None,
        "fisherfast": ff.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Run the parts asked for and store them beside those already stored."""
    names = {part.__name__: part for part in PARTS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*names, []], metavar="part")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/validation.json")
    parser.add_argument("--table", action="store_true", help="only print what is stored")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ff.FisherWarning)  # the published steps are wide
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.table:
        print(table(results))
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.parts or names:
        start = time.perf_counter()
        figures = names[name]()
        seconds = round(time.perf_counter() - start, 1)
        results[name] = {
            "what": " ".join((names[name].__doc__ or "").split()),
            "seconds": seconds,
            "machine": machine(),
            "figures": figures,
        }
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name} ({seconds} s): {json.dumps(figures, indent=1)}", flush=True)


if __name__ == "__main__":
    main()
