"""Importance and elastic weight consolidation against their formulas, from a dense matrix.

The dense matrix comes from autograd over single samples, see `parameters_oracle`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support.networks_zoo import seeded
from support.parameters_oracle import brute_force
from support.parameters_small import (
    CATEGORICAL,
    OUTPUTS,
    ROUNDING,
    dense_network,
    inputs,
    network,
)
from torch import Tensor, nn

import fisherfast as ff

STRENGTH = 3.0


@pytest.fixture(scope="module")
def truth() -> Tensor:
    return brute_force(network(), "categorical", inputs(7))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([w.detach().flatten() for w in model.parameters()])


def group_importance(truth: Tensor, members: Tensor, w: Tensor) -> float:
    """1/2 w_S^T F_SS w_S."""
    return float(0.5 * w[members] @ truth[members][:, members] @ w[members])


# --- importance ---


def test_of_parameters(truth: Tensor) -> None:
    """The half that is forgotten, |w| for w^2, a sum for the mean over samples."""
    model = network()
    found = ff.parameters.importance(model, CATEGORICAL, inputs(7))
    expected = 0.5 * truth.diag() * flat(model) ** 2
    assert list(found.values) == [name for name, _ in model.named_parameters()]
    assert (found.per, found.samples, found.fisher_type) == ("parameter", 7, "exact")
    for name, w in model.named_parameters():
        assert found[name].shape == found.fisher[name].shape == w.shape
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], 0.5 * found.fisher[name] * w.detach() ** 2)
    got = torch.cat([v.flatten() for v in found.values.values()])
    torch.testing.assert_close(got, expected, rtol=ROUNDING, atol=1e-16)


@pytest.mark.parametrize("structure", ["diag", "block", "kfac", "full", "gram"])
def test_of_a_matrix_that_is_there(structure: str) -> None:
    """A structure whose diagonal is read in another order, or that is measured again."""
    model = network()
    matrix = ff.parameters.fisher(model, CATEGORICAL, inputs(7), structure)  # type: ignore[arg-type]
    found = ff.parameters.importance(model, fisher=matrix)
    got = torch.cat([v.flatten() for v in found.values.values()])
    expected = 0.5 * matrix.diag() * flat(model) ** 2
    torch.testing.assert_close(got, expected, rtol=ROUNDING, atol=1e-16)


def test_of_units_and_layers(truth: Tensor) -> None:
    """Squares summed before a unit's parameters are, a bias that belongs to no unit, units along
    the inputs, an average over members."""
    model, x = network(), inputs(7)
    units = ff.parameters.importance(model, CATEGORICAL, x, per="unit")
    layers = ff.parameters.importance(model, CATEGORICAL, x, per="layer")
    where = ff.parameters.ParameterLayout.of(model).unflatten(torch.arange(len(truth)))
    assert set(units.values) == set(layers.values) == {"0", "3", "4"}
    for name in units.values:
        weight, bias = where[f"{name}.weight"], where[f"{name}.bias"]
        assert units[name].shape == (len(weight),)
        for unit in range(len(weight)):
            members = torch.cat([weight[unit].flatten(), bias[unit].flatten()])
            expected = group_importance(truth, members, flat(model))
            assert float(units[name][unit]) == pytest.approx(expected, rel=1e-9)
            assert float(units.fisher[name][unit]) == pytest.approx(2 * expected, rel=1e-9)
        members = torch.cat([weight.flatten(), bias.flatten()])
        assert layers[name].shape == ()
        expected = group_importance(truth, members, flat(model))
        assert float(layers[name]) == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_a_gate_says_the_same() -> None:
    """KL(p || p with a layer times 1 + e) = e^2 fisher / 2: the unit of `fisher` is that of a
    gate."""
    model, x, gate = dense_network(5), inputs(7)[:, 0, :4], 1e-4
    found = ff.parameters.importance(model, CATEGORICAL, x, per="layer")
    log_p = model(x).log_softmax(1).detach()
    for name in found.values:
        gated = {
            k: w * (1 + gate) if k.startswith(name) else w for k, w in model.named_parameters()
        }
        log_q = torch.func.functional_call(model, gated, x).log_softmax(1)
        divergence = float((log_p.exp() * (log_p - log_q.detach())).sum(1).mean())
        assert divergence / gate**2 == pytest.approx(float(found.fisher[name]) / 2, rel=1e-3)


@pytest.mark.parametrize("per", ["parameter", "unit", "layer"])
def test_scale_that_two_layers_share(per: Any) -> None:
    """ReLU(2 w_1 x) w_2 / 2 is the same network: importance does not change, though F does."""
    one, other = (
        seeded(
            lambda: nn.Sequential(
                nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, OUTPUTS, bias=False)
            ).double()
        ).eval()
        for _ in range(2)
    )
    with torch.no_grad():
        for w in other[0].parameters():
            w.mul_(2)
        other[2].weight.div_(2)
    x = inputs(7)[:, 0, :4]
    before, after = (ff.parameters.importance(m, CATEGORICAL, x, per=per) for m in (one, other))
    for name in before.values:
        torch.testing.assert_close(after[name], before[name], rtol=1e-9, atol=1e-15)
    if per == "parameter":
        assert float(after.fisher["0.bias"].sum() / before.fisher["0.bias"].sum()) < 0.3  # 1/4


@pytest.mark.parametrize("per", ["parameter", "unit", "layer"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_the_least_important(per: Any, fraction: float) -> None:
    """Masks of each layer by itself, of the most important, or of another number of members."""
    found = ff.parameters.importance(network(), CATEGORICAL, inputs(7), per=per)
    masks = found.least(fraction)
    assert list(masks) == list(found.values)
    chosen, left = [], []
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert mask.shape == found[name].shape
        chosen.append(found[name][mask])
        left.append(found[name][~mask])
    chosen, left = torch.cat(chosen), torch.cat(left)
    assert len(chosen) == round(fraction * (len(chosen) + len(left)))
    if len(chosen) and len(left):
        assert float(chosen.max()) <= float(left.min())


def test_equals_are_taken_in_order() -> None:
    """Among equals the first are taken."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    found = ff.parameters.importance(model, ff.parameters.Gaussian(), torch.ones(3, 4))
    assert found.least(0.5)["weight"].tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_wrong_fraction(fraction: float) -> None:
    found = ff.parameters.importance(network(), CATEGORICAL, inputs(3), per="layer")
    with pytest.raises(ValueError, match=r"fraction must .*got"):
        found.least(fraction)


def test_numbers_for_json() -> None:
    """Tensors left in what is said to be numbers."""
    found = ff.parameters.importance(network(), CATEGORICAL, inputs(3), per="unit")
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_importance_asks_for_one_source() -> None:
    """Neither or both of data and a matrix, an unknown `per`, the matrix of another network."""
    model, x = network(), inputs(3)
    matrix = ff.parameters.fisher(model, CATEGORICAL, x)
    with pytest.raises(ValueError, match="fisher"):
        ff.parameters.importance(model)
    with pytest.raises(ValueError, match="fisher"):
        ff.parameters.importance(model, CATEGORICAL, x, fisher=matrix)
    with pytest.raises(ValueError, match=r"per must .*got"):
        ff.parameters.importance(model, CATEGORICAL, x, per="neuron")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unit"):
        ff.parameters.importance(model, fisher=matrix, per="unit")
    with pytest.raises(ValueError, match=r"parameters must be of the model"):
        ff.parameters.importance(dense_network(5), fisher=matrix)
