"""Numbers published in Phys. Rev. X 15, 031072 (2025)."""

from __future__ import annotations

import warnings

import pytest
import torch
from published import GAUSSIAN_FLOW, LIFT_CURVE

import fisherfast as ff
from fisherfast.problems import GaussianScale, GaussianShift, gaussian_network

FIGURE_3 = {lifted: J for lifted, J in LIFT_CURVE.items() if 0 < lifted < 1300}
UNTRAINED = GAUSSIAN_FLOW[0]


@pytest.mark.slow
def test_figure_3_curve_of_the_scale_problem():
    """J against the number of lifted features for N(0, theta^2 1_50), I = 100, T = 20 000.

    Catches a curve that does not rise, one below the published bias-free lift, and one that
    overshoots 100 beyond its error bar (no correction: far above).
    """
    data = GaussianScale(50).finite_difference(1.0, 0.1, 20_000, seed=0)
    with warnings.catch_warnings():
        # dtheta = 0.1 is the published step: 0.5, where the linear information of x^2 is not
        # distorted
        warnings.simplefilter("ignore", ff.FisherWarning)
        info = ff.fisher_information(data, max_features=50 + 1300)
    k = info.curve_k.tolist()
    J = info.curve_J[:, 0, 0]
    error = info.curve_stderr[:, 0, 0]
    for lifted, published in FIGURE_3.items():
        nearest = min(range(len(k)), key=lambda i: abs(k[i] - 50 - lifted))
        assert float(J[nearest]) > published
    assert float(J[-1] + error[-1]) >= 95
    assert float(J[-1] - error[-1]) <= 103
    quarters = J[:: len(k) // 4][:5]
    assert (quarters.diff() > -2 * error[-1]).all()
    assert quarters[1] > quarters[0] + 20


@pytest.mark.slow
def test_untrained_gaussian_network():
    """J / J_input after each hidden ReLU and at the output, mean over 5 initialisations.

    Catches taps before the ReLU (the first layers would keep more) and a flow in the wrong order.
    Tangents of 4000 samples know J to 2 %.
    """
    data = GaussianShift(torch.ones(256)).pathwise(0.0, 4000, seed=0)
    means = torch.zeros(5)
    for seed in range(5):
        flow = ff.fisher_flow(gaussian_network(seed=seed), data, layers="relu", max_features=400)
        assert len(flow) == 6
        means += torch.tensor([layer.value / 256 for layer in flow][1:]) / 5
    assert (means - torch.tensor(UNTRAINED)).abs().max() < 0.08
