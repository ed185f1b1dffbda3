"""J along theta from labels, against closed forms, and what one pass costs.

    python benchmarks/accuracy/labelled.py [--tiny] [--out FILE]

For each problem and for continuous and gridded labels: the mean of J over many data sets in each
bin, in units of the closed form and of its standard error, the spread of J in units of the stated
errors, and how often J +- 1.96 of them holds the truth. The truth of a bin is the mean of the
linear information of its samples. The cost is that of a flow of labelled samples and of as many
samples of a finite difference, measured in turn.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fisherfast as ff

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness

RESULTS = harness.RESULTS.with_name("labelled.json")
SAMPLES, BINS, RUNS, DIM, VALUES = 6000, 6, 100, 6, 31
RAW = 1  # max_features that leaves the activations alone: their linear information is known
COST_SAMPLES, TURNS = 20_000, 5


class Along(NamedTuple):
    """A problem along theta.

    Attributes:
        draw: draws x [n, d] at theta [n].
        truth: linear information at theta [n].
        low, high: range of theta.
    """

    draw: Callable[[Tensor, torch.Generator], Tensor]
    truth: Callable[[Tensor], Tensor]
    low: float
    high: float


MIX = torch.eye(3, dtype=torch.float64).repeat_interleave(DIM // 3, 1)  # means of neighbours
SLOPES = torch.linspace(0.5, 1.5, DIM, dtype=torch.float64)


def _normal(theta: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(len(theta), DIM, generator=g, dtype=torch.float64)


def _gaussian(theta: Tensor, g: torch.Generator) -> Tensor:
    return 3 * torch.sin(theta)[:, None] * SLOPES + (1 + theta / 2)[:, None] * _normal(theta, g)


def _bent(theta: Tensor, g: torch.Generator) -> Tensor:
    return torch.sin(3 * theta)[:, None] * SLOPES * 2 + _normal(theta, g)


def _rates(theta: Tensor) -> Tensor:
    return 4 + 3 * torch.sin(theta[:, None] + torch.arange(DIM).double())


def _rates_slope(theta: Tensor) -> Tensor:
    return 3 * torch.cos(theta[:, None] + torch.arange(DIM).double())


def _layer_truth(theta: Tensor) -> Tensor:
    """Linear information of the layer MIX x of the Gaussian problem."""
    a = MIX @ SLOPES
    unit = a @ torch.linalg.solve(MIX @ MIX.T, a)
    return 9 * unit * torch.cos(theta).square() / (1 + theta / 2).square()


PROBLEMS = {
    "Gaussian, mean and noise": Along(
        _gaussian,
        lambda t: 9 * SLOPES.square().sum() * torch.cos(t).square() / (1 + t / 2).square(),
        -1.0,
        1.0,
    ),
    "Gaussian, a layer": Along(
        lambda theta, g: _gaussian(theta, g) @ MIX.T, _layer_truth, -1.0, 1.0
    ),
    "Gaussian, bent mean": Along(
        _bent, lambda t: 36 * SLOPES.square().sum() * torch.cos(3 * t).square(), -0.4, 0.4
    ),
    "Poisson": Along(
        lambda theta, g: torch.poisson(_rates(theta), generator=g),
        lambda t: (_rates_slope(t).square() / _rates(t)).sum(1),
        -1.0,
        1.0,
    ),
    "log-normal": Along(
        lambda theta, g: torch.exp(theta[:, None] + 0.5 * _normal(theta, g)),
        lambda t: torch.full_like(t, DIM / (torch.e**0.25 - 1)),
        -1.0,
        1.0,
    ),
}


def labels(problem: Along, n: int, gridded: bool, g: torch.Generator) -> Tensor:
    """Draw theta [n] of a problem: uniform, or on a grid of `VALUES`."""
    if gridded:
        grid = torch.linspace(problem.low, problem.high, VALUES, dtype=torch.float64)
        return grid[torch.randint(VALUES, (n,), generator=g)]
    unit = torch.rand(n, generator=g, dtype=torch.float64)
    return problem.low + (problem.high - problem.low) * unit


def along_theta(name: str, gridded: bool, runs: int, samples: int = SAMPLES) -> dict[str, Any]:
    """Measure a problem many times, and compare J in each bin with the closed form."""
    problem = PROBLEMS[name]
    J, errors, truths, means = [], [], [], []
    for seed in range(runs):
        g = torch.Generator().manual_seed(seed)
        theta = labels(problem, samples, gridded, g)
        data = ff.Labelled(problem.draw(theta, g).float(), theta, bins=BINS)
        info = ff.fisher_information(data, max_features=RAW)
        assert info.profile is not None
        own = data.point_of(theta[:, None])
        truth = problem.truth(theta)
        J.append(info.profile.J[:, 0, 0])
        errors.append(info.profile.stderr[:, 0, 0])
        truths.append(torch.stack([truth[own == q].mean() for q in range(BINS)]))
        of_all = info.J - truth.mean(), info.stderr, info.lower / truth.mean()
        means.append(torch.stack(of_all)[:, 0, 0])
    J, errors, truths, means = map(torch.stack, (J, errors, truths, means))
    off = (J - truths) / errors
    bias = (J - truths).mean(0)
    return {
        "ratio": ((J / truths).mean(0)).tolist(),
        "error_of_mean": (errors.mean(0) / runs**0.5 / truths.mean(0)).tolist(),
        "bias_in_errors": (bias / (errors.mean(0) / runs**0.5)).tolist(),
        "spread_over_stated": (((J - truths).std(0)) / errors.mean(0)).tolist(),
        "pooled_spread": float(((J - truths).var(0) / errors.square().mean(0)).mean().sqrt()),
        "coverage": float((off.abs() < 1.96).double().mean()),
        "mean_spread": float(means[:, 0].std() / means[:, 1].mean()),
        "lower_ratio": float(means[:, 2].mean()),
        "mean_ratio": float(1 + means[:, 0].mean() / truths.mean()),
    }


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """The two networks whose cost is measured, with the shape of a sample."""
    torch.manual_seed(0)
    mlp = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)]
    cnn = [nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten()]
    return {
        "MLP 64-128-64-1": (nn.Sequential(*mlp), (64,)),
        "CNN 16 x 16": (nn.Sequential(*cnn, nn.Linear(72, 1)), (1, 16, 16)),
    }


def cost(tiny: bool) -> dict[str, Any]:
    """Time a flow of labelled samples and of as many of a finite difference, in turn."""
    found: dict[str, Any] = {}
    n, turns = (2000, 1) if tiny else (COST_SAMPLES, TURNS)
    for name, (model, shape) in networks().items():
        g = torch.Generator().manual_seed(0)
        noise, signal = torch.randn(n, *shape, generator=g), torch.randn(shape, generator=g) / 3
        theta = 2 * torch.rand(n, generator=g) - 1
        labelled = ff.Labelled(noise + theta.reshape(-1, *[1] * len(shape)) * signal, theta)
        minus, plus = noise.split(n // 2)
        steps = ff.FiniteDifference(minus - signal / 10, plus + signal / 10, dtheta=0.2)
        seconds: dict[str, list[float]] = {"labelled": [], "finite difference": []}
        for turn in range(turns + 1):  # the first one warms up
            for kind, data in (("labelled", labelled), ("finite difference", steps)):
                start = time.process_time()
                ff.fisher_flow(model, data)
                if turn:
                    seconds[kind].append(time.process_time() - start)
        medians = {kind: statistics.median(times) for kind, times in seconds.items()}
        ratio = medians["labelled"] / medians["finite difference"]
        found[name] = {"seconds": medians, "ratio": ratio}
        print(f"{name:28s} {medians} ratio {ratio:.2f}", flush=True)
    return found


def closed_forms(tiny: bool) -> dict[str, Any]:
    """Measure all problems with continuous and gridded labels."""
    found: dict[str, Any] = {}
    for name in PROBLEMS:
        for gridded in (False, True):
            case = f"{name}, {'gridded' if gridded else 'continuous'}"
            found[case] = along_theta(name, gridded, 2 if tiny else RUNS)
            row = found[case]
            ratios = " ".join(f"{value:5.3f}" for value in row["ratio"])
            print(
                f"{case:40s} {ratios}  spread {row['pooled_spread']:.2f}  coverage"
                f" {row['coverage']:.3f}  mean {row['mean_ratio']:.3f} spread"
                f" {row['mean_spread']:.2f} lower {row['lower_ratio']:.3f}",
                flush=True,
            )
    return found


def main() -> None:
    """Measure and store both parts."""
    warnings.simplefilter("ignore", ff.FisherWarning)
    torch.set_num_threads(1)
    parts = {"closed_forms": closed_forms, "cost": cost}
    harness.main(__doc__ or "", parts, results=RESULTS)


if __name__ == "__main__":
    main()
