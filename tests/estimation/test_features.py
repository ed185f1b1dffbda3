"""The dictionary: nested, reproducible, with biases, blind to activations that never vary."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from fisherfast.estimation.features import (
    MAX_WIDTH,
    MIN_LIFT_SHARE,
    FeatureDictionary,
    draw_lift,
    mean_of_leaky_relu,
)
from fisherfast.estimation.pilot import PilotMoments
from fisherfast.estimation.ridge import AUTO, raw_ridge


def dictionary_of(x: torch.Tensor, size: int, **options) -> FeatureDictionary:
    pilot = PilotMoments()
    pilot.update(x)
    return FeatureDictionary(pilot.standardisation(), size, **options)


def features_of(x: torch.Tensor, size: int, **options) -> torch.Tensor:
    return dictionary_of(x, size, **options)(x)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(500, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7


def test_ill_conditioned_activations_are_summed_in_float64(x):
    """Catches float32 products of a covariance that they do not carry, and float64 ones, at twice
    the cost, of one that they do."""
    assert dictionary_of(x, 80).raw_features(x).dtype == torch.float32
    alike = x.clone()
    alike[:, 1] = alike[:, 0] + 0.01 * alike[:, 1]  # correlation 1 - 5e-5: an inverse of 2e4
    assert dictionary_of(alike, 80).raw_features(alike).dtype == torch.float64
    few = x[:9]  # two samples for each activation tell its condition
    assert dictionary_of(few, 80).raw_features(few).dtype == torch.float64


def test_features_are_nested(x):
    """Catches a lift whose first rows depend on how many are asked for: draws agree to the bit."""
    alive = torch.ones(5, dtype=torch.bool)
    for few, many in zip(draw_lift(alive, 70, 3), draw_lift(alive, 300, 3), strict=True):
        assert torch.equal(few, many[:70])
    small, large = features_of(x, 90), features_of(x, 200)
    # the projection is one GEMM of another size: equal to rounding, 4e-7 measured
    torch.testing.assert_close(small, large[:, :90], rtol=0, atol=1e-5)


def test_seed_fixes_the_lift_and_nothing_else_does(x):
    """Catches a lift drawn from the global random state, and seeds that are ignored."""
    torch.manual_seed(1)
    first = features_of(x, 100, seed=5)
    state = torch.get_rng_state()
    assert torch.equal(first, features_of(x, 100, seed=5))
    assert torch.equal(state, torch.get_rng_state())
    lifts = [features_of(x, 100, seed=seed)[:, 5:] for seed in range(6)]
    assert not any(torch.equal(a, b) for a, b in combinations(lifts, 2))


def test_raw_features_are_standardised_activations(x):
    """Catches a missing centre or scale."""
    raw = features_of(x, 100)[:, :5]
    torch.testing.assert_close(raw.mean(0), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(raw.std(0, correction=0), torch.ones(5))


def test_half_of_the_rows_read_one_activation_all_in_turn():
    """Catches dense rows only: axis-aligned ones are what log-normal and Laplace need."""
    weight, bias = draw_lift(torch.ones(6, dtype=torch.bool), 128, 0)
    assert ((weight[0::2] != 0).sum(1) == 1).all()
    assert sorted((weight[0::2] != 0).sum(0).tolist()) == [10, 10, 11, 11, 11, 11]
    torch.testing.assert_close(weight[1::2].norm(dim=1), torch.ones(64, dtype=torch.float64))
    assert (bias != 0).all()
    assert 0.5 < float(bias.std()) < 1.5


def test_dead_activations_stay_out_of_the_lift(x):
    """Catches lifted features wasted on constants."""
    x[:, 2] = 4.0
    dictionary = dictionary_of(x, 100)
    weight, _ = draw_lift(torch.tensor([True, True, False, True, True]), 95, 0)
    assert (weight[:, 2] == 0).all()
    features = dictionary(x)
    assert (features[:, 2] == 0).all()


def test_rounding_noise_is_no_variation():
    """Catches a softmax sum of 1 +- 1e-7 blown up to a feature of unit variance."""
    x = torch.ones(400, 1) + 6e-8 * torch.randn(400, 1).sign()
    assert not dictionary_of(x, 10).size > 1


def test_the_ridge_is_the_rounding_of_the_activations(x):
    """Which is relative to their size: 1 + mean^2 / variance times that of centred ones."""
    centred = x - x.mean(0)
    ridges = [
        dictionary_of(part, 5).ridge(AUTO, torch.ones(5, dtype=torch.float64))
        - raw_ridge(torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
        for part in (centred, centred + 100)
    ]
    expected = 1 + 1e4 / x.double().var(0)
    torch.testing.assert_close(ridges[1] / ridges[0], expected, rtol=0.01, atol=0)


def test_wide_layers_get_a_lift_to_judge_a_plateau_by():
    """Catches k = d, where `converged` would have nothing to look at."""
    x = torch.randn(50, 80)
    assert dictionary_of(x, 64).size == 80 + 64 // MIN_LIFT_SHARE


def test_very_wide_layers_are_sketched():
    """Catches a [d, d] matrix for a convolution layer; the sketch is linear in the activations."""
    x = torch.randn(40, MAX_WIDTH + 1)
    dictionary = dictionary_of(x, 32, groups=32)
    assert (dictionary.kind, dictionary.raw, dictionary.size) == ("sketch", 32, 32)
    one, two = x[:20], x[20:]
    mean = dictionary((one + two) / 2)
    both = (dictionary(one) + dictionary(two)) / 2
    torch.testing.assert_close(mean, both, rtol=0, atol=1e-4)
    sketches = [features_of(x, 32, groups=32, seed=seed) for seed in range(6)]
    assert not any(torch.equal(a, b) for a, b in combinations(sketches, 2))


@pytest.mark.parametrize("slope", [0.7, 0.0, -1.0])
def test_pilot_of_the_lift_is_the_gaussian_mean(slope):
    """Catches a wrong closed form: 4 standard errors of 10^6 draws are 0.004."""
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bias in (-1.3, 0.0, 0.8):
        expected = torch.nn.functional.leaky_relu(z + bias, slope).mean()
        got = mean_of_leaky_relu(torch.tensor([bias], dtype=torch.float64), slope)
        assert abs(float(got - expected)) < 0.004


def test_raw_features_and_lift_are_the_features(x):
    """Catches a lift of activations that are not standardised, and a leading part that is not."""
    dictionary = dictionary_of(x, 80)
    raw, features = dictionary.raw_features(x), dictionary(x)
    assert torch.equal(features[:, :5], raw)
    assert torch.equal(features[:, 5:], dictionary.lift(raw))
    assert len(dictionary.lift.leading(7)) == 7
    few = dictionary.lift.leading(7)(raw)
    torch.testing.assert_close(few, features[:, 5:12], rtol=0, atol=1e-5)


def test_pilot_moments_merge_batches(x):
    """Catches a mean of batch means where batches differ in size."""
    pieces, whole = PilotMoments(), PilotMoments()
    for part in x.split([3, 400, 97]):
        pieces.update(part)
    whole.update(x)
    torch.testing.assert_close(pieces.standardisation().mean, whole.standardisation().mean)
    torch.testing.assert_close(pieces.standardisation().scale, whole.standardisation().scale)
