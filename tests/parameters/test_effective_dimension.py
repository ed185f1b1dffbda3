"""The effective dimension against its formula, from dense determinants, and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.pairwise import pairwise
from support.parameters_oracle import brute_force
from support.parameters_small import STRUCTURES, measure, rows
from support.parameters_zoo import NETWORKS, Network
from torch import Tensor, nn

from fisherfast import parameters as fp
from fisherfast.parameters.structures import gram


def drawn(network: Network, draws: int) -> list[nn.Module]:
    """Networks with parameters at random."""
    models = [network.make() for _ in range(draws)]
    for draw, model in enumerate(models):
        generator = torch.Generator().manual_seed(5 + draw)
        for parameter in model.parameters():
            parameter.data.normal_(generator=generator)
    return models


def by_hand(matrices: list[Tensor], n: float, gamma: float) -> float:
    """Equation 2 of Abbas et al. (2021), by dense matrices."""
    F = torch.stack(matrices)
    size = F.shape[1]
    trace = F.diagonal(dim1=1, dim2=2).sum(1).mean()
    kappa = gamma * n / (2 * math.pi * math.log(n))
    inside = torch.eye(size, dtype=torch.float64) + kappa * size / trace * F
    return float(2 * torch.linalg.det(inside).sqrt().mean().log() / math.log(kappa))


def grams(models: list[nn.Module], x: Tensor) -> list[fp.ParameterFisher]:
    return [fp.fisher(model, "categorical", x, structure="gram") for model in models]


@pairwise(
    name=["linear", "embedding", "called twice"],
    samples=[6, 25],  # P > N, and P < N
    parts=[(1000, 1.0), (200, 0.7)],
)
def test_equals_the_definition(
    name: str, samples: int, parts: tuple[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a lost factor 2 pi, a trace of one matrix in place of the mean, a mean of logarithms
    in place of the logarithm of the mean, a determinant of the larger side
    alone, and an error in the slower way, by eigenvalues, which small problems never take."""
    network, (n, gamma) = NETWORKS[name], parts
    models, x = drawn(network, 3), network.inputs(samples)
    exact = [brute_force(model, "categorical", x) for model in models]
    first, *others = grams(models, x)
    found = first.effective_dimension(n, gamma, others=others)
    assert math.isclose(found.value, by_hand(exact, n, gamma), rel_tol=1e-10)
    assert float(found) == found.value
    assert found.share == found.value / found.parameters
    assert (found.n, found.gamma, found.parameters) == (n, gamma, len(exact[0]))
    torch.testing.assert_close(found.traces, torch.stack([f.trace() for f in exact]))
    assert found.log_determinants.shape == (3,)
    assert repr(found).startswith("EffectiveDimension(")
    alone = first.effective_dimension(n, gamma)
    assert math.isclose(alone.value, by_hand(exact[:1], n, gamma), rel_tol=1e-10)
    monkeypatch.setattr(gram, "NEGLIGIBLE", 0.0)
    assert math.isclose(alone.value, first.effective_dimension(n, gamma).value, rel_tol=1e-10)


def test_of_every_structure() -> None:
    """Catches a determinant that is not that of the structure's own matrix."""
    for structure in STRUCTURES:
        F = measure(structure)
        exact = by_hand([F.to_dense()], 1000, 1.0)
        assert math.isclose(F.effective_dimension(1000).value, exact, rel_tol=1e-9), structure


def test_tends_to_the_rank() -> None:
    """Catches zero eigenvalues that rounding turns into dimensions: with kappa from 1e150 to 1e250
    log det grows by the rank for each unit of log kappa."""
    network = NETWORKS["conv2d strided"]
    x = network.inputs(4)[[0, 1, 2, 3, 3]]  # a copy, which adds rows and no rank
    F = fp.fisher(network.make(), "categorical", x, structure="gram")
    few, many = (F.effective_dimension(n) for n in (1e150, 1e250))
    logs = [math.log(f.n / (2 * math.pi * math.log(f.n))) for f in (few, many)]
    slope = float(many.log_determinants - few.log_determinants) / (logs[1] - logs[0])
    assert math.isclose(slope, 4 * 2, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"n": 1.0}, ValueError, r"n must be so large that gamma n / \(2 pi log n\)"),
        ({"n": float("nan")}, ValueError, "n must be so large"),
        ({"n": 10}, ValueError, "n must be so large"),  # kappa below 1
        ({"n": "1000"}, TypeError, "n must be a number, got '1000'"),
        ({"gamma": 0.0}, ValueError, r"gamma must lie in \(0, 1\], got 0.0"),
        ({"gamma": 1.5}, ValueError, r"gamma must lie in \(0, 1\], got 1.5"),
        ({"gamma": None}, TypeError, "gamma must be a number, got None"),
        ({"others": [measure("gram")]}, ValueError, "others must be of the same network, got '0"),
        ({"others": [3]}, TypeError, "fisher must be a matrix of ff.parameters.fisher, got int"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    """Catches a logarithm that is zero or negative, and errors that do not name the argument."""
    F = measure("gram", rows(3), model=nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(error, match=f"^{text}"):
        F.effective_dimension(**{"n": 5000.0, **settings})
