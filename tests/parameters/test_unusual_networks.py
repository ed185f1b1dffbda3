"""Networks in which a layer's rule would be wrong, or autograd does not see everything: each is
measured rightly or refused. "never silently wrong"."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.parameters_oracle import brute_force
from support.parameters_zoo import NETWORKS, OUTPUTS, Lambda, Network, linear, randomised
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fisherfast as ff
from fisherfast.parameters.fisher import fisher

CATEGORICAL = ff.parameters.Categorical()

ROUNDING = 1e-12
"""Relative to the largest entry; measured: below 2e-15."""

SAMPLES = 5

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # of torch, on copies


def make(build: Callable[[], nn.Module], shape: tuple[int, ...] = (4,)) -> tuple[nn.Module, Tensor]:
    """A network in float64 and eval mode, and its inputs."""
    network = Network(build, shape)
    return network.make(), network.inputs(SAMPLES)


def assert_right(model: nn.Module, x: Tensor, **settings: Any) -> ff.parameters.ParameterFisher:
    """The whole matrix, and the diagonal, of two batches equal the brute force."""
    chosen = settings.pop("chosen", None)
    truth = brute_force(model, "categorical", x, chosen=chosen)
    settings.setdefault("batch_size", SAMPLES - 1)
    parameters = chosen and (lambda name: chosen(name))
    whole = fisher(model, CATEGORICAL, x, structure="full", parameters=parameters, **settings)
    diagonal = fisher(model, CATEGORICAL, x, structure="diag", parameters=parameters, **settings)
    scale = truth.abs().max()
    assert float((whole.to_dense() - truth).abs().max() / scale) < ROUNDING
    assert float((diagonal.diag() - truth.diag()).abs().max() / scale) < ROUNDING
    return whole


# --- layers whose rule does not hold ---


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(
    "hook",
    [
        lambda module, args, output: output * 2 + 1,
        lambda module, args, output: output.mul_(2),
        lambda module, args, output: None,
    ],
    ids=["another output", "in place", "only looks"],
)
def test_forward_hooks(layer: int, hook: Callable[..., Any]) -> None:
    """A tap behind the user's hook, where the gradient is that of another output."""
    model, x = make(linear)
    model[layer].register_forward_hook(hook)
    assert_right(model, x)


def test_input_hooks() -> None:
    """A tap that keeps the input before the user's hook has changed it."""
    model, x = make(linear)
    model[2].register_forward_pre_hook(lambda module, args: (args[0].exp(),))
    assert_right(model, x)


def test_global_hooks() -> None:
    """Hooks of all modules, which come before any tap."""
    model, x = make(linear)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 3 if isinstance(module, nn.Linear) else None
    )
    try:
        assert_right(model, x)
    finally:
        handle.remove()


def test_backward_hooks() -> None:
    """Hooks on the way back, that observe and change nothing."""
    model, x = make(linear)
    seen: list[torch.Size] = []
    model[2].register_full_backward_hook(lambda module, given, g: seen.append(g[0].shape))
    assert_right(model, x)
    assert seen


def test_parameter_hooks() -> None:
    """Gradients clipped or masked for training, taken for those of log p."""
    model, x = make(NETWORKS["called twice"].build)
    truth = brute_force(model, "categorical", x)
    model.layer.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    model.head.weight.register_hook(lambda g: g * 0)
    found = fisher(model, CATEGORICAL, x, structure="full").to_dense()
    assert float((found - truth).abs().max() / truth.abs().max()) < ROUNDING


class Scaled(nn.Linear):
    """A linear layer that does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


def test_subclass() -> None:
    """The rule of a class applied to one that inherits from it."""
    assert_right(*make(lambda: nn.Sequential(Scaled(4, 5), nn.Tanh(), nn.Linear(5, OUTPUTS))))


def test_forward_of_an_instance() -> None:
    """The rule of a layer whose forward method was replaced: adapters do that."""
    model, x = make(linear)
    layer, plain = model[0], model[0].forward
    layer.forward = lambda x: plain(x).square()
    assert_right(model, x)


def test_pruned() -> None:
    """A layer whose weight is computed of another parameter before each call."""
    model, x = make(linear)
    prune.random_unstructured(model[0], "weight", 0.5)
    assert_right(model, x)


def test_adapter() -> None:
    """Two layers whose outputs are added: the first one's output must not be the tap's sum."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, OUTPUTS).requires_grad_(False)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, OUTPUTS, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x).add_(self.up(self.down(x)), alpha=0.5)

    assert_right(*make(Adapted))


IN_PLACE = {
    "linear": (lambda: nn.Linear(4, 4), (4,)),
    "batch norm": (lambda: nn.BatchNorm1d(4), (4,)),
    "layer norm": (lambda: nn.LayerNorm(4), (4,)),
    "RMS norm": (lambda: nn.RMSNorm(4), (4,)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4,)),
    "conv": (lambda: nn.Conv1d(1, 1, 3, padding=1), (1, 4)),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("change", [torch.relu_, lambda h: h.mul_(2), lambda h: h[:, :1].zero_()])
def test_outputs_changed_in_place(name: str, change: Callable[[Tensor], Tensor]) -> None:
    """A tap that keeps what is overwritten afterwards: all of it, or a part."""
    build, shape = IN_PLACE[name]

    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = build()
            self.head = nn.Linear(4, OUTPUTS)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            change(h)
            return self.head(h.flatten(1).tanh())

    assert_right(*make(Changed, shape))


def test_inputs_changed_in_place() -> None:
    """A tap that reads the input of a layer after it was overwritten: the bias does not need it,
    so that autograd has nothing to complain about."""

    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, OUTPUTS)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 2
            y = self.first(h)
            h += 1
            return self.second(y.tanh() + h)

    model, x = make(Reused)
    model.first.weight.requires_grad_(False)
    assert_right(model, x)


# --- rows that are not the samples ---


class Positions(nn.Module):
    """A layer that sees the positions, the same for all samples."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.register_buffer("place", torch.linspace(-1, 1, positions)[:, None].expand(-1, 2) + 1.0)
        self.embed = nn.Linear(2, 4)
        self.head = nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x[:, :1, None] * self.embed(self.place)).tanh().mean(1))


@pytest.mark.parametrize("positions", [3, 4, SAMPLES, 6, 8])
def test_positions(positions: int) -> None:
    """As many positions as samples in a batch, in the examination, or a multiple of them."""
    for batch_size in (3, positions):
        assert_right(*make(lambda: Positions(positions)), batch_size=batch_size)


@pytest.mark.parametrize("time", [3, 4, SAMPLES, 6])
def test_time_first(time: int) -> None:
    """[time, n, d] with as many times as samples."""
    network = NETWORKS["transformer, time first"]
    for batch_size in (3, time):
        assert_right(*make(network.build, (time, 2)), batch_size=batch_size)


class Experts(nn.Module):
    """Every sample goes to one of two experts, and those of the second in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, OUTPUTS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        second = x[:, 0] > 0
        y = x.new_zeros(len(x), OUTPUTS)
        y[~second] = self.experts[0](x[~second])
        order = second.nonzero()[:, 0].flip(0)
        y[order] = self.experts[1](x[order])
        return y


@pytest.mark.parametrize("first", ["mixed", "all to one", "none to the other"])
def test_experts(first: str) -> None:
    """Rows that belong to other samples in each batch, and an expert that a batch does not use;
    the first three samples, which are examined, may all go one way."""
    model, x = make(Experts)
    x = torch.cat([x, -x, x.flip(0)])
    if first != "mixed":
        x[:3, 0] = x[:3, 0].abs() * (1 if first == "all to one" else -1)
    assert_right(model, x, batch_size=6)


class Tokens(nn.Module):
    """Two tokens a sample; those above a threshold go through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 4)
        chosen = tokens[:, 0] > 0
        h = tokens.clone()
        h[chosen] = self.layer(tokens[chosen])
        return self.head(h.tanh().reshape(len(x), 2, 4).mean(1))


def test_as_many_rows_as_samples() -> None:
    """Chosen tokens that are as many as the samples, and of some samples two, of others none."""
    model, x = make(Tokens, (2, 4))
    x = x[:4].abs()  # the examination sees two tokens of every sample
    later = x.clone()
    later[0, :, 0] *= -1
    later[2, :, 0] *= -1
    assert_right(model, torch.cat([x, later]), batch_size=4)


# --- parameters that the graph shows only partly ---


class Detached(nn.Module):
    """A layer whose output goes one way with its gradient, and another way without."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.head(h.tanh()) * h.detach().exp().mean(1, keepdim=True)


class Target(nn.Module):
    """A layer that is called once without gradient, and once with it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = self.layer(-x)
        return self.head((self.layer(x) - shift).tanh())


class Cached(nn.Module):
    """The transpose of a weight, kept from the beginning and used beside the layer, or alone."""

    def __init__(self, layer_too: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, OUTPUTS)
        self.layer_too = layer_too
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.kept:
            self.kept.append(self.layer.weight.t())
        h = self.layer(x) if self.layer_too else x
        return self.head((h @ self.kept[0]).tanh())


@pytest.mark.parametrize(
    "build", [Detached, Target, lambda: Cached(True), lambda: Cached(False)],
    ids=["detached", "target", "cached transpose and layer", "cached transpose"],
)  # fmt: skip
def test_partly_seen(build: Callable[[], nn.Module]) -> None:
    """A tap that gets the gradient of one use only, or of one too many; torch.func, which does not
    know what a module has kept of its parameters."""
    assert_right(*make(build))


class Square(torch.autograd.Function):
    """x^2 w with a backward pass of its own, which torch.func cannot vectorise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x.square() * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * 2 * x * w, (g * x.square()).sum(0)


def test_own_function() -> None:
    """An autograd function of the user's own, with a parameter as its input."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(0.5, 1, 5))
            self.first, self.head = nn.Linear(4, 5), nn.Linear(5, OUTPUTS)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(Square.apply(self.first(x), self.w))

    assert_right(*make(Own))


def test_branch_on_a_value() -> None:
    """A network that reads numbers in Python, so that samples cannot be vectorised."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(0.5, 1, 4))
            self.head = nn.Linear(4, OUTPUTS)

        def forward(self, x: Tensor) -> Tensor:
            rows = [row * self.scale if float(row[0]) > 0 else row for row in x]
            return self.head(torch.stack(rows))

    assert_right(*make(Branch))


def test_sparse_embedding() -> None:
    """Gradients that autograd gives as sparse tensors, tied and not."""

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Embedding(6, 4, sparse=True), nn.Embedding(6, 4, sparse=True)
            self.head = nn.Linear(4, OUTPUTS)

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x) + self.two(x) * self.two(x.flip(1))
            return self.head(h.tanh().mean(1))

    network = Network(Sparse, (5,), tokens=True)
    assert_right(network.make(), network.inputs(SAMPLES))


def test_bag_of_words() -> None:
    """A layer without a rule whose inputs are whole numbers."""
    bag = nn.Sequential
    network = Network(
        lambda: bag(nn.EmbeddingBag(6, 4, mode="sum"), nn.Tanh(), nn.Linear(4, OUTPUTS)),
        (5,),
        tokens=True,
    )
    assert_right(network.make(), network.inputs(SAMPLES))


def test_own_precision() -> None:
    """A network that lowers the precision of a part itself: the rule of the layer before has
    numbers of two kinds, and that of the layer inside too."""

    class Lowered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 5), nn.Linear(5, OUTPUTS)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = self.first(x).tanh()
            return self.head(h.float())

    network = Network(Lowered, (4,))
    model, x = network.make(torch.float32), network.inputs(SAMPLES, torch.float32)
    truth = brute_force(model, "categorical", x)
    for structure in ("diag", "full"):
        found = fisher(model, CATEGORICAL, x, structure=structure)
        assert float((found.diag() - truth.diag()).abs().max() / truth.max()) < 0.02  # 2 eps


# --- what cannot be measured ---


class Hidden(nn.Module):
    """A layer whose use autograd does not see."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how
        self.layer, self.idle, self.head = nn.Linear(4, 4), nn.Linear(2, 2), nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.how(self.layer, x).tanh())


class Secret(torch.autograd.Function):
    """A layer inside of a function, unknown to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        return layer(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


HIDDEN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "detach": lambda layer, x: layer(x).detach(),
    "no_grad": lambda layer, x: torch.no_grad()(layer)(x),
    "data": lambda layer, x: F.linear(x, layer.weight.data, layer.bias.data),
    "function": lambda layer, x: Secret.apply(x, layer),
    "numpy": lambda layer, x: torch.from_numpy(layer(x).detach().numpy()),
}


@pytest.mark.parametrize("way", HIDDEN)
def test_hidden_parameters(way: str) -> None:
    """Parameters that change the outputs and have no gradient: their information is not zero. An
    unused one's is, and a hidden one that is left out does not matter."""
    model, x = make(lambda: Hidden(HIDDEN[way]))
    message = r"parameters must reach the outputs through autograd, got 'layer\.weight'.* leave it"
    for structure in ("diag", "full"):
        with pytest.raises(ValueError, match=message):
            fisher(model, CATEGORICAL, x, structure=structure)
    found = assert_right(model, x, chosen=lambda name: not name.startswith("layer"))
    assert found.diag()[: 4 + 2].abs().max() == 0  # idle


@pytest.mark.parametrize("first", [True, False])
def test_reentrant_checkpoint(first: bool) -> None:
    """A checkpoint that hides its parameters, with and without a gradient at its input."""
    model, x = make(
        lambda: Hidden(lambda layer, x: checkpoint(layer, x, use_reentrant=True)),
    )
    if not first:
        model = nn.Sequential(nn.Linear(4, 4).double(), model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        with pytest.raises(ValueError, match="use_reentrant"):
            fisher(model, CATEGORICAL, x)


def test_mixed_samples() -> None:
    """A network that centres its batch."""
    model, x = make(linear)
    model = nn.Sequential(Lambda(lambda x: x - x.mean(0)), model)
    with pytest.raises(ValueError, match="model must treat every sample by itself"):
        fisher(model, CATEGORICAL, x)


def test_shape_of_a_single_sample() -> None:
    """A network that forgets the batch when it has one sample."""
    model, x = make(linear)
    model = nn.Sequential(model, Lambda(torch.squeeze))
    with pytest.raises(ValueError, match="model must treat every sample by itself"):
        fisher(model, CATEGORICAL, x)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: (y, y), r"model must return one tensor \[n, \.\.\.\], got tuple"),
        (lambda y: {"logits": y}, r"model must return one tensor \[n, \.\.\.\], got dict"),
        (lambda y: y.argmax(1), r"outputs of the model must be real and floating, got torch.int64"),
    ],
)
def test_outputs(output: Callable[[Tensor], Any], message: str) -> None:
    """Outputs that no likelihood can read."""
    model, x = make(linear)
    with pytest.raises(TypeError, match=message):
        fisher(nn.Sequential(model, Lambda(output)), CATEGORICAL, x)


def test_no_gradient_for_one_sample() -> None:
    """An error of autograd's that does not say which parameters it is about."""

    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            return x * w

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
            raise RuntimeError("no derivative here")

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return Refuses.apply(x, self.w)

    message = r"parameters must have gradients for a sample alone, .* w;.*no derivative here"
    with pytest.raises(RuntimeError, match=message):
        fisher(Own(), CATEGORICAL, torch.ones(2, 3))


def test_lazy() -> None:
    """A layer that has no shape yet, and the same after its first call."""
    model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(OUTPUTS)).double().eval()
    x = Network(linear, (4,)).inputs(SAMPLES)
    with pytest.raises(
        ValueError, match=r"parameters must have a shape, got '0\.weight' of a lazy"
    ):
        fisher(model, CATEGORICAL, x)
    model(x)
    assert_right(randomised(model), x)


def test_complex() -> None:
    """Complex parameters, of whose gradients only the real part would be left."""

    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.phase).abs()

    with pytest.raises(
        TypeError, match=r"parameters must be real, got 'phase' of torch\.complex128"
    ):
        fisher(Rotated(), CATEGORICAL, torch.ones(2, 3, dtype=torch.float64))


# --- callers and wrappers ---


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "save on CPU": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["linear", "attention", "checkpoint", "batch norm 2d"])
def test_modes_of_the_caller(mode: str, name: str) -> None:
    """Gradients that are off, or numbers of lower precision, because the caller wanted so."""
    network = NETWORKS[name]
    model, x = network.make(), network.inputs(SAMPLES)
    truth = brute_force(model, "categorical", x)
    with MODES[mode]():
        given = x.clone()  # in inference mode, a tensor that autograd refuses
        found = fisher(model, CATEGORICAL, given, structure="full", batch_size=3)
    assert float((found.to_dense() - truth).abs().max() / truth.abs().max()) < ROUNDING


def test_default_dtype() -> None:
    """Numbers of the default dtype among those of the network."""
    network = NETWORKS["attention"]
    model, x = network.make(torch.float32), network.inputs(SAMPLES, torch.float32)
    expected = fisher(model, CATEGORICAL, x, structure="full").to_dense()
    torch.set_default_dtype(torch.float64)
    try:
        found = fisher(model, CATEGORICAL, x, structure="full").to_dense()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled(whole: bool) -> None:
    """A compiled network, or a compiled part, whose taps would be compiled into it or left out."""
    model, x = make(linear)
    truth = brute_force(model, "categorical", x)
    if whole:
        compiled: Any = torch.compile(model, backend="eager")
    else:
        compiled = nn.Sequential(torch.compile(model[0], backend="eager"), *model[1:])
    compiled(x)
    found = fisher(compiled, CATEGORICAL, x, structure="full").to_dense()
    assert float((found - truth).abs().max() / truth.abs().max()) < ROUNDING


@pytest.mark.parametrize("whole", [True, False])
def test_data_parallel(whole: bool) -> None:
    """A network in a wrapper, whose names and calls are another's."""
    model, x = make(linear)
    truth = brute_force(model, "categorical", x)
    wrapped = nn.DataParallel(model) if whole else nn.Sequential(nn.DataParallel(model))
    found = fisher(wrapped, CATEGORICAL, x, structure="full").to_dense()
    assert float((found - truth).abs().max() / truth.abs().max()) < ROUNDING


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_few_samples(samples: int) -> None:
    """Fewer samples than are examined."""
    for name in ("conv2d", "windows", "windows mixed", "transformer, time first"):
        network = NETWORKS[name]
        assert_right(network.make(), network.inputs(samples))


def test_half_precision() -> None:
    """A network in bfloat16: sums that stay there would be wrong by more than its own rounding."""
    network = NETWORKS["shared linear"]
    truth = fisher(network.make(), CATEGORICAL, network.inputs(64), structure="diag").diag()
    low = network.make(torch.bfloat16)
    for structure in ("diag", "full"):
        found = fisher(
            low, CATEGORICAL, network.inputs(64, torch.bfloat16), structure=structure
        ).diag()
        assert float((found - truth).abs().max() / truth.max()) < 0.02  # measured: 0.006


# --- what is the user's ---


def _state(model: nn.Module) -> list[Any]:
    """Everything of a model that a measurement could touch."""
    found: list[Any] = []
    for name, module in model.named_modules():
        found.append((name, module.training, len(module._forward_hooks)))
        found.append((len(module._forward_pre_hooks), len(module._backward_hooks)))
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        found.append(sorted(plain))
    found += [(k, v._version, v.clone()) for k, v in model.state_dict(keep_vars=True).items()]
    found += [(p.requires_grad, p.is_leaf, id(p)) for p in model.parameters()]
    found += [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()]
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_touched(name: str) -> None:
    """Gradients that are filled or freed, modes, hooks, versions, random state, weights that a
    recurrent layer lists: all as before, and a training step gives what it gives without."""
    network = NETWORKS[name]
    model, x, y = network.make(torch.float32), network.inputs(SAMPLES, torch.float32), None
    x = x if network.tokens else x.requires_grad_()
    y = network.labels(SAMPLES)
    untouched = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, random_state = _state(model), torch.get_rng_state()
    fisher(model, CATEGORICAL, (x, y), structure="block", fisher_type="empirical", batch_size=3)
    assert _equal(_state(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert x.grad is None
    gradients = []
    for net in (model, untouched):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        gradients.append([p.grad for p in net.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_is_left_after_an_error(where: str) -> None:
    """Hooks that stay when the network raises."""
    model, x = make(linear)

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    if where == "forward":
        handle = model[2].register_forward_hook(fail)
    else:
        handle = model[2].register_full_backward_hook(fail)
    before = _state(model)
    with pytest.raises(KeyError, match="mine"):
        fisher(model, CATEGORICAL, x)
    assert _equal(_state(model), before)
    handle.remove()
    assert_right(model, x)


def test_recurrent_layers_keep_their_weights() -> None:
    """torch.func.functional_call leaves the weights of its call in a recurrent layer, which then
    answers with those, also in training."""
    for name in ("LSTM", "GRU"):
        network = NETWORKS[name]
        for dtype in (torch.float32, torch.float64):
            model, x = network.make(dtype), network.inputs(SAMPLES, dtype)
            fisher(model, CATEGORICAL, x, structure="diag")
            for listed, name in zip(
                model.rnn._flat_weights, model.rnn._flat_weights_names, strict=True
            ):
                assert listed is getattr(model.rnn, name)
            changed = {k: v.detach() * 2 for k, v in model.named_parameters()}
            doubled = copy.deepcopy(model)
            doubled.load_state_dict(changed)
            found = torch.func.functional_call(model, changed, (x,))
            torch.testing.assert_close(found, doubled(x))  # not the output of the old weights
