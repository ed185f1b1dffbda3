"""What the documentation promises of a Fisher matrix, whatever its structure.

Its methods tell of one matrix; structures stand to each other as they should.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.parameters_oracle import brute_force
from support.parameters_small import (
    ALL_OF_F,
    CATEGORICAL,
    LINEAR_IN_F,
    OUTPUTS,
    ROUNDING,
    STRUCTURES,
    dense_network,
    difference,
    inputs,
    least_eigenvalue,
    measure,
    network,
)
from torch import Tensor, nn

import fisherfast as ff


@pytest.fixture(scope="module")
def found() -> dict[str, ff.parameters.ParameterFisher]:
    return {structure: measure(structure) for structure in STRUCTURES}


@pytest.fixture(scope="module")
def truth() -> Tensor:
    return brute_force(network(), "categorical", inputs(7))


# --- one matrix, told in several ways ---


@pytest.mark.parametrize("structure", STRUCTURES)
def test_methods_tell_of_one_matrix(
    found: dict[str, ff.parameters.ParameterFisher], structure: str
) -> None:
    """A method of some structure that speaks of another matrix than its `to_dense`."""
    matrix = found[structure]
    dense = matrix.to_dense()
    assert matrix.shape == (matrix.layout.size, matrix.layout.size) == tuple(dense.shape)
    assert dense.dtype == matrix.diag().dtype == matrix.eigenvalues().dtype == torch.float64
    assert difference(dense, dense.T) < ROUNDING
    assert least_eigenvalue(dense) > -ROUNDING
    assert difference(matrix.diag(), dense.diag()) < ROUNDING
    assert isinstance(matrix.trace(), float)
    assert matrix.trace() == pytest.approx(float(dense.trace()), rel=ROUNDING)
    values, all_values = matrix.eigenvalues(), torch.linalg.eigvalsh(dense)
    assert bool((values.diff() >= 0).all())
    assert difference(values, all_values[-len(values) :]) < ROUNDING
    assert bool((values >= 0).all())
    assert float(all_values[: -len(values)].abs().sum()) < ROUNDING * float(values[-1])
    probe = torch.linspace(-1, 1, len(dense), dtype=torch.float64)
    assert difference(matrix @ probe, dense @ probe) < ROUNDING


@pytest.mark.parametrize("damping", [1e-4, 0.3, 50.0])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_damping_is_added_to_the_matrix(
    found: dict[str, ff.parameters.ParameterFisher], structure: str, damping: float
) -> None:
    """Damping by its root for each Kronecker factor, relative to the trace, or times n."""
    matrix = found[structure]
    damped = matrix.to_dense() + damping * torch.eye(matrix.layout.size, dtype=torch.float64)
    probe = torch.linspace(-1, 2, len(damped), dtype=torch.float64)
    expected = torch.linalg.solve(damped, probe)
    assert difference(matrix.solve(probe, damping=damping), expected) < 1e-9  # condition 1e5
    logdet = matrix.logdet(damping=damping)
    assert isinstance(logdet, float)
    assert logdet == pytest.approx(float(torch.logdet(damped)), rel=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_vectors_come_back_as_they_went_in(
    found: dict[str, ff.parameters.ParameterFisher], structure: str
) -> None:
    """Names mixed up, columns taken for rows, or a product that writes into the vector given."""
    matrix = found[structure]
    probe = torch.linspace(-1, 1, matrix.layout.size, dtype=torch.float64)
    columns = torch.stack([probe, probe.flip(0), probe**2], 1)
    named = {k: v.clone() for k, v in matrix.layout.unflatten(probe).items()}
    actions: list[Callable[[Any], Any]] = [
        lambda v: matrix @ v,
        lambda v: matrix.solve(v, damping=0.2),
    ]
    for action in actions:
        flat, several, by_name = action(probe), action(columns), action(named)
        assert flat.shape == probe.shape
        assert several.shape == columns.shape
        for j in range(columns.shape[1]):
            assert difference(several[:, j], action(columns[:, j])) < ROUNDING
        assert list(by_name) == [name for name, _ in network().named_parameters()]
        for name, w in network().named_parameters():
            assert by_name[name].shape == w.shape
        assert difference(matrix.layout.flatten(by_name), flat) < ROUNDING
        backwards = action(dict(reversed(list(named.items()))))
        assert difference(matrix.layout.flatten(backwards), flat) < ROUNDING
    assert torch.equal(probe, torch.linspace(-1, 1, matrix.layout.size, dtype=torch.float64))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_unusual_vectors(found: dict[str, ff.parameters.ParameterFisher], structure: str) -> None:
    """The parameters themselves, float32, no columns at all, a strided matrix: each works in
    every structure, in float64, and is differentiated like the dense matrix."""
    matrix, model = found[structure], network()
    probe = torch.cat([w.detach().flatten() for w in model.parameters()])
    for action in (matrix.__matmul__, lambda v: matrix.solve(v, damping=0.2)):
        expected = action(probe)
        by_name = action(dict(model.named_parameters()))
        assert torch.equal(matrix.layout.flatten(by_name), expected)
        parabola = 0.5 * (probe @ matrix.layout.flatten(action(dict(model.named_parameters()))))
        gradient = torch.autograd.grad(parabola, list(model.parameters()))
        found_gradient = torch.cat([g.flatten() for g in gradient])
        assert difference(found_gradient, 0.5 * expected) < ROUNDING
        by_function = torch.func.grad(lambda v, f=action: 0.5 * v @ f(v))(probe)
        assert difference(by_function, expected) < ROUNDING
        single = action(probe.float())
        assert single.dtype == torch.float64
        assert difference(single, action(probe.float().double())) < ROUNDING
        assert action(probe[:, None][:, :0]).shape == (matrix.layout.size, 0)
        wide = torch.stack([probe, 2 * probe]).T  # columns that are not contiguous
        assert difference(action(wide), torch.stack([expected, 2 * expected], 1)) < ROUNDING


@pytest.mark.parametrize("structure", STRUCTURES)
def test_wrong_vectors(found: dict[str, ff.parameters.ParameterFisher], structure: str) -> None:
    """A complex vector whose imaginary part is dropped, names that are missing, other shapes."""
    matrix = found[structure]
    size = matrix.layout.size
    wrong: list[tuple[Any, type[Exception], str]] = [
        (torch.ones(size, dtype=torch.complex64), TypeError, "vector must be real"),
        ([1.0] * size, TypeError, "vector must be a tensor or a mapping"),
        (torch.ones(size - 1), ValueError, "vector must have shape"),
        (torch.ones(1, size), ValueError, "vector must have shape"),
        ({"0.weight": torch.ones(3, 2, 3)}, ValueError, r"tensors must hold .*'0\.bias'"),
        ({n: [0.0] for n in matrix.layout.names}, TypeError, "0.weight must be a tensor"),
        (
            {n: torch.ones(1) for n in matrix.layout.names},
            ValueError,
            r"0\.weight must have shape \[3, 2, 3\], got \[1\]",
        ),
    ]
    for vector, error, message in wrong:
        with pytest.raises(error, match=message):
            matrix @ vector
        with pytest.raises(error, match=message):
            matrix.solve(vector, damping=1.0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_wrong_damping(found: dict[str, ff.parameters.ParameterFisher], structure: str) -> None:
    """Damping that makes the matrix indefinite, or no number."""
    matrix = found[structure]
    for damping in (-1e-3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"damping must be finite and at least 0, got"):
            matrix.solve(torch.ones(matrix.layout.size), damping=damping)
        with pytest.raises(ValueError, match=r"damping must be finite and at least 0, got"):
            matrix.logdet(damping=damping)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_state_is_all_of_it(
    found: dict[str, ff.parameters.ParameterFisher], structure: str
) -> None:
    """A state that leaves something out, or needs more than plain numbers to be read."""
    matrix = found[structure]
    file = io.BytesIO()
    torch.save(matrix.state_dict(), file)
    file.seek(0)
    back = ff.parameters.from_state_dict(torch.load(file, weights_only=True))
    assert type(back) is type(matrix)
    assert repr(back) == repr(matrix)
    assert (back.samples, back.fisher_type, back.name) == (7, "exact", matrix.name)
    assert back.layout == matrix.layout
    assert torch.equal(back.to_dense(), matrix.to_dense())
    assert torch.equal(back.eigenvalues(), matrix.eigenvalues())
    assert back.logdet(damping=0.1) == matrix.logdet(damping=0.1)
    probe = torch.linspace(0, 1, matrix.layout.size, dtype=torch.float64)
    assert torch.equal(back @ probe, matrix @ probe)
    assert torch.equal(back.solve(probe, damping=0.1), matrix.solve(probe, damping=0.1))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_own_arithmetic_leaves_the_matrix_alone(structure: str) -> None:
    """Results that are views of what the matrix keeps: a user's in-place step would change it."""
    matrix = measure(structure)
    before, values = matrix.to_dense().clone(), matrix.eigenvalues().clone()
    for view in (matrix.diag(), matrix.to_dense(), matrix.eigenvalues()):
        view.fill_(-1.0)
    assert torch.equal(matrix.to_dense(), before)
    assert torch.equal(matrix.eigenvalues(), values)
    assert matrix.trace() == pytest.approx(float(before.trace()), rel=ROUNDING)


# --- how the structures stand to each other ---


def test_structures_agree_where_they_keep_the_same(
    found: dict[str, ff.parameters.ParameterFisher], truth: Tensor
) -> None:
    """A structure with a scale, an order or a sum over positions of its own."""
    for structure in ALL_OF_F:
        assert difference(found[structure].to_dense(), truth) < ROUNDING
    for structure in LINEAR_IN_F:
        assert difference(found[structure].diag(), truth.diag()) < ROUNDING
    block = found["block"]
    assert isinstance(block, ff.parameters.BlockFisher)
    assert set(block.slices()) == {"0", "3", "4"}
    for name, where in block.slices().items():
        assert difference(block.block(name), truth[where, where]) < ROUNDING
    values = torch.linalg.eigvalsh(truth)
    for structure in ALL_OF_F:
        found_values = found[structure].eigenvalues()
        assert difference(found_values, values[-len(found_values) :]) < ROUNDING
        assert found[structure].logdet(damping=0.1) == pytest.approx(
            float((values + 0.1).log().sum()), rel=ROUNDING
        )


@pytest.mark.parametrize("rank", [1, 4, 14])
def test_lowrank_is_below_f_and_says_by_how_much(truth: Tensor, rank: int) -> None:
    """Eigenvalues that are too large, directions that are not those of F, and a bound or a missing
    trace that promise more than is kept."""
    low = measure("lowrank", rank=rank)
    assert isinstance(low, ff.parameters.LowRankFisher)
    values, directions = torch.linalg.eigh(truth)
    left = truth - low.to_dense()
    assert least_eigenvalue(left + ROUNDING * values[-1] * torch.eye(len(left))) > -ROUNDING
    assert low.values.shape == (rank,)
    assert difference(low.values, values.flip(0)[:rank]) < ROUNDING
    assert difference(low.directions.T @ low.directions, torch.eye(rank)) < ROUNDING
    overlap = (low.directions[:, 0] @ directions[:, -1]).abs()
    assert float(overlap) == pytest.approx(1.0, abs=ROUNDING)
    scale = float(values.sum())
    assert low.missing_trace == pytest.approx(float(left.trace()), abs=ROUNDING * scale)
    assert low.trace() + low.missing_trace == pytest.approx(float(truth.trace()), rel=ROUNDING)
    assert low.error_bound >= float(torch.linalg.eigvalsh(left)[-1]) - ROUNDING * scale
    assert low.logdet(damping=0.01) <= float((values + 0.01).log().sum()) + 1e-9


def test_kronecker_is_exact_for_one_sample_of_a_dense_network() -> None:
    """Factors with 1/n twice or never, a bias outside of the block, B (x) A the wrong way round."""
    model, x = dense_network(5), inputs(1)[:, 0, :4]
    kfac = ff.parameters.fisher(model, CATEGORICAL, x, structure="kfac")
    block = ff.parameters.fisher(model, CATEGORICAL, x, structure="block")
    assert difference(kfac.to_dense(), block.to_dense()) < ROUNDING
    assert isinstance(kfac, ff.parameters.KroneckerFisher)
    assert not kfac.diagonal_names


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kronecker_trace_is_that_of_its_factors(sharing: str) -> None:
    """Factors of another normalisation than the docstring's, the bias's 1 left out of A, or a sum
    over positions in the wrong place; the norm keeps its exact diagonal."""
    x, model = inputs(6), network()
    kfac = ff.parameters.fisher(model, CATEGORICAL, x, structure="kfac", sharing=sharing)
    assert isinstance(kfac, ff.parameters.KroneckerFisher)
    assert set(kfac.diagonal_names) == {"3.weight", "3.bias"}
    assert "3.weight" in repr(kfac)

    outer, inner = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i in range(6):
        hidden = model[0](x[i : i + 1])
        hidden.retain_grad()
        log_p = model[1:](hidden).log_softmax(1)[0]
        rows = torch.cat([x[i].unfold(1, 3, 2).transpose(0, 1).flatten(1), torch.ones(2, 1)], 1)
        if sharing == "expand":
            outer += rows.square().sum() / (6 * 2)
        else:
            outer += rows.mean(0).square().sum() / 6
        for c in range(OUTPUTS):  # every label with its probability: the columns of the root
            (g,) = torch.autograd.grad(log_p[c], hidden, retain_graph=True)
            summed = g.sum(2, keepdim=True) if sharing == "reduce" else g
            inner += log_p[c].detach().exp() * summed.square().sum() / 6
    parts = kfac.layout.unflatten(kfac.diag())
    trace = parts["0.weight"].sum() + parts["0.bias"].sum()
    assert float(trace) == pytest.approx(float(outer * inner), rel=ROUNDING)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_matrix_of_zero(structure: str) -> None:
    """Inputs that say nothing of the weights (all zero, as behind dead units): F is zero, no
    error, and `solve` needs damping. For low rank, no direction is left."""
    model = nn.Linear(4, 3, bias=False).double()
    x = torch.zeros(5, 4, dtype=torch.float64)
    settings = {"rank": 2} if structure == "lowrank" else {}
    matrix = ff.parameters.fisher(model, CATEGORICAL, x, structure=structure, **settings)  # type: ignore[arg-type]
    for each in (matrix, ff.parameters.from_state_dict(matrix.state_dict())):
        assert each.trace() == 0
        assert not each.eigenvalues().any()
        assert torch.equal(each.to_dense(), torch.zeros(12, 12, dtype=torch.float64))
        probe = torch.linspace(-1, 1, 12, dtype=torch.float64)
        assert not (each @ probe).any()
        assert difference(each.solve(probe, damping=0.25), 4 * probe) < ROUNDING
        assert each.logdet(damping=0.25) == pytest.approx(12 * math.log(0.25))
        assert each.logdet() == -math.inf
        with pytest.raises(ValueError, match="damping must be positive, got 0"):
            each.solve(probe)
