"""The published networks and the lossless chain."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fisherfast.problems import (
    gaussian_network,
    imaging_network,
    invertible_chain,
    lognormal_network,
    mlp,
)


@pytest.mark.parametrize(
    ("build", "widths"),
    [
        (imaging_network, [432, 800, 100, 25, 5, 1]),
        (gaussian_network, [256, 150, 100, 50, 25, 1]),
        (lognormal_network, [10, 150, 100, 50, 25, 1]),
    ],
)
def test_published_widths_and_names(build, widths):
    """Catches a lost layer, an activation after the output, or another name."""
    network = build(seed=0)
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert [linear[0].in_features] + [layer.out_features for layer in linear] == widths
    names = [name for name, _ in network.named_children() if name != "flatten"]
    assert names == ["fc1", "relu1", "fc2", "relu2", "fc3", "relu3", "fc4", "relu4", "fc5"]
    shape = (18, 24) if build is imaging_network else widths[:1]
    assert network(torch.zeros(3, *shape)).shape == (3, 1)


def test_seed_fixes_the_weights_and_spares_the_global_state():
    """Catches manual_seed without a fork."""
    before = torch.get_rng_state()
    first, second, third = mlp([4, 3, 1], seed=5), mlp([4, 3, 1], seed=5), mlp([4, 3, 1], seed=6)
    invertible_chain(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.fc1.weight, second.fc1.weight)
    assert not torch.equal(first.fc1.weight, third.fc1.weight)


def test_chain_can_be_undone():
    """Catches a layer that is not orthogonal or a missing bias: the inverse is written out here."""
    chain = invertible_chain(6, depth=3, slope=0.3, seed=2)
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    y = chain(x)
    for layer in reversed(chain):
        if isinstance(layer, nn.LeakyReLU):
            y = torch.where(y < 0, y / 0.3, y)
        else:
            assert layer.bias.abs().min() > 0
            y = (y - layer.bias) @ layer.weight
    torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in chain.named_children()][:2] == ["fc1", "leakyrelu1"]
    network = mlp([4, 3, 1], lambda: nn.LeakyReLU(0.7))
    assert network.leakyrelu1.negative_slope == 0.7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mlp([4]), r"widths must hold at least 2 numbers, got \[4\]"),
        (lambda: mlp([4, 0]), "widths must be at least 1, got 0"),
        (lambda: invertible_chain(4, slope=0.0), "slope must be positive and finite, got 0.0"),
        (lambda: invertible_chain(4, depth=0), "depth must be at least 1, got 0"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
