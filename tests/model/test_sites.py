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
    Nested,
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


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_any_network_is_measured_and_left_as_it_was(name, training):
    """Catches hooks, modes, buffers or random states that are not put back, for every network."""
    model = seeded(ZOO[name]).train(training)
    with untouched(model):
        flow = measure(model)
    assert flow.names[0] == "input"
    assert len(set(flow.names)) == len(flow.names)
    for layer in flow:
        assert torch.isfinite(layer.J).all()
        assert layer.samples == 800
        assert layer.J.dtype == torch.float64


@pytest.mark.parametrize(
    "activation",
    [
        F.relu,
        torch.relu,
        torch.Tensor.relu,
        F.relu_,
        torch.relu_,
        torch.Tensor.relu_,
        lambda x: F.relu(x, inplace=True),
    ],
    ids=["F.relu", "torch.relu", "x.relu", "F.relu_", "torch.relu_", "x.relu_", "inplace=True"],
)
def test_functional_relu_is_seen_in_every_spelling(activation):
    """Catches a spelling without a tap, and in-place ones that overwrite the values before them."""
    model = seeded(lambda: Functional(activation))
    with untouched(model):
        flow = measure(model)
    assert flow.names == ["input", "fc1", "fc1/relu", "output"]
    assert flow["fc1/relu"].kind == "relu"
    assert_measures(flow["fc1"], model.fc1)
    assert_measures(flow["fc1/relu"], lambda x: model.fc1(x).relu())
    assert_measures(flow["output"], lambda x: model.fc2(model.fc1(x).relu()))


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (torch.tanh, "tanh"),
        (lambda x: x.tanh(), "tanh"),
        (F.tanh, "tanh"),
        (lambda x: x.sigmoid(), "sigmoid"),
        (torch.sigmoid, "sigmoid"),
        (F.sigmoid, "sigmoid"),
        (F.gelu, "gelu"),
        (F.silu, "silu"),
        (F.elu, "elu"),
        (F.selu, "selu"),
        (F.softplus, "softplus"),
        (F.leaky_relu, "leaky_relu"),
        (lambda x: F.softmax(x, dim=-1), "softmax"),
        (lambda x: x.tanh_(), "tanh"),
    ],
)
def test_other_functional_activations(activation, name):
    """Catches an activation function that hides what it loses."""
    model = seeded(lambda: Functional(activation))
    flow = measure(model)
    assert flow.names == ["input", "fc1", f"fc1/{name}", "output"]
    assert_measures(flow["fc1"], model.fc1)
    assert_measures(flow[f"fc1/{name}"], lambda x: activation(model.fc1(x)))


def test_inplace_module_after_a_tapped_layer():
    """Catches nn.ReLU(inplace=True) that turns the values before it into those after it."""
    plain = seeded(lambda: nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, 1)))
    inplace = copy.deepcopy(plain)
    inplace[1].inplace = True
    expected, flow = measure(plain), measure(inplace)
    assert flow.names == expected.names == ["input", "0", "1", "output"]
    for layer in flow:
        assert torch.equal(layer.curve_J, expected[layer.name].curve_J)
        assert set(layer.descendants) == set(expected[layer.name].descendants)


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


@pytest.mark.parametrize("kind", ["tensor", "array", "stream", "paired"])
def test_networks_that_overwrite_their_input(kind):
    """Catches the user's samples changed by nn.ReLU(inplace=True), and J taken after it."""
    model = seeded(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, 2)))
    minus, plus = samples()
    before = minus.clone(), plus.clone()
    sources = {
        "tensor": (minus, plus),
        "array": (minus.numpy(), plus.numpy()),
        "stream": (lambda: minus.split(70), lambda: plus.split(70)),
        "paired": (minus, plus),
    }
    flow = measure(model, ff.FiniteDifference(*sources[kind], DTHETA, paired=kind == "paired"))
    assert torch.equal(minus, before[0])
    assert torch.equal(plus, before[1])
    if kind != "paired":
        assert_measures(flow["input"], nn.Identity())
        assert_measures(flow["0"], torch.relu)


def test_modules_called_twice():
    """Catches a second call that overwrites the first, and calls in a wrong order."""
    model = seeded(Twice)
    flow = measure(model)
    assert flow.names == ["input", "fc", "act", "fc#2", "act#2", "output"]
    assert_measures(flow["act"], lambda x: model.fc(x).tanh())
    assert_measures(flow["fc#2"], lambda x: model.fc(model.fc(x).tanh()))
    assert flow["output"].aliases == ("out",)


def test_functions_called_twice():
    """Catches two functions after one layer under one name."""
    model = seeded(lambda: Functional(lambda x: torch.tanh(2 * torch.tanh(x))))
    flow = measure(model)
    assert flow.names == ["input", "fc1", "fc1/tanh", "fc1/tanh#2", "output"]
    assert_measures(flow["fc1/tanh#2"], lambda x: torch.tanh(2 * torch.tanh(model.fc1(x))))


def test_one_module_under_two_names():
    """Catches a name that is counted twice: the first of `named_modules()`, then "#2"."""
    model = seeded(Shared)
    flow = measure(model)
    assert flow.names == ["input", "a", "a/tanh", "a#2", "output"]
    assert_measures(flow["a#2"], lambda x: model.a(model.a(x).tanh()))


def test_function_on_the_input():
    """Catches a function before the first layer that is lost or has no name."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.tanh(x))

    flow = measure(seeded(First))
    assert flow.names == ["input", "input/tanh", "output"]
    assert_measures(flow["input/tanh"], torch.tanh)


def test_residual_sum_ends_the_chain():
    """Catches information of the sum that is credited to the branch, and a chain cut too early."""
    flow = measure(seeded(Residual))
    assert flow.names == ["input", "a", "act", "b", "output"]
    assert kept(flow) == {
        "input": {"a", "act", "b", "output"},
        "a": {"act", "b"},
        "act": {"b"},
        "b": set(),
        "output": set(),
    }


def test_sequential_is_one_chain():
    """Catches a missing link: every layer of a Sequential is a function of every one before."""
    flow = measure(seeded(mlp))
    names = flow.names
    assert kept(flow) == {name: set(names[k + 1 :]) for k, name in enumerate(names)}


def test_parallel_branches_are_no_chain():
    """Catches a chain made of the order of execution alone."""

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Linear(WIDTH, 2)
            self.right = nn.Linear(WIDTH, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.left(x), self.right(x)], dim=1)

    flow = measure(seeded(Parallel))
    assert kept(flow) == {
        "input": {"left", "right", "output"},
        "left": set(),
        "right": set(),
        "output": set(),
    }


@pytest.mark.parametrize("gate", [1.0, 2.0], ids=["1 in 6", "1 in 44"])
def test_rarely_open_skip_makes_no_chain(gate):
    """Catches a link found on few samples: a skip that is mostly closed still carries data."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + x[:, :2] * (x[:, 2:3] > gate)

    flow = measure(seeded(Gated))
    assert "output" not in flow["fc"].descendants


def test_random_output_is_no_function_of_the_layer_before():
    """Noise only loses information, but two draws of a layer (Noisy) are no chain."""
    flow = measure(seeded(Noisy))
    assert "output" not in flow["fc"].descendants


def test_nested_outputs():
    """Catches tensors in dicts, lists and tuples that are lost, and entries that are none."""
    model = seeded(Nested)
    flow = measure(model)
    assert flow.names == ["input", "a", "b", "b#2", "b#2/tanh", "output"]
    assert flow["output[mean]"].name == "a"
    assert flow["output[rest][0]"].name == "b"
    assert flow["output[rest][2][0]"].name == "b#2/tanh"
    assert_measures(flow["output[mean]"], model.a)


def test_lstm():
    """Catches the state [layers, n, h], whose first axis is no batch, that is taken for samples."""
    model = seeded(Recurrent)
    flow = measure(model)
    assert flow.names == ["input", "lstm[0]", "output"]
    assert flow["lstm[0]"].shape == (2, 4)
    assert_measures(flow["lstm[0]"], lambda x: model.lstm(x.view(-1, 2, 3))[0])


@pytest.mark.parametrize(("build", "layer"), [(Recurrent, "lstm[0]"), (Attention, "heads[0]")])
def test_chain_behind_a_tuple(build, layer):
    """The output is a function of the first entry alone: catches chains that end at a tuple."""
    flow = measure(seeded(build))
    assert flow[layer].descendants == ("output",)


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


@pytest.mark.parametrize("length", [2, 32, 64, 128, 200, 400])
def test_tensors_that_look_like_a_batch(length):
    """Catches a table of as many rows as a batch has samples: 400, 200 or those of a survey."""
    flow = measure(
        seeded(lambda: Positions(length)),
        settings=ff.Settings(batch_size=200),
        layers="^(position|fc)$",
    )
    assert "position" not in flow
    assert flow["output"].samples == 800


@pytest.mark.parametrize("rows", [64, 128, 200, 400])
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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [2, 3, 8])
def test_layer_norm(width, seed):
    """Catches an exact linear dependence of activations that ends in an error of Cholesky."""
    model = seeded(lambda: nn.Sequential(nn.Linear(WIDTH, width), nn.LayerNorm(width)), seed)
    flow = measure(model)
    assert torch.isfinite(flow["output"].J).all()
    assert torch.isfinite(flow["output"].lower).all()


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_duplicated_and_dependent_activations(double):
    """Catches copies, negatives and sums of activations that end in an error of Cholesky."""
    matrix = torch.eye(WIDTH)
    matrix = torch.cat([matrix, matrix[:2], -matrix[2:4], matrix.sum(0, keepdim=True)])
    model = nn.Linear(WIDTH, len(matrix), bias=False)
    model.weight.data = matrix
    data = two_conditions()
    if double:
        model = model.double()
        data = ff.FiniteDifference(*(x.double() for x in samples()), DTHETA)
    flow = measure(model, data)
    bound = 4 * flow["output"].linear_stderr.item()
    assert flow["output"].linear.item() == pytest.approx(flow["input"].linear.item(), abs=bound)


def test_submodules_called_input_and_output():
    """Catches names that collide with the ends of the network."""
    model = seeded(InputOutput)
    flow = measure(model)
    assert flow.names == ["input", "self.input", "self.output", "output"]
    assert_measures(flow["self.input"], model.input)
    assert_measures(flow["self.output"], lambda x: model.output(model.input(x)))
    assert_measures(flow["output"], model)


def test_a_bare_layer():
    """Catches a model whose only module has the empty name."""
    model = seeded(lambda: nn.Linear(WIDTH, 2))
    flow = measure(model)
    assert flow.names == ["input", "output"]
    assert flow["output"].kind == "Linear"
    assert_measures(flow["output"], model)


def test_output_without_an_axis_of_features():
    """Catches [n] that is taken for one sample of n activations."""
    model = seeded(Squeezed)
    flow = measure(model)
    assert flow["output"].shape in [(), (1,)]
    assert flow["output"].dim == 1
    assert_measures(flow["output"], model.fc)


def test_scalar_output():
    """A mean over the batch is no activation: catches one sample per batch."""
    flow = measure(seeded(lambda: Squeezed(scalar=True)))
    assert "fc" in flow
    assert flow["fc"].samples == 800
    if "output" in flow:
        assert flow["output"].name == "fc"


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
    """Catches dropout, flatten and reshapes that are measured again; their names still work."""
    model = seeded(convolutional)
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


def test_mixed_modes_return():
    """Catches `model.train(was_training)`, which sets every submodule alike."""
    model = seeded(convolutional).train()
    model[2].eval()
    model[4].eval()
    with untouched(model):
        measure(model)
    assert [child.training for child in model] == [True, True, False, True, False, True, True]


def test_random_networks_repeat():
    """Catches random numbers that come from the user's stream, or differ from run to run."""
    model = seeded(Noisy)
    first = measure(model)
    torch.manual_seed(12345)
    second = measure(model)
    for layer in first:
        assert torch.equal(layer.curve_J, second[layer.name].curve_J)


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


@pytest.mark.parametrize("calls", [1, 2, 3, 5])
@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt(), StopIteration(3)])
def test_errors_of_the_model_pass_through(error, calls):
    """Catches a model left in eval mode, with hooks, after an error in the middle of a forward."""
    model = seeded(lambda: Failing(error, calls)).train()
    with untouched(model), pytest.raises((type(error), RuntimeError)) as caught:
        measure(model, settings=ff.Settings(batch_size=70))
    assert error in (caught.value, caught.value.__cause__, caught.value.__context__)


def test_wrong_input_shape_leaves_the_model_as_it_was():
    """Catches hooks that stay when the first layer refuses the data."""
    model = seeded(mlp).train()
    with untouched(model), pytest.raises(RuntimeError):
        measure(model, two_conditions(width=WIDTH + 1))


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


def test_networks_that_check_their_own_values():
    """Catches an error that only a replay with exchanged values brings about."""

    class Checking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            if not torch.allclose(y, nn.functional.linear(x, self.fc.weight, self.fc.bias)):
                raise ArithmeticError("my own layer lies")
            return torch.tanh(y)

    flow = measure(seeded(Checking))
    assert flow.names == ["input", "fc", "output"]


def test_nothing_is_recorded_for_backward():
    """Catches a graph: activations must not require gradients."""
    recorded = []
    model = seeded(mlp)
    model[0].register_forward_hook(lambda *args: recorded.append(args[2].requires_grad))
    measure(model)
    assert recorded
    assert not any(recorded)


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


@pytest.mark.parametrize(
    ("model_dtype", "data_dtype"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.float32, torch.float16),
    ],
)
def test_data_of_another_precision_than_the_model(model_dtype, data_dtype):
    """NumPy's float64 into a float32 network: catches "mat1 and mat2 must have the same dtype".

    The batches are moved to the model's dtype, or the message names data and model and what to do.
    """
    model = seeded(mlp).to(model_dtype)
    data = ff.FiniteDifference(*(x.to(data_dtype) for x in samples()), DTHETA)
    try:
        flow = measure(model, data)
    except (TypeError, ValueError) as error:
        assert "dtype" in str(error) or "float" in str(error)  # noqa: PT017
        assert "must" in str(error)  # noqa: PT017
    else:
        assert flow["input"].linear > 0


def test_lazy_modules_are_refused_or_run():
    """Catches a lazy layer whose parameters are made by the measurement without a word."""
    model = nn.Sequential(nn.LazyLinear(3))
    try:
        flow = measure(model)
    except (RuntimeError, ValueError):
        return
    assert flow["output"].dim == 3


# --- which layers ---


def test_names_select():
    """Catches a selection in the order of the list instead of the order of execution."""
    model = seeded(Unused)
    assert measure(model, layers="fc1").names == ["input", "fc1", "output"]
    assert measure(model, layers=["fc1/relu", "fc1"]).names == [
        "input",
        "fc1",
        "fc1/relu",
        "output",
    ]
    assert measure(model, layers=("fc1",)).names == ["input", "fc1", "output"]
    assert measure(model, layers=[]).names == ["input", "output"]
    assert measure(model, layers=["input", "output"]).names == ["input", "output"]
    assert measure(model, layers=["fc2"]).names == ["input", "output"]


def test_passive_layers_by_name():
    """Catches a dropout that cannot be asked for although it has a name."""
    model = seeded(lambda: nn.Sequential(nn.Linear(WIDTH, 4), nn.Dropout(), nn.Linear(4, 1)))
    for name in ("0", "1"):
        assert measure(model, layers=[name])[name].dim == 4


def test_regular_expressions_search():
    """Catches a match that is anchored, or that sees the main name but not the others."""
    model = seeded(Unused)
    assert measure(model, layers=r"fc[12]$").names == ["input", "fc1", "output"]
    assert measure(model, layers=r"/relu").names == ["input", "fc1/relu", "output"]
    assert measure(model, layers=r"^fc1").names == ["input", "fc1", "fc1/relu", "output"]


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
    assert measure(model, layers=lambda *_: False).names == ["input", "output"]


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
        ("fc1/rel.$", None),
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
    if text is None:
        assert "fc1/relu" in measure(model, layers=layers)
        return
    with untouched(model), pytest.raises(ValueError, match=text):
        measure(model, layers=layers)


@pytest.mark.parametrize("layers", [None, 3, b"fc1", [3], [None], nn.Linear(1, 1)])
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
