"""The two simulated tasks of the publication, in which the information in the input is known.

Reference: Weimar et al., Phys. Rev. X 15, 031072 (2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fisherfast.demos.task import VALIDATION_SHARE, Task
from fisherfast.problems import (
    GaussianShift,
    LogNormal,
    Problem,
    gaussian_network,
    lognormal_network,
)
from fisherfast.problems.published import GAUSSIAN_FLOW, LOGNORMAL_FLOW

__all__ = [
    "GAUSSIAN_SIZES",
    "LEAST_SAMPLES",
    "PUBLISHED_HELD_OUT",
    "Size",
    "gaussian_task",
    "lognormal_task",
    "simulated_task",
    "sized",
]

LAYERS = ("relu1", "relu2", "relu3", "relu4")
LEAST_SAMPLES = 100
"""Per value of theta: enough batches for an epoch to change something."""
LEAST_HELD_OUT = 1000
"""Per condition: the covariance of the 256 numbers of an input, and a lift beside them."""
PUBLISHED_HELD_OUT = 150_000

MEASURED = (
    "Before training and after each epoch, the Fisher information about theta is measured in the"
    " input, in every hidden layer after its ReLU, and in the output, on samples that are not used"
    " for training: {pairing}."
)
PAIRED = "both conditions are drawn with the same noise, which makes the error bars far smaller"
INDEPENDENT = "both conditions have independent noise, as published"
SCALED = (
    "This run is scaled down: fewer samples and a larger learning rate. It goes through the"
    " published states at other epochs, so compare rows in which the output transmits the same"
    " share, not rows of the same epoch. --full runs the published size."
)
FULL = "This run has the published number of samples and the published learning rate."


@dataclass(frozen=True)
class Size:
    """How large a run is: samples and validation samples per theta, held-out ones per condition."""

    samples: int
    held_out: int
    epochs: int
    learning_rate: float
    paired: bool
    validation: int | None = None  # one for `VALIDATION_SHARE` training samples


GAUSSIAN_SIZES = {
    False: Size(6000, 20_000, 10, 1e-5, paired=True),
    True: Size(20_000, PUBLISHED_HELD_OUT, 15, 1e-6, paired=False),
}
LOGNORMAL_SIZES = {
    False: Size(10_000, 40_000, 10, 1e-4, paired=True),
    True: Size(20_000, PUBLISHED_HELD_OUT, 8, 1e-4, paired=False),
}


def gaussian_task(*, samples: int | None = None, seed: int = 0, full: bool = False) -> Task:
    """x ~ N(theta 1, I_256): every one of the 256 numbers knows a little about theta, J = 256.

    Args:
        samples: training samples per value of theta.
        seed: of samples, weights and order.
        full: the published size.

    Raises:
        ValueError: too few samples.
    """
    size = sized(GAUSSIAN_SIZES[full], samples)
    problem = GaussianShift(torch.ones(256))
    story = (
        "A sample is 256 numbers, each theta plus independent noise of standard deviation 1. The"
        " Fisher information in it is exactly 256, and the mean of the numbers holds all of it. A"
        " network 256-150-100-50-25-1 with ReLU learns to read theta from samples at 31 values from"
        " -1 to 1.",
        MEASURED.format(pairing=PAIRED if size.paired else INDEPENDENT),
        FULL if full else SCALED,
    )
    return simulated_task(
        problem,
        size,
        seed,
        values=torch.linspace(-1, 1, 31),
        dtheta=0.06,
        layers=LAYERS,
        name="gaussian",
        title="A mean hidden in Gaussian noise",
        story=story,
        model=gaussian_network(seed=seed),
        published=GAUSSIAN_FLOW,
        max_features=256,
    )


def lognormal_task(*, samples: int | None = None, seed: int = 0, full: bool = False) -> Task:
    """x = exp(B z), z ~ N(theta 1, I_10): ten numbers of very unequal size, J = 10.

    Args:
        samples: training samples per value of theta.
        seed: of samples, the matrix B, weights and order.
        full: the published size.

    Raises:
        ValueError: too few samples.
    """
    size = sized(LOGNORMAL_SIZES[full], samples)
    story = (
        "A sample is 10 numbers exp(B z), where z is theta plus independent noise of standard"
        " deviation 1 and B a random matrix. The Fisher information is exactly 10, but not all of"
        " it is linear: part of it sits in the shape of the distribution. A network"
        " 10-150-100-50-25-1 with ReLU learns to read theta from samples at 21 values from -7"
        " to 7.",
        MEASURED.format(pairing=PAIRED if size.paired else INDEPENDENT),
        FULL if full else SCALED,
    )
    return simulated_task(
        LogNormal.random(seed=seed),
        size,
        seed,
        values=torch.linspace(-7, 7, 21),
        dtheta=0.15,
        layers=LAYERS,
        name="lognormal",
        title="Information in the shape of a distribution",
        story=story,
        model=lognormal_network(seed=seed),
        published=LOGNORMAL_FLOW,
        max_features=512,
    )


def sized(size: Size, samples: int | None) -> Size:
    """The size with another number of samples, the held-out ones in proportion."""
    if samples is None:
        return size
    if samples < LEAST_SAMPLES:
        raise ValueError(f"--samples must be at least {LEAST_SAMPLES} per theta, got {samples}")
    held_out = max(LEAST_HELD_OUT, size.held_out * samples // size.samples)
    return replace(size, samples=samples, held_out=held_out)


def simulated_task(
    problem: Problem,
    size: Size,
    seed: int,
    *,
    values: torch.Tensor,
    dtheta: float,
    **words: Any,
) -> Task:
    """A task of a simulated problem with training samples at `values`; `words` go to `Task`."""
    generator = torch.Generator().manual_seed(seed)
    draws = []
    validation = size.validation or size.samples // VALIDATION_SHARE
    for count in (size.samples, validation):
        x = torch.cat([problem.sample(float(value), count, generator) for value in values])
        draws.append((x, values.repeat_interleave(count)))
    (x, theta), (val_x, val_theta) = draws
    return Task(
        x=x,
        theta=theta,
        val_x=val_x,
        val_theta=val_theta,
        data=problem.finite_difference(0.0, dtheta, size.held_out, seed=seed, paired=size.paired),
        unit="1/theta²",
        learning_rate=size.learning_rate,
        epochs=size.epochs,
        settings={
            "source": "simulated",
            "FI of one sample": float(problem.fisher(0.0)),
            "dtheta": dtheta,
            "training samples per theta": size.samples,
            "held-out samples per condition": size.held_out,
            "paired conditions": size.paired,
            "seed": seed,
        },
        **words,
    )
