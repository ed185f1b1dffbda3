"""What the numbers assume, and what a measurement gives where an assumption does not hold.

    python benchmarks/accuracy/assumptions.py [--repeats 40] [--case NAME ...]

For each case the true information I, the mean of J and of the honest bound over fresh samples, the
share of intervals J +- t(15) stderr that hold the truth, of bounds above it by more than 3 errors,
how often neighbouring samples are found to depend on each other, and how often the status is
"resolved". The table is that of docs/assumptions.md.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fisherfast as ff
from fisherfast.problems import Laplace, RectifiedGaussian

STUDENT = 2.131  # 95 %, 15 degrees of freedom
REPEATS = 40
CLEAR = 3.0
RAW_ONLY = 1
MANY = 512


@dataclass(frozen=True)
class Case:
    """Samples drawn by a generator, and the information in them: the linear one where only the
    activations themselves are features."""

    name: str
    draw: Callable[[torch.Generator], ff.Pathwise | ff.Score | ff.FiniteDifference]
    truth: float
    max_features: int = MANY


def moved(x: Tensor, groups: Tensor | None = None) -> ff.Pathwise:
    """Samples [n, d] whose mean moves along (1, .., 1) / sqrt(d)."""
    n, d = x.shape
    return ff.Pathwise(x, torch.full((n, d), d**-0.5), groups=groups)


def normal(generator: torch.Generator, n: int = 4000, d: int = 1) -> Tensor:
    """Standard normal numbers [n, d]."""
    return torch.randn(n, d, generator=generator)


def laplace(generator: torch.Generator) -> Tensor:
    """Laplace numbers [n, 1] of scale 1: I = 1, half of it linear."""
    return Laplace(1).sample(0.0, 4000, generator)


def student(generator: torch.Generator) -> Tensor:
    """Student's t numbers [n, 1] with three degrees of freedom; their variance is 3."""
    return normal(generator) / (normal(generator, d=3).square().mean(1, keepdim=True)).sqrt()


def sorted_scores(generator: torch.Generator) -> ff.Score:
    """The score is the sum of ten numbers, of which five are seen, so J is half of V = 1. The file
    is sorted by the score."""
    x = normal(generator, d=10)
    score = (x.sum(1) / math.sqrt(10)).double()
    order = score.argsort()
    return ff.Score(x[order, :5], score[order])


def common_brightness(generator: torch.Generator) -> ff.Score:
    """x = R u and s = R v, with one brightness R for each sample, log R ~ N(0, 1/4): x says nothing
    about s, so J = 0."""
    size = torch.exp(normal(generator, 2000) / 2)
    score = (size * normal(generator, 2000)).double()
    return ff.Score(size * normal(generator, 2000, 200), score)


def rare_units(generator: torch.Generator) -> ff.Pathwise:
    """64 rectified units, each of which fires in about five of 4000 samples."""
    return ff.Pathwise(*RARE_UNITS.sample_with_tangent(RARE, 4000, generator))


def two_humps(generator: torch.Generator) -> Tensor:
    """Numbers [n, 1] about -1 and 1 with a spread of 0.5: their variance is 1.25."""
    return normal(generator).sign() + normal(generator) / 2


def bright_shift(generator: torch.Generator) -> ff.Pathwise:
    """Tangents of 200 numbers with a common brightness R, log R ~ N(0, 1/4): E[R^2] = exp(1/2)."""
    size = torch.exp(normal(generator, 1000) / 2)
    return moved(size * normal(generator, 1000, 200))


def series(generator: torch.Generator, groups: Tensor | None = None) -> ff.Score:
    """Six independent autoregressive series with coefficient 0.9. One of them is the score, and the
    others say nothing about it: J = 0."""
    noise = torch.randn(4000, 6, generator=generator, dtype=torch.float64)
    values = [noise[0]]
    for step in noise[1:]:
        values.append(0.9 * values[-1] + math.sqrt(1 - 0.81) * step)
    x = torch.stack(values)
    return ff.Score(x[:, 1:].float(), x[:, 0], groups=groups)


def antithetic(generator: torch.Generator, groups: Tensor | None = None) -> ff.Pathwise:
    """Samples of eight numbers in pairs e, -e that follow each other."""
    noise = normal(generator, 2000, 8)
    return moved(torch.stack([noise, -noise], 1).flatten(0, 1), groups)


def twice(generator: torch.Generator, groups: Tensor | None = None) -> ff.Pathwise:
    """2000 samples of eight numbers, each stored two times."""
    return moved(normal(generator, 2000, 8).repeat_interleave(2, 0), groups)


RARE_UNITS = RectifiedGaussian(64)
PAIRS, HUNDREDS = torch.arange(4000) // 2, torch.arange(4000) // 100
RARE = -3.0  # mean of the units before they are rectified, in standard deviations
CASES = (
    Case("Gaussian", lambda g: moved(normal(g)), 1.0),
    Case("steps of 0.1 sigma", lambda g: moved((normal(g) * 10).round() / 10), 1.0),
    Case("Laplace", lambda g: moved(laplace(g)), 1.0),
    Case("Laplace, linear", lambda g: moved(laplace(g)), 0.5, RAW_ONLY),
    Case("Student t(3), linear", lambda g: moved(student(g)), 1 / 3, RAW_ONLY),
    Case(
        "uniform, linear",
        lambda g: moved(torch.rand(4000, 1, generator=g) * math.sqrt(12)),
        1.0,
        RAW_ONLY,
    ),
    Case("two humps, linear", lambda g: moved(two_humps(g)), 0.8, RAW_ONLY),
    Case("Laplace, sorted", lambda g: moved(laplace(g).sort(0).values), 1.0),
    Case("sorted by the score", sorted_scores, 0.5),
    Case("common brightness", common_brightness, 0.0, RAW_ONLY),
    Case("common brightness, tangents", bright_shift, math.exp(-0.5), RAW_ONLY),
    Case(
        "units that fire rarely",
        rare_units,
        float(RARE_UNITS.linear_fisher(RARE)),
        RAW_ONLY,
    ),
    Case("antithetic pairs", antithetic, 1.0),
    Case("antithetic pairs, groups", lambda g: antithetic(g, PAIRS), 1.0),
    Case("every sample twice", twice, 1.0),
    Case("every sample twice, groups", lambda g: twice(g, PAIRS), 1.0),
    Case("time series", series, 0.0),
    Case("time series, groups of 100", lambda g: series(g, HUNDREDS), 0.0),
)


def measured(case: Case, repeats: int) -> str:
    """A row of the table."""
    J, lower, held, above, dependent, resolved = [], [], 0, 0, 0, 0
    for seed in range(repeats):
        data = case.draw(torch.Generator().manual_seed(seed))
        # Read at the output: the row "input" of a score source is V itself.
        flow = ff.fisher_flow(
            torch.nn.Hardtanh(-1e9, 1e9), data, max_features=case.max_features, seed=seed
        )
        layer = flow["output"]
        J.append(layer.value)
        lower.append(float(layer.lower))
        held += abs(layer.value - case.truth) < STUDENT * float(layer.stderr)
        above += float(layer.lower) > case.truth + CLEAR * float(layer.lower_stderr)
        dependent += not layer.independent
        resolved += layer.status == "resolved"
    values, bounds = torch.tensor(J), torch.tensor(lower)
    return (
        f"| {case.name} | {case.truth:.3g} | {values.mean():.3g} +- {values.std():.2g} |"
        f" {bounds.mean():.3g} | {held / repeats:.0%} | {above / repeats:.0%} |"
        f" {dependent / repeats:.0%} | {resolved / repeats:.0%} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--case", nargs="*", choices=[case.name for case in CASES])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| case | I | J | lower | coverage | lower above I | dependent | resolved |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        if not options.case or case.name in options.case:
            print(measured(case, options.repeats), flush=True)


if __name__ == "__main__":
    main()
