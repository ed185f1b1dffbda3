"""Every structure on every network equals a brute force over samples and classes."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from support.parameters_oracle import brute_force, moments_of_trace
from support.parameters_zoo import NETWORKS, OUTPUTS, Network, linear
from torch import Tensor, nn

import fisherfast as ff
from fisherfast.parameters.fisher import fisher

STRUCTURES = ("diag", "block", "full")
TYPES = ("exact", "empirical")
SAMPLES = 5
BATCH = 4  # the second batch is smaller, of one sample

ROUNDING = 1e-12
"""Largest difference in float64, relative to the largest entry; measured: below 2e-15."""

SINGLE_ROUNDING = 3e-6
"""The same of a network in float32; measured: at most 3e-7."""

CATEGORICAL = ff.parameters.Categorical()

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # of torch, on copies


def kept(dense: Tensor, matrix: ff.parameters.ParameterFisher) -> Tensor:
    """What a structure keeps of a dense matrix; the blocks are read off the parameters' names."""
    if matrix.structure == "full":
        return dense
    if matrix.structure == "diag":
        return dense.diag().diag()
    modules = []
    for name, shape in zip(matrix.layout.names, matrix.layout.shapes, strict=True):
        modules += [name.rpartition(".")[0]] * shape.numel()
    same = torch.tensor([[a == b for a in modules] for b in modules])
    return dense * same


def difference(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_brute_force(name: str) -> None:
    """A rule that mixes samples, positions, groups or taps of a kernel; squares taken before
    positions are summed; parameters that are missed, or counted twice where they are tied."""
    network = NETWORKS[name]
    model, x, y = network.make(), network.inputs(SAMPLES), network.labels(SAMPLES)
    for kind in TYPES:
        truth = brute_force(model, "categorical", x, y if kind == "empirical" else None)
        for structure in STRUCTURES:
            found = fisher(
                model, CATEGORICAL, (x, y), structure=structure, fisher_type=kind, batch_size=BATCH
            )
            expected = kept(truth, found)
            assert difference(found.to_dense(), expected) < ROUNDING, (kind, structure)
            assert difference(found.diag(), truth.diag()) < ROUNDING, (kind, structure)


@pytest.mark.parametrize("name", NETWORKS)
def test_single_precision(name: str) -> None:
    """A structure that multiplies or sums in less than the precision of the network."""
    network = NETWORKS[name]
    model, x = network.make(torch.float32), network.inputs(SAMPLES, torch.float32)
    truth = brute_force(network.make(), "categorical", network.inputs(SAMPLES))
    for structure in STRUCTURES:
        found = fisher(model, CATEGORICAL, x, structure=structure, batch_size=BATCH)
        assert found.diag().dtype == torch.float64
        assert difference(found.to_dense(), kept(truth, found)) < SINGLE_ROUNDING, structure


LIKELIHOODS = {
    "gaussian": ff.parameters.Gaussian(variance=0.3),
    "bernoulli": ff.parameters.Bernoulli(),
    "poisson": ff.parameters.Poisson(),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_likelihoods(kind: str, structure: str) -> None:
    """A structure that takes the columns of one likelihood for those of another, or leaves some
    out."""
    network = NETWORKS["conv2d grouped"]
    model, x = network.make(), network.inputs(SAMPLES)
    truth = brute_force(model, kind, x, variance=0.3)
    found = fisher(model, LIKELIHOODS[kind], x, structure=structure)
    assert difference(found.to_dense(), kept(truth, found)) < 1e-10  # the tail of the counts


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", [*TYPES, "mc"])
def test_batch_size(kind: str, structure: str) -> None:
    """The square of a batch's mean gradient, which other libraries take: here 8 samples in one
    batch, in batches of 3, and one by one give the same; the labels drawn are those of a sample."""
    network = NETWORKS["batch norm 2d"]
    model, data = network.make(), (network.inputs(8), network.labels(8))
    settings = {"samples": 3} if kind == "mc" else {}
    found = [
        fisher(
            model,
            CATEGORICAL,
            data,
            structure=structure,
            fisher_type=kind,
            batch_size=size,
            **settings,
        ).to_dense()
        for size in (8, 3, 1)
    ]
    for other in found[1:]:
        assert difference(other, found[0]) < ROUNDING
    mean_first = brute_force(model, "categorical", *data)
    gradients = [p.grad for p in _trained(model, *data).parameters()]
    squared = torch.cat([g.flatten() for g in gradients if g is not None]).square()
    assert difference(squared, mean_first.diag()) > 0.1  # it would show


def _trained(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """A model with the gradients of a batch's mean loss."""
    nn.functional.cross_entropy(model(x), y).backward()
    return model


@pytest.mark.parametrize("structure", STRUCTURES)
def test_chosen_parameters(structure: str) -> None:
    """Parameters that are left out and yet shift those that follow."""
    network = NETWORKS["transformer"]
    model, x = network.make(), network.inputs(SAMPLES)
    truth = brute_force(model, "categorical", x, chosen=lambda name: "linear1" in name)
    found = fisher(model, CATEGORICAL, x, structure=structure, parameters="linear1")
    assert found.layout.names == ("0.linear1.weight", "0.linear1.bias")
    assert difference(found.to_dense(), kept(truth, found)) < ROUNDING


def test_parts_of_a_block() -> None:
    """Parameters of one module that arrive apart, in different batches of columns: `embedding` is
    tied and comes row by row, its scale and the layer `mix` by their rules."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.eye(3, 4))
            self.second = nn.Parameter(torch.linspace(-1, 1, 4))
            self.layer = nn.Linear(4, OUTPUTS)
            self.layer.bias = self.second_bias = nn.Parameter(torch.linspace(-1, 1, OUTPUTS))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(x @ self.first + self.second))

    network = Network(Mixed, (3,))
    model, x = network.make(), network.inputs(SAMPLES)
    assert [name for name, _ in model.named_parameters()] == [
        "first",
        "second",
        "second_bias",  # arrives with the layer's weight, and belongs to the model's own block
        "layer.weight",
    ]
    truth = brute_force(model, "categorical", x)
    for structure in STRUCTURES:
        found = fisher(model, CATEGORICAL, x, structure=structure)
        assert difference(found.to_dense(), kept(truth, found)) < ROUNDING


# --- what a structure can be asked ---


@pytest.fixture(scope="module")
def regular() -> dict[str, tuple[ff.parameters.ParameterFisher, Tensor]]:
    """Structures and their dense matrices, of more samples than parameters."""
    model, x = (
        Network(lambda: linear(bias=False), (4,)).make(),
        torch.randn(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
    )
    likelihood = ff.parameters.Gaussian()
    found = {s: fisher(model, likelihood, x, structure=s) for s in STRUCTURES}
    truth = brute_force(model, "gaussian", x)
    return {s: (matrix, kept(truth, matrix)) for s, matrix in found.items()}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_algebra(regular: dict, structure: str) -> None:
    """Products, inverses, determinants and eigenvalues of another matrix than `to_dense`."""
    matrix, dense = regular[structure]
    P = len(dense)
    V = torch.randn(P, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(matrix @ V, dense @ V, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(matrix @ V[:, 0], dense @ V[:, 0], rtol=1e-10, atol=1e-12)
    assert matrix.trace() == pytest.approx(float(dense.trace()), rel=1e-12)
    torch.testing.assert_close(
        matrix.eigenvalues(), torch.linalg.eigvalsh(dense), rtol=1e-9, atol=1e-12
    )
    for damping in (0.0, 1e-3, 2.0):
        damped = dense + damping * torch.eye(P, dtype=torch.float64)
        torch.testing.assert_close(
            damped @ matrix.solve(V, damping=damping), V, rtol=1e-8, atol=1e-8
        )
        logdet = float(torch.linalg.slogdet(damped).logabsdet)
        assert matrix.logdet(damping=damping) == pytest.approx(logdet, rel=1e-8)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_by_name(regular: dict, structure: str) -> None:
    """Vectors by name that are put together in another order than the matrix has."""
    matrix, dense = regular[structure]
    flat = torch.linspace(-1, 1, len(dense), dtype=torch.float64)
    named = matrix.layout.unflatten(flat)
    reordered = dict(reversed(named.items()))
    products, solved = matrix @ reordered, matrix.solve(reordered, damping=0.1)
    assert matrix.layout.flatten(products).sub(dense @ flat).abs().max() < 1e-12
    assert torch.equal(matrix.layout.flatten(solved), matrix.solve(flat, damping=0.1))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_state(regular: dict, structure: str) -> None:
    """A state that misses something, or that torch.load refuses with weights_only."""
    matrix, _ = regular[structure]
    file = io.BytesIO()
    torch.save(matrix.state_dict(), file)
    file.seek(0)
    back = ff.parameters.from_state_dict(torch.load(file, weights_only=True))
    assert type(back) is type(matrix)
    assert torch.equal(back.to_dense(), matrix.to_dense())
    assert repr(back) == repr(matrix)
    assert back.layout == matrix.layout
    assert back.logdet(damping=0.5) == matrix.logdet(damping=0.5)


def test_blocks(regular: dict) -> None:
    """Blocks under the wrong name, or of the wrong rows."""
    matrix, dense = regular["block"]
    assert matrix.slices() == {"0": slice(0, 20), "2": slice(20, 35)}
    assert difference(matrix.block("2"), dense[20:, 20:]) < ROUNDING
    with pytest.raises(ValueError, match=r"name must be one of 0, 2, got '1'"):
        matrix.block("1")


# --- singular matrices ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_singular(structure: str, dtype: torch.dtype) -> None:
    """A factorisation that rounding let pass: with softmax outputs, adding the same to all logits'
    biases changes nothing, however many samples there are, and a weight of an input that is always
    zero has no information."""
    network = NETWORKS["linear"]
    x = torch.randn(80, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x[:, 1] = 0
    matrix = fisher(network.make(dtype), CATEGORICAL, x.to(dtype), structure=structure)
    v = torch.ones(matrix.layout.size)
    with pytest.raises(ValueError, match=r"damping must be positive, got 0: .*pass damping="):
        matrix.solve(v)
    assert matrix.logdet() == -float("inf")
    assert matrix.solve(v, damping=1e-2).isfinite().all()
    assert matrix.logdet(damping=1e-2) > -float("inf")
    assert matrix.eigenvalues()[0] >= 0


def test_few_samples_are_singular() -> None:
    """A matrix of rank n C = 6 with 43 parameters that passes as invertible."""
    network = NETWORKS["linear"]
    matrix = fisher(network.make(), CATEGORICAL, network.inputs(2), structure="full")
    assert int((matrix.eigenvalues() > 1e-12 * matrix.trace()).sum()) == 4  # 2 (C - 1)
    with pytest.raises(ValueError, match="is singular to rounding"):
        matrix.solve(torch.ones(43))
    with pytest.raises(ValueError, match=r"larger than the rounding of F, got 1e-18"):
        matrix.solve(torch.ones(43), damping=1e-18)


def test_small_but_regular() -> None:
    """A test for singular matrices that takes small numbers for zero: a scale of 1e-9 in one
    parameter leaves an eigenvalue of 1e-10, far from the rounding of float64."""

    model = nn.Linear(2, 1, bias=False).double()
    x = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    x[:, 1] *= 1e-5
    matrix = fisher(model, ff.parameters.Gaussian(), x, structure="full")
    v = torch.tensor([1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.solve(v), v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("damping", [-1e-3, float("nan"), float("inf")])
def test_damping(regular: dict, structure: str, damping: float) -> None:
    """A damping that makes a logarithm of a negative number, or a solution of nothing."""
    matrix, dense = regular[structure]
    message = r"damping must be finite and at least 0, got"
    with pytest.raises(ValueError, match=message):
        matrix.solve(torch.ones(len(dense)), damping=damping)
    with pytest.raises(ValueError, match=message):
        matrix.logdet(damping=damping)


# --- memory ---


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (
            "full",
            r"memory_budget must be at least 7\.41 MB for these 962 parameters, got 1 MB: 'model'"
            r' takes 7\.41 MB for its 962; structure="gram", "block", "kfac" or "diag" takes less,'
            r" or leave parameters out by parameters=",
        ),
        (
            "block",
            r"memory_budget must be at least 7\.3[0-9] MB for these 962 parameters, got 1 MB: '1'"
            r' takes 7\.3[0-9] MB for its 957; structure="kfac" or "diag" takes less',
        ),
    ],
)
def test_memory(structure: str, message: str) -> None:
    """A matrix that is allocated before it is known to fit."""
    calls = []
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1))
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(28, 33), nn.Linear(1, 1, False))
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(MemoryError, match=message):
        fisher(model, CATEGORICAL, torch.ones(3, 2), structure=structure, memory_budget="1 MB")
    assert not calls


@pytest.mark.parametrize("structure", ["block", "full"])
def test_budget(structure: str) -> None:
    """A bound that is not the bytes of the matrices: 43 parameters, in blocks of 25 and 18."""
    network = NETWORKS["linear"]
    model, x = network.make(), network.inputs()
    needed = 8 * (43**2 if structure == "full" else 25**2 + 18**2)
    fisher(model, CATEGORICAL, x, structure=structure, memory_budget=needed)
    fisher(model, CATEGORICAL, x, structure=structure, memory_budget=None)
    with pytest.raises(MemoryError, match="memory_budget must be at least"):
        fisher(model, CATEGORICAL, x, structure=structure, memory_budget=needed - 1)


@pytest.mark.parametrize("structure", ["block", "full"])
def test_few_rows_at_a_time(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that are lost or counted twice where per-sample gradients are multiplied by parts."""
    network = NETWORKS["batch norm 2d"]
    model, x = network.make(), network.inputs(7)
    whole = fisher(model, CATEGORICAL, x, structure=structure).to_dense()
    monkeypatch.setattr("fisherfast.parameters.structures.block.ROWS_BYTES", 2 * 8 * 99)
    parts = fisher(model, CATEGORICAL, x, structure=structure).to_dense()
    assert difference(parts, whole) < ROUNDING


# --- Monte Carlo ---

DRAWS = 40
"""Repetitions at each number of samples."""

ALLOWED = (13.5, 87.5)
"""Sum of 40 squared normal numbers of variance 1: outside with probability 5e-5. With three numbers
of samples that is a false alarm for 1 of 7000 seeds; the seeds are fixed.

Power: labels that are the same in all draws of a sample multiply the sum by the number of samples:
99.999 % fall outside at 8. A variance that is wrong by a factor of 4 falls outside in 99.1 % of
cases, already at one sample."""


@pytest.mark.parametrize("structure", STRUCTURES)
def test_monte_carlo(structure: str) -> None:
    """Labels that are not the network's own, or draws of one sample that are not independent: the
    error of the trace has the variance of the brute force, at 1, 8 and 64 draws per sample."""
    network = NETWORKS["linear"]
    model, x = network.make(), network.inputs(8)
    mean, variance = moments_of_trace(model, "categorical", x)
    seeds = itertools.count()
    for samples in (1, 8, 64):
        squares = 0.0
        for _ in range(DRAWS):
            found = fisher(
                model,
                CATEGORICAL,
                x,
                structure=structure,
                fisher_type="mc",
                samples=samples,
                seed=next(seeds),
            ).trace()
            squares += (found - mean) ** 2 / (variance / samples)
        assert ALLOWED[0] < squares < ALLOWED[1], samples
