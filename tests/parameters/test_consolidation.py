"""Elastic weight consolidation against the sum of its parabolas, written out."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parameters_oracle import brute_force
from torch import Tensor, nn

import fisherfast as ff
from fisherfast.parameters import Categorical, DiagonalFisher, ElasticWeightConsolidation

ROUNDING = 1e-12  # relative, in float64; 4e-16 measured
STRUCTURES = ("kfac", "block", "full", "gram", "lowrank")


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """4 inputs, a first unit that is never active (no information), 3 classes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].bias[0] = -100.0
    return model.to(dtype).eval()


def data(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 4, generator=generator, dtype=torch.float64).to(dtype)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def move(model: nn.Module, seed: int, by: float = 0.3) -> None:
    """Another task: other weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += by * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    found = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([each.flatten() for each in found])


Parabola = tuple[Tensor, Tensor, float]
"""F [P, P] or its diagonal as a matrix, w_k [P], weight."""


def learn(
    model: nn.Module,
    memories: Sequence[ElasticWeightConsolidation],
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    structure: str = "diag",
) -> list[Parabola]:
    """Consolidate three tasks, at three places; the parabolas by brute force."""
    found = []
    for task, weight in enumerate(weights):
        x = data(task)
        F = brute_force(model, "categorical", x)
        if structure == "diag":
            F = F.diagonal().diag()
        elif structure not in ("full", "gram"):
            F = ff.parameters.fisher(model, Categorical(), x, structure=structure).to_dense()
        found.append((F, flat(model).clone(), weight))
        for memory in memories:
            memory.consolidate(model, Categorical(), x, weight=weight, structure=structure)
        move(model, seed=10 + task)
    return found


def written_out(parabolas: Sequence[Parabola], w: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """strength / 2 sum_k weight_k (w - w_k)^T F_k (w - w_k), and its gradient."""
    value = sum(weight * (w - a) @ F @ (w - a) for F, a, weight in parabolas)
    slope = sum(weight * F @ (w - a) for F, a, weight in parabolas)
    return strength / 2 * torch.as_tensor(value), strength * torch.as_tensor(slope)


def check(memory: ElasticWeightConsolidation, model: nn.Module, truth: tuple[Tensor, Tensor]):
    value = memory.penalty(model)
    slope = gradient(value, model)
    assert value.shape == ()
    assert float(truth[0]) > 1e-3
    assert abs(float(value.detach() - truth[0])) <= ROUNDING * float(truth[0])
    assert (slope - truth[1]).abs().max() <= ROUNDING * truth[1].abs().max()


@pytest.mark.parametrize("structure", ["diag", *STRUCTURES])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 0.5, 20.0)])
def test_several_tasks_are_the_sum_of_their_penalties(structure, weights):
    """Catches anchors replaced by the latest, a vertex without its height, weights left out, a
    factor two of value against gradient."""
    model = network()
    memory = ElasticWeightConsolidation(7.0)
    parabolas = learn(model, [memory], weights=weights, structure=structure)
    assert memory.tasks == 3
    check(memory, model, written_out(parabolas, flat(model), 7.0))
    move(model, seed=99, by=3.0)
    check(memory, model, written_out(parabolas, flat(model), 7.0))


@pytest.mark.parametrize("structure", ["diag", *STRUCTURES])
def test_online_is_one_parabola_about_the_latest(structure):
    """Catches old anchors that stay, a decay applied to the new task or not to the old ones."""
    model = network()
    memory = ElasticWeightConsolidation(2.0, online=True, decay=0.6)
    parabolas = learn(model, [memory], structure=structure)
    latest = parabolas[-1][1]
    faded = [(F, latest, 0.6 ** (2 - k)) for k, (F, _, _) in enumerate(parabolas)]
    check(memory, model, written_out(faded, flat(model), 2.0))


def test_memory_does_not_grow_with_tasks():
    """Catches a list of anchors."""

    def numbers(memory: ElasticWeightConsolidation) -> int:
        state = memory.state_dict()
        return sum(x.numel() for part in ("information", "anchors") for x in state[part].values())

    model, memory = network(), ElasticWeightConsolidation(1.0)
    memory.consolidate(model, Categorical(), data(0))
    one = numbers(memory)
    learn(model, [memory])
    assert numbers(memory) == one == 2 * len(flat(model))
    assert memory.state_dict()["quadratics"] == []


def test_the_hessian_is_the_information():
    """Catches a gradient cut out of the graph: second derivatives of the penalty exist."""
    model, memory = network(), ElasticWeightConsolidation(3.0)
    F = memory.consolidate(model, Categorical(), data(0))
    slopes = torch.autograd.grad(memory.penalty(model), list(model.parameters()), create_graph=True)
    direction = torch.ones(len(flat(model)), dtype=torch.float64)
    total = torch.cat([s.flatten() for s in slopes]) @ direction
    assert torch.allclose(gradient(total, model), 3.0 * F.diag(), rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_dtype_of_the_penalty(dtype, result):
    """Catches sums in half precision, float64 that leaks into a float32 loss, and a penalty before
    the first task that no gradient flows through."""
    model, memory = network(dtype=dtype), ElasticWeightConsolidation(1.0)
    value = memory.penalty(model)
    assert (value.dtype, value.item(), value.shape) == (result, 0.0, ())
    value.backward()
    assert not model[0].weight.grad.any()
    memory.consolidate(model, fisher=diagonal(model))
    before = flat(model).double()
    move(model, seed=1)
    value = memory.penalty(model)
    assert value.dtype == result
    distance = (flat(model).double() - before).square().sum()
    assert value.item() == pytest.approx(0.5 * float(distance), rel=2e-6)  # of float32 sums
    value.backward()
    assert model[0].weight.grad.dtype == dtype


def diagonal(model: nn.Module, value: float = 1.0) -> DiagonalFisher:
    layout = ff.parameters.ParameterLayout.of(model)
    return DiagonalFisher(layout, 1, "exact", torch.full((layout.size,), value))


def test_a_converted_network_is_still_followed():
    """Catches what was prepared for float64 and is used for float32."""
    model, memory = network(), ElasticWeightConsolidation(1.0)
    learn(model, [memory])
    double = memory.penalty(model).item()
    single = memory.penalty(model.float())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(double, rel=1e-5)


def test_training_keeps_what_is_determined():
    """Plain steps on another task move weights that the first has determined; with a penalty they
    stay, and only those. Catches a penalty that holds all weights, or the wrong ones."""
    strength = 1e3
    moved = {}
    for held in (False, True):
        model, memory = network(), ElasticWeightConsolidation(strength)
        information = memory.consolidate(model, Categorical(), data(0)).diag()
        before = flat(model)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        x, y = data(5), torch.zeros(12, dtype=torch.long)
        for _ in range(60):
            loss = nn.functional.cross_entropy(model(x), y)
            loss = loss + memory.penalty(model) * held
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moved[held] = (flat(model) - before).abs()
    stiff = information > information.median()
    assert moved[True][stiff].mean() < 0.2 * moved[False][stiff].mean()
    assert moved[True][information == 0].max() == 0.0  # the first unit: no loss, no penalty
    assert bool((information == 0).any())


class WithHeads(nn.Module):
    """A body, and an output layer for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5).double()
        self.heads = nn.ModuleList([nn.Linear(5, 3).double()])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[-1](torch.tanh(self.body(x)))


def test_new_heads_are_free_only_where_that_is_said():
    """Catches a head of a later task that is silently left out, and one that stays out after its
    own task."""
    torch.manual_seed(0)
    model, strict = WithHeads(), ElasticWeightConsolidation(1.0)
    free = ElasticWeightConsolidation(1.0, new="free")
    for memory in (strict, free):
        memory.consolidate(model, Categorical(), data(0))
    model.heads.append(nn.Linear(5, 3).double())
    with pytest.raises(ValueError, match=r"got 'heads\.1\.weight' that is new; .*new=\"free\""):
        strict.penalty(model)
    with pytest.raises(ValueError, match=r"got 'heads\.1\.weight' that is new"):
        strict.consolidate(model, Categorical(), data(1))
    assert free.penalty(model).item() == 0.0
    before = copy.deepcopy(model)
    move(model.heads[1], seed=1)
    assert free.penalty(model).item() == 0.0
    move(model.body, seed=2)
    first = free.penalty(model).item()
    assert first > 0
    last = {"body.weight", "body.bias", "heads.1.weight", "heads.1.bias"}
    free.consolidate(model, Categorical(), data(1), parameters=sorted(last))
    assert free.penalty(model).item() == pytest.approx(first, rel=1e-6)
    move(model.heads[1], seed=3)
    assert free.penalty(model).item() > 1.001 * first
    assert len(list(before.parameters())) == 6


@pytest.mark.parametrize("part", ["weight", "0"])
def test_parameters_left_out_are_free(part):
    """Catches a choice of parameters that is refused as new, or penalised all the same."""
    model, memory = network(), ElasticWeightConsolidation(1.0)
    memory.consolidate(model, Categorical(), data(0), parameters=part)
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter += 1.0
        assert (memory.penalty(model).item() > 0) == (part in name)
        with torch.no_grad():
            parameter.copy_(before)


def test_another_network():
    """Catches a penalty of the parameters that happen to have the same name."""
    memory = ElasticWeightConsolidation(1.0)
    memory.consolidate(network(), Categorical(), data(0))
    other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(
        ValueError,
        match=r"model must be the network that was consolidated, got '0\.weight' \[6, 4\] in it and"
        r" \[5, 4\] in the consolidation",
    ):
        memory.penalty(other)
    loaded = ElasticWeightConsolidation(1.0)
    loaded.load_state_dict(memory.state_dict())
    for each in (memory, loaded):
        with pytest.raises(ValueError, match=r"got '2\.weight' missing in it"):
            each.penalty(nn.Sequential(nn.Linear(4, 5)))
        with pytest.raises(ValueError, match=r"got '0\.weight' \[6, 4\] in it"):
            each.consolidate(other, Categorical(), data(1))
    assert memory.tasks == 1
    with pytest.raises(ValueError, match=r"fisher must be of the model's parameters, got '2\.wei"):
        ElasticWeightConsolidation(1.0).consolidate(
            nn.Sequential(nn.Linear(4, 5)), fisher=diagonal(network())
        )


@pytest.mark.parametrize("structure", ["diag", *STRUCTURES])
@pytest.mark.parametrize("online", [False, True])
def test_state_is_the_same_bits(structure, online):
    """Catches a state that forgets a setting, an anchor or the height of the sum, and one that
    shares its tensors with the object it was taken of."""
    model = network(dtype=torch.float32)
    memory = ElasticWeightConsolidation(5.0, online=online, decay=0.5 if online else 1.0)
    for task in range(2):
        memory.consolidate(model, Categorical(), data(task, torch.float32), structure=structure)
        move(model, seed=task)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    loaded = ElasticWeightConsolidation(1.0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded.penalty(model), memory.penalty(model))
    assert repr(loaded) == repr(memory)
    kept = loaded.penalty(model).item()
    for each in (memory, loaded):  # goes on alike
        each.consolidate(model, Categorical(), data(7, torch.float32), structure=structure)
    move(model, seed=3)
    assert torch.equal(loaded.penalty(model), memory.penalty(model))
    assert loaded.penalty(model).item() != kept


def test_state_of_something_else():
    """Catches an optimizer's state, half a state, a state of a later version."""
    memory = ElasticWeightConsolidation(1.0)
    with pytest.raises(ValueError, match="state must be of an ElasticWeightConsolidation, vers"):
        memory.load_state_dict(torch.optim.SGD(network().parameters(), 0.1).state_dict())
    with pytest.raises(ValueError, match="state must be of an ElasticWeightConsolidation, vers"):
        memory.load_state_dict(memory.state_dict() | {"version": 2})


def test_bad_arguments():
    """Catches a silent default."""
    for strength in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength must be positive and finite, got"):
            ElasticWeightConsolidation(strength)
    for decay in (1.1, -0.1):
        with pytest.raises(ValueError, match=rf"decay must lie in \[0, 1\], got {decay}"):
            ElasticWeightConsolidation(1.0, online=True, decay=decay)
    with pytest.raises(ValueError, match=r"decay must be 1 unless online=True, got 0\.5"):
        ElasticWeightConsolidation(1.0, decay=0.5)
    with pytest.raises(ValueError, match="new must be one of 'refuse', 'free', got 'yes'"):
        ElasticWeightConsolidation(1.0, new="yes")  # type: ignore[arg-type]
    model, memory = network(), ElasticWeightConsolidation(1.0)
    with pytest.raises(ValueError, match="likelihood and data must be given, or fisher"):
        memory.consolidate(model, Categorical())
    with pytest.raises(ValueError, match="fisher must be given alone"):
        memory.consolidate(model, Categorical(), data(0), fisher=diagonal(model))
    for weight in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"weight must be positive and finite, got {weight}"):
            memory.consolidate(model, Categorical(), data(0), weight=weight)
    with pytest.raises(ValueError, match="fisher must be finite, got NaN or infinity"):
        memory.consolidate(model, fisher=diagonal(model, float("nan")))
    assert memory.tasks == 0  # nothing of what was refused stays
    memory.consolidate(model, Categorical(), data(0))
    with pytest.raises(ValueError, match=r"structure must be the same for all tasks \(a diag"):
        memory.consolidate(model, Categorical(), data(0), structure="full")
    assert memory.tasks == 1


def test_a_matrix_measured_before():
    """Catches a matrix that is measured again, and a task that keeps its network and data alive."""
    model = network()
    measured, given = (ElasticWeightConsolidation(3.0) for _ in range(2))
    matrix = measured.consolidate(model, Categorical(), data(0), structure="full")
    assert given.consolidate(model, fisher=matrix) is matrix
    move(model, seed=0)
    assert torch.equal(given.penalty(model), measured.penalty(model))
    assert given._quadratics[0].fisher._source is None


def test_callers_modes():
    """Catches anchors that autograd refuses because they were made in inference mode, a graph that
    anchors keep alive, and a model that is changed."""
    model, memory = network(), ElasticWeightConsolidation(1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = data(0)
    with torch.inference_mode():
        memory.consolidate(model, Categorical(), x)
        memory.penalty(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert not memory.penalty(model).requires_grad
    memory.penalty(model).backward()
    state = memory.state_dict()
    assert not any(value.requires_grad for value in state["anchors"].values())
    with torch.no_grad():
        model[0].weight += 1.0
    assert torch.equal(state["anchors"]["0.weight"], before["0.weight"])


def test_wrapped_models_are_the_models_inside():
    """Catches names with the prefix of a wrapper."""
    model, memory = network(), ElasticWeightConsolidation(1.0)
    memory.consolidate(nn.DataParallel(model), Categorical(), data(0))
    move(model, seed=1)
    assert torch.equal(memory.penalty(nn.DataParallel(model)), memory.penalty(model))
    assert memory.penalty(model).item() > 0


RANKS = """
import sys, torch, torch.distributed as dist
from torch import nn
import fisherfast as ff
rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
torch.manual_seed(0)
inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
model = nn.parallel.DistributedDataParallel(inner)
memory = ff.parameters.ElasticWeightConsolidation(50.0)
optimizer = torch.optim.SGD(model.parameters(), 0.02)
for task in range(2):
    generator = torch.Generator().manual_seed(task)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (16,), generator=generator)
    for _ in range(5):
        mine = slice(rank, None, size)
        loss = nn.functional.cross_entropy(model(x[mine]), y[mine]) + memory.penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    memory.consolidate(model, ff.parameters.Categorical(), x)
w = torch.cat([p.detach().flatten() for p in inner.parameters()])
torch.save({"w": w, "state": memory.state_dict()}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def run_ranks(size: int, folder: Path) -> list[Any]:
    """What each of so many processes ends with."""
    folder.mkdir()
    root = Path(ff.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANKS]
    children = [
        subprocess.Popen([*command, str(rank), str(size), str(folder)], env=environment)
        for rank in range(size)
    ]
    try:
        assert [child.wait(120) for child in children] == [0] * size
    finally:
        for child in children:
            child.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.mark.slow
def test_data_parallel_training_gives_the_same_numbers(tmp_path):
    """Two processes with half of each batch against one: catches a penalty that is counted once for
    each process, and anchors that differ between them."""
    (alone,) = run_ranks(1, tmp_path / "one")
    pair = run_ranks(2, tmp_path / "two")
    assert torch.equal(pair[0]["w"], pair[1]["w"])
    assert torch.allclose(pair[0]["w"], alone["w"], rtol=1e-10, atol=1e-12)
    for name, anchor in alone["state"]["anchors"].items():
        assert torch.allclose(pair[1]["state"]["anchors"][name], anchor, rtol=1e-9, atol=1e-12)
