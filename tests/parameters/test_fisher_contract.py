"""What `fisher` promises of its arguments: data, costs, memory, errors, parameter layouts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.networks_zoo import seeded
from support.parameters_small import (
    CATEGORICAL,
    OUTPUTS,
    ROUNDING,
    STRUCTURES,
    dense_network,
    difference,
    inputs,
    labels,
    measure,
    network,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fisherfast as ff


class Inputs(Dataset[Tensor]):
    """A Dataset of x alone."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index]


# --- data ---


@pytest.mark.parametrize("structure", STRUCTURES)
def test_ways_to_give_the_data(structure: str) -> None:
    """A kind of data of which a batch is lost, read twice, or of whose pair the labels become
    inputs."""
    x, y = inputs(7), labels(7)
    expected = measure(structure, x).to_dense()
    pairs = TensorDataset(x, y)
    ways: list[Any] = [
        (x, y),
        x.numpy(),
        (x.numpy(), y.numpy()),
        Inputs(x),
        pairs,
        DataLoader(pairs, batch_size=3),
        DataLoader(Inputs(x), batch_size=7),
        [x[:2], x[2:3], x[3:]],
        iter([(x[:2], y[:2]), (x[2:6], y[2:6]), (x[6:], y[6:])]),
        (batch for batch in (x[:5], x[5:])),
    ]
    for way in ways:
        found = measure(structure, way, batch_size=4)
        assert found.samples == 7, type(way)
        assert difference(found.to_dense(), expected) < ROUNDING, type(way)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_inputs_take_the_dtype_of_the_model(structure: str) -> None:
    """Inputs in float32 for a network in float64, and the other way round; results in float64."""
    x = inputs(7).float()
    expected = measure(structure, x.double()).to_dense()
    assert difference(measure(structure, x).to_dense(), expected) < ROUNDING
    settings = {"rank": 4} if structure == "lowrank" else {}
    single = ff.parameters.fisher(
        network().float(), CATEGORICAL, x.double(), structure=structure, **settings
    )
    assert single.diag().dtype == torch.float64
    assert difference(single.to_dense(), expected) < 1e-5  # of float32; measured: 1e-6


def test_labels_out_of_range_show_only_where_they_are_used() -> None:
    """Labels are used by "empirical" only."""
    x, wrong = inputs(4), torch.full((4,), OUTPUTS)
    assert measure("diag", (x, wrong)).samples == 4
    with pytest.raises(ValueError, match=r"labels must .*got"):
        measure("diag", (x, wrong), "empirical")
    with pytest.raises(ValueError, match=r"data must hold labels, got"):
        measure("diag", x, "empirical")


@pytest.mark.parametrize("empty", [torch.zeros(0, 2, 5), [], iter(())])
def test_no_data(empty: Any) -> None:
    """0 / 0 in place of an error."""
    with pytest.raises(ValueError, match="must"):
        measure("diag", empty)


# --- costs ---


class Counting(torch.autograd.Function):
    """The identity; counts the backward passes."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        Counting.passes += 1
        return g


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(Counting.apply(self.first(x))))


def passes(likelihood: ff.parameters.Likelihood, data: Any, **settings: Any) -> int:
    """Backward passes of one batch: those of four batches less those of one, since what a new
    network is examined with is done once."""
    model = seeded(lambda: Counted().double()).eval()
    counts = []
    for batches in (1, 1, 4):
        Counting.passes = 0
        ff.parameters.fisher(model, likelihood, iter([data] * batches), **settings)
        counts.append(Counting.passes)
    assert (counts[2] - counts[1]) % 3 == 0
    return (counts[2] - counts[1]) // 3


@pytest.mark.parametrize("structure", ["diag", "kfac", "full", "gram"])
def test_backward_passes_of_a_batch(structure: str) -> None:
    """One pass per output, one less for classes, one per drawn label, one for the data's: a
    structure that goes back once more, or once per sample."""
    x, y = inputs(6)[:, 0, :4], labels(6)
    kind = {"structure": structure}
    assert passes(ff.parameters.Gaussian(), x, **kind) == OUTPUTS
    assert passes(CATEGORICAL, x, **kind) == OUTPUTS - 1
    assert passes(CATEGORICAL, x, fisher_type="mc", samples=5, **kind) == 5
    assert passes(CATEGORICAL, (x, y), fisher_type="empirical", **kind) == 1


def kept_bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(kept_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(kept_bytes(value) for value in state)
    return 0


def test_numbers_that_are_kept() -> None:
    """Structures that keep more than the guide's table says: 8 P, 8 sum (D^2 + M^2), 8 sum p^2,
    8 P^2, 8 P rank; up to a hundred numbers besides."""
    model, x = dense_network(20), inputs(6)[:, 0, :4]
    first, last = 20 * 5, 3 * 21
    size = first + last
    expected = {
        "diag": size,
        "kfac": 5**2 + 20**2 + 21**2 + 3**2,
        "block": first**2 + last**2,
        "full": size**2,
        "lowrank": 7 * size,
    }
    for structure, numbers in expected.items():
        settings = {"rank": 7} if structure == "lowrank" else {}
        matrix = ff.parameters.fisher(model, CATEGORICAL, x, structure=structure, **settings)  # type: ignore[arg-type]
        assert 8 * numbers <= kept_bytes(matrix.state_dict()) <= 8 * (numbers + 100), structure


# --- errors ---


@pytest.mark.parametrize("structure", ["block", "full", "gram"])
def test_a_budget_is_held(structure: str) -> None:
    """A matrix that is allocated before anyone asks whether it fits."""
    with pytest.raises(MemoryError, match=r"memory_budget .*got"):
        measure(structure, memory_budget=64)
    assert measure(structure, memory_budget="1 GiB").samples == 7


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"structure": "dense"}, ValueError, r"structure must .*got 'dense'"),
        ({"fisher_type": "true"}, ValueError, r"fisher_type must .*got 'true'"),
        ({"fisher_type": "mc", "samples": 0}, ValueError, r"samples must .*got 0"),
        ({"fisher_type": "mc", "samples": 1.5}, TypeError, r"samples must .*got"),
        ({"samples": 3}, ValueError, r"samples must .*got 3"),
        ({"batch_size": 0}, ValueError, r"batch_size must .*got 0"),
        ({"rank": 3}, TypeError, r"settings must .*got 'rank'"),
        ({"parameters": ["head.weight"]}, ValueError, r"parameters must .*'head\.weight'"),
        ({"parameters": "no such"}, ValueError, r"parameters must .*'no such'"),
        ({"parameters": []}, ValueError, r"parameters must"),
    ],
)
def test_wrong_arguments(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    """Arguments that are ignored, or fail somewhere inside."""
    with pytest.raises(error, match=message):
        ff.parameters.fisher(network(), CATEGORICAL, inputs(3), **settings)


def test_wrong_likelihoods_and_models() -> None:
    with pytest.raises(ValueError, match=r"likelihood must .*got"):
        ff.parameters.fisher(network(), "multinomial", inputs(3))
    with pytest.raises(TypeError, match=r"likelihood must .*got"):
        ff.parameters.fisher(network(), ff.parameters.Gaussian, inputs(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must .*got"):
        ff.parameters.fisher(torch.tanh, CATEGORICAL, inputs(3))  # type: ignore[arg-type]
    frozen = network()
    for w in frozen.parameters():
        w.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameters must .* requires? grad"):
        ff.parameters.fisher(frozen, CATEGORICAL, inputs(3))
    frozen[4].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"parameters must require grad, got '4\.bias'"):
        ff.parameters.fisher(frozen, CATEGORICAL, inputs(3), parameters=["4.weight", "4.bias"])
    assert measure("diag").layout.names != ("4.weight",)
    assert ff.parameters.fisher(frozen, CATEGORICAL, inputs(3)).layout.names == ("4.weight",)


def test_tied_weights_are_summed_or_refused() -> None:
    """A weight used twice: the gradients of both uses are one score; Kronecker factors have no
    such sum."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
            self.last.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)))

    model, x = seeded(lambda: Tied().double()), inputs(5)[:, 0, :3]
    found = ff.parameters.fisher(model, ff.parameters.Gaussian(), x, structure="full")
    assert found.layout.names == ("first.weight", "first.bias", "last.bias")
    jacobian = torch.func.vmap(
        torch.func.jacrev(lambda w, one: torch.func.functional_call(model, w, one[None])[0]),
        in_dims=(None, 0),
    )({name: w.detach() for name, w in model.named_parameters()}, x)
    rows = torch.cat([jacobian[name].flatten(2) for name in found.layout.names], 2).flatten(0, 1)
    assert difference(found.to_dense(), rows.T @ rows / 5) < ROUNDING
    with pytest.raises(ValueError, match=r"tied|twice|shared"):
        ff.parameters.fisher(model, ff.parameters.Gaussian(), x, structure="kfac")


def test_states_of_something_else() -> None:
    with pytest.raises(TypeError, match=r"state must be a mapping, got"):
        ff.parameters.from_state_dict([1, 2])  # type: ignore[arg-type]
    for state in ({}, {"weight": torch.ones(2)}, network().state_dict()):
        with pytest.raises(ValueError, match=r"state must be"):
            ff.parameters.from_state_dict(state)


# --- parameter layouts ---


def test_layout_is_the_order_of_the_network() -> None:
    """Columns instead of rows, another order than `named_parameters`, views that are copies."""
    model = network()
    layout = ff.parameters.ParameterLayout.of(model)
    named = {name: w.detach() for name, w in model.named_parameters()}
    assert layout.names == tuple(named)
    assert layout.shapes == tuple(w.shape for w in named.values())
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert layout.size == len(vector)
    assert torch.equal(layout.flatten(named), vector)
    for name, where in layout.slices().items():
        assert torch.equal(vector[where], named[name].flatten())
    several = torch.stack([vector, -vector])
    for name, part in layout.unflatten(several).items():
        assert torch.equal(part, torch.stack([named[name], -named[name]]))
    layout.unflatten(vector)["4.bias"].zero_()
    assert not vector[layout.slices()["4.bias"]].any()
    assert ff.parameters.ParameterLayout.from_state_dict(layout.state_dict()) == layout
    with pytest.raises(ValueError, match=r"vector must .*got"):
        layout.unflatten(vector[:-1])


def test_a_parameter_that_is_one_number() -> None:
    """A temperature, of shape []: it has a place, a name and a shape like any other."""

    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, OUTPUTS, dtype=torch.float64)
            self.temperature = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) / self.temperature

    model, x = seeded(Tempered), inputs(5)[:, 0, :4]
    for structure in STRUCTURES:
        settings = {"rank": 4} if structure == "lowrank" else {}
        matrix = ff.parameters.fisher(model, CATEGORICAL, x, structure=structure, **settings)  # type: ignore[arg-type]
        assert matrix.layout.unflatten(matrix.diag())["temperature"].shape == ()
        named = {name: w.detach() for name, w in model.named_parameters()}
        product = matrix @ named
        assert product["temperature"].shape == ()
        flat = matrix @ matrix.layout.flatten(named)
        assert float(flat[matrix.layout.slices()["temperature"]]) == float(product["temperature"])
    stiffest = ff.parameters.fisher(model, CATEGORICAL, x, structure="gram").spectrum().direction(0)
    assert stiffest["temperature"].shape == ()
    for per in ("parameter", "unit", "layer"):
        found = ff.parameters.fisher(model, CATEGORICAL, x).importance(per=per)  # type: ignore[arg-type]
        assert found.least(1.0)
    ewc = ff.parameters.ElasticWeightConsolidation(1.0)
    ewc.consolidate(model, CATEGORICAL, x)
    with torch.no_grad():
        model.temperature.mul_(2)
    assert ewc.penalty(model).item() > 0
    scores = ff.parameters.score(model, CATEGORICAL, x, labels(5))
    assert next(iter(scores))["temperature"].shape == (5,)


def batches(x: Tensor) -> Iterator[Tensor]:
    yield x[:3]
    yield x[3:]


def test_data_that_can_be_read_once_are_read_once() -> None:
    """A generator that is exhausted before its second batch is measured."""
    x = inputs(7)
    read = batches(x)
    expected = measure("diag", x)
    found = measure("diag", read)
    assert next(read, None) is None
    assert difference(found.diag(), expected.diag()) < ROUNDING
