"""The largest directions of the Fisher matrix, at once and batch after batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.networks_zoo import seeded
from support.parameters_oracle import brute_force
from support.parameters_small import difference, measure
from support.parameters_zoo import NETWORKS
from torch import nn

from fisherfast import parameters as fp
from fisherfast.parameters.structures import lowrank
from fisherfast.parameters.structures.lowrank import LowRankFisher

ROUNDING = 1e-9
"""Relative to the largest number of the truth; 2e-14 was measured."""

NAMES = ["linear", "conv2d grouped", "layer norm", "embedding", "called twice"]


def low(model: nn.Module, x: Any, rank: int, **settings: object) -> LowRankFisher:
    found = fp.fisher(model, fp.Categorical(), x, structure="lowrank", rank=rank, **settings)  # type: ignore[arg-type]
    assert isinstance(found, LowRankFisher)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_eigenpairs_are_exact(name: str) -> None:
    """Catches directions or eigenvalues that are not those of the brute force, and a wrong account
    of what is left out."""
    network = NETWORKS[name]
    model, x = network.make(), network.inputs(6)
    truth = brute_force(model, "categorical", x)
    values, vectors = torch.linalg.eigh(truth)
    found = low(model, x, 4, batch_size=4)
    assert difference(found.eigenvalues(), values[-4:]) < ROUNDING
    cut = (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T
    assert difference(found.to_dense(), cut) < ROUNDING
    assert difference(found.diag(), cut.diagonal()) < ROUNDING
    assert math.isclose(found.trace() + found.missing_trace, float(truth.trace()), rel_tol=1e-10)
    assert difference(found.directions.T @ found.directions, torch.eye(4)) < ROUNDING
    assert math.isclose(found.error_bound, float(values[-5]), rel_tol=1e-8)


def test_many_batches_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a merge that loses what came before, or adds to F: F - F_k is positive semi-definite,
    within its bound, and its trace is what is said."""
    monkeypatch.setattr(lowrank, "ROWS_AT_ONCE", 24)
    network = NETWORKS["conv2d grouped"]
    model, x = network.make(), network.inputs(64)
    found = low(model, iter(x.split(4)), 6)  # can be read once
    truth = brute_force(model, "categorical", x)
    rest = torch.linalg.eigvalsh(truth - found.to_dense())
    scale = float(truth.trace())
    assert float(rest.min()) > -1e-13 * scale
    assert float(rest.max()) <= found.error_bound * (1 + 1e-9)
    assert math.isclose(found.missing_trace, float(rest.sum()), rel_tol=1e-9)
    exact = torch.linalg.eigvalsh(truth)[-6:]
    assert bool((found.eigenvalues() <= exact * (1 + 1e-12)).all())
    # 0.9998 of the trace of the best six directions was measured; those of the first eight samples
    # have 0.98 of it
    assert found.trace() > 0.999 * float(exact.sum())


def test_arguments() -> None:
    """Catches a rank that is taken for something else."""
    with pytest.raises(ValueError, match=r"^rank must be at least 1, got 0$"):
        measure("lowrank", rank=0)
    with pytest.raises(TypeError, match=r"^rank must be a whole number, got 2.5$"):
        measure("lowrank", rank=2.5)


@pytest.mark.parametrize("zeros_first", [True, False])
def test_a_part_of_the_data_that_says_nothing(
    monkeypatch: pytest.MonkeyPatch, zeros_first: bool
) -> None:
    """Catches a merge with a basis of no directions, or with rows that are all zero."""
    monkeypatch.setattr(lowrank, "ROWS_AT_ONCE", 8)
    model = seeded(lambda: nn.Linear(4, 3, bias=False).double())
    zeros = torch.zeros(20, 4, dtype=torch.float64)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = torch.cat([zeros, x] if zeros_first else [x, zeros])
    full = fp.fisher(model, fp.Categorical(), data, structure="full")
    found = low(model, data, 12, batch_size=4)
    torch.testing.assert_close(found.to_dense(), full.to_dense(), rtol=1e-11, atol=1e-15)
