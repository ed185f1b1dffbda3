"""Every structure on every network equals a brute force over samples and classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from support.networks_zoo import seeded
from support.pairwise import pairwise
from support.parameters_oracle import brute_force, moments_of_trace
from support.parameters_small import (
    CATEGORICAL,
    LINEAR_IN_F,
    STRUCTURES,
    blocks_of,
    difference,
    labels,
    measure,
)
from support.parameters_zoo import NETWORKS, OUTPUTS, Network, Written
from torch import Tensor, nn

from fisherfast import parameters as fp
from fisherfast.parameters.structures import jacobian, layer_rows, lowrank
from fisherfast.parameters.structures.layer_rows import FactorRows

ALL_OF_F = ("full", "gram", "lowrank", "streamed")
SAMPLES = 5
BATCH = 4  # the second batch is smaller, of one sample

ROUNDING = 1e-11
"""Largest difference in float64, relative to the largest entry; measured: below 2e-14."""

SINGLE_ROUNDING = 3e-6
"""The same of a network in float32; measured: at most 3e-7."""

NORMAL = torch.randn(400, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
"""Vectors to multiply with: products for each column take long."""

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # of torch, on copies


def kept(dense: Tensor, matrix: fp.ParameterFisher) -> Tensor:
    """What a structure keeps of a dense matrix."""
    if matrix.structure in ALL_OF_F:
        return dense
    if matrix.structure == "diag":
        return dense.diag().diag()
    return blocks_of(dense, matrix.layout)


def whole(structure: str) -> dict[str, int]:
    """Settings for all directions."""
    return {"rank": 1000} if structure == "lowrank" else {}


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_brute_force(name: str) -> None:
    """A rule that mixes samples, positions, groups or taps of a kernel; squares taken before
    positions are summed; parameters that are missed, or counted twice where they are tied; a kept
    layer that lacks a position or its padding; and a state that does not hold all of it."""
    network = NETWORKS[name]
    model, x = network.make(), network.inputs(SAMPLES)
    truth = brute_force(model, "categorical", x)
    v = NORMAL[: len(truth)]
    for structure in ("diag", "block", *ALL_OF_F):
        found = measure(structure, x, model=model, batch_size=BATCH, **whole(structure))
        assert difference(found @ v, kept(truth, found) @ v) < ROUNDING, structure
        assert difference(found.diag(), truth.diag()) < ROUNDING, structure
        if isinstance(found, fp.GramFisher):
            assert_gram(found, truth)
            again = fp.from_state_dict(found.state_dict())
            assert torch.equal(again @ v, found @ v)
        if isinstance(found, fp.LowRankFisher):
            assert len(found.values) <= (OUTPUTS - 1) * SAMPLES
            assert found.missing_trace < 1e-12 * float(truth.trace())


@pytest.mark.parametrize(
    "name", ["shared linear", "conv2d grouped", "layer norm", "embedding", "LSTM", "tied head"]
)
def test_single_precision_and_labels(name: str) -> None:
    """Products or sums in less than the precision of the network, here of the data's labels."""
    network = NETWORKS[name]
    x, y = network.inputs(SAMPLES), labels(SAMPLES)
    truth = brute_force(network.make(), "categorical", x, y)
    single = network.inputs(SAMPLES, torch.float32), y
    for structure in ("diag", "block"):
        model = network.make(torch.float32)
        found = measure(structure, single, "empirical", model=model, batch_size=BATCH)
        assert found.diag().dtype == torch.float64
        assert difference(found.to_dense(), kept(truth, found)) < SINGLE_ROUNDING, structure


LIKELIHOODS = {
    "gaussian": fp.Gaussian(variance=0.3),
    "bernoulli": fp.Bernoulli(),
    "poisson": fp.Poisson(),
}


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_likelihoods(kind: str) -> None:
    """A structure that takes the columns of one likelihood for those of another, or leaves some
    out."""
    network = NETWORKS["conv2d grouped"]
    model, x = network.make(), network.inputs(SAMPLES)
    truth = brute_force(model, kind, x, variance=0.3)
    for structure in LINEAR_IN_F:
        found = measure(structure, x, model=model, likelihood=LIKELIHOODS[kind])
        assert difference(found.to_dense(), kept(truth, found)) < 1e-10  # the tail of the counts


@pairwise(fisher_type=["mc", "empirical"], structure=[*STRUCTURES, "streamed"])
def test_types_and_batches(fisher_type: str, structure: str) -> None:
    """Labels that are drawn in the order of batches, or anew in a later pass, and columns that are
    those of another type: one by one and in batches of three the matrix is that of "full"."""
    network = NETWORKS["conv2d strided"]
    data = network.inputs(7), labels(7)
    settings = {"model": network.make(), "seed": 5, "samples": 3 if fisher_type == "mc" else 1}
    full = measure("full", data, fisher_type, **settings).to_dense()
    found = [
        measure(structure, data, fisher_type, batch_size=size, **settings, **whole(structure))
        for size in (7, 3, 1)
    ]
    v = NORMAL[: len(full)]
    expected = found[0] @ v if structure == "kfac" else kept(full, found[0]) @ v
    for each in found:
        assert (each.fisher_type, each.samples) == (fisher_type, 7)
        assert difference(each @ v, expected) < ROUNDING
    another = measure(structure, data, fisher_type, **settings | {"seed": 6}, **whole(structure))
    assert torch.equal(another @ v, found[0] @ v) == (fisher_type == "empirical")


def test_parts_of_a_block() -> None:
    """Parameters of one module that arrive apart, in different batches of columns: the model's own
    come row by row, one of them by the rule of a layer."""

    def build() -> nn.Module:
        layer = nn.Linear(4, OUTPUTS)
        own = {"first": nn.Parameter(torch.eye(4)), "second_bias": layer.bias}
        return Written(lambda m, x: m.layer(torch.tanh(x @ m.first)), **own, layer=layer)

    network = Network(build, (4,))
    model, x = network.make(), network.inputs(SAMPLES)
    # the bias arrives with the layer's weight, and belongs to the model's own block
    names = [name for name, _ in model.named_parameters()]
    assert names == ["first", "second_bias", "layer.weight"]
    truth = brute_force(model, "categorical", x)
    for structure in ("diag", "block", "full"):
        found = measure(structure, x, model=model)
        assert difference(found.to_dense(), kept(truth, found)) < ROUNDING


def test_blocks() -> None:
    """Blocks under the wrong name, or of the wrong rows."""
    matrix = measure("block")
    assert isinstance(matrix, fp.BlockFisher)
    assert matrix.slices() == {"0": slice(0, 16), "3": slice(16, 32), "4": slice(32, 59)}
    assert torch.equal(matrix.block("4"), matrix.to_dense()[32:, 32:])
    with pytest.raises(ValueError, match=r"name must be one of 0, 3, 4, got '1'"):
        matrix.block("1")


@pytest.mark.parametrize("structure", ["block", "full", "lowrank", "streamed"])
def test_few_rows_at_a_time(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that are lost or counted twice where per-sample gradients are multiplied by
    parts, and columns where a batch has too many rows to keep."""
    network = NETWORKS["batch norm"]
    model, x = network.make(), network.inputs(7)
    expected = measure(structure, x, model=model, **whole(structure))
    modules = "fisherfast.parameters.structures"
    monkeypatch.setattr(f"{modules}.block.ROWS_BYTES", 2 * 8 * 99)
    for name in ("lowrank", "streamed"):
        monkeypatch.setattr(f"{modules}.{name}.ROWS_AT_ONCE", 8)
    parts = measure(structure, x, model=model, **whole(structure))
    v = NORMAL[: parts.layout.size]
    assert difference(parts @ v, expected @ v) < ROUNDING
    assert difference(parts.diag(), expected.diag()) < ROUNDING


# --- the Gram matrix ---


def assert_gram(found: fp.ParameterFisher, truth: Tensor) -> None:
    """All of the matrix, and the eigenvalues of the Gram matrix."""
    assert isinstance(found, fp.GramFisher)
    assert difference(found.to_dense(), truth) < ROUNDING
    assert difference(found.diag(), truth.diagonal()) < ROUNDING
    rank = min(found.rows, len(truth))
    values = (torch.linalg.eigvalsh(each)[-rank:] for each in (found.gram(), truth))
    assert difference(*values) < ROUNDING


@pytest.mark.parametrize(
    "name", ["linear", "shared linear", "conv2d same", "conv2d grouped", "embedding"]
)
def test_factors_that_are_kept_though_rows_are_smaller(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form that small layers do not take by themselves, and tiles smaller than the batch."""
    monkeypatch.setattr(layer_rows, "TILE_NUMBERS", 1)
    monkeypatch.setattr(jacobian, "FACTOR_COST", 0.0)
    model, x = NETWORKS[name].make(), NETWORKS[name].inputs(4)
    found = measure("gram", x, model=model, batch_size=3)
    assert all(isinstance(part, FactorRows) for part in found._jacobian.pieces[0].values())
    assert_gram(found, brute_force(model, "categorical", x))


def test_batches_of_other_lengths() -> None:
    """Batches whose layers are kept in different forms: a shared layer's rows are smaller than long
    sequences, and larger than short ones."""
    model, generator = NETWORKS["shared linear"].make(), torch.Generator().manual_seed(2)
    batches = [
        torch.randn(3, length, 4, dtype=torch.float64, generator=generator) for length in (1, 12, 2)
    ]
    found = measure("gram", iter(batches), model=model)
    forms = {tuple(type(part) for part in piece.values()) for piece in found._jacobian.pieces}
    assert len(forms) == 2
    truths = torch.stack([brute_force(model, "categorical", x) for x in batches])
    assert_gram(found, truths.mean(0))


def chain(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(widths)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("build", "samples", "rank"),
    [
        (lambda: nn.Sequential(chain(20, 64), nn.Tanh(), chain(64, 4)), 60, 60 * 4),
        (lambda: chain(6, 3, 3, 3, 5), 300, 3 * (6 + 5 - 3) + 5),
        (lambda: chain(6, 8, 8, 8, 5), 300, 5 * (6 + 1)),
    ],
)
def test_rank(build: Callable[[], nn.Module], samples: int, rank: int, dtype: torch.dtype) -> None:
    """Rounding that counts as rank, or a threshold above what is there: a wide network has full
    rank n C; one without activations is an affine map of rank at most its width, whatever its
    number of parameters."""
    model = seeded(build).to(dtype)
    width = next(model.parameters()).shape[1]
    x = torch.randn(samples, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = measure("gram", x, model=model, likelihood=fp.Gaussian())
    assert isinstance(found, fp.GramFisher)
    assert found.rank() == rank


def test_training_that_goes_on_changes_nothing() -> None:
    """A result that still reads the network: weights, running statistics, the inputs."""
    model, x = NETWORKS["batch norm"].make(), NETWORKS["batch norm"].inputs(4)
    found, truth = measure("gram", x, model=model), brute_force(model, "categorical", x)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers(), x]:
            if tensor.is_floating_point():
                tensor.mul_(2).add_(1)
    with torch.inference_mode():
        assert_gram(found, truth)


# --- low rank ---


@pytest.mark.parametrize("name", ["linear", "conv2d grouped", "called twice"])
def test_eigenpairs_are_exact(name: str) -> None:
    """Directions or eigenvalues that are not those of the brute force, and a wrong account of what
    is left out."""
    model, x = NETWORKS[name].make(), NETWORKS[name].inputs(6)
    truth = brute_force(model, "categorical", x)
    values, vectors = torch.linalg.eigh(truth)
    found = measure("lowrank", x, model=model, batch_size=4)
    assert isinstance(found, fp.LowRankFisher)
    assert difference(found.eigenvalues(), values[-4:]) < ROUNDING
    cut = (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T
    assert difference(found.to_dense(), cut) < ROUNDING
    assert difference(found.diag(), cut.diagonal()) < ROUNDING
    assert math.isclose(found.trace() + found.missing_trace, float(truth.trace()), rel_tol=1e-10)
    assert difference(found.directions.T @ found.directions, torch.eye(4)) < ROUNDING
    assert math.isclose(found.error_bound, float(values[-5]), rel_tol=1e-8)


def test_many_batches_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that loses what came before, or adds to F: F - F_k is positive semi-definite, within
    its bound, and its trace is what is said."""
    monkeypatch.setattr(lowrank, "ROWS_AT_ONCE", 24)
    model, x = NETWORKS["conv2d grouped"].make(), NETWORKS["conv2d grouped"].inputs(64)
    found = measure("lowrank", iter(x.split(4)), model=model, rank=6)  # can be read once
    assert isinstance(found, fp.LowRankFisher)
    truth = brute_force(model, "categorical", x)
    rest = torch.linalg.eigvalsh(truth - found.to_dense())
    assert float(rest.min()) > -1e-13 * float(truth.trace())
    assert float(rest.max()) <= found.error_bound * (1 + 1e-9)
    assert math.isclose(found.missing_trace, float(rest.sum()), rel_tol=1e-9)
    exact = torch.linalg.eigvalsh(truth)[-6:]
    assert bool((found.eigenvalues() <= exact * (1 + 1e-12)).all())
    # 0.9998 of the trace of the best six directions was measured; those of the first eight samples
    # have 0.98 of it
    assert found.trace() > 0.999 * float(exact.sum())


@pytest.mark.parametrize("zeros_first", [True, False])
def test_a_part_of_the_data_that_says_nothing(
    monkeypatch: pytest.MonkeyPatch, zeros_first: bool
) -> None:
    """A merge with a basis of no directions, or with rows that are all zero."""
    monkeypatch.setattr(lowrank, "ROWS_AT_ONCE", 8)
    model = seeded(lambda: nn.Linear(3, 3, bias=False).double())
    parts = [torch.zeros(20, 3, dtype=torch.float64), NORMAL[:4]]
    data = torch.cat(parts if zeros_first else parts[::-1])
    full = measure("full", data, model=model)
    found = measure("lowrank", data, model=model, rank=9, batch_size=4)
    torch.testing.assert_close(found.to_dense(), full.to_dense(), rtol=1e-11, atol=1e-15)


# --- Monte Carlo ---

DRAWS = 40
"""Repetitions at each number of samples."""

ALLOWED = (13.5, 87.5)
"""Sum of 40 squared normal numbers of variance 1: outside with probability 5e-5. With two numbers
of samples that is a false alarm for 1 of 10 000 seeds; the seeds are fixed.

Power: labels that are the same in all draws of a sample multiply the sum by the number of samples:
99.999 % fall outside at 8. A variance that is wrong by a factor of 4 falls outside in 99.1 % of
cases, already at one sample."""


def test_monte_carlo() -> None:
    """Labels that are not the network's own, or draws of one sample that are not independent: the
    error of the trace has the variance of the brute force, at 1 and at 8 draws per sample. All
    structures have the same columns (`test_types_and_batches`)."""
    network = NETWORKS["linear"]
    model, x = network.make(), network.inputs(8)
    mean, variance = moments_of_trace(model, x)
    seeds = itertools.count()
    for samples in (1, 8):
        squares = 0.0
        for _ in range(DRAWS):
            found = fp.fisher(
                model, CATEGORICAL, x, fisher_type="mc", samples=samples, seed=next(seeds)
            )
            squares += (found.trace() - mean) ** 2 / (variance / samples)
        assert ALLOWED[0] < squares < ALLOWED[1], samples


# --- on a GPU ---


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["linear", "conv2d strided", "batch norm", "embedding"])
def test_the_same_matrix_on_a_gpu(name: str, structure: str) -> None:
    """Kernels that differ, numbers made on another device than they are used on, labels that are
    drawn by the device, and anchors and masks that stay on the CPU."""
    model, x = NETWORKS[name].make(), NETWORKS[name].inputs(5)
    expected = measure(structure, x, "mc", model=model).to_dense()
    model, x = model.cuda(), x.cuda()
    there = measure(structure, x, "mc", model=model)
    assert there.diag().device.type == "cuda"
    # of the largest entry; sums are taken in another order
    assert difference(there.to_dense().cpu(), expected) < 1e-9
    assert all(mask.device.type == "cuda" for mask in there.importance().least(0.5).values())
    keep = fp.ElasticWeightConsolidation(strength=1.0)
    keep.consolidate(model, fisher=there)
    assert keep.penalty(model).item() == pytest.approx(0, abs=1e-9)
