"""What the Fisher matrix does when data, parameters, likelihood or labels change.

All of it follows from F = 1/n sum_i E[s s^T] alone.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.networks_zoo import seeded
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
    labels,
    measure,
    network,
)
from torch import Tensor, nn

import fisherfast as ff


@pytest.fixture(scope="module")
def truth() -> Tensor:
    return brute_force(network(), "categorical", inputs(7))


@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
@pytest.mark.parametrize("structure", LINEAR_IN_F)
def test_the_mean_over_samples(structure: str, fisher_type: str) -> None:
    """Data in two parts: n F = n_1 F_1 + n_2 F_2. A sum in place of the mean, a mean of batches of
    different sizes, the square of a mean gradient."""
    x, y = inputs(9), labels(9)
    parts = [
        measure(structure, (x[where], y[where]), fisher_type)
        for where in (slice(0, 2), slice(2, 9))
    ]
    whole = measure(structure, (x, y), fisher_type, batch_size=4)
    assert [p.samples for p in parts] == [2, 7]
    assert whole.samples == 9
    expected = (2 * parts[0].to_dense() + 7 * parts[1].to_dense()) / 9
    assert difference(whole.to_dense(), expected) < ROUNDING


@pytest.mark.parametrize("structure", STRUCTURES)
def test_order_and_repetition_of_the_samples(structure: str) -> None:
    """A result that knows which sample came first, or that counts one twice: a shuffled set, and
    the whole set twice, have the same F."""
    x = inputs(7)
    expected = measure(structure).to_dense()
    shuffled = x[torch.tensor([3, 0, 6, 2, 5, 1, 4])]
    assert difference(measure(structure, shuffled, batch_size=3).to_dense(), expected) < ROUNDING
    twice = measure(structure, torch.cat([x, x]))
    assert twice.samples == 14
    assert difference(twice.to_dense(), expected) < ROUNDING


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gaussian_information_is_one_over_its_variance(structure: str) -> None:
    """sigma in place of sigma^2, a variance that is forgotten, or taken twice."""
    settings = {"rank": 4} if structure == "lowrank" else {}
    unit, precise = (
        ff.parameters.fisher(
            network(), ff.parameters.Gaussian(variance), inputs(5), structure=structure, **settings
        ).to_dense()
        for variance in (1.0, 0.04)
    )
    assert difference(precise, 25 * unit) < ROUNDING


def test_the_unit_of_the_parameters() -> None:
    """w = c w': F' = c^2 F, since F has the unit 1 / w^2; between two parameters c c'."""

    class Scaled(nn.Module):
        def __init__(self, unit: float) -> None:
            super().__init__()
            self.unit = unit
            self.layer = nn.Linear(4, OUTPUTS, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.unit * self.layer.weight, self.layer.bias)

    one, other = seeded(lambda: Scaled(1.0)), seeded(lambda: Scaled(8.0))
    with torch.no_grad():
        other.layer.weight.div_(8.0)
    x = inputs(6)[:, 0, :4]
    before, after = (
        ff.parameters.fisher(model.eval(), CATEGORICAL, x, structure="full")
        for model in (one, other)
    )
    unit = before.layout.flatten(
        {"layer.weight": torch.full((3, 4), 8.0), "layer.bias": torch.ones(3)}
    ).double()
    assert difference(after.to_dense(), torch.outer(unit, unit) * before.to_dense()) < ROUNDING


@pytest.mark.parametrize("structure", STRUCTURES)
def test_order_of_units(structure: str) -> None:
    """Hidden units in another order are the same network: F has the same entries, elsewhere."""
    order = torch.tensor([2, 0, 1])

    def dense(shuffle: bool) -> nn.Module:
        model = dense_network(3)
        if shuffle:
            with torch.no_grad():
                for w in (model[0].weight, model[0].bias):
                    w.copy_(w[order])
                model[2].weight.copy_(model[2].weight[:, order])
        return model

    settings = {"rank": 4} if structure == "lowrank" else {}
    x = inputs(6)[:, 0, :4]
    one, other = (
        ff.parameters.fisher(dense(shuffle), CATEGORICAL, x, structure=structure, **settings)
        for shuffle in (False, True)
    )
    numbers = one.layout.unflatten(torch.arange(one.layout.size))
    numbers = {
        name: w[:, order] if name == "2.weight" else w if name == "2.bias" else w[order]
        for name, w in numbers.items()
    }
    moved = torch.cat([w.flatten() for w in numbers.values()])
    assert difference(other.to_dense(), one.to_dense()[moved][:, moved]) < ROUNDING


@pytest.mark.parametrize("structure", LINEAR_IN_F)
def test_a_choice_of_parameters_is_a_part_of_the_matrix(structure: str, truth: Tensor) -> None:
    """Parameters left out that still count, or a part of the wrong place; four ways to choose."""
    names = ["0.bias", "4.weight"]
    chosen = [measure(structure, parameters=p) for p in (names, r"0\.bias|4\.weight")]
    chosen.append(measure(structure, parameters=lambda name: name in names))
    slices = ff.parameters.ParameterLayout.of(network()).slices()
    where = torch.cat([torch.arange(s.start, s.stop) for s in (slices[n] for n in names)])
    for matrix in chosen:
        assert matrix.layout.names == tuple(names)
        assert difference(matrix.diag(), truth.diag()[where]) < ROUNDING
    if structure in ALL_OF_F:
        assert difference(chosen[0].to_dense(), truth[where][:, where]) < ROUNDING


def test_f_is_the_curvature_of_the_divergence() -> None:
    """KL(p_w || p_(w + dw)) = 1/2 dw^T F dw + O(dw^3), in nats per sample: the whole scale of F."""
    model, x = network(), inputs(7)
    matrix = measure("gram")
    generator = torch.Generator().manual_seed(5)
    step = 1e-4 * torch.randn(matrix.layout.size, generator=generator, dtype=torch.float64)
    log_p = model(x).log_softmax(1).detach()
    moved = {
        name: w.detach() + matrix.layout.unflatten(step)[name]
        for name, w in model.named_parameters()
    }
    log_q = torch.func.functional_call(model, moved, x).log_softmax(1)
    divergence = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
    predicted = 0.5 * float(step @ (matrix @ step))
    assert divergence == pytest.approx(predicted, rel=1e-2)  # third order: measured 2e-4


def test_null_directions_of_logits() -> None:
    """The same added to all logits changes nothing: F v = 0 there, and `solve` must say so."""
    for structure in ("block", "full", "gram"):
        matrix = measure(structure)
        same = {
            name: torch.zeros(shape)
            for name, shape in zip(matrix.layout.names, matrix.layout.shapes, strict=True)
        }
        same["4.bias"] = torch.ones(OUTPUTS)
        product = matrix.layout.flatten(matrix @ same)
        assert float(product.abs().max()) < ROUNDING * matrix.trace()
        with pytest.raises(ValueError, match="damping"):
            matrix.solve(torch.ones(matrix.layout.size))
        assert matrix.logdet() == -math.inf


@pytest.mark.parametrize("structure", STRUCTURES)
def test_empirical_says_that_it_is_not_the_fisher_matrix(structure: str) -> None:
    """A name that lets the second moment of the training gradients pass for the Fisher matrix."""
    matrix = measure(structure, (inputs(5), labels(5)), "empirical")
    assert matrix.fisher_type == "empirical"
    for text in (matrix.name, repr(matrix)):
        assert "not the Fisher matrix" in text
    assert "not the Fisher matrix" not in measure(structure).name
    back = ff.parameters.from_state_dict(matrix.state_dict())
    assert back.name == matrix.name


@pytest.mark.parametrize("structure", LINEAR_IN_F)
def test_empirical_at_every_label_averages_to_the_exact_one(structure: str) -> None:
    """Empirical with label c weighed by p(c | x) over all c is the exact matrix: labels that are
    not used, or weighed once more."""
    x = inputs(1)
    p = network()(x).softmax(1)[0].detach()
    parts = [
        measure(structure, (x, torch.tensor([c])), "empirical").to_dense() for c in range(OUTPUTS)
    ]
    expected = sum(p[c] * parts[c] for c in range(OUTPUTS))
    assert difference(measure(structure, x).to_dense(), expected) < ROUNDING
