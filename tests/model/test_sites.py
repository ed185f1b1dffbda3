"""Where activations are read: every kind of network, its names, its chains, its untouched state."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.networks_zoo import (
    DTHETA,
    WIDTH,
    ZOO,
    Attention,
    Failing,
    Functional,
    InputOutput,
    Noisy,
    Recurrent,
    Residual,
    Shared,
    Squeezed,
    Transformer,
    Twice,
    Unused,
    convolutional,
    measure,
    mlp,
    one_thread,  # noqa: F401
    samples,
    seeded,
    two_conditions,
    untouched,
)
from torch import nn

import fisherfast as ff

Transform = Callable[[torch.Tensor], torch.Tensor]


def linear_of(transform: Transform, data_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Linear information of activations that are computed here, without hooks."""
    with torch.no_grad():
        minus, plus = (transform(x.to(data_dtype)) for x in samples())
    return ff.fisher_information(ff.FiniteDifference(minus, plus, DTHETA), max_features=4).linear


def assert_measures(layer: ff.LayerFisher, transform: Transform) -> None:
    """The layer holds the information of these activations. float32: 1e-5 seen, 1e-3 allowed."""
    torch.testing.assert_close(layer.linear, linear_of(transform), rtol=1e-3, atol=1e-3)


def kept(flow: ff.FisherFlow) -> dict[str, set[str]]:
    """Descendants of each layer."""
    return {layer.name: set(layer.descendants) for layer in flow}


@pytest.mark.parametrize(("number", "name"), list(enumerate(ZOO)))
def test_any_network_is_measured_and_left_as_it_was(number, name):
    """Catches hooks, modes, buffers or random states that are not put back, for every network:
    those in training mode have some layers in eval mode."""
    model = seeded(ZOO[name]).train(number % 2 == 0)
    for child in list(model.children())[1::2]:
        child.eval()
    with untouched(model):
        flow = measure(model)
    assert flow.names[0] == "input"
    assert len(set(flow.names)) == len(flow.names)
    for layer in flow:
        assert torch.isfinite(layer.J).all()
        assert layer.samples == 800
        assert layer.J.dtype == torch.float64


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (F.relu, "relu"),
        (torch.Tensor.relu, "relu"),
        (F.relu_, "relu"),
        (torch.Tensor.relu_, "relu"),
        (lambda x: F.relu(x, inplace=True), "relu"),
        (torch.tanh, "tanh"),
        (lambda x: x.tanh_(), "tanh"),
        (F.sigmoid, "sigmoid"),
        (F.gelu, "gelu"),
        (lambda x: F.softmax(x, dim=-1), "softmax"),
    ],
)
def test_functional_activations(activation, name):
    """Catches a spelling without a tap, and in-place ones that overwrite the values before them."""
    model = seeded(lambda: Functional(activation))
    with untouched(model):
        flow = measure(model)
    assert flow.names == ["input", "fc1", f"fc1/{name}", "output"]
    assert flow[f"fc1/{name}"].kind == name
    assert_measures(flow["fc1"], model.fc1)
    assert_measures(flow[f"fc1/{name}"], lambda x: activation(model.fc1(x)))
    assert_measures(flow["output"], lambda x: model.fc2(activation(model.fc1(x))))


class First(nn.Module):
    """A function of the input before the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(x))


@pytest.mark.parametrize(
    ("build", "names", "layer", "transform"),
    [
        (
            Twice,
            ["input", "fc", "act", "fc#2", "act#2", "output"],
            "fc#2",
            lambda model, x: model.fc(model.fc(x).tanh()),
        ),
        (
            lambda: Functional(lambda x: torch.tanh(2 * torch.tanh(x))),
            ["input", "fc1", "fc1/tanh", "fc1/tanh#2", "output"],
            "fc1/tanh#2",
            lambda model, x: torch.tanh(2 * torch.tanh(model.fc1(x))),
        ),
        (
            Shared,
            ["input", "a", "a/tanh", "a#2", "output"],
            "a#2",
            lambda model, x: model.a(model.a(x).tanh()),
        ),
        (First, ["input", "input/tanh", "output"], "input/tanh", lambda model, x: x.tanh()),
        (lambda: nn.Linear(WIDTH, 2), ["input", "output"], "output", lambda model, x: model(x)),
    ],
    ids=["module twice", "function twice", "two names", "before all layers", "bare layer"],
)
def test_names_of_calls(build, names, layer, transform):
    """Catches a second call that overwrites the first, one name for two calls, a name that is
    counted twice, and a function before the first layer that is lost."""
    model = seeded(build)
    flow = measure(model)
    assert flow.names == names
    assert_measures(flow[layer], lambda x: transform(model, x))


def test_inplace_arithmetic_after_a_tapped_layer():
    """Catches values that are read only when the forward pass is over."""

    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            z = y.clone()
            y.mul_(0)
            return z

    model = seeded(Overwritten)
    flow = measure(model)
    assert_measures(flow["fc"], model.fc)
    assert_measures(flow["output"], model.fc)


@pytest.mark.parametrize("kind", ["tensor", "stream", "paired"])
def test_networks_that_overwrite_their_input(kind):
    """Catches the user's samples changed by nn.ReLU(inplace=True), and J taken after it."""
    model = seeded(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, 2)))
    minus, plus = samples()
    before = minus.clone(), plus.clone()
    sources = {
        "tensor": (minus, plus),
        "stream": (lambda: minus.split(70), lambda: plus.split(70)),
        "paired": (minus, plus),
    }
    flow = measure(model, ff.FiniteDifference(*sources[kind], DTHETA, paired=kind == "paired"))
    assert torch.equal(minus, before[0])
    assert torch.equal(plus, before[1])
    if kind != "paired":
        assert_measures(flow["input"], nn.Identity())
        assert_measures(flow["0"], torch.relu)


class Parallel(nn.Module):
    """Two branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(WIDTH, 2)
        self.right = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.left(x), self.right(x)], dim=1)


class Gated(nn.Module):
    """A skip that is open for 1 in 6 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + x[:, :2] * (x[:, 2:3] > 1)


@pytest.mark.parametrize(
    ("build", "descendants"),
    [
        (mlp, None),
        (
            Residual,
            {"input": {"a", "act", "b", "output"}, "a": {"act", "b"}, "act": {"b"}, "b": set()},
        ),
        (Parallel, {"input": {"left", "right", "output"}, "left": set(), "right": set()}),
        (Gated, {"input": {"fc", "output"}, "fc": set()}),
        (Noisy, {"fc": set()}),
    ],
)
def test_chains(build, descendants):
    """Every layer of a Sequential is a function of every one before. Catches a missing link, and
    one made of the order of execution alone, past a sum, past a skip that is mostly closed, or past
    two draws of random numbers."""
    flow = measure(seeded(build))
    found = kept(flow)
    if descendants is None:
        descendants = {name: set(flow.names[k + 1 :]) for k, name in enumerate(flow.names)}
    assert {name: found[name] for name in descendants} == descendants


def test_lstm():
    """Catches the state [layers, n, h], whose first axis is no batch, that is taken for samples,
    and a chain that ends at a tuple."""
    model = seeded(Recurrent)
    flow = measure(model)
    assert flow.names == ["input", "lstm[0]", "output"]
    assert flow["lstm[0]"].shape == (2, 4)
    assert flow["lstm[0]"].descendants == ("output",)
    assert_measures(flow["lstm[0]"], lambda x: model.lstm(x.view(-1, 2, 3))[0])


class Positions(nn.Module):
    """Adds an embedding of `length` positions, [length, 2], to the tokens."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.token = nn.Linear(WIDTH, 2 * length)
        self.position = nn.Embedding(length, 2)
        self.fc = nn.Linear(2, 1)
        self.length = length

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.token(x).view(-1, self.length, 2)
        tokens = tokens + self.position(torch.arange(self.length))
        return self.fc(tokens.mean(1))


@pytest.mark.parametrize("length", [64, 200, 400])
def test_tensors_that_look_like_a_batch(length):
    """Catches a table of as many rows as a batch has samples: 400, 200 or those of a survey."""
    flow = measure(
        seeded(lambda: Positions(length)),
        settings=ff.Settings(batch_size=200),
        layers="^(position|fc)$",
    )
    assert "position" not in flow
    assert flow["output"].samples == 800


@pytest.mark.parametrize("rows", [64, 200])
def test_parametrised_weights(rows):
    """Catches a weight [rows, d] that is taken for the activations of its parametrisation."""

    def build() -> nn.Module:
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, rows))
        return nn.Sequential(layer, nn.Linear(rows, 2))

    flow = measure(seeded(build), settings=ff.Settings(batch_size=200), layers=["1"])
    assert flow.names == ["input", "output"]
    full = measure(seeded(build), settings=ff.Settings(batch_size=200))
    assert full.names == ["input", "0", "output"]


def test_multihead_attention():
    """Catches the fused path of eval mode, which hides what it does, and lost weights."""
    model = seeded(Attention)
    flow = measure(model)
    assert flow.names == ["input", "embed", "heads[0]", "heads[1]", "output"]
    assert flow["heads[0]"].shape == (2, 4)
    assert flow["heads[1]"].shape == (2, 2)
    assert flow["heads[0]"].descendants == ("output",)

    def mixed(x: torch.Tensor) -> torch.Tensor:
        tokens = model.embed(x.view(-1, 2, 3))
        return model.heads(tokens, tokens, tokens)[0]

    assert_measures(flow["heads[0]"], mixed)


@pytest.mark.parametrize("fast", [True, False])
def test_transformer_encoder(fast):
    """Catches the fused path of eval mode, and a flag that is switched on instead of put back.

    The outputs of LayerNorm add up to a constant: catches a covariance that must have full rank.
    """
    model = seeded(Transformer).eval()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with untouched(model):
            flow = measure(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    names = [
        "encoder.layers.0.self_attn[0]",
        "encoder.layers.0.norm1",
        "encoder.layers.0.linear1",
        "encoder.layers.0.linear1/relu",
        "encoder.layers.0.linear2",
        "encoder.layers.0.norm2",
    ]
    assert [name for name in flow.names if name in names] == names
    assert flow["encoder"].name == "encoder.layers.0.norm2"


def test_submodules_called_input_and_output():
    """Catches names that collide with the ends of the network."""
    model = seeded(InputOutput)
    flow = measure(model)
    assert flow.names == ["input", "self.input", "self.output", "output"]
    assert_measures(flow["self.input"], model.input)
    assert_measures(flow["self.output"], lambda x: model.output(model.input(x)))
    assert_measures(flow["output"], model)


def test_output_without_an_axis_of_features():
    """Catches [n] that is taken for one sample of n activations."""
    model = seeded(Squeezed)
    flow = measure(model)
    assert flow["output"].shape in [(), (1,)]
    assert flow["output"].dim == 1
    assert_measures(flow["output"], model.fc)


def test_containers_are_aliases_of_their_last_layer():
    """Catches a Sequential that is measured twice, and "output" apart from the last layer."""
    body = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh())
    model = nn.Sequential(body, nn.Sequential(nn.Linear(5, 2)))
    flow = measure(model)
    assert flow.names == ["input", "0.0", "0.1", "output"]
    assert flow["0"] is flow["0.1"]
    assert flow["output"] is flow["1"]
    assert flow["output"] is flow["1.0"]
    assert set(flow["output"].aliases) == {"1", "1.0"}


def test_passive_layers_are_left_out():
    """Catches dropout, flatten and reshapes that are measured again, and those that cannot be asked
    for by name."""
    model = seeded(convolutional)
    assert measure(model, layers=["5"])["5"].dim == 6
    flow = measure(model)
    assert flow.names == ["input", "1", "2", "3", "output"]
    assert flow["5"].name == "3"
    assert flow["1"].shape == (3, 1, 2)
    model.eval()
    assert_measures(flow["3"], model[:4])


def test_batchnorm_uses_its_running_statistics():
    """Catches batch statistics of train mode: they mix samples, and would be updated."""
    model = seeded(lambda: nn.Sequential(nn.Linear(WIDTH, 3), nn.BatchNorm1d(3), nn.ReLU()))
    model[1].running_mean.fill_(0.5)
    model[1].running_var.fill_(3.0)
    model.train()
    with untouched(model):
        flow = measure(model, settings=ff.Settings(batch_size=70))
    assert model[1].num_batches_tracked == 0
    assert_measures(flow["output"], copy.deepcopy(model).eval())


def test_hooks_of_the_user_stay_and_run():
    """Catches hooks that are removed, not called, or called on other values."""
    model = seeded(mlp)
    seen = {"pre": 0, "post": 0, "changed": 0}

    def pre(module: nn.Module, args: tuple) -> None:
        seen["pre"] += len(args[0])

    def post(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen["post"] += len(output)

    def double(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        seen["changed"] += 1
        return torch.tanh(output)

    model[0].register_forward_pre_hook(pre)
    model[0].register_forward_hook(post)
    model[0].register_forward_hook(double)
    model[2].register_full_backward_hook(lambda *_: None)
    with untouched(model):
        flow = measure(model)
    assert min(seen["pre"], seen["post"]) >= 800
    # what leaves the module is what its own hooks made of it
    assert_measures(flow["0"], lambda x: F.linear(x, model[0].weight, model[0].bias).tanh())


@pytest.mark.parametrize(
    ("error", "calls"),
    [(RuntimeError("mine"), 1), (KeyboardInterrupt(), 2), (StopIteration(3), 3)],
)
def test_errors_of_the_model_pass_through(error, calls):
    """Catches a model left in eval mode, with hooks, after an error in the middle of a forward."""
    model = seeded(lambda: Failing(error, calls)).train()
    with untouched(model), pytest.raises((type(error), RuntimeError)) as caught:
        measure(model, settings=ff.Settings(batch_size=70))
    assert error in (caught.value, caught.value.__cause__, caught.value.__context__)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_grad_modes_return(mode):
    """Catches a measurement that fails in inference mode or leaves another mode behind."""
    model = seeded(mlp)
    expected = measure(model)
    with mode(), untouched(model):
        flow = measure(model)
    assert torch.equal(flow["output"].J, expected["output"].J)


def test_autocast_of_the_user():
    """Catches statistics in bfloat16, and a type error, when autocast is on around the call."""
    model = seeded(mlp)
    expected = measure(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), untouched(model):
        flow = measure(model)
    assert flow.names == expected.names
    torch.testing.assert_close(flow["input"].linear, expected["input"].linear, rtol=1e-5, atol=0)
    # the layers themselves may run in bfloat16, rounded to 1 in 256: within one error bar
    for layer in flow:
        error = layer.linear_stderr.item()
        assert layer.linear.item() == pytest.approx(expected[layer.name].linear.item(), abs=error)


class Energy(nn.Module):
    """A force: minus the gradient of an energy, taken inside the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.fc(x).tanh().sum()
            return -torch.autograd.grad(energy, x)[0]


def test_networks_that_differentiate_inside():
    """Catches a replay for chains whose replaced outputs break the network's own gradient."""
    model = seeded(Energy)
    with untouched(model):
        flow = measure(model)
    assert flow.names == ["input", "fc", "fc/tanh", "output"]
    assert_measures(flow["fc"], model.fc)


def test_default_dtype_of_the_user():
    """Catches statistics or a lift in the default dtype of the day."""
    model, data = seeded(mlp), two_conditions()
    expected = measure(model, data)
    torch.set_default_dtype(torch.float64)
    try:
        with untouched(model):
            flow = measure(model, data)
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in flow:
        torch.testing.assert_close(layer.curve_J, expected[layer.name].curve_J)


def test_double_precision():
    """Catches a model in float64 whose statistics are done in float32. Seen 1e-14, allowed 1e-9."""
    model = seeded(mlp).double()
    minus, plus = (x.double() for x in samples())
    with untouched(model):
        flow = measure(model, ff.FiniteDifference(minus, plus, DTHETA))
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in scaled[0].parameters():
            parameter.mul_(1024 / 1000)
    other = measure(scaled, ff.FiniteDifference(minus, plus, DTHETA))
    torch.testing.assert_close(other["0"].linear, flow["0"].linear, rtol=1e-9, atol=0)


# --- which layers ---


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("fc1", ["fc1"]),
        (["fc1/relu", "fc1"], ["fc1", "fc1/relu"]),
        (("fc1",), ["fc1"]),
        ([], []),
        (["input", "output"], []),
        (["fc2"], []),
        (r"fc[12]$", ["fc1"]),
        (r"/relu", ["fc1/relu"]),
        (r"^fc1", ["fc1", "fc1/relu"]),
        ("fc1/rel.$", ["fc1/relu"]),
        ("auto", ["fc1", "fc1/relu"]),
        (lambda *_: False, []),
    ],
)
def test_layers_select(layers, names):
    """Catches a selection in the order of the list instead of the order of execution, an anchored
    match, one that does not see every name, and an unused layer that is measured."""
    assert measure(seeded(Unused), layers=layers).names == ["input", *names, "output"]


def test_functions_select():
    """Catches a function that is not given the module, or None for functions."""
    model = seeded(Unused)
    seen = {}

    def linear(name: str, module: nn.Module | None) -> bool:
        seen[name] = module
        return isinstance(module, nn.Linear)

    assert measure(model, layers=linear).names == ["input", "fc1", "output"]
    assert seen["fc1"] is model.fc1
    assert seen["fc1/relu"] is None


def test_selection_does_not_change_a_layer():
    """Catches a lift that depends on which other layers are measured."""
    model = seeded(Unused)
    everything = measure(model)
    for name in ("fc1", "fc1/relu", "output"):
        layer = measure(model, layers=[name])[name]
        assert torch.equal(layer.curve_J, everything[name].curve_J)


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("fc3", r"^layers must name layers of the model, got 'fc3'; nearest: fc2, fc1, fc1/relu$"),
        (
            ["fc1", "fc9"],
            r"^layers must name layers of the model, got 'fc9'; nearest: fc[12], fc[12]",
        ),
        ("^zz", r"^layers must name layers of the model, got '\^zz'; nearest: "),
        ("OUTPUT", r"^layers must name layers of the model, got 'OUTPUT'; nearest: .*output"),
        ("(", r"^layers must be names or a regular expression, got '\(': missing \)"),
        ("aux", r"^layer 'aux' must run in the forward pass, got none: it never ran"),
        (["fc1", "aux"], r"^layer 'aux' must run in the forward pass, got none: it never ran"),
        (["fc1#2"], r"^layers must name layers of the model, got 'fc1#2'; nearest: .*fc1"),
    ],
)
def test_layers_that_are_not_there(layers, text):
    """Catches a typo that measures nothing, and a never-used layer that is left out silently."""
    model = seeded(Unused).train()
    with untouched(model), pytest.raises(ValueError, match=text):
        measure(model, layers=layers)


@pytest.mark.parametrize("layers", [None, b"fc1", [3], nn.Linear(1, 1)])
def test_layers_of_a_wrong_kind(layers):
    """Catches "'int' object is not iterable", which does not name the argument."""
    model = seeded(Unused)
    with untouched(model), pytest.raises((TypeError, ValueError), match=r"^layers must "):
        measure(model, layers=layers)


def test_errors_of_a_selecting_function_pass_through():
    """Catches hooks that stay when the user's function fails."""
    model = seeded(Unused).train()
    with untouched(model), pytest.raises(ZeroDivisionError):
        measure(model, layers=lambda name, module: 1 / 0)
