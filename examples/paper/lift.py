"""Figure 3: the linear Fisher information of N(0, theta^2 1) against the number of features.

All information is in the spread, so without a lift J = 0, and it rises to I = 100 with more
features. Measured with the dictionary of this library and, on the same samples, with the published
lift: leaky_relu(W x) + noise, W of normal numbers, without biases.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from figure import HEIGHT, OPEN, PANEL, Options, Outcome
from published import (
    LIFT_CURVE,
    LIFT_DIM,
    LIFT_FISHER,
    LIFT_NOISE,
    LIFT_SLOPE,
    LIFT_STEP,
    LIFT_THETA,
)
from torch import Tensor, nn

import fisherfast as ff
from fisherfast.demo.runner import DONE
from fisherfast.problems import GaussianScale
from fisherfast.results.plots import BLUE, GREY, VERMILION, new_figure, tidy

SAMPLES = {False: 40_000, True: 150_000}  # per condition; 150 000 as published elsewhere
RAW = 1  # max_features of a measurement of given features without a lift of ours


@dataclass(frozen=True)
class LiftPoint:
    """J at one number of lifted features, in 1/theta^2.

    Attributes:
        lifted: their number.
        ours: with the dictionary of this library, the samples themselves included.
        theirs: with the published lift, the samples themselves included.
        published: J as published.
    """

    lifted: int
    ours: ff.LayerFisher
    theirs: ff.LayerFisher
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


def measure_lift(options: Options) -> Outcome:
    """Every published number of features."""
    samples = options.samples or SAMPLES[options.full]
    points: list[LiftPoint] = []
    print(f"N(0, theta^2) in {LIFT_DIM} dimensions, {samples} samples each")
    print(f"{'lifted':>7}  {'J +- error':>16}  {'published lift':>16}  published")
    for point in _points(samples, options.seed):
        points.append(point)
        print(_row(point), flush=True)
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
    return Outcome(DONE, numbers, lambda: _draw(points))


def _points(samples: int, seed: int) -> Iterator[LiftPoint]:
    """Measure, one number of features at a time: features are nested, so each is exact."""
    problem = GaussianScale(LIFT_DIM)
    (minus,), (plus,) = problem.conditions(LIFT_THETA, LIFT_STEP, samples, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(LIFT_DIM, max(LIFT_CURVE), generator=generator)
    pair = (minus, plus)
    lifted = [_published_lift(x, weight, generator) for x in pair]
    with warnings.catch_warnings():
        # the published step, dtheta sqrt(I) / 2 = 0.5: it leaves the variance of x almost linear
        warnings.simplefilter("ignore", ff.FisherWarning)
        for count, published in LIFT_CURVE.items():
            raw = ff.FiniteDifference(minus, plus, LIFT_STEP)
            if count == 0:
                plain = ff.fisher_information(raw, max_features=RAW)
                yield LiftPoint(count, plain, plain, published)
                continue
            ours = ff.fisher_information(raw, max_features=LIFT_DIM + count, seed=seed)
            below, above = (
                torch.cat([x, f[:, :count]], 1) for x, f in zip(pair, lifted, strict=True)
            )
            data = ff.FiniteDifference(below, above, LIFT_STEP)
            # the noise of the published lift replaces a ridge
            theirs = ff.fisher_information(data, max_features=RAW, ridge=0.0)
            yield LiftPoint(count, ours, theirs, published)


def _published_lift(x: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """leaky_relu(x W) + noise: [n, d] -> [n, k]."""
    features = nn.functional.leaky_relu(x @ weight, LIFT_SLOPE)
    return features.add_(torch.randn(features.shape, generator=generator), alpha=LIFT_NOISE)


def _row(point: LiftPoint) -> str:
    ours, theirs = (
        f"{layer.value:.1f} +- {float(layer.stderr):.1f}" for layer in (point.ours, point.theirs)
    )
    return f"{point.lifted:>7}  {ours:>16}  {theirs:>16}  {point.published:9.1f}"


def _draw(points: Sequence[LiftPoint]) -> Any:
    """J against the number of lifted features: both lifts, and the published values."""
    figure = new_figure(PANEL + 1.2, HEIGHT)
    ax = figure.add_subplot()
    ax.axhline(LIFT_FISHER, color=GREY, ls="--", lw=1, label="Fisher information")
    widest = points[-1].ours
    lifted = widest.curve_k - points[0].ours.dim
    J, error = widest.curve_J[:, 0, 0], widest.curve_stderr[:, 0, 0]
    k, low, middle, high = (v[lifted >= 0].tolist() for v in (lifted, J - error, J, J + error))
    ax.fill_between(k, low, high, color=BLUE, alpha=0.2, lw=0)
    ax.plot(k, middle, color=BLUE, lw=1.2)
    counts = [point.lifted for point in points]
    for label, color, marker, layers in (
        ("lift of fisherfast", BLUE, "o", [point.ours for point in points]),
        ("published lift, measured here", VERMILION, "D", [point.theirs for point in points]),
    ):
        ax.errorbar(
            counts,
            [layer.value for layer in layers],
            [float(layer.stderr) for layer in layers],
            label=label,
            color=color,
            marker=marker,
            ms=4.5,
            ls="none",
            capsize=3,
        )
    ax.plot(counts, [point.theirs.value for point in points], color=VERMILION, lw=1.2, ls=":")
    published = [point.published for point in points]
    ax.plot(counts, published, "s", color="black", label="published", **OPEN)
    ax.set_xlabel("lifted features")
    ax.set_ylabel("linear Fisher information J (1/theta²)")
    ax.set_title("x ~ N(0, theta² 1), 50 numbers, theta = 1", fontsize="medium")
    ax.set_ylim(-4, 1.08 * LIFT_FISHER)
    tidy(ax)
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    return figure
