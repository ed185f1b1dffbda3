"""Where activations are read: every kind of network, its names, its chains, its untouched state."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.networks_zoo import (
    DTHETA,
    WIDTH,
    Failing,
    Written,
    attention,
    convolutional,
    functional,
    input_output,
    measure,
    mlp,
    noisy,
    recurrent,
    residual,
    samples,
    seeded,
    shared,
    transformer,
    twice,
    two_conditions,
    untouched,
    unused,
)
from torch import nn

import fisherfast as ff

Transform = Callable[[torch.Tensor], torch.Tensor]


def assert_measures(layer: ff.LayerFisher, transform: Transform) -> None:
    """The layer holds the information of activations that are computed here, without hooks.
    float32: 1e-5 seen, 1e-3 allowed."""
    with torch.no_grad():
        data = ff.FiniteDifference(*(transform(x) for x in samples()), DTHETA)
    truth = ff.fisher_information(data, max_features=4).linear
    torch.testing.assert_close(layer.linear, truth, rtol=1e-3, atol=1e-3)


def around(function: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> nn.Module:
    """A function of a linear layer and the input."""
    return Written(lambda m, x: function(m.fc, x), fc=nn.Linear(WIDTH, 4))


def overwritten(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Writes over the layer's output when it was read."""
    y = fc(x)
    z = y.clone()
    y.mul_(0)
    return z


def force(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Minus the gradient of an energy, taken inside the forward pass."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(fc(x).tanh().sum(), x)[0]


def mixed(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of self-attention."""
    tokens = model.embed(x.view(-1, 2, 3))
    return model.heads(tokens, tokens, tokens)[0]


SPELLINGS = [
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
]


def spelled(activation: Transform, name: str) -> tuple:
    """A case of `NETWORKS`: an activation between two layers."""
    of = {"fc1": lambda m, x: m.fc1(x), f"fc1/{name}": lambda m, x: activation(m.fc1(x))}
    return lambda: functional(activation), f"input fc1 fc1/{name} output", of


def doubled(x: torch.Tensor) -> torch.Tensor:
    """A function that calls an activation twice."""
    return torch.tanh(2 * torch.tanh(x))


FC = {"fc": lambda m, x: m.fc(x)}
NETWORKS = {
    **{f"{each[1]} {number}": spelled(*each) for number, each in enumerate(SPELLINGS)},
    "module twice": (
        twice,
        "input fc act fc#2 act#2 output",
        {"fc#2": lambda m, x: m.fc(m.fc(x).tanh())},
    ),
    "function twice": (
        lambda: functional(doubled),
        "input fc1 fc1/tanh fc1/tanh#2 output",
        {"fc1/tanh#2": lambda m, x: doubled(m.fc1(x))},
    ),
    "two names": (shared, "input a a/tanh a#2 output", {"a#2": lambda m, x: m.a(m.a(x).tanh())}),
    "before all layers": (
        lambda: around(lambda fc, x: fc(torch.tanh(x))),
        "input input/tanh output",
        {"input/tanh": lambda m, x: x.tanh()},
    ),
    "bare layer": (lambda: nn.Linear(WIDTH, 2), "input output", {}),
    "overwritten": (lambda: around(overwritten), "input fc output", FC),
    "gradient inside": (lambda: around(force), "input fc fc/tanh output", FC),
    "one number": (lambda: around(lambda fc, x: fc(x)[:, 0]), "input fc output", FC),
    "mean of the batch": (lambda: around(lambda fc, x: fc(x).mean()), "input fc", FC),
    "ends of the network": (
        input_output,
        "input self.input self.output output",
        {"self.input": lambda m, x: m.input(x), "self.output": lambda m, x: m.output(m.input(x))},
    ),
    "recurrent": (
        recurrent,
        "input lstm[0] output",
        {"lstm[0]": lambda m, x: m.lstm(x.view(-1, 2, 3))[0]},
    ),
    "attention": (attention, "input embed heads[0] heads[1] output", {"heads[0]": mixed}),
    "convolutional": (convolutional, "input 1 3 output", {"3": lambda m, x: m[:4](x)}),
    "noisy": (noisy, "input fc output", FC),
}


@pytest.mark.parametrize(("number", "name"), list(enumerate(NETWORKS)))
def test_any_network_is_measured_and_left_as_it_was(number, name):
    """Catches hooks, modes, buffers or random states that are not put back (the networks in
    training mode have some layers in eval mode), a spelling of an activation without a tap, one
    that overwrites the values before it, a second call that overwrites the first, a name that is
    counted twice or collides with an end of the network, a state [layers, n, h] taken for samples,
    [n] taken for one sample, the fused path of attention, and a replay that breaks a gradient."""
    build, names, transforms = NETWORKS[name]
    model = seeded(build).train(number % 2 == 0)
    for child in list(model.children())[1::2]:
        child.eval()
    with untouched(model):
        flow = measure(model)
    assert flow.names == names.split()
    for layer in flow:
        assert torch.isfinite(layer.J).all()
        assert (layer.samples, layer.J.dtype) == (800, torch.float64)
    model.eval()
    if "output" in flow and name != "noisy":
        transforms = {"output": lambda model, x: model(x).view(len(x), -1)} | transforms
    for layer, transform in transforms.items():
        assert_measures(flow[layer], lambda x, transform=transform: transform(model, x))


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


def parallel() -> nn.Module:
    """Two branches side by side."""
    branches = {"left": nn.Linear(WIDTH, 2), "right": nn.Linear(WIDTH, 2)}
    return Written(lambda m, x: torch.cat([m.left(x), m.right(x)], dim=1), **branches)


def gated(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A skip that is open for 1 in 6 samples."""
    return fc(x) + x[:, :4] * (x[:, 4:5] > 1)


@pytest.mark.parametrize(
    ("build", "descendants"),
    [
        (mlp, None),
        (
            residual,
            {"input": {"a", "act", "b", "output"}, "a": {"act", "b"}, "act": {"b"}, "b": set()},
        ),
        (parallel, {"input": {"left", "right", "output"}, "left": set(), "right": set()}),
        (lambda: around(gated), {"input": {"fc", "output"}, "fc": set()}),
        (noisy, {"fc": set()}),
        (recurrent, {"lstm[0]": {"output"}}),
        (attention, {"heads[0]": {"output"}}),
    ],
)
def test_chains(build, descendants):
    """Every layer of a Sequential is a function of every one before. Catches a missing link, and
    one made of the order of execution alone, past a sum, past a skip that is mostly closed, or past
    two draws of random numbers; and a chain that ends at a tuple."""
    flow = measure(seeded(build))
    found = {layer.name: set(layer.descendants) for layer in flow}
    if descendants is None:
        descendants = {name: set(flow.names[k + 1 :]) for k, name in enumerate(flow.names)}
    assert {name: found[name] for name in descendants} == descendants


def positions(length: int) -> nn.Module:
    """Adds an embedding of `length` positions, [length, 2], to the tokens."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        tokens = m.token(x).view(-1, length, 2) + m.position(torch.arange(length))
        return m.fc(tokens.mean(1))

    layers = {"token": nn.Linear(WIDTH, 2 * length), "position": nn.Embedding(length, 2)}
    return Written(forward, **layers, fc=nn.Linear(2, 1))


@pytest.mark.parametrize("length", [64, 400])
def test_tensors_that_look_like_a_batch(length):
    """Catches a table of as many rows as a batch has samples: 400, 200 or those of a survey."""
    flow = measure(
        seeded(lambda: positions(length)),
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


def test_transformer_encoder():
    """Catches the fused path of eval mode, and a flag that is switched on instead of put back.

    The outputs of LayerNorm add up to a constant: catches a covariance that must have full rank.
    """
    model = seeded(transformer).eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with untouched(model):
            flow = measure(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    parts = ("self_attn[0]", "norm1", "linear1", "linear1/relu", "linear2", "norm2")
    names = [f"encoder.layers.0.{part}" for part in parts]
    assert [name for name in flow.names if name in names] == names
    assert flow["encoder"].name == "encoder.layers.0.norm2"


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
    assert flow["5"].name == "3"
    assert flow["1"].shape == (3, 1, 2)


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
    before, after = [], []
    model[0].register_forward_pre_hook(lambda module, args: before.append(len(args[0])))
    model[0].register_forward_hook(lambda module, args, output: after.append(len(output)))
    model[0].register_forward_hook(lambda module, args, output: torch.tanh(output))
    model[2].register_full_backward_hook(lambda *_: None)
    with untouched(model):
        flow = measure(model)
    assert min(sum(before), sum(after)) >= 800
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


# --- which layers ---


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("fc1", ["fc1"]),
        (["fc1/relu", "fc1"], ["fc1", "fc1/relu"]),
        ([], []),
        (["input", "output"], []),
        (["fc2"], []),
        (r"fc[12]$", ["fc1"]),
        (r"/relu", ["fc1/relu"]),
        (r"^fc1", ["fc1", "fc1/relu"]),
        ("auto", ["fc1", "fc1/relu"]),
        (lambda *_: False, []),
    ],
)
def test_layers_select(layers, names):
    """Catches a selection in the order of the list instead of the order of execution, an anchored
    match, one that does not see every name, and an unused layer that is measured."""
    assert measure(seeded(unused), layers=layers).names == ["input", *names, "output"]


def test_functions_select():
    """Catches a function that is not given the module, or None for functions."""
    model = seeded(unused)
    seen = {}

    def linear(name: str, module: nn.Module | None) -> bool:
        seen[name] = module
        return isinstance(module, nn.Linear)

    assert measure(model, layers=linear).names == ["input", "fc1", "output"]
    assert seen["fc1"] is model.fc1
    assert seen["fc1/relu"] is None


def test_selection_does_not_change_a_layer():
    """Catches a lift that depends on which other layers are measured."""
    model = seeded(unused)
    everything = measure(model)
    for name in ("fc1", "fc1/relu", "output"):
        layer = measure(model, layers=[name])[name]
        assert torch.equal(layer.curve_J, everything[name].curve_J)


NAME = "layers must name layers of the model, got "
NEVER = "layer 'aux' must run in the forward pass, got none: it never ran"


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("fc3", f"{NAME}'fc3'; nearest: fc2, fc1, fc1/relu"),
        (["fc1", "fc9"], f"{NAME}'fc9'; nearest: fc"),
        ("OUTPUT", f"{NAME}'OUTPUT'; nearest: "),
        (["fc1#2"], f"{NAME}'fc1#2'; nearest: "),
        ("(", "layers must be names or a regular expression, got '(': missing )"),
        (["fc1", "aux"], NEVER),
        ("aux", NEVER),
        *((layers, "layers must ") for layers in (None, b"fc1", [3], nn.Linear(1, 1))),
        (lambda name, module: 1 / 0, "division by zero"),
    ],
)
def test_layers_that_are_not_there(layers, text):
    """Catches a typo that measures nothing, a never-used layer that is left out silently, "'int'
    object is not iterable", which does not name the argument, and hooks that stay when the user's
    function fails."""
    model = seeded(unused).train()
    errors = (TypeError, ValueError, ZeroDivisionError)
    with untouched(model), pytest.raises(errors, match=f"^{re.escape(text)}"):
        measure(model, layers=layers)
