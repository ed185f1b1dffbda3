"""Which lift reads most, and which rule chooses its size: J / I of the ground truths.

    python benchmarks/accuracy/dictionary.py

Prints, for each choice, the mean over seeds of J at all features and of the honest lower bound,
both over I.
"""

from __future__ import annotations

import warnings

import torch

import fisherfast as ff
from fisherfast.estimation import features
from fisherfast.estimation.choice import Choice
from fisherfast.estimation.curve import FisherCurve
from fisherfast.measurement import fit, layer
from fisherfast.problems import GaussianScale, Laplace, LogNormal

PROBLEMS = {
    "log-normal": (LogNormal.random(dim=10, variance=0.01), 0.0, 0.2, 10.0),
    "scale": (GaussianScale(20), 1.0, 0.1, 40.0),
    "laplace": (Laplace(4, 1.0), 0.0, 0.1, 4.0),
}
CHOICES = [(0.7, 0.7), (0.7, 1.0), (0.0, 0.7), (0.0, 1.0), (-1.0, 0.7), (-1.0, 1.0), (-1.0, 1.4)]
SEEDS = range(5)
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


def one_error_of_J(curve: FisherCurve, first: int) -> Choice:
    """The other rule: the smallest k whose J lies within one standard error of all later J."""
    J, error = curve.J[first - 1 :, 0, 0], curve.stderr[first - 1 :, 0, 0]
    floor = (J - error).flip(0).cummax(0).values.flip(0)
    chosen = first + int((floor <= J).nonzero()[0])
    return Choice(chosen, True, torch.zeros_like(curve.replicates[0]), True)


def compare_rules() -> None:
    """J / I at the chosen size by both rules, means over seeds, with the dictionary as it is."""
    rules = {"two errors of the gain": fit.choose_features, "one error of J": one_error_of_J}
    for rule, choose in rules.items():
        fit.choose_features = choose
        means = []
        for problem, theta, dtheta, truth in PROBLEMS.values():
            values = [
                ff.fisher_information(
                    problem.finite_difference(theta, dtheta, SAMPLES, seed=seed),
                    max_features=FEATURES,
                    seed=seed,
                ).value
                for seed in SEEDS
            ]
            means.append(sum(values) / len(values) / truth)
        print(f"{rule:24s}" + "  ".join(f"{mean:.3f}" for mean in means), flush=True)


def main() -> None:
    """Compare the rules, then measure all choices of the dictionary."""
    warnings.simplefilter("ignore", ff.FisherWarning)
    print("chosen by               " + "  ".join(PROBLEMS))
    compare_rules()
    layer.FeatureDictionary = SlopedDictionary  # type: ignore[misc]
    print("slope  bias  " + "  ".join(f"{name + ' J / lower':>20}" for name in PROBLEMS))
    for slope, bias_scale in CHOICES:
        results = measure(slope, bias_scale)
        cells = "  ".join(f"{J:10.3f} / {lower:7.3f}" for J, lower in results.values())
        print(f"{slope:5.1f}  {bias_scale:4.1f}  {cells}", flush=True)


if __name__ == "__main__":
    main()
