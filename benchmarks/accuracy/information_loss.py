"""Networks trained with `ff.InformationLoss`, measured on fresh samples against the truth.

    python benchmarks/accuracy/information_loss.py [--out FILE] [run ...]
    python benchmarks/accuracy/information_loss.py --table

Every run trains a small network with one output on one core and measures its output with
`ff.fisher_flow` on samples that no training has seen. Each way to give the samples is run with
several seeds of weights and training samples; nothing is chosen by the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisherfast as ff
from fisherfast.problems import GaussianScale, LogNormal, Problem, mlp

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness

OUT = harness.ROOT / "benchmarks" / "results" / "training.json"
SEEDS = 3
FRESH_SAMPLES = 50_000
FRESH_SEED = 1000  # far from the seeds of training
WHITENING_SAMPLES = 20_000
HIDDEN = 64
LEARNING_RATE = 1e-2
FIXED_SAMPLES = (2_000, 20_000)


@dataclass(frozen=True)
class Task:
    """A problem at theta, and the full step of two conditions."""

    problem: Problem
    theta: float
    dtheta: float
    wide_dtheta: float  # of independent conditions, whose noise falls with the step


@dataclass(frozen=True)
class Run:
    """One training: what gives the samples, and how many."""

    source: str  # paired, independent, tangents or score
    steps: int = 2000
    batch: int = 500
    fixed: int | None = None  # training samples a condition; None: fresh ones at every step
    corrected: bool = False
    activation: Callable[[], nn.Module] = nn.GELU


TASKS = {
    "log-normal d=10": Task(LogNormal.random(dim=10, seed=0), 0.0, 0.1, 0.2),
    "scale d=20": Task(GaussianScale(20), 1.0, 0.05, 0.1),
}

RUNS = {
    "paired": Run("paired"),
    "independent": Run("independent"),
    "tangents": Run("tangents"),
    "score": Run("score"),
    **{f"paired, {n} fixed samples": Run("paired", fixed=n) for n in FIXED_SAMPLES},
    "independent, corrected": Run("independent", corrected=True),
    "paired, ReLU": Run("paired", activation=nn.ReLU),
    "tangents, ReLU": Run("tangents", activation=nn.ReLU),
}


def whitening(task: Task) -> nn.Linear:
    """A fixed layer to inputs of mean 0 and covariance 1; the log-normal's are nearly collinear."""
    problem = task.problem
    x = problem.sample(task.theta, WHITENING_SAMPLES, torch.Generator().manual_seed(FRESH_SEED - 1))
    values, vectors = torch.linalg.eigh(torch.cov(x.double().T))
    root = vectors * values.rsqrt() @ vectors.T  # of the inverse: each input stays most like itself
    layer = nn.Linear(problem.dim, problem.dim).requires_grad_(False)
    layer.weight.copy_(root)
    layer.bias.copy_(-root @ x.double().mean(0))
    return layer


class Samples:
    """Batches for one run, fresh or from a fixed set."""

    def __init__(self, task: Task, run: Run, seed: int) -> None:
        self.task, self.run = task, run
        self.generator = torch.Generator().manual_seed(seed)
        self.dtheta = task.wide_dtheta if run.source == "independent" else task.dtheta
        self.kept = self.draw(run.fixed) if run.fixed else None

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """The two conditions, or the samples at theta with their companion."""
        problem, theta, generator = self.task.problem, self.task.theta, self.generator
        if self.run.source == "tangents":
            x, dx = problem.sample_with_tangent(theta, n, generator)
            return x, dx[:, 0]
        if self.run.source == "score":
            x = problem.sample(theta, n, generator)
            return x, problem.score(x, theta)
        start = generator.get_state()
        minus = problem.sample(theta - self.dtheta / 2, n, generator)
        if self.run.source == "paired":
            generator.set_state(start)
        return minus, problem.sample(theta + self.dtheta / 2, n, generator)

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next batch."""
        if self.kept is None:
            return self.draw(self.run.batch)
        chosen = torch.randint(len(self.kept[0]), (self.run.batch,), generator=self.generator)
        return self.kept[0][chosen], self.kept[1][chosen]


def step_loss(
    network: nn.Module, loss: ff.InformationLoss, source: str, first: Tensor, second: Tensor
) -> Tensor:
    """The loss of one batch."""
    if source in ("paired", "independent"):
        return loss(*network(torch.cat([first, second])).split(len(first)))
    if source == "tangents":
        z, dz = torch.func.jvp(network, (first,), (second,))
        return loss(z, tangents=dz[None])
    return loss(network(first), score=second)


def train(task: Task, run: Run, seed: int) -> tuple[nn.Module, float]:
    """A trained network, and the seconds of one core it took."""
    widths = [task.problem.dim, HIDDEN, HIDDEN, task.problem.parameters]
    network = nn.Sequential(whitening(task), mlp(widths, run.activation, seed=seed))
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=run.steps)
    samples = Samples(task, run, seed)
    two = run.source in ("paired", "independent")
    loss = ff.InformationLoss(
        samples.dtheta if two else None, paired=run.source == "paired", corrected=run.corrected
    )
    start = time.process_time()
    for _ in range(run.steps):
        try:
            value = step_loss(network, loss, run.source, *samples.batch())
        except ValueError:  # the output is constant: what is left is measured
            break
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return network, time.process_time() - start


def measure(task: Task, network: nn.Module) -> dict[str, float]:
    """J of the output over the true information, on fresh samples with exact tangents."""
    data = task.problem.pathwise(task.theta, FRESH_SAMPLES, seed=FRESH_SEED)
    output = ff.fisher_flow(network, data, layers="^1$", max_features=32)["output"]
    truth = task.problem.fisher(task.theta).item()
    return {
        "J / I": output.value / truth,
        "stderr / I": float(output.stderr) / truth,
        "linear / I": float(output.linear) / truth,
        "lower / I": float(output.lower) / truth,
    }


def information_loss(label: str, seeds: int, tiny: bool) -> dict[str, Any]:
    """J / I of the output of 64-64-1 networks trained to maximise log det J, one entry a seed."""
    run = dataclasses.replace(RUNS[label], steps=20, batch=100) if tiny else RUNS[label]
    results: dict[str, Any] = {}
    for name, task in TASKS.items():
        rows = []
        for seed in range(seeds):
            network, seconds = train(task, run, seed)
            rows.append(measure(task, network) | {"core seconds": round(seconds, 1)})
            print(f"{name}, {label}, seed {seed}: {rows[-1]}", flush=True)
        results[name] = {"steps": run.steps, "batch": run.batch} | {
            key: [row[key] for row in rows] for key in rows[0]
        }
    return results


def table(figures: dict[str, Any]) -> str:
    """The figures as docs/training.md shows them."""
    lines = [
        "| samples at theta | " + " | ".join(TASKS) + " | core seconds |",
        "|---|" + "---|" * (len(TASKS) + 1),
    ]
    for label in RUNS:
        if label in figures:
            rows = [figures[label][name] for name in TASKS]
            cells = [", ".join(f"{value:.3f}" for value in row["J / I"]) for row in rows]
            seconds = [value for row in rows for value in row["core seconds"]]
            mean = sum(seconds) / len(seconds)
            lines.append(f"| {label} | {' | '.join(cells)} | {mean:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Train, measure, store beside what else is stored there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help=f"of {', '.join(RUNS)}; all without arguments")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to add the results to")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="networks trained for each run")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--table", action="store_true", help="only print what is stored")
    options = parser.parse_args()
    stored = json.loads(options.out.read_text()) if options.out.exists() else {}
    figures = stored.get("information_loss", {}).get("figures", {})
    if options.table:
        print(table(figures))
        return
    torch.set_num_threads(1)
    what = (information_loss.__doc__ or "").splitlines()[0]
    seconds = stored.get("information_loss", {}).get("seconds", 0.0)
    for label in options.runs or RUNS:
        start = time.perf_counter()
        figures |= {label: information_loss(label, options.seeds, options.tiny)}
        seconds += time.perf_counter() - start
        harness.store("information_loss", what, figures, seconds, options.out)


if __name__ == "__main__":
    main()
