"""Gram matrices of a layer's per-sample gradients, each way against the gradients themselves."""

import pytest
import torch
from torch import nn

from fisherfast.parameters.layers import linear as ways
from fisherfast.parameters.layers.linear import column_gram
from fisherfast.parameters.layers.registry import rule_for

# Relative to the largest entry. Measured: 7e-16 in float64, 1e-7 in float32.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}

# n R G T D M, and which way the cost chooses.
SIZES = {
    "single positions": ((5, 3, 1, 1, 7, 4), "_of_single_positions"),
    "few positions": ((4, 3, 1, 6, 700, 40), "_without_gradients"),
    "many positions": ((3, 2, 1, 90, 5, 3), "_with_gradients"),
    "groups": ((3, 2, 4, 20, 9, 2), "_with_gradients"),
    "deep groups": ((3, 2, 2, 8, 300, 100), "_without_gradients"),
}


def normal(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def side(n, R, G, T, D, M, dtype):
    return normal(n, G, T, D, dtype=dtype), normal(R, n, G, T, M, dtype=dtype)


def by_gradients(left, right, weight, bias):
    rows = []
    for a, b in (left, right):
        parts = [torch.einsum("rngtm,ngtd->rngmd", b.double(), a.double()).flatten(2)] * weight
        parts += [b.double().sum(3).flatten(2)] * bias
        rows.append(torch.cat(parts, 2))
    return torch.einsum("rnp,qmp->rnqm", *rows)


def noted(calls, way):
    """The function of that name, which puts its name on the list."""
    function = getattr(ways, way)

    def call(*given):
        calls.append(way)
        return function(*given)

    return call


def assert_near(got, truth, dtype):
    assert got.dtype == torch.float64
    assert got.shape == truth.shape
    assert (got - truth).abs().max() <= TOLERANCE[dtype] * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("weight", "bias"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("name", SIZES)
def test_every_way_equals_the_gradients(monkeypatch, name, weight, bias, dtype):
    """Catches columns and samples exchanged, a group or a bias that is forgotten, and a choice of
    the dearer way."""
    (n, R, *rest), chosen = SIZES[name]
    left, right = side(n, R, *rest, dtype), side(n + 1, R + 1, *rest, dtype)
    calls = []
    for way in ("_of_single_positions", "_without_gradients", "_with_gradients"):
        monkeypatch.setattr(ways, way, noted(calls, way))
    kinds = {"weight": weight, "bias": bias}
    assert_near(column_gram(*left, *right, **kinds), by_gradients(left, right, **kinds), dtype)
    assert_near(column_gram(*left, **kinds), by_gradients(left, left, **kinds), dtype)
    assert set(calls) == ({chosen} if weight else set())


@pytest.mark.parametrize("numbers", [1, 50, 1000])
def test_gradients_in_pieces(monkeypatch, numbers):
    """Catches a piece of the gradients that is lost or counted twice."""
    monkeypatch.setattr(ways, "TILE_NUMBERS", numbers)
    left, right = side(3, 2, 1, 90, 5, 3, torch.float64), side(4, 1, 1, 90, 5, 3, torch.float64)
    assert_near(column_gram(*left, *right), by_gradients(left, right, True, False), torch.float64)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "shared linear": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "no bias": (lambda: nn.Linear(6, 5, bias=False), (9, 6)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 5, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 7, 6)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (4, 9)),
}


@pytest.mark.parametrize("portion", [1, 2**25], ids=["pieces", "whole"])
@pytest.mark.parametrize("name", LAYERS)
def test_rules_of_layers(monkeypatch, name, portion):
    """Catches samples of another portion, and g of one column beside x of another sample."""
    monkeypatch.setattr("fisherfast.parameters.layers.linear.PORTION_BYTES", portion)
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    rule = rule_for(layer, {kind: kind for kind, _ in layer.named_parameters()})
    x, other_x = normal(5, *shape), normal(3, *shape)
    g = torch.stack([normal(*layer(x).shape) * c for c in (1, 2)]).roll(1, 1)
    other_g = normal(1, *layer(other_x).shape)
    rows = [
        torch.stack([torch.cat([p.flatten(1) for p in rule.gradients(a, c)], 1) for c in b])
        for a, b in ((x, g), (other_x, other_g))
    ]
    for given, (left, right) in (
        ((x, g, other_x, other_g), rows),
        ((x, g, x, g), (rows[0], rows[0])),
    ):
        truth = torch.einsum("rnp,qmp->rnqm", left, right)
        assert_near(rule.columns_gram(*given), truth, torch.float64)
    whole = rule.columns_gram(x, g, x, g).reshape(10, 10)
    assert_near(whole, whole.T, torch.float64)
