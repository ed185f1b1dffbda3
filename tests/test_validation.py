"""The checks of arguments, and that every caller uses them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import fisherfast as ff
from fisherfast import problems
from fisherfast._validation import check_positive, check_seed, check_whole
from fisherfast.problems.problem import seeded_generator


def test_whole_numbers():
    """Catches NumPy integers that are refused or returned as they are, a bound that is off by one,
    True as 1, and a float that happens to be whole."""
    for value in (3, np.int32(3), np.uint8(3)):
        assert check_whole("n", value, least=3) == 3
        assert type(check_whole("n", value)) is int
    with pytest.raises(ValueError, match=r"^n must be at least 4, got 3$"):
        check_whole("n", 3, least=4)
    for value in (True, 2.0, np.float64(2), "2", None, np.bool_(True)):
        message = f"n must be a whole number, got {value!r}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            check_whole("n", value)


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1, np.int64(-7)])
def test_seeds(seed):
    """Catches seeds that torch takes and we refuse."""
    assert torch.Generator().manual_seed(check_seed(seed)).initial_seed() == int(seed) % 2**64


def test_positive():
    assert check_positive("x", np.float32(0.5)) == 0.5
    assert type(check_positive("x", 2)) is float
    for value in (0.0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^x must be positive and finite, got {value}$"):
            check_positive("x", value)
    for value in ("1", True, None, 1j):
        with pytest.raises(TypeError, match=f"^x must be a number, got {re.escape(repr(value))}$"):
            check_positive("x", value)


X = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))


def draw(theta, n, generator):
    return theta + torch.randn(n, 2, generator=generator)


def linear():
    return problems.mlp([2, 18], seed=0)[0]


TAKE_A_SEED = {
    "simulator": lambda seed: next(ff.Simulator(draw, 0.5, samples=9, seed=seed).read(0, 9)).x,
    "problem": lambda seed: torch.randn(9, generator=seeded_generator(seed, 1)),
    "network": lambda seed: problems.mlp([4, 1], seed=seed)[0].weight,
    "flow": lambda seed: (
        ff.fisher_information(ff.Pathwise(X, torch.ones_like(X)), seed=seed).curve_J
    ),
    "parameters": lambda seed: ff.parameters.fisher(
        linear(), "gaussian", X, fisher_type="mc", seed=seed
    ).diag(),
    "spectrum": lambda seed: (
        ff.parameters.fisher(linear(), "gaussian", X[:20], structure="gram")
        .spectrum(2, seed=seed)
        .residuals
    ),
    "score": lambda seed: torch.tensor(
        ff.parameters.score(linear(), "gaussian", X, X.repeat(1, 9))
        .mean_zero_test(seed=seed)
        .statistic
    ),
}


@pytest.mark.parametrize("use", TAKE_A_SEED)
def test_seeds_are_the_same_everywhere(use):
    """Catches a function with rules of its own for seeds: one that refuses negative ones, ignores
    the sign, or takes a float."""
    take = TAKE_A_SEED[use]
    assert not torch.equal(take(-1), take(1))
    for seed in (2**63 - 1, -(2**63)):
        assert torch.equal(take(seed), take(seed))
    with pytest.raises(TypeError, match=r"^seed must be a whole number, got 1.5$"):
        take(1.5)
    with pytest.raises(TypeError, match=r"^seed must be a whole number, got True$"):
        take(True)
    with pytest.raises(ValueError, match=r"^seed must be at least -2\*\*63 and below 2\*\*63"):
        take(2**63)
