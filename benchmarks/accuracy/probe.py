"""What a network as probe gains behind six strong non-linearities, and what it costs.

    python benchmarks/accuracy/probe.py            about ten minutes, stored after every row
    python benchmarks/accuracy/probe.py --table    the tables of docs/training.md

A Gaussian shift, J = 16, through six square orthogonal layers with leaky ReLU 0.3, d = 16: nothing
is lost, and a random lift finds 0.8 of it in the last layer. First the whole measurement, by
source; then single choices, as the part of the score that a network explains on fresh samples.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

import fisherfast as ff
from fisherfast.estimation import probe as probes
from fisherfast.problems import GaussianShift, invertible_chain

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness

RESULTS = harness.ROOT / "benchmarks" / "results" / "training.json"
DIM, DTHETA, LIFT = 16, 0.1, 400
SAMPLES, TINY_SAMPLES, FRESH = 100_000, 2000, 50_000

MANY = 400_000

RUNS = [
    ("score", MANY, 0),
    ("score", MANY, 1),
    ("score", MANY, 2),
    ("score", SAMPLES, 0),
    ("paired", MANY, 0),
    ("paired", SAMPLES, 0),
    ("pathwise", SAMPLES, 0),
    ("independent", SAMPLES, 0),
]
"""Source, samples per condition and seed (of samples, chain and probe) of each measurement."""


def stack(source: str, seed: int, samples: int) -> dict[str, Any]:
    """J of the last layer over 16 by the lift alone and with a probe, and seconds of both."""
    problem, model = GaussianShift(torch.ones(DIM)), invertible_chain(DIM, slope=0.3, seed=seed)
    data: ff.data.Data
    if source == "score":
        data = problem.scored(0.0, samples, seed=seed)
    elif source == "pathwise":
        data = problem.pathwise(0.0, samples, seed=seed)
    else:
        paired = source == "paired"
        data = problem.finite_difference(0.0, DTHETA, samples, seed=seed, paired=paired)
    row: dict[str, Any] = {"source": source, "seed": seed, "samples": samples}
    for name, probe in (("lift", None), ("probe", "network")):
        wall, used = time.perf_counter(), time.process_time()
        flow = ff.fisher_flow(
            model, data, layers="output", max_features=LIFT, probe=probe, seed=seed
        )
        layer = flow["output"]
        row[name] = {
            "J / 16": layer.value / DIM,
            "stderr": float(layer.stderr) / DIM,
            "lower / 16": float(layer.lower) / DIM,
            "J / J_input": flow.fractions()["output"],
            "wall seconds": time.perf_counter() - wall,
            "processor seconds": time.process_time() - used,
        }
    return row


def shallow(self: probes.Probe, z: torch.Tensor) -> torch.Tensor:
    """A network without the sums that pass its layers by."""
    hidden = probes.functional.gelu(functional.linear(z, *self.enter))
    for block in self.blocks:
        hidden = probes.functional.gelu(functional.linear(3**0.5 * hidden, *block))
    return functional.linear(hidden, *self.leave) + z @ self.skip.T


def only_scaled(covariance: torch.Tensor, ridge: float) -> torch.Tensor:
    """Activations that are standardised, not whitened."""
    return covariance.diagonal().rsqrt().diag()


def classified(self: Any, probe: probes.Probe, rows: torch.Tensor, *, noisy: bool) -> torch.Tensor:
    """The loss of telling two conditions apart by their log-odds, dtheta times the score."""
    points, targets = self._regression.batch(rows, self._scale)
    white = self._whitened(points)
    if noisy:
        white = white + probes.NOISE * torch.randn(
            (len(white), 1, DIM), generator=self._random, device=white.device
        )
    log_odds = DTHETA * self._scale * probe.read(white) * targets.sign()
    return functional.softplus(-log_odds).sum(-1).mean()


def leaky(slope: float) -> SimpleNamespace:
    """`torch.nn.functional` with a leaky ReLU for GELU."""
    return SimpleNamespace(gelu=lambda u: functional.leaky_relu(u, slope), linear=functional.linear)


CHOICES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "as it is": ("score", SAMPLES, {}),
    "64 units": ("score", SAMPLES, {"WIDTH": 64}),
    "256 units": ("score", SAMPLES, {"WIDTH": 256}),
    "2 hidden layers": ("score", SAMPLES, {"BLOCKS": 1}),
    "leaky ReLU 0.3": ("score", SAMPLES, {"functional": leaky(0.3)}),
    "no residual sums": ("score", SAMPLES, {"Probe.read": shallow}),
    "standardised, not whitened": ("score", SAMPLES, {"_whitening": only_scaled}),
    "constant learning rate": ("score", SAMPLES, {"schedule": lambda progress: 1.0}),
    "twice the steps": ("score", SAMPLES, {"EPOCHS": 40}),
    "paired": ("paired", SAMPLES, {}),
    "paired, no noise or decay": ("paired", SAMPLES, {"NOISE": 0.0, "DECAY": 0.0}),
    "paired, 400 000 samples": ("paired", MANY, {}),
    "independent": ("independent", SAMPLES, {}),
    "independent, classified": ("independent", SAMPLES, {"_Training._loss": classified}),
}
"""Name -> source, samples per condition, and what is changed in `fisherfast.estimation.probe`."""

TINY_CHOICES = ("as it is", "no residual sums", "independent, classified")


@contextmanager
def changed(changes: dict[str, Any]) -> Iterator[None]:
    """Another value of some names in `fisherfast.estimation.probe`."""
    former = []
    for path, value in changes.items():
        *holder, name = path.split(".")
        owner = getattr(probes, holder[0]) if holder else probes
        former.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in former:
            setattr(owner, name, value)


def half_of(source: str, samples: int) -> tuple[probes.Regression, torch.Tensor]:
    """What the probe of one half learns from, and its samples at theta = 0 for a first readout."""
    n, generator = samples // 2, torch.Generator().manual_seed(0)
    chain = invertible_chain(DIM, slope=0.3)
    x, other = torch.randn(2, n, DIM, generator=generator)
    with torch.no_grad():
        z = chain(x)[:, None]
        if source == "score":
            return probes.Regression(z, x.sum(1)[:, None, None]), x
        if source == "pathwise":
            _, tangents = torch.func.jvp(chain, (x,), (torch.ones_like(x),))
            return probes.Regression(z, z.new_zeros(1), tangents[:, None]), x
        minus = x if source == "paired" else other
        z = torch.stack([chain(minus - DTHETA / 2), chain(x + DTHETA / 2)], 1)
    return probes.Regression(z, torch.tensor([[[-2 / DTHETA], [2 / DTHETA]]])), x


def choice(source: str, samples: int, changes: dict[str, Any]) -> dict[str, float]:
    """The part of the score's variance that a network explains on fresh samples."""
    regression, _ = half_of(source, samples)
    z = regression.z.flatten(0, 1)
    mean, std = z.mean(0), z.std(0)
    regression = probes.Regression(
        (regression.z - mean) / std,
        regression.targets,
        None if regression.tangents is None else regression.tangents / std,
    )
    covariance = torch.cov((z - mean).T / std[:, None]).double()
    fresh = torch.randn(FRESH, DIM, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        seen = (invertible_chain(DIM, slope=0.3)(fresh) - mean) / std
    start = torch.linalg.solve(covariance, (seen * fresh.sum(1)[:, None]).mean(0).double())
    with changed(changes):
        used = time.process_time()
        trained = probes.train_probe(
            regression,
            covariance,
            start[:, None],
            torch.tensor([4.0], dtype=torch.float64),
            dof=float(len(z)),
            seed=0,
        )
        used = time.process_time() - used
        if trained.probe is None:
            return {"explained": 0.0, "steps": trained.steps, "processor seconds": used}
        out = trained.probe.read(seen)[:, 0]
    both = torch.stack([out, fresh.sum(1)])
    explained = float(torch.corrcoef(both)[0, 1].square())
    return {"explained": explained, "steps": trained.steps, "processor seconds": used}


def table(figures: dict[str, Any]) -> str:
    """Both tables, in Markdown."""
    lines = [
        "| source | samples | lift alone | with probes | lower | processor seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures["stack"]:
        lift, probe = row["lift"], row["probe"]
        lines.append(
            f"| {row['source']}, seed {row['seed']} | {row['samples']}"
            f" | {lift['J / J_input']:.3f} | {probe['J / J_input']:.3f} +- {probe['stderr']:.3f}"
            f" | {probe['lower / 16']:.3f} | {probe['processor seconds']:.0f} |"
        )
    lines += ["", "| choice | explained | steps | processor seconds |", "|---|---|---|---|"]
    for name, row in figures["choices"].items():
        lines.append(
            f"| {name} | {row['explained']:.3f} | {row['steps']} | {row['processor seconds']:.0f} |"
        )
    return "\n".join(lines)


def measure(out: Path, tiny: bool) -> dict[str, Any]:
    """All rows, stored after each."""
    start = time.perf_counter()
    figures: dict[str, Any] = {"stack": [], "choices": {}}

    def keep() -> None:
        what = " ".join((__doc__ or "").split("\n\n")[0].split())
        harness.store("probe", what, figures, time.perf_counter() - start, out)

    for source, samples, seed in RUNS[:1] if tiny else RUNS:
        figures["stack"].append(stack(source, seed, TINY_SAMPLES if tiny else samples))
        keep()
    for name, (source, samples, changes) in CHOICES.items():
        if not tiny or name in TINY_CHOICES:
            figures["choices"][name] = choice(source, TINY_SAMPLES if tiny else samples, changes)
            keep()
    return figures


def main() -> None:
    """Measure and store, or print what is stored."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to add the results to")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--table", action="store_true", help="only print what is stored")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text())["probe"]["figures"]))
        return
    print(table(measure(options.out, options.tiny)))


if __name__ == "__main__":
    main()
