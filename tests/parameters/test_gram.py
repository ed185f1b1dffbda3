"""The Fisher matrix through its Gram matrix, against the brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.parameters_oracle import brute_force
from support.parameters_zoo import NETWORKS
from torch import Tensor, nn

from fisherfast import parameters as fp
from fisherfast.parameters.structures import jacobian, layer_rows
from fisherfast.parameters.structures.gram import GramFisher
from fisherfast.parameters.structures.layer_rows import FactorRows, MatrixRows

ROUNDING = 1e-10
"""Relative to the largest number of the truth; 3e-15 was measured."""


def relative(got: Tensor, truth: Tensor) -> float:
    return float((got - truth).abs().max() / truth.abs().max().clamp_min(1e-30))


def gram(model: nn.Module, x: Tensor, **settings: object) -> GramFisher:
    found = fp.fisher(model, fp.Categorical(), x, structure="gram", **settings)  # type: ignore[arg-type]
    assert isinstance(found, GramFisher)
    return found


def vectors(size: int, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(size, count, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_brute_force(name: str) -> None:
    """Catches a layer whose kept factors lack a position, a group, the bias or the padding, in any
    of the three contractions: with vectors, with themselves, squared."""
    network = NETWORKS[name]
    model, x = network.make(), network.inputs(5)
    truth = brute_force(model, "categorical", x)
    found = gram(model, x, batch_size=3)
    assert relative(found.to_dense(), truth) < ROUNDING
    assert relative(found.diag(), truth.diagonal()) < ROUNDING
    assert math.isclose(float(found.gram().trace()), float(truth.trace()), rel_tol=ROUNDING)
    rank = min(found.rows, len(truth))
    exact = torch.linalg.eigvalsh(truth)
    assert relative(torch.linalg.eigvalsh(found.gram())[-rank:], exact[-rank:]) < ROUNDING
    assert relative(found.eigenvalues(), exact[-rank:]) < ROUNDING


FACTORED = [
    "linear",
    "shared linear",
    "conv2d same",
    "conv2d grouped",
    "conv1d",
    "embedding padded",
]


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
    assert relative(found.to_dense(), truth) < ROUNDING
    assert relative(found.diag(), truth.diagonal()) < ROUNDING
    exact = torch.linalg.eigvalsh(truth)
    rank = min(found.rows, len(exact))
    assert relative(torch.linalg.eigvalsh(found.gram())[-rank:], exact[-rank:]) < ROUNDING


def test_the_smaller_form_is_kept() -> None:
    """Catches a fully connected layer that is kept as rows of a million numbers, and a convolution
    kept as maps where its rows are shorter."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 30), nn.ReLU(), nn.Linear(30, 3)
    )
    found = gram(model, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    kept = found._jacobian.pieces[0]
    assert isinstance(kept["0.weight", "0.bias"], MatrixRows)
    assert isinstance(kept["3.weight", "3.bias"], FactorRows)
    assert kept["3.weight", "3.bias"].bytes() == 4 * (4 * 72 + found.rows * 30)


@pytest.mark.parametrize("name", ["linear", "conv2d", "batch norm 2d", "embedding"])
@pytest.mark.parametrize("damping", [1e-6, 0.3])
def test_solve_and_logdet(name: str, damping: float) -> None:
    """Catches a sign or a power of the damping in Woodbury's and Sylvester's identities."""
    network = NETWORKS[name]
    model, x = network.make(), network.inputs(4)
    found = gram(model, x)
    truth = brute_force(model, "categorical", x)
    damped = truth + damping * torch.eye(len(truth), dtype=torch.float64)
    v = vectors(len(truth))
    lost = ROUNDING * max(1.0, float(truth.trace()) / damping) * 1e-2
    assert relative(found.solve(v, damping=damping), torch.linalg.solve(damped, v)) < lost
    assert math.isclose(found.logdet(damping=damping), float(torch.logdet(damped)), rel_tol=1e-8)


def overdetermined() -> tuple[nn.Module, Tensor]:
    """A network with fewer parameters than rows, of full rank."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, torch.randn(40, 2, dtype=torch.float64, generator=generator)


def test_more_rows_than_parameters() -> None:
    """Catches Woodbury's identity where F itself is smaller and regular: solve without damping."""
    model, x = overdetermined()
    found = fp.fisher(model, fp.Gaussian(), x, structure="gram", batch_size=16)
    truth = brute_force(model, "gaussian", x)
    v = vectors(len(truth))
    assert relative(found.eigenvalues(), torch.linalg.eigvalsh(truth)) < ROUNDING
    assert relative(found.solve(v), torch.linalg.solve(truth, v)) < 1e-8
    damped = truth + 0.1 * torch.eye(len(truth), dtype=torch.float64)
    assert relative(found.solve(v, damping=0.1), torch.linalg.solve(damped, v)) < ROUNDING
    assert math.isclose(found.logdet(), float(torch.logdet(truth)), rel_tol=1e-9)
    assert math.isclose(found.logdet(damping=0.1), float(torch.logdet(damped)), rel_tol=1e-9)


def test_singular_without_damping() -> None:
    """Catches an inverse of a matrix that has none."""
    network = NETWORKS["linear"]
    found = gram(network.make(), network.inputs(2))
    with pytest.raises(ValueError, match=r"^damping must be positive, got 0: F has rank \d+ of"):
        found.solve(vectors(found.layout.size))
    assert found.logdet() == -math.inf
    with pytest.raises(ValueError, match=r"^damping must be finite and at least 0, got -1"):
        found.logdet(damping=-1)
    with pytest.raises(ValueError, match=r"^damping must be more than rounding, about"):
        found.solve(vectors(found.layout.size), damping=1e-30)


def test_eigenvectors() -> None:
    """Catches directions that are not of unit length, or of a zero eigenvalue: Categorical with C
    classes has C - 1 of each sample."""
    network = NETWORKS["conv2d"]
    model, x = network.make(), network.inputs(4)
    truth = brute_force(model, "categorical", x)
    found = gram(model, x).spectrum()
    values, directions = found.eigenvalues, found.stiff(found.rank)
    classes = model(x).shape[1]
    assert len(values) == 4 * (classes - 1)
    assert relative(truth @ directions, directions * values) < ROUNDING
    eye = torch.eye(len(values), dtype=torch.float64)
    assert relative(directions.T @ directions, eye) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_is_seen_through_rounding(dtype: torch.dtype) -> None:
    """Catches a threshold that counts the rounding of float32 gradients as rank, or drops what is
    there: a wide network has full rank n (C - 1)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        model = nn.Sequential(model, nn.Linear(64, 4)).to(dtype)
        x = torch.randn(60, 20, dtype=dtype)
    found = gram(model, x)
    assert found.rank() == 60 * 3


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
    assert relative(found.to_dense(), truth) < ROUNDING
    exact = torch.linalg.eigvalsh(truth)
    rank = min(found.rows, len(exact))
    assert relative(torch.linalg.eigvalsh(found.gram())[-rank:], exact[-rank:]) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("hidden", "rank"), [(3, 3 * (6 + 5 - 3) + 5), (8, 5 * (6 + 1))])
def test_rank_of_a_linear_network(dtype: torch.dtype, hidden: int, rank: int) -> None:
    """Catches rounding that counts as rank, or a threshold above what is there: a network without
    activations is an affine map of rank at most `hidden`, whatever its number of parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = [6, hidden, hidden, hidden, 5]
        layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
        model, x = nn.Sequential(*layers).to(dtype), torch.randn(300, 6, dtype=dtype)
    found = fp.fisher(model, fp.Gaussian(), x, structure="gram")
    assert isinstance(found, GramFisher)
    assert found.rank() == rank


def test_training_that_goes_on_changes_nothing() -> None:
    """Catches a result that still reads the network: weights, running statistics, the inputs."""
    network = NETWORKS["batch norm 2d"]
    model, x = network.make(), network.inputs(4)
    found = gram(model, x)
    v = vectors(found.layout.size)
    truth = brute_force(model, "categorical", x)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers(), x]:
            if tensor.is_floating_point():
                tensor.mul_(2).add_(1)
    assert relative(found @ v, truth @ v) < ROUNDING
    assert relative(found.diag(), truth.diagonal()) < ROUNDING
    assert relative(found.eigenvalues(), torch.linalg.eigvalsh(truth)[-found.rows :]) < ROUNDING


@pytest.mark.parametrize("name", ["linear", "conv2d replicate", "embedding padded", "attention"])
def test_state_dict(name: str, tmp_path: object) -> None:
    """Catches a state that does not hold all that is needed, or that torch.load refuses."""
    network = NETWORKS[name]
    found = gram(network.make(), network.inputs(4), batch_size=3)
    path = f"{tmp_path}/fisher.pt"
    torch.save(found.state_dict(), path)
    again = fp.from_state_dict(torch.load(path, weights_only=True))
    v = vectors(found.layout.size)
    assert isinstance(again, GramFisher)
    assert torch.equal(again @ v, found @ v)
    assert torch.equal(again.gram(), found.gram())
    assert torch.equal(again.diag(), found.diag())
    assert again.samples == found.samples


def test_random_state_and_grad_mode_stay() -> None:
    """Catches modules rebuilt with random weights, and contractions that need the user's mode."""
    network = NETWORKS["conv2d"]
    model, x = network.make(), network.inputs(4)
    before = torch.get_rng_state()
    found = gram(model, x)
    v = vectors(found.layout.size)
    expected = found @ v
    with torch.inference_mode():
        assert torch.equal(found @ v, expected)
    assert not expected.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_is_bounded() -> None:
    """Catches a Gram matrix that is begun and then killed for memory."""
    network = NETWORKS["linear"]
    model, x = network.make(), network.inputs(64)
    with pytest.raises(MemoryError, match=r"must fit into memory_budget = 1000 bytes, got \d+"):
        gram(model, x, memory_budget=1000)
    assert gram(model, x, memory_budget="1 MB").samples == 64


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
def test_other_types(fisher_type: str) -> None:
    """Catches rows that are those of the exact matrix: the trace is that of the diagonal structure,
    which reads the same columns."""
    network = NETWORKS["conv2d strided"]
    model, x = network.make(), network.inputs(6)
    y = torch.arange(6) % model(x).shape[1]
    found, diagonal = (
        fp.fisher(
            model, fp.Categorical(), (x, y), structure=structure, fisher_type=fisher_type, seed=5
        )  # type: ignore[arg-type]
        for structure in ("gram", "diag")
    )
    assert relative(found.diag(), diagonal.diag()) < ROUNDING
