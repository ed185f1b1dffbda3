"""What the compression of wide layers finds, and when it pays: the numbers of docs/theory.md, 15.

    python benchmarks/accuracy/wide_layers.py

First the share of J found on an image of 128 x 128 pixels in correlated noise, by source and number
of samples; then J of compressed and of all activations where the samples just carry a covariance.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import fisherfast as ff
from fisherfast.data import Data, Pathwise
from fisherfast.measurement import compressed_layer as wide
from fisherfast.problems import CorrelatedImage, GaussianShift, Problem

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy.validation_derivatives import IMAGE_THETA, shares_of_image

DIM = 400
RATIOS = (1.05, 1.1, 1.25, 1.5, 2.0)
REPETITIONS = 25


def share_of_image(name: str, source: Callable[[int], Data], seeds: int) -> None:
    """Print D alone, J and its standard error over the closed form, for position and amplitude."""
    cells = shares_of_image(CorrelatedImage(), source, seeds).mean(0)[:3]
    line = "  ".join(f"{a:6.2f} {b:6.2f}" for a, b in cells.tolist())
    print(f"{name:32s}{line}", flush=True)


def random_axes() -> GaussianShift:
    """Noise of 100 : 1 in random directions."""
    g = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(DIM, DIM, generator=g, dtype=torch.float64))[0]
    covariance = axes @ torch.diag(torch.logspace(0, 2, DIM, dtype=torch.float64)) @ axes.T
    return GaussianShift(torch.full((DIM,), 0.5), (covariance + covariance.T) / 2)


def compare(name: str, problem: Problem, theta: float | tuple[float, float]) -> None:
    """Print mean and spread of J, compressed and not, in units of the closed form."""
    truth, always = float(problem.fisher(theta)[-1, -1]), wide.LEAST_DOF
    for ratio in RATIOS:
        samples = int(ratio * DIM) + 16
        values = []
        for seed in range(REPETITIONS):
            g = torch.Generator().manual_seed(seed)
            x, dx = problem.sample_with_tangent(theta, samples, g)
            data = Pathwise(x, dx[:, -1])
            wide.LEAST_DOF = math.inf
            compressed = ff.fisher_information(data, max_features=DIM - 1).value
            wide.LEAST_DOF = always
            values.append([compressed, float(ff.fisher_information(data, max_features=DIM).linear)])
        shares = torch.tensor(values) / truth
        cells = zip(shares.mean(0).tolist(), shares.std(0).tolist(), strict=True)
        line = "   ".join(f"{mean:5.2f} +- {spread:4.2f}" for mean, spread in cells)
        print(f"{name:16s}{ratio:5.2f}   {line}", flush=True)


def main() -> None:
    """Measure both."""
    warnings.simplefilter("ignore", ff.FisherWarning)
    torch.set_num_threads(1)
    image = CorrelatedImage()
    steps = image.fisher(IMAGE_THETA).diagonal().rsqrt().tolist()
    print("image, position and amplitude    D alone        J              standard error")
    for n, seeds in ((500, 5), (2000, 6), (4000, 2)):
        share_of_image(
            f"{n}, tangents", lambda s, n=n: image.pathwise(IMAGE_THETA, n, seed=s), seeds
        )
    share_of_image("2000, scores", lambda s: image.scored(IMAGE_THETA, 2000, seed=s), 2)
    share_of_image(
        "4 x 500, independent",
        lambda s: image.finite_difference(IMAGE_THETA, steps, 500, seed=s),
        2,
    )
    print("problem         nu / d   compressed      all activations")
    compare("random axes", random_axes(), 0.0)
    small = CorrelatedImage((20, 20), spot=2.0, correlation_length=3.0)
    compare("small image", small, IMAGE_THETA)


if __name__ == "__main__":
    main()
