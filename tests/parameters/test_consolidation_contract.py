"""Elastic weight consolidation against its formula, from dense matrices of each task."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from support.networks_zoo import seeded
from support.parameters_small import CATEGORICAL, OUTPUTS, dense_network, inputs
from torch import Tensor, nn

import fisherfast as ff

STRENGTH = 3.0
ROUNDING = 1e-10
"""In float64, relative; measured: below 1e-13."""

STRUCTURES = ("diag", "block", "kfac", "full", "gram", "lowrank")


def data(task: int) -> Tensor:
    return inputs(6, seed=10 + task)[:, 0, :4]


def moved(model: nn.Module, seed: int) -> None:
    """Another task's training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for w in model.parameters():
            w.add_(0.3 * torch.randn(w.shape, generator=generator, dtype=w.dtype))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([w.detach().flatten() for w in model.parameters()])


def settings_of(structure: str) -> dict[str, Any]:
    return {"structure": structure} | ({"rank": 3} if structure == "lowrank" else {})


def parabola(matrix: Tensor, w: Tensor, centre: Tensor) -> float:
    return float(0.5 * (w - centre) @ matrix @ (w - centre))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_penalty_of_three_tasks(structure: str) -> None:
    """strength / 2 sum_k weight_k (w - w_k)^T F_k (w - w_k), with its gradient: a half that is
    forgotten, centres that are all the latest, heights that are lost, weights squared."""
    model = dense_network(4)
    ewc = ff.parameters.ElasticWeightConsolidation(STRENGTH)
    assert ewc.penalty(model).item() == 0.0
    tasks = []
    for task, weight in enumerate((1.0, 0.5, 4.0)):
        matrix = ewc.consolidate(
            model, CATEGORICAL, data(task), weight=weight, **settings_of(structure)
        )
        tasks.append((weight * matrix.to_dense(), flat(model)))
        assert ewc.tasks == task + 1
        moved(model, task)
    w = flat(model)
    penalty = ewc.penalty(model)
    assert penalty.shape == ()
    assert penalty.dtype == torch.float64
    expected = STRENGTH * sum(parabola(f, w, centre) for f, centre in tasks)
    assert penalty.item() == pytest.approx(expected, rel=ROUNDING)
    penalty.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    pull = STRENGTH * sum(f @ (w - centre) for f, centre in tasks)
    torch.testing.assert_close(gradient, pull, rtol=1e-9, atol=1e-12)


def test_online_keeps_one_parabola_about_the_latest() -> None:
    """F = decay F + F_k, about w_k: a decay of the new task, of the strength, or a centre left
    where the first task was."""
    model, decay = dense_network(4), 0.7
    ewc = ff.parameters.ElasticWeightConsolidation(STRENGTH, online=True, decay=decay)
    curvature = torch.zeros(())
    for task in range(3):
        moved(model, task)
        matrix = ewc.consolidate(model, CATEGORICAL, data(task))
        curvature = decay * curvature + matrix.to_dense()
        centre = flat(model)
        assert ewc.penalty(model).item() == pytest.approx(0.0, abs=1e-15)
    moved(model, 9)
    expected = STRENGTH * parabola(curvature, flat(model), centre)
    assert ewc.penalty(model).item() == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize(
    ("structure", "online"), [("diag", True), *((structure, False) for structure in STRUCTURES)]
)
def test_state_goes_through_a_file(structure: str, online: bool) -> None:
    """A state that leaves the settings, a task, or its centre behind; the penalties are the same
    bits, and so are those after the next task."""
    model = dense_network(4)
    ewc = ff.parameters.ElasticWeightConsolidation(STRENGTH, online=online)
    for task in range(2):
        ewc.consolidate(model, CATEGORICAL, data(task), **settings_of(structure))
        moved(model, task)
    file = io.BytesIO()
    torch.save(ewc.state_dict(), file)
    file.seek(0)
    back = ff.parameters.ElasticWeightConsolidation(strength=99.0)
    back.load_state_dict(torch.load(file, weights_only=True))
    assert back.tasks == 2
    assert torch.equal(back.penalty(model), ewc.penalty(model))
    for each in (ewc, back):
        each.consolidate(model, CATEGORICAL, data(2), **settings_of(structure))
    moved(model, 5)
    assert torch.equal(back.penalty(model), ewc.penalty(model))


def test_a_matrix_that_is_there() -> None:
    """`fisher=` in place of data: measured again, or at other weights."""
    model = dense_network(4)
    measured, given = (ff.parameters.ElasticWeightConsolidation(STRENGTH) for _ in range(2))
    matrix = measured.consolidate(model, CATEGORICAL, data(0))
    assert given.consolidate(model, fisher=matrix) is matrix
    moved(model, 0)
    assert torch.equal(given.penalty(model), measured.penalty(model))


def test_the_model_stays_as_it_is() -> None:
    """Gradients, mode, hooks or weights that consolidation changes."""
    model = dense_network(4)
    before = flat(model)
    ff.parameters.ElasticWeightConsolidation(1.0).consolidate(model, CATEGORICAL, data(0))
    assert torch.equal(flat(model), before)
    assert all(w.grad is None and w.requires_grad for w in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


class Heads(nn.Module):
    """A trunk with one output head, or two."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 3)
        self.heads = nn.ModuleList(nn.Linear(3, OUTPUTS) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[-1](torch.tanh(self.trunk(x)))


@pytest.mark.parametrize("new", ["refuse", "free"])
def test_a_head_that_came_later(new: Any) -> None:
    """New parameters that are penalised towards zero, or let through where that is refused."""
    one, two = (seeded(lambda n=n: Heads(n).double()).eval() for n in (1, 2))
    ewc = ff.parameters.ElasticWeightConsolidation(STRENGTH, new=new)
    matrix = ewc.consolidate(one, CATEGORICAL, data(0))
    if new == "refuse":
        with pytest.raises(ValueError, match=r"heads\.1"):
            ewc.penalty(two)
        return
    centre = dict(one.named_parameters())
    moved(two, 1)
    diagonal = matrix.layout.unflatten(matrix.diag())
    parts = [
        (diagonal[name] * (w - centre[name]).detach() ** 2).sum()
        for name, w in two.named_parameters()
        if name in centre
    ]
    assert ewc.penalty(two).item() == pytest.approx(0.5 * STRENGTH * float(sum(parts)), rel=1e-9)


def test_another_network_is_refused() -> None:
    """The state of another network: names that differ, or shapes."""
    ewc = ff.parameters.ElasticWeightConsolidation(1.0, new="free")
    ewc.consolidate(dense_network(4), CATEGORICAL, data(0))
    other = ff.parameters.ElasticWeightConsolidation(1.0)
    other.load_state_dict(ewc.state_dict())
    for consolidation in (ewc, other):
        for stranger in (dense_network(5), nn.Linear(4, 3).double()):
            with pytest.raises(ValueError, match="model must be the network that was consolidated"):
                consolidation.penalty(stranger)
            with pytest.raises(ValueError, match="model must be the network that was consolidated"):
                consolidation.consolidate(stranger, CATEGORICAL, data(1))
    assert ewc.tasks == 1


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"strength": -1.0}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"strength": 1.0, "online": True, "decay": 1.5}, "decay"),
        ({"strength": 1.0, "online": True, "decay": -0.1}, "decay"),
        ({"strength": 1.0, "decay": 0.5}, "decay"),
        ({"strength": 1.0, "new": "ignore"}, "new"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], name: str) -> None:
    """A setting out of its range, and a decay that nothing uses."""
    with pytest.raises(ValueError, match=name):
        ff.parameters.ElasticWeightConsolidation(**settings)


def test_wrong_tasks() -> None:
    """A weight that is not positive, structures mixed, a matrix that is not finite, no state: the
    tasks that were there are still."""
    model = dense_network(4)
    ewc = ff.parameters.ElasticWeightConsolidation(1.0)
    ewc.consolidate(model, CATEGORICAL, data(0))
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"weight must .*got"):
            ewc.consolidate(model, CATEGORICAL, data(1), weight=weight)
    with pytest.raises(ValueError, match="structure"):
        ewc.consolidate(model, CATEGORICAL, data(1), structure="block")
    state = ff.parameters.fisher(model, CATEGORICAL, data(1)).state_dict()
    broken = {
        k: v.fill_(torch.inf) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in state.items()
    }
    with pytest.raises(ValueError, match="finite"):
        ewc.consolidate(model, fisher=ff.parameters.from_state_dict(broken))
    with pytest.raises(ValueError, match="state must be of an ElasticWeightConsolidation"):
        ewc.load_state_dict({"tasks": 3})
    assert ewc.tasks == 1
    moved(model, 1)
    assert 0 < ewc.penalty(model).item() < torch.inf
