"""The level of labelled samples: from profiles of chosen numbers, and from Gaussian samples."""

from __future__ import annotations

import math

import pytest
import torch

from fisherfast.results.profile import Profile
from fisherfast.training.labels import bounding_J, choose

F64 = torch.float64


def profile_of(J: torch.Tensor, stderr: float | torch.Tensor) -> Profile:
    """Of one parameter, J [Q]; bins of 100 samples."""
    Q = len(J)
    error = torch.as_tensor(stderr, dtype=F64).expand(Q)
    samples = torch.full((Q,), 100)
    return Profile(torch.zeros(Q, 1), J[:, None, None], error[:, None, None].clone(), samples)


@pytest.mark.parametrize(
    ("truth", "error"),
    [(torch.ones(8, dtype=F64), 1 / 6), (torch.linspace(0.8, 2.0, 8, dtype=F64), 0.12)],
)
def test_the_mean_bound_is_free_of_the_bias_of_noise(truth, error):
    """150 draws: the mean bound within 2 % of the truth, four of its standard errors (false alarm
    6e-5). Catches the mean of 1 / J as it comes (3 % above for equal J) and 1 / mean J (6 % below
    where J varies)."""
    generator = torch.Generator().manual_seed(0)
    wanted, raw, found = float((1 / truth).mean()), 0.0, []
    for _ in range(150):
        J = truth + error * torch.randn(8, generator=generator, dtype=F64)
        raw += float((1 / J).mean()) / 150
        found.append(1 / float(bounding_J(profile_of(J, error))))
    assert sum(found) / 150 == pytest.approx(wanted, rel=0.02)
    assert abs(raw / wanted - 1) > 0.025 or abs(1 / float(truth.mean()) / wanted - 1) > 0.05


def test_two_parameters_in_any_unit():
    """Mean of the inverse matrices, exact without errors. Catches the inverse of the mean, an
    elementwise inverse, and a spread that depends on the unit of a parameter."""
    J = torch.tensor([[[4.0, 1.0], [1.0, 2.0]], [[9.0, -2.0], [-2.0, 1.0]]], dtype=F64)
    for unit in (1.0, 1000.0):
        scale = torch.diag(torch.tensor([1.0, unit], dtype=F64))
        scaled = scale @ J @ scale
        profile = Profile(torch.zeros(2, 2), scaled, 1e-9 * scaled.abs(), torch.tensor([300, 100]))
        inverse = (3 * scaled[0].inverse() + scaled[1].inverse()) / 4
        assert torch.allclose(bounding_J(profile).inverse(), inverse, rtol=1e-6)


def test_unresolved_information_is_not_a_bound():
    """A bin that differs from the others and is within three errors of zero: its 1 / J is unknown.
    Catches a bound of infinity, which would stop at once, and a bin that is left out (0.25). A bin
    that agrees with the others is as good as their mean."""
    J = torch.tensor([4.0, 4.0, 0.02, 4.0], dtype=F64)
    assert math.isnan(float(bounding_J(profile_of(J, 0.02))))
    assert math.isnan(float(bounding_J(profile_of(J / 4, 2.0))))
    assert math.isnan(float(bounding_J(profile_of(J * math.nan, 0.1))))
    alike = torch.tensor([4.0, 5.0, 3.0, 4.0], dtype=F64)
    assert float(bounding_J(profile_of(alike, 1.2))) == pytest.approx(4.0)


def test_the_number_of_bins_trades_bending_for_noise():
    """Catches the finest profile (noise), the coarsest (bending), the largest J (0.5 of luck), and
    a noisy profile that counts because its J is large."""
    coarse, middle, fine, finest = (
        profile_of(J * torch.ones(2**n, dtype=F64), error * 2 ** (n / 2))
        for n, (J, error) in enumerate([(0.6, 0.01), (1.0, 0.02), (1.01, 0.04), (1.6, 0.3)], 1)
    )
    assert choose([coarse, middle, fine, finest]) is middle
    assert choose([coarse]) is coarse
    assert choose([finest]) is finest
