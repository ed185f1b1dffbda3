"""The Fisher matrix through its Gram matrix, against the brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from support.networks_zoo import seeded
from support.parameters_oracle import brute_force
from support.parameters_small import difference
from support.parameters_zoo import NETWORKS
from torch import Tensor, nn

from fisherfast import parameters as fp
from fisherfast.parameters.structures import jacobian, layer_rows
from fisherfast.parameters.structures.gram import GramFisher
from fisherfast.parameters.structures.layer_rows import FactorRows

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # of torch, on copies

ROUNDING = 1e-10
"""Relative to the largest number of the truth; 3e-15 was measured."""


def gram(model: nn.Module, x: Tensor, **settings: object) -> GramFisher:
    found = fp.fisher(model, fp.Categorical(), x, structure="gram", **settings)  # type: ignore[arg-type]
    assert isinstance(found, GramFisher)
    return found


FACTORED = ["linear", "shared linear", "conv2d same", "conv2d grouped", "embedding"]


@pytest.mark.parametrize("name", FACTORED)
def test_factors_that_are_kept_though_rows_are_smaller(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an error in the form that small layers do not take by themselves, and in tiles
    smaller than the batch."""
    monkeypatch.setattr(layer_rows, "TILE_NUMBERS", 1)
    monkeypatch.setattr(jacobian, "FACTOR_COST", 0.0)
    network = NETWORKS[name]
    model, x = network.make(), network.inputs(5)
    found = gram(model, x, batch_size=3)
    assert all(isinstance(part, FactorRows) for part in found._jacobian.pieces[0].values())
    truth = brute_force(model, "categorical", x)
    assert difference(found.to_dense(), truth) < ROUNDING
    assert difference(found.diag(), truth.diagonal()) < ROUNDING
    exact = torch.linalg.eigvalsh(truth)
    rank = min(found.rows, len(exact))
    assert difference(torch.linalg.eigvalsh(found.gram())[-rank:], exact[-rank:]) < ROUNDING


def test_batches_of_other_lengths() -> None:
    """Catches batches whose layers are kept in different forms: a shared layer's rows are smaller
    than long sequences, and larger than short ones."""
    network = NETWORKS["shared linear"]
    model, width = network.make(), network.shape[-1]
    generator = torch.Generator().manual_seed(2)
    batches = [
        torch.randn(3, length, width, dtype=torch.float64, generator=generator)
        for length in (1, 12, 2)
    ]
    found = fp.fisher(model, fp.Categorical(), iter(batches), structure="gram")
    assert isinstance(found, GramFisher)
    forms = {tuple(type(part) for part in piece.values()) for piece in found._jacobian.pieces}
    assert len(forms) == 2
    truth = sum(brute_force(model, "categorical", x) for x in batches) / len(batches)
    assert isinstance(truth, Tensor)
    assert difference(found.to_dense(), truth) < ROUNDING
    exact = torch.linalg.eigvalsh(truth)
    rank = min(found.rows, len(exact))
    assert difference(torch.linalg.eigvalsh(found.gram())[-rank:], exact[-rank:]) < ROUNDING


def layers(*widths: int) -> list[nn.Module]:
    return [nn.Linear(*pair) for pair in itertools.pairwise(widths)]


def wide() -> nn.Module:
    first, second, last = layers(20, 64, 64, 4)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("build", "samples", "rank"),
    [
        (wide, 60, 60 * 4),
        (lambda: nn.Sequential(*layers(6, 3, 3, 3, 5)), 300, 3 * (6 + 5 - 3) + 5),
        (lambda: nn.Sequential(*layers(6, 8, 8, 8, 5)), 300, 5 * (6 + 1)),
    ],
)
def test_rank(build: Callable[[], nn.Module], samples: int, rank: int, dtype: torch.dtype) -> None:
    """Catches rounding that counts as rank, or a threshold above what is there: a wide network has
    full rank n C; one without activations is an affine map of rank at most its width, whatever its
    number of parameters."""
    model = seeded(build).to(dtype)
    width = next(model.parameters()).shape[1]
    x = torch.randn(samples, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = fp.fisher(model, fp.Gaussian(), x, structure="gram")
    assert isinstance(found, GramFisher)
    assert found.rank() == rank


def test_training_that_goes_on_changes_nothing() -> None:
    """Catches a result that still reads the network: weights, running statistics, the inputs."""
    network = NETWORKS["batch norm"]
    model, x = network.make(), network.inputs(4)
    found = gram(model, x)
    v = torch.linspace(-1, 1, found.layout.size, dtype=torch.float64)
    truth = brute_force(model, "categorical", x)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers(), x]:
            if tensor.is_floating_point():
                tensor.mul_(2).add_(1)
    with torch.inference_mode():
        assert difference(found @ v, truth @ v) < ROUNDING
    assert difference(found.diag(), truth.diagonal()) < ROUNDING
    assert difference(found.eigenvalues(), torch.linalg.eigvalsh(truth)[-found.rows :]) < ROUNDING
