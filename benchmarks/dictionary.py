"""Which lift reads most: J / I of the ground truths for slopes and bias scales of the dictionary.

    python benchmarks/dictionary.py

Prints, for each choice, the mean over seeds of J at all features and of the honest lower bound,
both over I.
"""

from __future__ import annotations

import warnings

import torch

import fisherfast as ff
from fisherfast import features, flow
from fisherfast.problems import GaussianScale, Laplace, LogNormal

PROBLEMS = {
    "log-normal": (LogNormal.random(dim=10, variance=0.01), 0.0, 0.2, 10.0),
    "scale": (GaussianScale(20), 1.0, 0.1, 40.0),
    "laplace": (Laplace(4, 1.0), 0.0, 0.1, 4.0),
}
CHOICES = [(0.7, 0.7), (0.7, 1.0), (0.0, 0.7), (0.0, 1.0), (-1.0, 0.7), (-1.0, 1.0), (-1.0, 1.4)]
SEEDS = range(3)
SAMPLES = 100_000
FEATURES = 400


class SlopedDictionary(features.FeatureDictionary):
    """The dictionary with another slope."""

    slope = features.LIFT_SLOPE

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{**options, "slope": SlopedDictionary.slope})


def measure(slope: float, bias_scale: float) -> dict[str, tuple[float, float]]:
    """J / I at all features and lower / I of each problem, means over seeds."""
    SlopedDictionary.slope = slope
    features.BIAS_SCALE = bias_scale
    results = {}
    for name, (problem, theta, dtheta, truth) in PROBLEMS.items():
        rows = []
        for seed in SEEDS:
            data = problem.finite_difference(theta, dtheta, SAMPLES, seed=seed)
            info = ff.fisher_information(data, max_features=FEATURES, seed=seed)
            rows.append([float(info.curve_J[-1]) / truth, float(info.lower) / truth])
        results[name] = tuple(torch.tensor(rows).mean(0).tolist())
    return results


def main() -> None:
    """Measure all choices."""
    warnings.simplefilter("ignore", ff.FisherWarning)
    flow.FeatureDictionary = SlopedDictionary  # type: ignore[misc]
    print("slope  bias  " + "  ".join(f"{name + ' J / lower':>20}" for name in PROBLEMS))
    for slope, bias_scale in CHOICES:
        results = measure(slope, bias_scale)
        cells = "  ".join(f"{J:10.3f} / {lower:7.3f}" for J, lower in results.values())
        print(f"{slope:5.1f}  {bias_scale:4.1f}  {cells}", flush=True)


if __name__ == "__main__":
    main()
