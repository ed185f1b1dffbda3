"""Inputs of 128 x 128 pixels: with scores their information is Cov(score), and what all pixels have
in common takes nothing from compressed layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fisherfast as ff

SIDE = 128
PIXELS = SIDE * SIDE
INFORMATION = 6.28


def signal() -> torch.Tensor:
    """A ring of 6.28 in information behind unit noise [1, SIDE, SIDE], without a mean."""
    grid = torch.linspace(-1, 1, SIDE)
    radius = (grid[:, None] ** 2 + grid**2).sqrt()
    ring = torch.exp(-((radius - 0.5) ** 2) / 0.02)
    ring -= ring.mean()
    return (ring * math.sqrt(INFORMATION) / ring.norm())[None]


def noise(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, SIDE, SIDE, generator=generator)


def scored(n: int = 600, seed: int = 0) -> tuple[ff.Score, float]:
    """Samples with scores, and the covariance of these scores."""
    x = noise(n, seed)
    score = (x * signal()).flatten(1).double().sum(1)
    return ff.Score(x, score), float(score.var())


def only_matched() -> nn.Module:
    """The first of three features keeps everything and is the only one that the output reads."""
    torch.manual_seed(0)
    features, output = nn.Linear(PIXELS, 3), nn.Linear(3, 1)
    with torch.no_grad():
        features.weight[0] = 0.2 * signal().flatten()
        output.weight.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
    return nn.Sequential(nn.Flatten(), features, output)


@pytest.fixture(scope="module")
def flow() -> ff.FisherFlow:
    return ff.fisher_flow(only_matched(), scored()[0])


def test_the_information_of_an_input_with_scores(flow):
    """It was 0.02 +- 0.04 for 6.28, "converged". V = Cov(score) is known whatever the width, to
    sqrt(2 / n); 4 errors: false alarm 6e-5. Within folds V differs by sqrt(30) / 599 = 0.9 %."""
    data, V = scored()
    for info in (ff.fisher_information(data), flow["input"]):
        assert info.value == pytest.approx(V, rel=0.036)
        assert abs(info.value - INFORMATION) < 4 * float(info.stderr)
        assert float(info.stderr) == pytest.approx(V * math.sqrt(2 / 600), rel=0.3)
        assert float(info.lower) < INFORMATION + 4 * float(info.lower_stderr)
        assert info.status in ("resolved", "noisy")
        for number in (info.lower, info.linear, info.stderr, info.lower_stderr, info.naive):
            assert number.isfinite().all()


def test_the_ratio_behind_a_wide_input(flow):
    """It was printed as -545 +- 4164. The matched filter keeps all."""
    for name in ("1", "output"):
        fraction, error = flow.fractions()[name], flow.fraction_errors()[name]
        assert abs(fraction - 1) < 0.03 + 4 * error
        assert error < 0.1
    assert "nan" not in str(flow)


def test_the_published_rule_does_not_stop_at_once():
    """An input with 0.02 of 6.28 has a bound of 50: every error is below it."""
    monitor = ff.FisherMonitor(only_matched(), scored()[0])
    stopping = ff.FisherEarlyStopping(rule="crlb")
    record = monitor.step(epoch=0, train_mse=2.0 / INFORMATION)
    assert not stopping.step(monitor)
    assert record.train_level == pytest.approx(2, rel=0.25)
    assert abs(record.transmission - 1) < 0.03 + 4 * record.transmission_error
    monitor.step(epoch=1, train_mse=0.5 / INFORMATION)
    assert stopping.step(monitor)


@pytest.mark.slow
def test_common_mode_noise_in_compressed_inputs():
    """Noise of all pixels together, a hundred times that of one: orthogonal to the signal, so the
    information is the same. 1000 samples cannot show all of it, with or without common mode; what
    they show is within a fifth of each other beyond 4 errors, and not above the truth."""
    n = 1000
    x, m = noise(n), signal().expand(n, -1, -1, -1)
    common = 100 * torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(9))
    plain, shifted = (ff.fisher_information(ff.Pathwise(one, m)) for one in (x, x + common))
    for info in (plain, shifted):
        assert info.compressed
        assert info.value < INFORMATION + 4 * float(info.stderr)
    error = math.hypot(float(plain.stderr), float(shifted.stderr))
    assert abs(plain.value - shifted.value) < 0.2 * plain.value + 4 * error
    assert error < 0.3 * plain.value
