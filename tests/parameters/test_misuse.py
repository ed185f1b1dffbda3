"""Calls that cannot be meant so: each is refused with the argument's name, and nothing changes."""

from __future__ import annotations

import copy
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.parameters_zoo import Network, linear
from torch import Tensor, nn
from torch.nn.utils import prune

import fisherfast.parameters as fp

CATEGORICAL = fp.Categorical()
ROUNDING = 1e-12
"""Relative to the largest; measured: below 1e-15."""


def make(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    network = Network(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,))
    return network.make(), network.inputs(6)


def consolidated(**settings: Any) -> tuple[fp.ElasticWeightConsolidation, nn.Module]:
    model, x = make()
    ewc = fp.ElasticWeightConsolidation(3.0, online=True, decay=0.5)
    ewc.consolidate(model, CATEGORICAL, x, **settings)
    return ewc, model


# --- consolidation ---

DAMAGED = [
    ({"strength": -1}, ValueError, "strength must be positive and finite, got -1"),
    ({"strength": None}, TypeError, "strength must be a number, got None"),
    ({"information": None}, ValueError, "state must be whole, got one that is damaged"),
    ({"anchors": {}}, ValueError, "state must be whole, got one that is damaged"),
    (
        {"information": {"0.weight": torch.ones(2)}},
        ValueError,
        "state must be whole, got one that is damaged: ValueError('0.weight has the shapes [2]",
    ),
    ({"quadratics": [{}]}, ValueError, "state must be whole, got one that is damaged"),
    ({"version": 99}, ValueError, "state must be of an ElasticWeightConsolidation, version 1"),
]


@pytest.mark.parametrize(("damage", "error", "text"), DAMAGED)
def test_damaged_states(damage: dict[str, Any], error: type[Exception], text: str) -> None:
    """Catches a state that is taken in half, or that shows only in the training loop."""
    ewc, model = consolidated()
    with torch.no_grad():
        model[0].weight.add_(0.1)  # type: ignore[index,operator,union-attr]
    before, state = float(ewc.penalty(model).detach()), ewc.state_dict()
    other = fp.ElasticWeightConsolidation(7.0)
    for each in (ewc, other):
        with pytest.raises(error, match=f"^{re.escape(text)}"):
            each.load_state_dict({**state, **damage})
    assert float(ewc.penalty(model).detach()) == before > 0
    assert (other.strength, other.online, other.tasks) == (7.0, False, 0)


def test_what_is_no_state_no_network_no_matrix() -> None:
    """Catches errors from deep inside."""
    ewc, model = consolidated()
    with pytest.raises(TypeError, match="state must be a mapping, got list"):
        ewc.load_state_dict(["strength"])  # type: ignore[arg-type]
    for wrong in (None, "model", torch.ones(3)):
        text = f"model must be a torch.nn.Module, got {type(wrong).__name__}"
        for call in (
            lambda wrong=wrong: ewc.penalty(wrong),
            lambda wrong=wrong: fp.ElasticWeightConsolidation(1.0).penalty(wrong),
            lambda wrong=wrong: ewc.consolidate(wrong, CATEGORICAL, torch.ones(1, 4)),
            lambda wrong=wrong: fp.fisher(wrong, CATEGORICAL, torch.ones(1, 4)),
        ):
            with pytest.raises(TypeError, match=text):
                call()
    with pytest.raises(TypeError, match=r"fisher must be a matrix of ff\.parameters\.fisher"):
        ewc.consolidate(model, fisher=torch.ones(43))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="online must be True or False, got 'yes'"):
        fp.ElasticWeightConsolidation(1.0, online="yes")  # type: ignore[arg-type]


def test_a_task_that_fails_leaves_no_trace() -> None:
    """Catches half of a task in the penalty."""
    ewc, model = consolidated()
    before = copy.deepcopy(ewc.state_dict())
    x = make()[1]
    for data, settings in ((x[:0], {}), (x * torch.nan, {}), (x, {"structure": "kfac"})):
        with pytest.raises(ValueError, match="must"):
            ewc.consolidate(model, CATEGORICAL, data, **settings)  # type: ignore[arg-type]
    after = ewc.state_dict()
    assert after["tasks"] == before["tasks"] == 1
    for part in ("information", "anchors"):
        for name, value in before[part].items():
            assert torch.equal(after[part][name], value)


def test_weights_that_are_loaded() -> None:
    """Catches a penalty about the weights of before: replaced ones (assign=True) are new tensors
    at, it may be, the old place."""
    ewc, model = consolidated()
    information, anchors = ewc.state_dict()["information"], ewc.state_dict()["anchors"]
    for seed in range(1, 6):
        ewc.penalty(model)
        model.load_state_dict(make(seed)[0].state_dict(), assign=seed % 2 == 0)
        with torch.no_grad():
            expected = sum(
                float((information[name] * (p - anchors[name]).square()).sum())
                for name, p in model.named_parameters()
            )
        assert float(ewc.penalty(model).detach()) == pytest.approx(1.5 * expected, rel=1e-10)


# --- importance ---


def test_pruned_networks() -> None:
    """Catches units that come apart where pruning has renamed their weights: the importance is that
    of the same network with zeros written into it."""
    model, x = make()
    plain = copy.deepcopy(model)
    prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[index]
    prune.ln_structured(model[2], "weight", 1, n=2, dim=0)  # type: ignore[index]
    for number in (0, 2):
        plain[number].weight.data.copy_(model[number].weight)  # type: ignore[index,union-attr]
    for per in ("parameter", "unit", "layer"):
        expected = fp.fisher(plain, CATEGORICAL, x).importance(per=per)
        found = fp.fisher(model, CATEGORICAL, x).importance(per=per)
        assert {name.removesuffix("_orig") for name in found} == set(expected)
        for name in found:
            truth = expected[name.removesuffix("_orig")]
            assert float((found[name] - truth).abs().max()) <= ROUNDING * float(truth.abs().max())


class WithoutBias(nn.Linear):
    """Whose bias is there, and never used."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@pytest.mark.parametrize("per", ["unit", "layer"])
def test_a_bias_that_is_never_used(per: Any) -> None:
    """Catches units that count on all of their parameters at once."""
    model, x = WithoutBias(4, 3).double(), make()[1]
    plain = nn.Linear(4, 3, bias=False).double()
    plain.weight.data.copy_(model.weight.data)
    found, expected = (fp.fisher(m, CATEGORICAL, x).importance(per=per)[""] for m in (model, plain))
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("fraction", ["0.5", None, True], ids=repr)
def test_fractions_that_are_no_numbers(fraction: Any) -> None:
    """Catches errors that do not say which argument is wrong."""
    model, x = make()
    with pytest.raises(TypeError, match="fraction must be a number, got"):
        fp.fisher(model, CATEGORICAL, x).importance().least(fraction)


# --- interrupted, or by several at once ---


class Interrupted(torch.autograd.Function):
    """Ctrl-C on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise KeyboardInterrupt


class Interrupting(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "forward":
            raise KeyboardInterrupt
        return Interrupted.apply(x)


@pytest.mark.parametrize("where", ["forward", "backward", "data"])
def test_interrupted(where: str) -> None:
    """Catches hooks, modes and random states that are left behind."""
    model: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double().eval()
    if where != "data":
        model = nn.Sequential(model[0], Interrupting(where), model[1])  # type: ignore[index]

    def data() -> Any:
        yield torch.ones(2, 4)
        raise KeyboardInterrupt

    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        fp.fisher(model, CATEGORICAL, data(), structure="diag", fisher_type="mc")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_measurement_inside_of_the_data() -> None:
    """Catches hooks of one measurement in the passes of another, and locks that never open."""
    model, x = linear().double().eval(), Network(linear, (4,)).inputs(8)

    def data() -> Any:
        for batch in x.split(2):
            fp.fisher(model, CATEGORICAL, batch)
            yield batch

    found = fp.fisher(model, CATEGORICAL, data()).diag()
    expected = fp.fisher(model, CATEGORICAL, x).diag()
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=0)


# --- spectrum ---


def test_spectra_of_nothing() -> None:
    """Catches errors that do not say which argument is wrong."""
    model, x = make()
    for structure in ("diag", "block", "kfac", "full", "gram", "lowrank"):
        F = fp.fisher(model, CATEGORICAL, x, structure=structure, parameters=r"0\.weight")  # type: ignore[arg-type]
        assert F.spectrum().trace > 0
        zero = fp.fisher(model, CATEGORICAL, 0 * x, structure=structure, parameters=r"0\.weight")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="F must not be zero"):
            zero.spectrum()


def test_several_threads_at_once() -> None:
    """Catches hooks of one thread in the passes of another: all measure the same network."""
    model, x = make()
    expected = fp.fisher(model, CATEGORICAL, x).diag()
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(
            lambda size: fp.fisher(model, CATEGORICAL, x, batch_size=size).diag(), [1, 2, 3] * 4
        )
        for each in found:
            torch.testing.assert_close(each, expected, rtol=ROUNDING, atol=0)
