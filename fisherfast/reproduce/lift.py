"""Figure 3: the linear Fisher information of N(0, theta^2 1) against the number of features.

All information sits in the spread, so without a lift J = 0, and it rises to I = 100 with more
features. Measured with the dictionary of this library and, on the same samples, with the published
lift beside them: leaky_relu(W x) + noise, W of normal numbers, without biases.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast._errors import FisherWarning
from fisherfast.data import FiniteDifference
from fisherfast.demos.runner import DONE, INTERRUPTED
from fisherfast.flow import fisher_information
from fisherfast.problems import GaussianScale
from fisherfast.problems.published import (
    LIFT_CURVE,
    LIFT_DIM,
    LIFT_FISHER,
    LIFT_NOISE,
    LIFT_SLOPE,
    LIFT_STEP,
    LIFT_THETA,
)
from fisherfast.reproduce.drawing import draw_lift
from fisherfast.reproduce.figure import Context, Outcome
from fisherfast.results.layer import LayerFisher

__all__ = ["LEAST_SAMPLES", "LiftPoint", "measure_lift"]

SAMPLES = {False: 40_000, True: 150_000}  # per condition; 150 000 as published elsewhere
LEAST_SAMPLES = 1000
"""Per condition: twice as many carry the covariance of 1350 features."""
RAW = 1  # max_features of a measurement of given features without a lift of ours


@dataclass(frozen=True)
class LiftPoint:
    """J at one number of lifted features, in 1/theta^2.

    Attributes:
        lifted: their number.
        ours: with the dictionary of this library, beside the samples themselves.
        theirs: with the published lift beside the samples.
        published: J as published.
    """

    lifted: int
    ours: LayerFisher
    theirs: LayerFisher
    published: float

    def numbers(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "lifted": self.lifted,
            "J": self.ours.value,
            "J_error": float(self.ours.stderr),
            "J_lower": float(self.ours.lower),
            "J_published_lift": self.theirs.value,
            "J_published_lift_error": float(self.theirs.stderr),
            "published": self.published,
        }


def measure_lift(context: Context) -> Outcome:
    """Every published number of features; after Ctrl-C those that are finished."""
    options = context.options
    samples = options.samples or SAMPLES[options.full]
    points: list[LiftPoint] = []
    status = DONE
    context.stream.write(f"N(0, theta^2) in {LIFT_DIM} dimensions, {samples} samples each\n")
    context.stream.write(f"{'lifted':>7}  {'J +- error':>16}  {'published lift':>16}  published\n")
    try:
        for point in _points(samples, options.seed):
            points.append(point)
            context.stream.write(_row(point))
            context.stream.flush()
    except KeyboardInterrupt:
        if not points:
            raise
        context.stream.write("\ninterrupted\n")
        status = INTERRUPTED
    numbers = {
        "settings": {
            "problem": f"N(0, theta^2 1), d = {LIFT_DIM}, theta = {LIFT_THETA:g}",
            "FI of one sample": LIFT_FISHER,
            "dtheta": LIFT_STEP,
            "samples per condition": samples,
            "paired conditions": False,
            "seed": options.seed,
        },
        "unit": "1/theta²",
        "points": [point.numbers() for point in points],
    }
    return Outcome(status, numbers, lambda: draw_lift(points))


def _points(samples: int, seed: int) -> Iterator[LiftPoint]:
    """Measure, one number of features at a time: features are nested, so each is exact."""
    problem = GaussianScale(LIFT_DIM)
    (minus,), (plus,) = problem.conditions(LIFT_THETA, LIFT_STEP, samples, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    widest = max(LIFT_CURVE)
    weight = torch.randn(LIFT_DIM, widest, generator=generator)
    pair = (minus, plus)
    lifted = [_published_lift(x, weight, generator) for x in pair]
    with warnings.catch_warnings():
        # the published step, dtheta sqrt(I) / 2 = 0.5: it leaves the variance of x almost linear
        warnings.simplefilter("ignore", FisherWarning)
        for count, published in LIFT_CURVE.items():
            raw = FiniteDifference(minus, plus, LIFT_STEP)
            plain = fisher_information(raw, max_features=RAW)
            if count == 0:
                yield LiftPoint(count, plain, plain, published)
                continue
            ours = fisher_information(raw, max_features=LIFT_DIM + count, seed=seed)
            below, above = (
                torch.cat([x, f[:, :count]], 1) for x, f in zip(pair, lifted, strict=True)
            )
            data = FiniteDifference(below, above, LIFT_STEP)
            # their noise stands in for a ridge
            theirs = fisher_information(data, max_features=RAW, ridge=0.0)
            yield LiftPoint(count, ours, theirs, published)


def _published_lift(x: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """leaky_relu(x W) + noise: [n, d] -> [n, k]."""
    features = nn.functional.leaky_relu(x @ weight, LIFT_SLOPE)
    return features.add_(torch.randn(features.shape, generator=generator), alpha=LIFT_NOISE)


def _row(point: LiftPoint) -> str:
    ours, theirs = (
        f"{layer.value:.1f} +- {float(layer.stderr):.1f}" for layer in (point.ours, point.theirs)
    )
    return f"{point.lifted:>7}  {ours:>16}  {theirs:>16}  {point.published:9.1f}\n"
