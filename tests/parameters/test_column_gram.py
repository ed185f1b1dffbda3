"""Gram matrices of a layer's per-sample gradients, each way against the gradients themselves."""

import pytest
import torch
from support.pairwise import pairwise

from fisherfast.parameters.layers import linear as ways
from fisherfast.parameters.layers.linear import column_gram

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


@pairwise(name=list(SIZES), kinds=["weight", "bias", "weight and bias"], dtype=list(TOLERANCE))
def test_every_way_equals_the_gradients(monkeypatch, name, kinds, dtype):
    """Catches columns and samples exchanged, a group or a bias that is forgotten, and a choice of
    the dearer way."""
    (n, R, *rest), chosen = SIZES[name]
    left, right = side(n, R, *rest, dtype), side(n + 1, R + 1, *rest, dtype)
    calls = []
    for way in ("_of_single_positions", "_without_gradients", "_with_gradients"):
        monkeypatch.setattr(ways, way, noted(calls, way))
    weight, bias = (each in kinds for each in ("weight", "bias"))
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
