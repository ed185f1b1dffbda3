"""Elastic weight consolidation against the sum of its parabolas, written out."""

from __future__ import annotations

import io
import re

import pytest
import torch
from support.parameters_small import STRUCTURES, difference
from support.parameters_zoo import Written
from torch import Tensor, nn

import fisherfast as ff
from fisherfast.parameters import Categorical, DiagonalFisher, ElasticWeightConsolidation

ROUNDING = 1e-12  # relative, in float64; 4e-16 measured


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """4 inputs, a first unit that is never active (no information), 3 classes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].bias[0] = -100.0
    return model.to(dtype).eval()


def data(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 4, generator=generator, dtype=torch.float64)


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


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_several_tasks(structure, online):
    """Catches anchors replaced by the latest or, online, old ones that stay, a vertex without its
    height, weights left out, a decay applied to the new task or not to the old ones, a factor two
    of value against gradient, a list of anchors that grows; a state that forgets a setting, an
    anchor or the height of the sum, and one that shares its tensors with the object it was taken
    of."""
    model, tasks = network(), []
    memory = ElasticWeightConsolidation(7.0, online=online, decay=0.6 if online else 1.0)
    for task, weight in enumerate((3.0, 0.5, 20.0)):
        settings = {"weight": weight, "structure": structure}
        F = memory.consolidate(model, Categorical(), data(task), **settings).to_dense()
        tasks.append((weight * F, flat(model)))
        move(model, seed=10 + task)
    if online:
        tasks = [(0.6 ** (2 - k) * F, tasks[-1][1]) for k, (F, _) in enumerate(tasks)]
    for _ in range(2):
        w, found = flat(model), memory.penalty(model)
        value = 7 / 2 * sum((w - anchor) @ F @ (w - anchor) for F, anchor in tasks)
        assert float(value) > 1e-3
        assert found.shape == ()
        assert found.item() == pytest.approx(float(value), rel=ROUNDING)
        slope = 7 * sum(F @ (w - anchor) for F, anchor in tasks)
        assert difference(gradient(found, model), slope) < ROUNDING
        move(model, seed=99, by=3.0)
    state, loaded = memory.state_dict(), ElasticWeightConsolidation(1.0)
    kept = sum(x.numel() for part in ("information", "anchors") for x in state[part].values())
    assert (kept, len(state["quadratics"])) == ((86, 0) if structure == "diag" else (0, 3))
    torch.save(state, file := io.BytesIO())
    loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert repr(loaded) == repr(memory)
    for task in (3, 4):  # goes on alike
        assert torch.equal(loaded.penalty(model), memory.penalty(model))
        assert (loaded.tasks, memory.tasks) == (task, task)
        for each in (memory, loaded):
            each.consolidate(model, Categorical(), data(task), structure=structure)
        move(model, seed=task)


def test_the_hessian_is_the_information():
    """Catches a gradient cut out of the graph: second derivatives of the penalty exist; a matrix
    that is given, and measured again."""
    model, memory = network(), ElasticWeightConsolidation(3.0)
    F = memory.consolidate(model, Categorical(), data(0))
    given = ElasticWeightConsolidation(3.0)
    assert given.consolidate(model, fisher=F) is F
    assert torch.equal(given.penalty(model), memory.penalty(model))
    slopes = torch.autograd.grad(memory.penalty(model), list(model.parameters()), create_graph=True)
    total = torch.cat([s.flatten() for s in slopes]).sum()
    assert torch.allclose(gradient(total, model), 3.0 * F.diag(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_of_the_penalty(dtype):
    """Catches sums in half precision, float64 that leaks into a float32 loss, a penalty before the
    first task that no gradient flows through, and one that was prepared for another dtype."""
    result = torch.promote_types(dtype, torch.float32)
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
    assert memory.penalty(model.double()).item() == pytest.approx(0.5 * float(distance))


def diagonal(model: nn.Module, value: float = 1.0) -> DiagonalFisher:
    layout = ff.parameters.ParameterLayout.of(model)
    return DiagonalFisher(layout, 1, "exact", torch.full((layout.size,), value))


def test_new_heads_are_free_only_where_that_is_said():
    """Catches a head of a later task that is silently left out, and one that stays out after its
    own task."""
    torch.manual_seed(0)
    model = Written(
        lambda m, x: m.heads[-1](torch.tanh(m.body(x))),
        body=nn.Linear(4, 5),
        heads=nn.ModuleList([nn.Linear(5, 3)]),
    ).double()
    strict = ElasticWeightConsolidation(1.0)
    free = ElasticWeightConsolidation(1.0, new="free")
    for memory in (strict, free):
        memory.consolidate(model, Categorical(), data(0), parameters=r"body|weight")
    model.heads[0].bias.data += 1.0  # left out, hence free
    assert strict.penalty(model).item() == 0
    model.heads.append(nn.Linear(5, 3).double())
    with pytest.raises(ValueError, match=r"got 'heads\.1\.weight' that is new; .*new=\"free\""):
        strict.penalty(model)
    with pytest.raises(ValueError, match=r"got 'heads\.1\.weight' that is new"):
        strict.consolidate(model, Categorical(), data(1))
    move(model.heads[1], seed=1)
    assert free.penalty(model).item() == 0.0
    move(model.body, seed=2)
    first = free.penalty(model).item()
    assert first > 0
    free.consolidate(model, Categorical(), data(1), parameters=r"body|heads\.1")
    assert free.penalty(model).item() == pytest.approx(first, rel=1e-6)
    move(model.heads[1], seed=3)
    assert free.penalty(model).item() > 1.001 * first


def test_another_network():
    """Catches a penalty of the parameters that happen to have the same name."""
    memory = ElasticWeightConsolidation(1.0)
    memory.consolidate(network(), Categorical(), data(0))
    other, short = nn.Sequential(nn.Linear(4, 6)), nn.Sequential(nn.Linear(4, 5))
    text = r"network that was consolidated, got '0\.weight' \[6, 4\] in it and \[5, 4\] in the cons"
    with pytest.raises(ValueError, match=text):
        memory.penalty(other)
    with pytest.raises(ValueError, match=text):
        memory.consolidate(other, Categorical(), data(1))
    with pytest.raises(ValueError, match=r"got '2\.weight' missing in it"):
        memory.penalty(short)
    assert memory.tasks == 1
    with pytest.raises(ValueError, match=r"fisher must be of the model's parameters, got '2\.wei"):
        ElasticWeightConsolidation(1.0).consolidate(short, fisher=diagonal(network()))


# --- states ---


OTHER = r"state must be of an ElasticWeightConsolidation, version 1, got \{"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ({"strength": -1}, r"strength must be positive and finite, got -1\.0"),
        ({"information": None}, r"state\.information must be a mapping, got None"),
        (
            {"information": {"0.weight": torch.ones(2)}},
            r"state\.information\['0\.weight'\] must be a tensor of torch\.float64, got a tens",
        ),
        (
            {"quadratics": [{}]},
            r"state\.quadratics\[0\] must hold 'fisher', 'anchor', 'weight', got",
        ),
        ({"version": 2}, OTHER),
        ({"param_groups": []}, r"state must hold only known fields, got 'param_groups'"),
    ],
)
def test_damaged_states(damage, text):
    """Catches a state that is taken in half, or that shows only in the training loop, and that of
    something else."""
    model, memory = network(), ElasticWeightConsolidation(3.0, online=True, decay=0.5)
    memory.consolidate(model, Categorical(), data(0))
    move(model, seed=1)
    before, other = memory.penalty(model).item(), ElasticWeightConsolidation(7.0)
    for each in (memory, other):
        with pytest.raises(ValueError, match=f"^{text}"):
            each.load_state_dict({**memory.state_dict(), **damage})
    assert memory.penalty(model).item() == before > 0
    assert (other.strength, other.online, other.tasks) == (7.0, False, 0)


# --- arguments, and what is the user's ---

SETTINGS = [
    ({"strength": 0.0}, ValueError, "strength must be positive and finite, got 0.0"),
    ({"strength": "1"}, TypeError, "strength must be a number, got '1'"),
    ({"decay": 1.1}, ValueError, "decay must lie in [0, 1], got 1.1"),
    ({"decay": "1"}, TypeError, "decay must be a number, got '1'"),
    ({"decay": 0.5, "online": False}, ValueError, "decay must be 1 unless online=True, got 0."),
    ({"online": "yes"}, TypeError, "online must be True or False, got 'yes'"),
    ({"new": "yes"}, ValueError, "new must be one of 'refuse', 'free', got 'yes'"),
]
TASKS = [
    ({"data": None}, ValueError, "likelihood and data must be given, or fisher, got neither"),
    ({"fisher": 3}, ValueError, "fisher must be given alone, got likelihood, data or settings as"),
    ({"data": None, "likelihood": None, "fisher": 3}, TypeError, "fisher must be a matrix of ff."),
    ({"weight": 0}, ValueError, "weight must be positive and finite, got 0"),
    ({"weight": None}, TypeError, "weight must be a number, got None"),
    ({"structure": "full"}, ValueError, "structure must be the same for all tasks (a diagonal), "),
]


@pytest.mark.parametrize(("arguments", "error", "text"), [*SETTINGS, *TASKS])
def test_wrong_arguments(arguments, error, text):
    """Catches a silent default, and half of a refused task in the penalty."""
    model, memory = network(), ElasticWeightConsolidation(1.0)
    memory.consolidate(model, Categorical(), data(0))
    move(model, seed=0)
    before = memory.penalty(model).item()
    of_a_task = {"model": model, "likelihood": Categorical(), "data": data(0)}
    use, given = memory.consolidate, of_a_task | arguments
    if (arguments, error, text) in SETTINGS:
        use, given = ElasticWeightConsolidation, {"strength": 1.0, "online": True} | arguments
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        use(**given)
    assert (memory.tasks, memory.penalty(model).item()) == (1, before)
    with pytest.raises(ValueError, match="fisher must be finite, got NaN or infinity"):
        memory.consolidate(model, fisher=diagonal(model, float("nan")))


def test_callers_modes_and_wrappers():
    """Catches anchors that autograd refuses because they were made in inference mode, a graph that
    anchors keep alive, anchors that follow the weights, and names with the prefix of a wrapper."""
    model, memory = network(), ElasticWeightConsolidation(1.0)
    before, x = flat(model), data(0)
    with torch.inference_mode():
        memory.consolidate(nn.DataParallel(model), Categorical(), x)
        memory.penalty(model)
    memory.penalty(model).backward()
    anchors = memory.state_dict()["anchors"].values()
    assert not any(value.requires_grad for value in anchors)
    move(model, seed=1)
    assert torch.equal(torch.cat([value.flatten() for value in anchors]), before)
    assert torch.equal(memory.penalty(nn.DataParallel(model)), memory.penalty(model))
    assert memory.penalty(model).item() > 0


def test_weights_that_are_loaded():
    """Catches a penalty about the weights of before: replaced ones (assign=True) are new tensors
    at, it may be, the old place."""
    model, memory = network(), ElasticWeightConsolidation(3.0)
    F, anchor = memory.consolidate(model, Categorical(), data(0)).diag(), flat(model)
    for seed in range(1, 6):
        memory.penalty(model)
        model.load_state_dict(network(seed).state_dict(), assign=seed % 2 == 0)
        expected = 1.5 * float(F @ (flat(model) - anchor).square())
        assert memory.penalty(model).item() == pytest.approx(expected, rel=1e-10)
