"""Damaged files and states: ValueError says what is wrong, and nothing has changed.

Five kinds of state, 1000 mutants of each with a fixed seed. Every mutant is refused with a
ValueError, or taken, and then what the object gives back is the mutant: no number is changed, cut
off or made up.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any

import pytest
import torch
from support.mutants import mutants, same
from torch import nn

import fisherfast as ff
from fisherfast._fields import Shape, build, kinds_of, plain, read
from fisherfast.parameters.fisher import RESULTS
from fisherfast.problems import GaussianShift
from fisherfast.results.information_map import InformationMap
from fisherfast.results.profile import Profile
from fisherfast.training.record import EpochRecord

COUNT = 1000
PROBLEM = GaussianShift(torch.ones(3))
DATA = PROBLEM.finite_difference(0.0, 0.2, 64, seed=1, paired=True)


def f64(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@cache
def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))


def monitor_of() -> ff.FisherMonitor:
    settings = ff.Settings(folds=6)
    options = {"layers": "output", "max_features": 4, "observe_every": 1, "settings": settings}
    return ff.FisherMonitor(network(), DATA, **options)


@cache
def trained() -> ff.FisherMonitor:
    """A monitor with a record, a live estimate, and hooks that wait for the next batch."""
    monitor = monitor_of()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        theta = torch.rand(16, generator=generator)
        network()(theta[:, None] + torch.randn(16, 3, generator=generator))
        monitor.observe(theta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ff.FisherWarning)
        monitor.step(train_mse=0.5, val_mse=math.nan)
    return monitor


@cache
def flow() -> dict[str, Any]:
    """A flow with everything in it: a map, a profile, words for NaN."""
    found = trained().history[0].flow
    J = torch.stack([f64(2.0)[None], f64(3.0)[None]])
    profile = Profile(f64(0.1, 0.2)[:, None], J, J / 9, torch.tensor([30, 34]))
    first = replace(found.layers[0], profile=profile, cut=True, parameter_names=("x",))
    first = replace(first, lower_stderr=f64(math.nan)[None], naive=f64(math.inf)[None])
    layers = (first, found.layers[1])
    picture = InformationMap(
        "output", torch.ones(1, 2, 1, 1).double(), torch.ones(1, 2, 1, 1).double()
    )
    settings = {**found.settings, "maps": True}
    whole = replace(found, layers=layers, maps={"output": picture}, settings=settings)
    return json.loads(json.dumps(whole.to_dict()))


@cache
def stopped() -> dict[str, Any]:
    stopping = ff.FisherEarlyStopping("crlb")
    weights = network().state_dict()
    stopping.load_state_dict(
        stopping.state_dict() | {"best_epoch": 3, "best_record": 2, "weights": weights}
    )
    return stopping.state_dict()


class Tokens(nn.Module):
    """Layers whose settings are in the state of a Gram matrix, and one whose gradients are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3, padding_idx=0)
        self.norm = nn.LayerNorm(3)
        self.conv = nn.Conv1d(3, 2, 2, padding="same", padding_mode="circular")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(self.embed(x)).mT).mean(2)


@cache
def fisher_of_tokens() -> dict[str, Any]:
    x = torch.arange(6).reshape(2, 3) % 5
    return ff.parameters.fisher(Tokens(), "gaussian", x, structure="gram").state_dict()


@cache
def fisher_state(structure: str) -> dict[str, Any]:
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    return ff.parameters.fisher(network(), "gaussian", x, structure=structure).state_dict()


def consolidated(structure: str = "diag") -> Any:
    memory = ff.parameters.ElasticWeightConsolidation(3.0, online=True, decay=0.5)
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    memory.consolidate(network(), "gaussian", x, structure=structure)
    return memory


@dataclass
class Kind:
    """A state, a function that loads it and gives it back, and one that shows that an object which
    has refused is as it was."""

    state: Callable[[], Any]
    load: Callable[[Any], Any]
    unchanged: Callable[[], bool] = lambda: True


def with_object(make: Callable[[], Any], state: Callable[[], Any]) -> Kind:
    """Of an object with `load_state_dict`; the one that has to refuse holds a state already."""

    @cache
    def holder() -> tuple[Any, Any]:
        made = make()
        made.load_state_dict(copy.deepcopy(state()))
        return made, copy.deepcopy(made.state_dict())

    def load(mutant: Any) -> Any:
        made, before = holder()
        made.load_state_dict(mutant)
        found = copy.deepcopy(made.state_dict())
        if "version" in found:  # of the library that writes
            found["version"] = mutant["version"]
        if sorted(set(mutant.get("warned", ()))) == found.get("warned"):  # a set
            found["warned"] = mutant["warned"]
        made.load_state_dict(copy.deepcopy(before))
        return found

    return Kind(state, load, lambda: same(holder()[0].state_dict(), holder()[1]))


def load_flow(content: Any) -> Any:
    """Loaded, printed (a number that cannot be shown is found later) and given back."""
    loaded = ff.FisherFlow.from_dict(content)
    assert repr(loaded)
    return loaded.to_dict()


def load_fisher(state: Any) -> Any:
    loaded = ff.parameters.from_state_dict(state)
    assert loaded.diag().shape == (loaded.layout.size,)
    assert (loaded @ torch.ones(loaded.layout.size)).shape == (loaded.layout.size,)
    return loaded.state_dict()


STRUCTURES = ["diag", "block", "kfac", "gram", "lowrank", "full"]
KINDS = {
    "flow": Kind(flow, load_flow),
    "monitor": with_object(monitor_of, lambda: trained().state_dict()),
    "stopping": with_object(lambda: ff.FisherEarlyStopping("crlb"), stopped),
    **{
        f"consolidation, {name}": with_object(
            lambda: ff.parameters.ElasticWeightConsolidation(1.0),
            cache(lambda name=name: consolidated(name).state_dict()),
        )
        for name in ("diag", "kfac")
    },
    **{
        f"Fisher, {name}": Kind(lambda name=name: fisher_state(name), load_fisher)
        for name in STRUCTURES
    },
    "Fisher, gram of tokens": Kind(fisher_of_tokens, load_fisher),
}


SLOW = {"monitor": pytest.mark.slow}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW.get(kind, ())) for kind in KINDS])
def test_mutants_are_refused_or_taken_as_they_are(kind):
    """Catches KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError, half of
    a state that was refused, and a value that is repaired in silence."""
    of = KINDS[kind]
    assert same(of.load(copy.deepcopy(of.state())), of.state())
    count = COUNT // sum(name.partition(",")[0] == kind.partition(",")[0] for name in KINDS) + 1
    refused = 0
    for said, mutant in mutants(of.state(), count, seed=16):
        try:
            found = of.load(copy.deepcopy(mutant))
        except ValueError:
            refused += 1
            assert of.unchanged(), said
        except Exception as error:
            pytest.fail(f"{said}: {type(error).__name__}: {error}")
        else:
            assert same(found, mutant), said
    assert refused > count / 2


def change(path: tuple[Any, ...], value: Any) -> Callable[[Any], None]:
    """A change of one value of a state; DROP takes it out, a function gets the old value."""

    def apply(state: Any) -> None:
        *way, last = path
        for key in way:
            state = state[key]
        if value is DROP:
            del state[last]
        else:
            state[last] = value(state[last]) if callable(value) else value

    return apply


DROP, ONE = object(), torch.tensor([1])
LAYER, RECORD, MOMENTS = ("layers", 1), ("history", 0), ("observer", "moments", "output")
WRONGS = [
    ("flow", (*LAYER, "J"), DROP, "layers[1]: content must hold 'J', got ['aliases"),
    ("flow", ("layers",), DROP, "content must hold 'layers', got ['maps', 'settings', 'version']"),
    ("flow", ("layers",), [], "layers must begin with 'input', got []"),
    ("flow", (*LAYER, "J"), "many", "layers[1]: J must be a list of numbers, got 'many'"),
    ("flow", (*LAYER, "J"), [[1.0, 2.0], [3.0]], "layers[1]: J must be a regular array of numbers"),
    ("flow", (*LAYER, "J"), [[None]], "layers[1]: an entry of J must be a number, got None"),
    ("flow", (*LAYER, "J"), [], "layers[1]: J must have the shape [P, P], got [0]"),
    ("flow", (*LAYER, "samples"), math.inf, "layers[1]: samples must be a whole number, got inf"),
    ("flow", (*LAYER, "samples"), -1, "layers[1]: samples must be at least 0, got -1"),
    ("flow", (*LAYER, "stderr"), True, "layers[1]: stderr must be a list of numbers, got True"),
    ("flow", (*LAYER, "stderr"), [[True]], "layers[1]: an entry of stderr must be a number, got T"),
    ("flow", (*LAYER, "stderr"), [[-1.0]], "layers[1]: stderr must be at least 0, got [[-1.0]]"),
    ("flow", (*LAYER, "plateau"), 1, "layers[1]: plateau must be True or False, got 1"),
    ("flow", ("layers", 0, "cut"), "yes", "layers[0]: cut must be True or False, got 'yes'"),
    ("flow", (*LAYER, "status"), "fine", "layers[1]: status must be one of 'unresolved', 'noisy',"),
    ("flow", (*LAYER, "descendants"), [3], "layers[1]: descendants[0] must be text, got 3"),
    ("flow", (*LAYER, "parameter_names"), ["x", "y"], "layers[1]: parameter_names must have 1 ent"),
    ("flow", (*LAYER, "dtheta"), [0.1, 0.1], "layers[1]: dtheta must have 1 entries or none, got"),
    ("flow", (*LAYER, "response"), [[1.0]] * 2, "layers[1]: readout must have the shape [d = 2, P"),
    ("flow", (*LAYER, "error_covariance"), [[1.0] * 3] * 3, "layers[1]: error_covariance must hav"),
    ("flow", (*LAYER, "name"), "input", "layers must have different names, got 'input' twice"),
    ("flow", (*LAYER, "curve_J"), lambda J: J[:-1], "layers[1]: curve_J must have the shape [K = "),
    ("flow", (*LAYER, "profil"), None, "layers[1]: content must hold only known fields, got 'prof"),
    ("flow", ("layers", 0, "profile", "J"), DROP, "layers[0]: profile: content must hold 'J', got"),
    ("flow", ("layers", 0, "profile", "samples"), [1], "layers[0]: profile: samples must have the"),
    ("flow", ("maps", "output", "name"), "1", "maps must be of the layers, got 'output' for"),
    ("flow", ("settings", "maps"), -1, "settings['maps'] must be a list, got -1"),
    ("flow", ("format",), "other", "content must be a saved flow (format 'fisherfast.flow'), got "),
    ("flow", ("format_version",), 2, "format_version must be 1, got 2: use the version of fisherf"),
    ("monitor", ("history",), DROP, "state must hold 'history', got ["),
    ("monitor", (*RECORD, "flow"), DROP, "state.history[0]: content must hold 'flow', got ["),
    ("monitor", (*RECORD, "flow"), {}, "state.history[0]: flow: content must be a saved flow"),
    ("monitor", (*RECORD, "epoch"), 1.5, "state.history[0]: epoch must be a whole number, got 1.5"),
    ("monitor", (*RECORD, "held_out"), "yes", "state.history[0]: held_out must be True or False,"),
    ("monitor", (*RECORD, "held_out"), 1, "state.history[0]: held_out must be True or False,"),
    ("monitor", (*RECORD, "attainable"), (1.0, 2.0), "state.history[0]: attainable must hold one "),
    ("monitor", (*RECORD, "source"), 3, "state.history[0]: source must be text, got 3"),
    ("monitor", (*RECORD, "live_age"), -1, "state.history[0]: live_age must be at least 0, got -1"),
    ("monitor", (*RECORD, "train_mse"), (1, 2), "state.history[0]: train_mse must hold one number"),
    ("monitor", (*RECORD, "input_J"), 3.0, "state.history[0]: input_J must be a tensor, got 3.0"),
    ("monitor", ("calls",), -1, "state.calls must be at least 0, got -1"),
    ("monitor", ("calls",), "many", "state.calls must be a whole number, got 'many'"),
    ("monitor", ("settings", "seed"), False, "state must be of the same settings, got seed = Fals"),
    ("monitor", ("observer", "listening"), 1, "observer.listening must be True or False, got 1"),
    ("monitor", (*MOMENTS, "square"), DROP, "observer.moments['output']: content must hold 'squar"),
    ("monitor", (*MOMENTS, "noise"), torch.ones(2, 2).double(), "observer.moments['output']: nois"),
    ("monitor", (*MOMENTS, "counts"), [1.0, 0.0, 1.0], "observer.moments['output']: counts must b"),
    ("monitor", ("spaces",), {"output": (torch.ones(2, 3),) * 2}, "state.spaces['output'] must"),
    ("stopping", ("weights",), DROP, "state must hold 'weights', got ["),
    ("stopping", ("weights", "0.bias"), "text", "state.weights['0.bias'] must be a tensor, got 't"),
    ("stopping", ("best_record",), None, "state.best_record must belong to best_epoch 3, got None"),
    ("stopping", ("stopped_epoch",), 4, "state.reason must belong to stopped_epoch 4, got ''"),
    ("consolidation, diag", ("anchors", "0.bias"), DROP, "state.anchors['0.bias'] must be a tenso"),
    ("consolidation, diag", ("tasks",), 0, "state.tasks must be those of 4 parabolas and 0 matric"),
    ("consolidation, diag", ("strength",), math.nan, "strength must be positive and finite, got n"),
    ("consolidation, kfac", ("quadratics", 0, "anchor"), None, "state.quadratics[0].anchor must b"),
    ("consolidation, kfac", ("quadratics", 0, "weight"), -1.0, "state.quadratics[0]: weight must"),
    ("Fisher, diag", ("values",), lambda v: v[:-1], "state.values must have the shape [P = 11], g"),
    ("Fisher, diag", ("values",), lambda v: v.float(), "state.values must be a tensor of torch.fl"),
    ("Fisher, diag", ("samples",), math.inf, "state.samples must be a whole number, got inf"),
    ("Fisher, block", ("blocks", "0"), DROP, "state: blocks must be those of ['0', '2'], got ['2'"),
    ("Fisher, kfac", ("blocks",), [], "state: blocks and diagonal must hold each of ['0.bias', '0"),
    ("Fisher, kfac", ("sharing",), "all", "state.sharing must be one of 'expand', 'reduce', got '"),
    ("Fisher, lowrank", ("directions",), lambda U: U.T, "state.directions must have the shape [P"),
    ("Fisher, gram", ("jacobian", 0, 0, "rule", "kind"), "norm", "state: jacobian[0]: rule.kind m"),
    ("Fisher, gram", ("jacobian", 0, 0, "x"), torch.ones(2, 9), "state: jacobian[0]: layer.x must"),
    ("Fisher, gram", ("layout", "0.bias"), [-2], "layout['0.bias'][0] must be at least 0, got -2"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "path", "value", "text"), WRONGS)
def test_wrongs_are_refused_by_name(kind, path, value, text):
    """Catches a message that does not say which value is wrong and what it must be; nothing has
    changed."""
    of = KINDS[kind]
    mutant = copy.deepcopy(of.state())
    change(path, value)(mutant)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        of.load(mutant)
    assert of.unchanged()


SAVED = [ff.FisherFlow, ff.LayerFisher, Profile, InformationMap, EpochRecord]


@pytest.mark.parametrize("cls", [*SAVED, *RESULTS.values()])
def test_every_saved_field_is_checked(cls):
    """Catches a new field with a hint that the checker does not know, or that takes anything."""
    for name, kind in kinds_of(cls).items():
        if name not in ("layout", "_jacobian"):  # these check themselves
            with pytest.raises(ValueError, match=f"^{name}"):
                read(kind, object(), name)


@dataclass(frozen=True)
class Thing:
    """All kinds of fields."""

    rows: Annotated[torch.Tensor, Shape(("n", "P"))]
    count: int
    where: tuple[int, str]
    parts: dict[str, list[float]]
    switch: bool | str = True
    inner: Profile | None = None


def test_fields_come_back():
    """Catches 1 that comes back as 1.0 or True, -0.0 and subnormals that change, a list for a
    tuple, and sizes that are shared by two objects."""
    inner = Profile(f64(-0.0)[:, None], f64(5e-324)[:, None, None], f64(1)[:, None, None], ONE)
    thing = Thing(
        f64(0.1 + 0.2, math.inf, math.nan)[:, None], 1, (2, "x"), {"a": [1.0]}, "on", inner
    )
    state = plain(thing)
    assert state == json.loads(json.dumps(state, allow_nan=False))
    back = build(Thing, state)
    assert same(vars(back) | {"inner": vars(back.inner)}, vars(thing) | {"inner": vars(inner)})
    assert type(back.count) is int
    assert math.copysign(1, float(back.inner.theta)) == -1
    assert build(Thing, state | {"rows": [[1.0, 2.0]]}).rows.shape == (1, 2)
    assert build(Thing, {**state, "switch": False, "inner": None}).switch is False
    for name, value, text in (
        ("where", [2], "where must have 2 entries, got [2]"),
        ("where", [2, 3], "where[1] must be text, got 3"),
        ("parts", {"a": [True]}, "parts['a'][0] must be a number, got True"),
        ("parts", {3: []}, "parts must have text as keys, got 3"),
        ("switch", 1, "switch must be text, got 1"),
        ("count", 2**63, "count must be a whole number below 2**63, got 9223372036854775808"),
        ("rows", [[10**400]], "an entry of rows must be a number that float64 can hold, got 1000"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
            build(Thing, state | {name: value})


def test_bytes_of_files(tmp_path):
    """300 files of both formats, cut off or with a byte changed or put in: each is the flow that
    was saved, another flow that is whole, or a ValueError with the name of the file. Catches
    BadZipFile, zlib.error, EOFError, UnicodeDecodeError and what `from_dict` raises."""
    saved = ff.FisherFlow.from_dict(copy.deepcopy(flow()))
    chance, refused = random.Random(16), 0
    for suffix in (".json", ".npz"):
        path = tmp_path / f"flow{suffix}"
        saved.save(path)
        whole = path.read_bytes()
        for number in range(150):
            place, byte = chance.randrange(len(whole)), bytes([chance.randrange(256)])
            rest = (b"", byte + whole[place + 1 :], byte + whole[place:])[number % 3]
            path.write_bytes(whole[:place] + rest)
            try:
                ff.FisherFlow.load(path)
            except ValueError as error:
                refused += f"flow{suffix}" in str(error)
            else:
                refused += 1
    assert refused == 300
