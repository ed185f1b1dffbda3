"""The three tasks of figures 4, 5 and 6: what is learned from which samples.

A reduced run has fewer samples and a larger learning rate than the publication. Its conditions
share their noise, which makes the error bars far smaller; the published size has independent ones.

Reference: Weimar et al., Phys. Rev. X 15, 031072 (2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from figure import Options
from torch import nn

from fisherfast.demo import Task, imaging_task
from fisherfast.demo.training import VALIDATION_SHARE
from fisherfast.problems import (
    GaussianShift,
    LogNormal,
    Problem,
    gaussian_network,
    lognormal_network,
)

LAYERS = ("relu1", "relu2", "relu3", "relu4")
LEAST_SAMPLES = 100
"""Per value of theta: enough batches for an epoch to change something."""
LEAST_HELD_OUT = 1000
"""Per condition: enough for the covariance of the 256 numbers of an input and of a lift."""
PUBLISHED_HELD_OUT = 150_000


@dataclass(frozen=True)
class Size:
    """Samples and validation samples per theta, held-out samples per condition, and training."""

    samples: int
    held_out: int
    epochs: int
    learning_rate: float
    paired: bool
    validation: int | None = None  # None: one for `VALIDATION_SHARE` training samples


GAUSSIAN_FULL = Size(20_000, PUBLISHED_HELD_OUT, 15, 1e-6, paired=False)
GAUSSIAN_REDUCED = replace(GAUSSIAN_FULL, samples=6000, held_out=20_000, paired=True)
LOGNORMAL_SIZES = {
    False: Size(10_000, 40_000, 12, 1e-3, paired=True),
    True: Size(20_000, PUBLISHED_HELD_OUT, 8, 1e-4, paired=False),
}
IMAGING_SAMPLES = {False: 10_000, True: 20_000}  # per position, simulated; a file has its own
IMAGING_EPOCHS = {False: 5, True: 15}
IMAGING_RATE = 3e-5  # of Adam: small enough to see states between the first and the last epoch


def gaussian_task(options: Options) -> Task:
    """The mean of 256 numbers, N(theta 1, I_256): J = 256.

    The reduced learning rate is larger by as much as an epoch has fewer samples, so that an epoch
    goes about as far as a published one.
    """
    size = sized(GAUSSIAN_FULL if options.full else GAUSSIAN_REDUCED, options.samples)
    if not options.full:
        rate = GAUSSIAN_FULL.learning_rate * GAUSSIAN_FULL.samples / size.samples
        size = replace(size, learning_rate=rate)
    return simulated_task(
        "gaussian",
        GaussianShift(torch.ones(256)),
        gaussian_network(seed=options.seed),
        size,
        options.seed,
        values=torch.linspace(-1, 1, 31),
        dtheta=0.06,
        layers=LAYERS,
        max_features=256,
    )


def lognormal_task(options: Options) -> Task:
    """Ten numbers exp(B z), z ~ N(theta 1, I_10): J = 10, part of it not linear."""
    return simulated_task(
        "lognormal",
        LogNormal.random(seed=options.seed),
        lognormal_network(seed=options.seed),
        sized(LOGNORMAL_SIZES[options.full], options.samples),
        options.seed,
        values=torch.linspace(-7, 7, 21),
        dtheta=0.15,
        layers=LAYERS,
        max_features=512,
    )


def flow_imaging_task(options: Options) -> Task:
    """The imaging task of the demo with a smaller learning rate."""
    samples = options.samples
    if samples is None and options.data is None:
        samples = IMAGING_SAMPLES[options.full]
    task = imaging_task(samples=samples, seed=options.seed, data=options.data)
    return replace(task, learning_rate=IMAGING_RATE, epochs=IMAGING_EPOCHS[options.full])


def sized(size: Size, samples: int | None) -> Size:
    """The size with another number of samples, the held-out ones in proportion.

    Raises:
        ValueError: too few samples.
    """
    if samples is None:
        return size
    if samples < LEAST_SAMPLES:
        raise ValueError(f"--samples must be at least {LEAST_SAMPLES} per theta, got {samples}")
    held_out = max(LEAST_HELD_OUT, size.held_out * samples // size.samples)
    return replace(size, samples=samples, held_out=held_out)


def simulated_task(
    name: str,
    problem: Problem,
    model: nn.Module,
    size: Size,
    seed: int,
    *,
    values: torch.Tensor,
    dtheta: float,
    **others: Any,
) -> Task:
    """A task of a simulated problem with training samples at `values`; `others` go to `Task`."""
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for count in (size.samples, size.validation or size.samples // VALIDATION_SHARE):
        x = torch.cat([problem.sample(float(value), count, generator) for value in values])
        draws.append((x, values.repeat_interleave(count)))
    (x, theta), (val_x, val_theta) = draws
    return Task(
        name=name,
        model=model,
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
        **others,
    )
