"""Layers whose covariance is singular or badly scaled: copies, sums, constants, single live ones.

They say nothing that the layer without them does not: same J, finite numbers.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.gaussian_shift import samples
from torch import nn

import fisherfast as ff

SOURCES = ["paired", "tangents", "scores", "independent"]
DIM, HIDDEN = 6, 4
RAW_ONLY = 1  # max_features below the width: no lift, which differs between layers


def data(source: str) -> ff.data.Data:
    """White noise moved along (1, .., 1): J = 6."""
    one = torch.ones(DIM, dtype=torch.float64)
    return samples(source, torch.diag(one), one, n=4000, seed=0)


class Mix(nn.Module):
    """x -> W x, then columns made from it."""

    def __init__(self, make) -> None:
        super().__init__()
        weight = torch.randn(HIDDEN, DIM, generator=torch.Generator().manual_seed(1))
        self.weight = nn.Parameter(weight)
        self.make = make

    def forward(self, x):
        return self.make(x @ self.weight.T)


COPIES = {
    "copies first": lambda z: torch.cat([z[:, 2:], z], 1),
    "all twice": lambda z: torch.cat([z, z], 1),
    "sums": lambda z: torch.cat([z, z[:, :2] - 0.3 * z[:, 2:], z @ torch.ones(4, 3)], 1),
    "constant": lambda z: torch.cat([z, torch.full_like(z[:, :2], 3.0)], 1),
    "zero": lambda z: torch.cat([torch.zeros_like(z[:, :2]), z], 1),
}
SCALES = {
    "1e12": lambda z: z * torch.tensor([1.0, 1e12, 1e4, 1e8]),
    "1e-12": lambda z: z * torch.tensor([1e-12, 1.0, 1e-6, 1e-3]),
    "copy of another scale": lambda z: torch.cat([z, 1e12 * z[:, :1]], 1),
}


def linear(source: str, make):
    return ff.fisher_flow(Mix(make), data(source), max_features=RAW_ONLY)["output"]


@pytest.mark.parametrize(
    ("source", "name"),
    [("tangents", name) for name in (*COPIES, *SCALES)] + [(source, "sums") for source in SOURCES],
)
def test_what_adds_nothing_changes_nothing(source, name):
    """Equal to the layer without it within a thousandth of the error: the samples are the same, so
    chance has no part in it. Catches a copy that is counted as information (sums of float32 differ
    by rounding, which is no signal), and a ridge that is not relative to each activation."""
    plain = linear(source, lambda z: z)
    found = linear(source, {**COPIES, **SCALES}[name])
    assert found.lower.isfinite().all()
    assert abs(found.value - plain.value) < 1e-3 * float(plain.stderr)
    assert float(found.stderr) == pytest.approx(float(plain.stderr), rel=1e-2)
    assert found.status == plain.status


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("tangents", "sums"),
        ("independent", "sums"),
        ("tangents", "1e12"),
        ("independent", "copy of another scale"),
    ],
)
def test_with_a_lift(source, name):
    """The lift of a singular layer: no more than the input has beyond 4 errors,
    and no less than 0.9 of what the layer without the copy shows."""
    plain = ff.fisher_flow(Mix(lambda z: z), data(source), max_features=64)["output"]
    model = Mix({**COPIES, **SCALES}[name])
    found = ff.fisher_flow(model, data(source), max_features=64)["output"]
    errors = float(found.stderr)
    assert found.value < DIM + 4 * errors
    assert abs(found.value - plain.value) < 0.02 * DIM + 4 * errors
    assert errors < 2 * float(plain.stderr) + 0.02 * DIM


@pytest.mark.parametrize("source", SOURCES)
def test_a_single_live_activation(source):
    """One of eight activations is alive: J of it alone, 6 (w . 1)^2 / (6 |w|^2)."""
    layer = nn.Linear(DIM, 8)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[3] = torch.tensor([1.0, 2, 0, 1, 0, -1])
    info = ff.fisher_flow(nn.Sequential(layer, nn.ReLU(), nn.Identity()), data(source))["0"]
    truth = 3**2 / 7
    assert info.dropped >= 7
    assert abs(info.value - truth) < 4 * float(info.stderr) + 0.01 * truth
    assert abs(float(info.linear) - truth) < 4 * float(info.linear_stderr)
    assert math.isfinite(float(info.lower))


@pytest.mark.parametrize(
    ("source", "size"), [("tangents", 1e8), ("scores", 1e22), ("conditions", 1e22)]
)
def test_an_outlier_takes_no_layer_with_it(source, size):
    """One float32 value far beyond the others: behind a linear layer all activations are copies of
    it, and float32 products of them have no positive covariance. Every layer gets its row."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2000, 5, generator=generator)
    score = x.sum(1).double()
    x[7, 1] = size
    if source == "tangents":
        data = ff.Pathwise(x, torch.ones(2000, 5))
    elif source == "scores":
        data = ff.Score(x, score)
    else:
        other = torch.randn(2000, 5, generator=generator)
        data = ff.FiniteDifference(x - 0.1, other + 0.1, 0.2)
    torch.manual_seed(0)
    flow = ff.fisher_flow(nn.Linear(5, 3), data)
    assert flow["input"].value == pytest.approx(4.5, abs=4 * float(flow["input"].stderr) + 0.6)
    output = flow["output"]
    assert output.value <= 5 + 4 * float(output.stderr)
    assert output.status != "resolved"


@pytest.mark.parametrize("n", [4000, 100])
def test_activations_below_the_range_of_float32(n):
    """Catches scales whose inverse overflows: a softmax over many places has activations that vary
    by 1e-42. A layer with them was refused as not finite; at n = 100 it is compressed."""
    source = samples("tangents", torch.eye(DIM).double(), torch.ones(DIM).double(), n=n, seed=0)

    def tiny(z: torch.Tensor) -> torch.Tensor:
        return torch.cat([z, (z * 1e-42).repeat(1, 10), (z * 1e-30).repeat(1, 10)], 1)

    flow = ff.fisher_flow(Mix(tiny), source, max_features=RAW_ONLY)
    plain = ff.fisher_flow(Mix(lambda z: z), source, max_features=RAW_ONLY)
    seen, expected = flow["output"], plain["output"]
    assert seen.compressed == (n == 100)
    assert abs(seen.value - expected.value) < 4 * expected.stderr.item()


@pytest.mark.parametrize("n", [60, 100])
def test_one_hot_activations(n):
    """Catches an IndexError where no feature of one half varies in the other by more than
    rounding."""
    x = torch.zeros(n, 300)
    x[torch.arange(n), torch.arange(n)] = 1
    dx = torch.zeros(n, 300)
    dx[:, 0] = 1e-3
    flow = ff.fisher_flow(nn.Identity(), ff.Pathwise(x, dx))
    assert flow["input"].J.isfinite().all()
