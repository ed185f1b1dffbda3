"""Effect of the leverages of kept samples on samples that are not Gaussian (docs/theory.md, 22).

    python benchmarks/accuracy/leverage.py [--repeats 60]

The linear information of the raw activations: mean and spread of J over fresh data sets with the
corrections for Gaussian samples, with leverages, and from two independent halves for a score.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from statistics import NormalDist
from unittest import mock

import torch
from torch import Tensor

import fisherfast as ff
from fisherfast.measurement.replicates import HeldSamples
from fisherfast.problems import Laplace, RectifiedGaussian

REPEATS = 60
Draw = Callable[[torch.Generator], ff.Pathwise | ff.Score]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator)


def brightness(generator: torch.Generator, n: int) -> Tensor:
    """R [n, 1] with log R ~ N(0, 1/4)."""
    return torch.exp(normal(generator, n, 1) / 2)


def moved(x: Tensor) -> ff.Pathwise:
    """Samples [n, d] whose mean moves along (1, .., 1) / sqrt(d)."""
    return ff.Pathwise(x, torch.full_like(x, x.shape[1] ** -0.5))


def bright_score(generator: torch.Generator) -> ff.Score:
    """x = R u says nothing about s = R v."""
    size = brightness(generator, 2000)
    return ff.Score(
        size * normal(generator, 2000, 200), (size * normal(generator, 2000, 1)).double()
    )


def half_seen(generator: torch.Generator) -> ff.Score:
    """200 numbers explain half of a score of variance 10."""
    x = normal(generator, 1000, 200)
    score = math.sqrt(5) * (x.sum(1) / math.sqrt(200) + normal(generator, 1000))
    return ff.Score(x, score.double())


def laplace_score(generator: torch.Generator) -> ff.Score:
    """A Laplace number of scale 1, whose score is its sign, next to 199 others."""
    x = Laplace(1).sample(0.0, 800, generator)
    return ff.Score(torch.cat([x, normal(generator, 800, 199)], 1), x[:, 0].sign().double())


def firing(times: int) -> tuple[str, Draw, float]:
    """64 rectified units that fire so many times in 4000 samples."""
    problem, mean = RectifiedGaussian(64), NormalDist().inv_cdf(times / 4000)
    truth = float(problem.linear_fisher(mean))
    draw = lambda g: ff.Pathwise(*problem.sample_with_tangent(mean, 4000, g))  # noqa: E731
    return f"64 units, {times} firings of 4000", draw, truth


CASES: tuple[tuple[str, Draw, float], ...] = (
    ("200 Gaussian numbers, 500 samples", lambda g: moved(normal(g, 500, 200)), 1.0),
    (
        "common brightness, 1000 samples",
        lambda g: moved(brightness(g, 1000) * normal(g, 1000, 200)),
        math.exp(-0.5),
    ),
    firing(64),
    firing(20),
    firing(5),
    ("common brightness, score", bright_score, 0.0),
    ("half of a Gaussian score", half_seen, 5.0),
    ("Laplace score", laplace_score, 0.5),
)


def output(data: ff.Pathwise | ff.Score) -> float:
    """J of the raw activations."""
    flow = ff.fisher_flow(torch.nn.Hardtanh(-1e9, 1e9), data, layers=["output"], max_features=1)
    return float(flow["output"].linear)


def by_halves(data: ff.Score) -> float:
    """(W_A^T D_B + W_B^T D_A) / 2 of two halves of the samples."""
    batch = next(data.read(0, 10**6))
    parts = [(batch.x[h::2].double(), batch.score[h::2]) for h in range(2)]
    moments = []
    for x, s in parts:
        x, s = x - x.mean(0), s - s.mean(0)
        moments.append((x.T @ x / (len(x) - 1), x.T @ s / (len(x) - 1)))
    (S_a, D_a), (S_b, D_b) = moments
    products = torch.linalg.solve(S_a, D_a).T @ D_b + torch.linalg.solve(S_b, D_b).T @ D_a
    return float(products) / 2


def shown(values: list[float]) -> str:
    """Mean and spread."""
    numbers = torch.tensor(values)
    return f"{numbers.mean():.3f} +- {numbers.std():.3f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    repeats = parser.parse_args().repeats
    print("| case | truth | Gaussian | leverages | halves |")
    print("|---|---|---|---|---|")
    for name, draw, truth in CASES:
        sets = [draw(torch.Generator().manual_seed(seed)) for seed in range(repeats)]
        after = [output(data) for data in sets]
        with mock.patch.object(HeldSamples, "samples", return_value=None):
            before = [output(data) for data in sets]
        halves = [by_halves(data) for data in sets if isinstance(data, ff.Score)]
        last = shown(halves) if halves else ""
        print(f"| {name} | {truth:.3g} | {shown(before)} | {shown(after)} | {last} |", flush=True)


if __name__ == "__main__":
    main()
