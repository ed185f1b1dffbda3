"""The published algorithm for the Fisher information against the number of features, in NumPy.

    python benchmarks/speed/published_loop.py [--samples 150000]

Written from the description in Weimar et al., Phys. Rev. X 15, 031072 (2025), as a physicist would
write it down: for every number of features k a new random lift and a new covariance, which is
inverted through its singular values. `curve` compares it with one call of ours.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2]))


LIFT_SLOPE = 0.7
LIFT_NOISE = 0.01  # standard deviation; keeps the covariance invertible
CUT_OFF = 1e-9  # singular values below this times the largest count as zero
WIDTHS = tuple(range(50, 501, 50))


def lift(x: np.ndarray, weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """leaky_relu(x W) + noise: [T, d] -> [T, k]."""
    projected = x @ weight
    features = np.where(projected > 0, projected, LIFT_SLOPE * projected)
    return features + LIFT_NOISE * rng.normal(size=features.shape)


def linear_fisher(minus: np.ndarray, plus: np.ndarray, dtheta: float) -> float:
    """D^T S^+ D of features [T, k] at theta -+ dtheta / 2, without any correction."""
    covariance = (np.cov(minus, rowvar=False) + np.cov(plus, rowvar=False)) / 2
    derivative = (plus.mean(0) - minus.mean(0)) / dtheta
    inverse = np.linalg.pinv(covariance, rcond=CUT_OFF)
    return float(derivative @ inverse @ derivative)


def corrected(J: float, k: int, samples: tuple[int, int], dtheta: float) -> float:
    """J without finite-sample bias: J (nu - k - 1) / nu - c k (Kanitscheider et al. 2015).

    c = (1 / T_minus + 1 / T_plus) / dtheta^2, nu = T_minus + T_plus - 2.
    """
    nu = sum(samples) - 2
    return J * (nu - k - 1) / nu - derivative_noise(samples, dtheta) * k


def standard_error(J: float, k: int, samples: tuple[int, int], dtheta: float) -> float:
    """Of the corrected J, for Gaussian features.

    Variance 2 / (nu - k - 3) [J^2 + 2 c J (nu - 1) + c^2 k (nu - 1)], docs/theory.md.
    """
    nu, c = sum(samples) - 2, derivative_noise(samples, dtheta)
    spread = J**2 + 2 * c * J * (nu - 1) + c**2 * k * (nu - 1)
    return float(np.sqrt(2 * spread / (nu - k - 3)))


def derivative_noise(samples: tuple[int, int], dtheta: float) -> float:
    """c, the variance of a derivative of a unit-variance feature's mean."""
    return (1 / samples[0] + 1 / samples[1]) / dtheta**2


def published_curve(
    minus: np.ndarray,
    plus: np.ndarray,
    dtheta: float,
    widths: Sequence[int] = WIDTHS,
    seed: int = 0,
) -> dict[int, float]:
    """Corrected J for every number of features, in 1/theta^2.

    Args:
        minus, plus: samples [T, d] at theta -+ dtheta / 2, float64.
        dtheta: full separation of the two.
        widths: numbers of features k.
        seed: of lifts and noise.
    """
    rng = np.random.default_rng(seed)
    samples = (len(minus), len(plus))
    curve = {}
    for k in widths:
        weight = rng.normal(size=(minus.shape[1], k))
        J = linear_fisher(lift(minus, weight, rng), lift(plus, weight, rng), dtheta)
        curve[k] = corrected(J, k, samples, dtheta)
    return curve


def main() -> None:
    """Run the loop once on a problem of `curve`."""
    from benchmarks.speed.curve import DTHETA, PROBLEMS, draw

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=150_000, help="per condition")
    parser.add_argument("--problem", choices=list(PROBLEMS), default="log-normal")
    options = parser.parse_args()
    problem = draw(options.problem, options.samples)
    start = time.perf_counter()
    curve = published_curve(*problem.arrays, DTHETA)
    print(f"{time.perf_counter() - start:.1f} s for {len(curve)} numbers of features")
    samples = (options.samples, options.samples)
    for k, J in curve.items():
        print(f"k {k:4d}  J {J:.4f} +- {standard_error(J, k, samples, DTHETA):.4f}")
    print(f"truth {problem.truth:g}")


if __name__ == "__main__":
    main()
