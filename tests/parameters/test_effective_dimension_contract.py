"""The effective dimension against its formula, from dense matrices of each draw."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.networks_zoo import seeded
from support.parameters_oracle import brute_force
from support.parameters_small import CATEGORICAL, OUTPUTS, dense_network, inputs
from torch import Tensor, nn

import fisherfast as ff

N = 5000.0


def drawn(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for w in model.parameters():
            w.copy_(torch.randn(w.shape, generator=generator, dtype=w.dtype))


def by_hand(matrices: list[Tensor], n: float, gamma: float) -> float:
    """2 log < sqrt det(1 + kappa F^) > / log kappa."""
    kappa = gamma * n / (2 * math.pi * math.log(n))
    size = len(matrices[0])
    mean_trace = sum(float(f.trace()) for f in matrices) / len(matrices)
    halves = torch.stack(
        [0.5 * torch.logdet(torch.eye(size) + kappa * size / mean_trace * f) for f in matrices]
    )
    return float(2 * (halves.logsumexp(0) - math.log(len(matrices))) / math.log(kappa))


@pytest.mark.parametrize("gamma", [1.0, 0.3])
@pytest.mark.parametrize("samples", [4, 60])
def test_effective_dimension_of_draws(samples: int, gamma: float) -> None:
    """log n of another base, a mean of logarithms, traces of each draw for their mean; with fewer
    rows than parameters, and with more."""
    model, x = dense_network(4), inputs(samples)[:, 0, :4]
    draws = []

    def initialise(model: nn.Module, generator: torch.Generator) -> None:
        drawn(model, generator)
        draws.append(copy.deepcopy(model))

    found = ff.parameters.effective_dimension(
        model, CATEGORICAL, x, n=N, gamma=gamma, draws=3, initialise=initialise
    )
    matrices = [brute_force(each.requires_grad_(), "categorical", x) for each in draws]
    assert len(matrices) == 3
    assert found.value == pytest.approx(by_hand(matrices, N, gamma), rel=1e-9)
    assert (found.n, found.gamma, found.parameters) == (N, gamma, len(matrices[0]))
    assert found.share == pytest.approx(found.value / found.parameters)
    traces = torch.stack([f.trace() for f in matrices])
    torch.testing.assert_close(found.traces, traces)
    assert found.log_determinants.shape == (3,)
    assert 0 < found.value < found.parameters


def test_effective_dimension_of_the_present_weights() -> None:
    """Another place than the centre, n of the ball in place of that of kappa."""
    model, x = dense_network(4), inputs(9)[:, 0, :4]
    found = ff.parameters.local_effective_dimension(model, CATEGORICAL, x, n=N)
    assert found.value == pytest.approx(
        by_hand([brute_force(model, "categorical", x)], N, 1.0), rel=1e-9
    )
    small = ff.parameters.local_effective_dimension(
        model, CATEGORICAL, x, n=N, draws=2, radius=1e-6
    )
    assert small.value == pytest.approx(found.value, rel=1e-4)
    wide = ff.parameters.local_effective_dimension(model, CATEGORICAL, x, n=N, draws=2, radius=9.0)
    assert wide.value != pytest.approx(found.value, rel=1e-3)


def test_effective_dimension_has_no_unit() -> None:
    """The variance of the noise cancels in F^; it grows with n to the rank."""
    model, x = dense_network(4), inputs(5)[:, 0, :4]
    one, other = (
        ff.parameters.local_effective_dimension(model, ff.parameters.Gaussian(v), x, n=N).value
        for v in (1.0, 1e-3)
    )
    assert other == pytest.approx(one, rel=1e-9)
    rank = ff.parameters.spectrum(model, ff.parameters.Gaussian(), x).rank
    far = ff.parameters.local_effective_dimension(model, ff.parameters.Gaussian(), x, n=1e200)
    assert far.value == pytest.approx(rank, rel=0.05)  # log(P / trace) / log(kappa) is left


@pytest.mark.parametrize("raises", [False, True])
def test_effective_dimension_leaves_the_model(raises: bool) -> None:
    """Parameters of the last draw left in the network, also after an error; global random
    state that moves."""
    model, x = dense_network(4), inputs(5)[:, 0, :4]
    before = [w.detach().clone() for w in model.parameters()]
    state = torch.get_rng_state()

    def initialise(model: nn.Module, generator: torch.Generator) -> None:
        drawn(model, generator)
        if raises:
            raise KeyboardInterrupt

    if raises:
        with pytest.raises(KeyboardInterrupt):
            ff.parameters.effective_dimension(model, CATEGORICAL, x, n=N, initialise=initialise)
    else:
        results = [
            ff.parameters.effective_dimension(model, CATEGORICAL, x, n=N, draws=2, seed=seed).value
            for seed in (0, 0, 1)
        ]
        assert results[0] == results[1] != results[2]
    for w, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(w, was)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"n": 1.0}, "n"),
        ({"n": float("nan")}, "n"),
        ({"n": 10}, "n"),  # kappa below 1
        ({"n": N, "gamma": 0.0}, "gamma"),
        ({"n": N, "gamma": 1.5}, "gamma"),
        ({"n": N, "draws": 0}, "draws"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], name: str) -> None:
    """A logarithm that is zero or negative, and an average over nothing."""
    for function in (ff.parameters.effective_dimension, ff.parameters.local_effective_dimension):
        with pytest.raises(ValueError, match=rf"^{name} must .*got"):
            function(dense_network(4), CATEGORICAL, inputs(3)[:, 0, :4], **settings)


def test_a_matrix_of_zero() -> None:
    """0 / 0 in place of an error."""
    model = seeded(lambda: nn.Linear(4, OUTPUTS, bias=False).double())
    with pytest.raises(ValueError, match=r"must have a positive trace, got 0"):
        ff.parameters.local_effective_dimension(
            model, CATEGORICAL, torch.zeros(3, 4, dtype=torch.float64), n=N
        )
