"""Models with several outputs: what "output" and its heads are, and which one a monitor reads."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.dual_oracle import Function
from support.networks_zoo import (
    WIDTH,
    Written,
    measure,
    mlp,
    samples,
    seeded,
    two_conditions,
    untouched,
)
from torch import nn

import fisherfast as ff
from fisherfast.model.graph import survey
from fisherfast.model.hooks import Forward
from fisherfast.model.isolation import evaluation

HALF = WIDTH // 2


def head(outputs: Callable[[torch.Tensor, torch.Tensor], Any]) -> nn.Module:
    """Returns what a function makes of the input and of a linear layer's output."""
    return Written(lambda m, x: outputs(x, m.fc(x)), fc=nn.Linear(WIDTH, 2))


class Estimate(NamedTuple):
    mean: torch.Tensor
    log_variance: torch.Tensor


class ModelOutput(OrderedDict):
    """A mapping with attributes, as the models of transformers return it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last pixels: half of the information each."""
    return x[:, :HALF] * 2, x[:, HALF:] - 1


class Backwards(nn.Module):
    """The head that is called last is constant, and returned first."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(WIDTH, WIDTH, bias=False)
        self.log_variance = nn.Linear(WIDTH, 2)
        self.log_variance.weight.data.zero_()
        self.mean.weight.data.copy_(torch.eye(WIDTH))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.mean(x)
        log_variance = self.log_variance(x)
        return log_variance, mean


CONTAINERS: dict[str, tuple[Callable[[Any, Any], Any], list[str]]] = {
    "tuple": (lambda a, b: (a, b), ["output[0]", "output[1]"]),
    "list": (lambda a, b: [a, b], ["output[0]", "output[1]"]),
    "dict": (lambda a, b: {"mean": a, "rest": b}, ["output[mean]", "output[rest]"]),
    "named tuple": (Estimate, ["output[0]", "output[1]"]),
    "nested": (lambda a, b: {"x": (a, None, [b])}, ["output[x][0]", "output[x][2][0]"]),
    "model output": (lambda a, b: ModelOutput(m=a, s=b), ["output[m]", "output[s]"]),
    "beside others": (lambda a, b: (3, a, a.argmax(1), None, b), ["output[1]", "output[4]"]),
}


def sources(n: int = 2000) -> dict[str, ff.data.Data]:
    """x ~ N(theta 1, 1) of WIDTH pixels at theta = 0, in every form: I = WIDTH."""
    x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(1))
    return {
        "independent": two_conditions(6 * n),
        "paired": ff.FiniteDifference(x - 0.05, x + 0.05, dtheta=0.1, paired=True),
        "pathwise": ff.Pathwise(x, torch.ones(n, WIDTH)),
        "score": ff.Score(x, x.sum(1)),
    }


# --- the joint output -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "source"),
    [("tuple", source) for source in sources(4)] + [(each, "paired") for each in CONTAINERS],
)
def test_the_joint_output_has_the_information_of_all_heads(container, source):
    """Catches "output" that is one head (3 of 6), or that is missing. 4 sigma: 6e-5 a case."""
    join, names = CONTAINERS[container]
    model = Function(lambda x: join(x[:, :HALF] * 1, x[:, HALF:] * 1))
    with untouched(model):
        flow = measure(model, sources()[source])
    assert flow.names == ["input", *names, "output"]
    assert (flow["output"].kind, flow["output"].shape) == ("outputs", (WIDTH,))
    for name, truth in ((names[0], HALF), (names[1], HALF), ("output", WIDTH)):
        assert float(flow[name].linear) == pytest.approx(
            truth, abs=4 * float(flow[name].linear_stderr)
        )
        assert float(flow[name].linear_stderr) < HALF / 8  # one head is 8 sigma away
    assert set(flow["input"].descendants) == {*names, "output"}
    assert flow["output"].descendants == ()


@pytest.mark.parametrize("layers", [[], "output", "^output$", lambda *_: False, ["input"]])
def test_the_joint_output_is_always_measured(layers):
    """Catches a selection that loses it; heads are measured where they are asked for."""
    model = Function(halves)
    assert measure(model, layers=layers).names == ["input", "output"]
    for chosen in ("output[1]", r"output\[1", ["output[1]"], lambda name, _: name == "output[1]"):
        assert measure(model, layers=chosen).names == ["input", "output[1]", "output"]


def test_heads_in_the_order_in_which_they_are_returned():
    """Catches an output that is the head called last: it is constant here, and J = 0."""
    monitor = ff.FisherMonitor(seeded(Backwards), two_conditions(2000), max_features=16)
    record = monitor.step()
    flow = record.flow
    assert flow.names == ["input", "mean", "log_variance", "output"]
    assert flow["output[0]"].name == "log_variance"
    assert flow["output[1]"].name == "mean"
    assert flow["log_variance"].value == 0
    assert flow["output"].shape == (2 + WIDTH,)
    assert record.transmission == pytest.approx(1, abs=0.02)  # 0.001 seen; the same numbers
    joined = torch.cat([torch.ones(2), torch.zeros(WIDTH)])  # log_variance comes first
    seen = ff.propagate(seeded(Backwards), torch.zeros(2, WIDTH), torch.ones(1, 2, WIDTH))
    assert torch.equal(seen["output"][1][0, 0], 1 - joined)


def test_joint_tangents_are_exact():
    """Catches a joint whose columns are in another order in the tangents, and lost constants."""

    def outputs(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        constant = torch.full((len(x), 2), 3.0, dtype=x.dtype)
        return x.square().sum(1), constant, x.view(-1, 2, HALF).transpose(1, 2)

    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dx = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, tangents = ff.propagate(Function(outputs), x, dx)["output"]
    square, constant, last = outputs(x)
    assert torch.equal(value, torch.cat([square[:, None], constant, last.flatten(1)], 1))
    torch.testing.assert_close(tangents[:, :, 0], 2 * (x * dx).sum(-1))
    assert not tangents[:, :, 1:3].any()
    turned = dx.view(2, 5, 2, HALF).transpose(2, 3).flatten(2)
    torch.testing.assert_close(tangents[:, :, 3:], turned)


def test_mixed_precision_of_heads():
    """Catches a joint that is rounded to the narrowest dtype, or refused by `cat`."""
    model = Function(lambda x: (x[:, :HALF].half(), x[:, HALF:].double()))
    x = torch.randn(3, WIDTH)
    joint, _ = ff.propagate(model, x, torch.ones(1, 3, WIDTH))["output"]
    assert joint.dtype == torch.float64
    assert torch.equal(joint[:, HALF:], x[:, HALF:].double())
    layer = measure(model, sources()["pathwise"])["output"]
    assert float(layer.linear) == pytest.approx(WIDTH, abs=4 * float(layer.linear_stderr))


def test_a_joint_output_is_a_function_of_what_all_heads_depend_on():
    """Catches a chain from a layer that only one head depends on, and one that is lost."""

    def forward(m: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = m.body(x)
        return m.a(h), m.b(h)

    def build() -> nn.Module:
        return Written(forward, body=nn.Linear(WIDTH, 4), a=nn.Linear(4, 1), b=nn.Linear(4, 2))

    flow = measure(seeded(build))
    assert flow.names == ["input", "body", "a", "b", "output"]
    assert set(flow["body"].descendants) == {"a", "b", "output"}
    assert flow["a"].descendants == flow["b"].descendants == ()


def test_recall_between_measurements():
    """Catches a joint that is lost from the third measurement on, when the layers are known."""
    model, data = seeded(Backwards), two_conditions()
    monitor = ff.FisherMonitor(model, data, max_features=16)
    once = ff.fisher_flow(model, data, max_features=16)
    for _ in range(4):
        assert monitor.step().flow.to_dict()["layers"] == once.to_dict()["layers"]


def test_the_memory_of_a_joint_output_is_planned():
    """Catches a plan that leaves it out: two views of a small tensor take nothing, it does."""
    wide = 10_000

    def largest_batch(joined: bool) -> int:
        def outputs(x: torch.Tensor) -> Any:
            heads = x[:, :1].expand(-1, wide), x[:, 1:2].expand(-1, wide)
            return torch.cat(heads, 1) if joined else heads

        model, seen = Function(outputs), []
        model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        options = {"max_features": 8, "layers": [], "memory_budget": "60 MB"}
        measure(model, two_conditions(600), **options)
        return max(seen)

    assert largest_batch(joined=False) == largest_batch(joined=True)


# --- one head, or none ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "others",
    [
        lambda x, y: (y, None),
        lambda x, y: {"y": y, "class": y.argmax(1)},
        lambda x, y: (y.mean(), y),
        lambda x, y: (torch.ones(2, 3), y, torch.ones(len(x), dtype=torch.bool)),
        lambda x, y: (y, y),
        lambda x, y: (y, y.view(-1, 1, 2)),
    ],
    ids=["None", "integers", "mean", "table", "twice", "view"],
)
def test_one_floating_output_beside_others(others):
    """Catches a joint of copies or of one tensor: "output" is the layer itself."""

    model = seeded(lambda: head(others))
    with untouched(model):
        flow = measure(model)
    assert flow.names == ["input", "output"]
    assert flow["output"].aliases[0] == "fc"
    assert any(alias.startswith("output[") for alias in flow["output"].aliases)
    assert flow["output"].kind == "Linear"
    assert torch.equal(flow["output"].J, measure(nn.Sequential(model.fc))["output"].J)


def test_the_input_returned_as_it_is():
    """Catches a joint output that hides that nothing is lost: "output" is the input here."""
    flow = measure(Function(lambda x: {"x": x, "n": len(x)}))
    assert flow.names == ["input"]
    assert flow["output"] is flow["output[x]"] is flow["input"]


def test_tables_that_look_like_a_batch():
    """Catches a table of as many rows as a batch has samples, in a survey or in the last batch."""
    for length in (64, 200):
        table = torch.randn(length, 3)
        flow = measure(
            Function(lambda x, table=table: (*halves(x), table)),
            settings=ff.Settings(batch_size=200),
        )
        assert flow.names == ["input", "output[0]", "output[1]", "output"]
        assert flow["output"].shape == (WIDTH,)


@pytest.mark.parametrize(
    "outputs",
    [lambda x: (x.argmax(1), None), lambda x: x.mean(), lambda x: None, lambda x: {"n": 3}],
    ids=["integers", "a mean", "nothing", "a number"],
)
def test_models_without_a_floating_output(outputs):
    """Catches an error, or another layer that passes for the output: there is none."""

    model = seeded(lambda: head(lambda x, y: outputs(y)))
    flow = measure(model)
    assert flow.names == ["input", "fc"]
    assert "output" not in flow
    with pytest.raises(ValueError, match=re.escape("output must be one of [], got 'output'")):
        measure(model, output="output")
    monitor = ff.FisherMonitor(model, two_conditions(), max_features=16)
    text = "model must return a floating tensor with one row per sample, got none: use fisher_flow"
    with pytest.raises(ValueError, match=f"^{text}"):
        monitor.step()


@pytest.mark.parametrize(
    "late",
    [
        lambda x: (x * 1,),
        lambda x: None,
        lambda x: (x * 1, x.argmax(1)),
        lambda x: (x * 1, x[:-1]),
        lambda x: (x * 1, x[0, 0]),
    ],
    ids=["fewer", "none", "integers", "other rows", "a number"],
)
def test_heads_that_are_not_always_there(late):
    """Catches moments of a joint output that changes from batch to batch."""
    calls = []

    def outputs(x: torch.Tensor) -> Any:
        calls.append(len(x))
        return (x * 1, x * 2) if len(calls) < 16 else late(x)

    with pytest.raises(ValueError, match=r"^layer 'output(\[\d\])?' must (have the same|run for)"):
        measure(Function(outputs), settings=ff.Settings(batch_size=20), layers=[])


# --- which one is read ------------------------------------------------------------------------


def test_a_named_head_is_kept_in_the_settings_and_measured():
    """Catches a head that `layers` loses, and a joint that is lost for it."""
    model = Function(halves)
    flow = measure(model, layers=[], output="output[1]")
    assert flow.names == ["input", "output[1]", "output"]
    assert flow.settings["output"] == "output[1]"
    assert measure(model).settings["output"] is None
    monitor = ff.FisherMonitor(model, sources()["paired"], layers=[], output="output[1]")
    record = monitor.step()
    assert record.flow.settings["output"] == "output[1]"
    assert record.transmission == record.flow.fractions()["output[1]"] < 0.8
    assert "output[1]" in monitor.step().flow


def test_a_named_head_is_measured_on_training_samples_too():
    """Catches training samples measured in another output than held-out ones."""
    held_out, training = sources()["paired"], sources()["pathwise"]
    options = {"training_data": training, "max_features": 16, "output": "output[1]"}
    record = ff.FisherMonitor(Function(halves), held_out, **options).step()
    assert "output[1]" in record.training_flow
    share = record.training_flow.fractions()["output[1]"]
    assert record.overfitting == pytest.approx(share - record.flow.fractions()["output[1]"])


def test_a_named_head_that_is_a_layer():
    """Catches a name that the flow knows as an alias alone: the record reads the layer "mean"."""
    for head, layer in (("output[1]", "mean"), ("output[0]", "log_variance")):
        record = ff.FisherMonitor(seeded(Backwards), two_conditions(2000), output=head).step()
        assert record.flow[head].name == layer
        assert record.transmission == record.flow.fractions()[layer]


@pytest.mark.parametrize("name", ["output[2]", "", "input"])
def test_a_head_that_is_not_there(name):
    """Catches a typo that is found when all passes are done, or never."""
    calls = []
    model = nn.Sequential(nn.Identity(), Function(halves))
    model.register_forward_hook(lambda *_: calls.append(1))
    text = f"output must be one of ['output[0]', 'output[1]', 'output'], got {name!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        measure(model, output=name)
    assert len(calls) == 3  # two of the survey, and one that is followed
    monitor = ff.FisherMonitor(model, two_conditions(), output=name)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        monitor.step()


@pytest.mark.parametrize("output", [0, ["output[0]"]])
def test_a_head_that_is_no_name(output):
    """Catches a number that is taken for an index."""
    text = f'output must be a name like "output[0]" or None, got {output!r}'
    for measurement in (ff.fisher_flow, ff.FisherMonitor):
        with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
            measurement(seeded(mlp), two_conditions(), output=output)


# --- wrappers ---------------------------------------------------------------------------------


def test_the_model_and_its_output_stay_as_they_are():
    """Catches an output that is replaced by a copy of its container: classes of the user's own."""
    made = []

    def outputs(x: torch.Tensor) -> ModelOutput:
        made.append(ModelOutput(a=x[:, :1] * 1, b=x[:, 1:] * 1))
        return made[-1]

    model, x = Function(outputs), samples(8)[0]
    with evaluation(model, 0):
        sites = survey(model, x)
        with Forward(model, lambda *event: None, sites) as forward:
            assert forward.run(x) is made[-1]
