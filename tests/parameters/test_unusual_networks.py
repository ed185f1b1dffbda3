"""Networks in which a layer's rule would be wrong, or autograd does not see everything: each is
measured rightly or refused. "never silently wrong"."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.parameters_oracle import brute_force
from support.parameters_small import CATEGORICAL, difference, inputs, measure, rows
from support.parameters_zoo import (
    NETWORKS,
    OUTPUTS,
    Network,
    Written,
    linear,
)
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from fisherfast import parameters as fp

ROUNDING = 1e-12
"""Relative to the largest entry; measured: below 2e-15."""

SAMPLES = 5

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # of torch, on copies


def head() -> nn.Module:
    return nn.Linear(4, OUTPUTS)


LAYERS = {"layer": lambda: nn.Linear(4, 4), "head": head}


def made(forward: Callable[[Any, Tensor], Any], parts: dict[str, Any] = LAYERS) -> nn.Module:
    """The function of parts, which are built anew."""
    built = {name: build() for name, build in parts.items()}
    return make(lambda: Written(forward, **built))[0]


def make(build: Callable[[], nn.Module]) -> tuple[Any, Tensor]:
    """A network in float64 and eval mode, and its inputs."""
    network = Network(build, (4,))
    return network.make(), network.inputs(SAMPLES)


def assert_right(model: nn.Module, x: Tensor, **settings: Any) -> fp.ParameterFisher:
    """The whole matrix, and the diagonal, of two batches equal the brute force."""
    chosen = settings.get("parameters")
    settings = {"batch_size": SAMPLES - 1, "model": model} | settings
    truth = brute_force(model, "categorical", x, chosen=chosen)
    whole = measure("full", x, **settings)
    assert difference(whole.to_dense(), truth) < ROUNDING
    assert difference(measure("diag", x, **settings).diag(), truth.diag()) < ROUNDING
    return whole


# --- layers whose rule does not hold ---


class Scaled(nn.Linear):
    """A linear layer that does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


CHANGES: dict[str, Callable[[Any], object]] = {
    "hook": lambda m: m[0].register_forward_hook(lambda module, args, output: output * 2 + 1),
    "hook, in place": lambda m: m[2].register_forward_hook(lambda module, args, f: f.mul_(2)),
    "hook that only looks": lambda m: m[0].register_forward_hook(lambda module, args, f: None),
    "inherited": lambda m: setattr(m[0], "__class__", Scaled),
    "replaced": lambda m: setattr(m[2], "forward", lambda x, f=m[2].forward: f(x).square()),
    "pruned": lambda m: prune.random_unstructured(m[0], "weight", 0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_layers(name: str) -> None:
    """A tap after the user's hook, where the gradient is that of another output; the rule of a
    class applied to one that inherits from it, and to a layer whose forward method was replaced, as
    adapters do; a layer whose weight is computed of another parameter before each call."""
    model, x = make(linear)
    CHANGES[name](model)
    assert_right(model, x)


def test_other_hooks() -> None:
    """A tap that keeps the input before the user's hook has changed it, hooks of all modules, which
    come before any tap, and hooks on the way back, that observe and change nothing."""
    model, x = make(linear)
    seen: list[torch.Size] = []
    model[2].register_forward_pre_hook(lambda module, args: (args[0].exp(),))
    model[2].register_full_backward_hook(lambda module, given, g: seen.append(g[0].shape))
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 3 if isinstance(module, nn.Linear) else None
    )
    try:
        assert_right(model, x)
    finally:
        handle.remove()
    assert seen


def test_parameter_hooks() -> None:
    """Gradients clipped or masked for training, taken for those of log p."""
    model, x = make(NETWORKS["called twice"].build)
    truth = brute_force(model, "categorical", x)
    model.layer.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    model.head.weight.register_hook(lambda g: g * 0)
    assert difference(measure("full", x, model=model).to_dense(), truth) < ROUNDING


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.BatchNorm1d(4)], ids=["linear", "norm"])
@pytest.mark.parametrize("change", [torch.relu_, lambda h: h[:, :1].zero_()])
def test_outputs_changed_in_place(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """A tap that keeps what is overwritten afterwards: all of it, or a part."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.layer(x)
        change(h)
        return m.head(h.tanh())

    assert_right(made(forward, LAYERS | {"layer": lambda: copy.deepcopy(layer)}), rows(SAMPLES))


# --- rows that are not the samples ---


@pytest.mark.parametrize("positions", [3, SAMPLES, 6])
def test_positions(positions: int) -> None:
    """A layer that sees the positions, the same for all samples: as many as samples in a batch, in
    the examination, or a multiple of them."""
    place = torch.linspace(-1, 1, positions)[:, None].expand(-1, 2) + 1.0

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head((x[:, :1, None] * m.embed(place.to(x))).tanh().mean(1))

    model = made(forward, {"embed": lambda: nn.Linear(2, 4), "head": head})
    for batch_size in (3, positions):
        assert_right(model, rows(SAMPLES), batch_size=batch_size)


def experts(m: Any, x: Tensor) -> Tensor:
    """Every sample goes to one of two experts, and those of the second in another order."""
    second = x[:, 0] > 0
    y = x.new_zeros(len(x), OUTPUTS)
    y[~second] = m.first(x[~second])
    order = second.nonzero()[:, 0].flip(0)
    y[order] = m.second(x[order])
    return y


@pytest.mark.parametrize("sign", [None, 1, -1], ids=["mixed", "all to one", "none to the other"])
def test_experts(sign: int | None) -> None:
    """Rows that belong to other samples in each batch, and an expert that a batch does not use;
    the first three samples, which are examined, may all go one way."""
    x = torch.cat([rows(SAMPLES), -rows(SAMPLES), rows(SAMPLES).flip(0)])
    if sign is not None:
        x[:3, 0] = x[:3, 0].abs() * sign
    assert_right(made(experts, {"first": head, "second": head}), x, batch_size=6)


# --- samples that mix, or come in another order: a few are tried alone ---

MIXED = "must treat every sample by itself"


def switch(from_samples: float = float("inf")) -> nn.Module:
    """Mixes the samples of a batch of at least `from_samples`."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.layer(x))
        return m.head(h - 0.5 * h.mean(0) if len(x) >= from_samples else h)

    return made(forward)


def test_mixed_samples_are_refused() -> None:
    """At 4: a check of the three samples alone, without the batch itself. Then what a call keeps
    of a network for the next: a hook that mixes."""
    model, x = switch(), rows(5)
    assert_right(model, x)
    model.layer.register_forward_hook(lambda module, args, output: output - output.mean(0))
    for mixing in (switch(1), switch(2), switch(4), model):
        with pytest.raises(ValueError, match=MIXED):
            fp.fisher(mixing, CATEGORICAL, x)


@pytest.mark.parametrize("name", ["windows mixed", "windows"])
def test_a_head_that_was_zero(name: str) -> None:
    """Layers that are trusted because their gradients were all zero when they were looked at, as
    they are before the first step of a network whose last layer begins at zero."""
    model, x = NETWORKS[name].make(), NETWORKS[name].inputs(5)
    before = copy.deepcopy(model.head.state_dict())
    for parameter in model.head.parameters():
        parameter.data.zero_()
    assert_right(model, x)
    model.head.load_state_dict(before)
    assert_right(model, x)


def gated(m: Any, x: Tensor) -> Tensor:
    """Windows of all samples mixed, of samples that a gate lets pass."""
    every = x.unfold(1, 4, 2).transpose(0, 1).reshape(-1, 4)
    windows = torch.tanh(m.layer(every)).reshape(-1, len(x), 4).mean(0)
    return m.head(windows * (x[:, :1] > 0))


def in_order(m: Any, x: Tensor) -> Tensor:
    """Sorts the samples of its batch, as those of different lengths are, and back."""
    order = x[:, 0].argsort(descending=True)
    return m.head(torch.tanh(m.layer(x[order]))[order.argsort()])


@pytest.mark.parametrize("structure", ["diag", "block", "gram"])
def test_gradients_that_begin_in_a_later_batch(structure: str) -> None:
    """Layers that are trusted because the first batch has shown nothing of them."""
    model, x = made(gated), inputs(8).flatten(1)[:, :8]
    x[:4, 0], x[4:, 0] = -1, 1
    found = measure(structure, iter([x[:4], x[4:]]), model=model).diag()
    assert difference(found, brute_force(model, "categorical", x).diag()) < ROUNDING


@pytest.mark.parametrize("first", [1, 4], ids=["one sample", "samples alike"])
def test_first_batches_that_tell_nothing(first: int) -> None:
    """Samples that mix and are alike in the first batch."""
    model, x = switch(1), rows(9)
    x[:4] = x[0]
    with pytest.raises(ValueError, match=MIXED):
        fp.fisher(model, CATEGORICAL, iter([x[:first], x[first:]]))


@pytest.mark.parametrize("descending", [True, False])
def test_samples_in_an_order_of_the_networks_own(descending: bool) -> None:
    """An order that is that of the samples looked at, and of no others."""
    model, x = made(in_order), rows(8)
    x[:3, 0] = x[:3, 0].sort(descending=descending).values
    assert_right(model, x)


# --- parameters that the graph shows only partly, or that torch.func cannot vectorise ---


def detached(m: Any, x: Tensor) -> Tensor:
    """The output goes one way with its gradient, and another way without."""
    h = m.layer(x)
    return m.head(h.tanh()) * h.detach().exp().mean(1, keepdim=True)


def target(m: Any, x: Tensor) -> Tensor:
    """The layer is called once without gradient, and once with it."""
    with torch.no_grad():
        shift = m.layer(-x)
    return m.head((m.layer(x) - shift).tanh())


def bias_alone() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    return layer


def reused(m: Any, x: Tensor) -> Tensor:
    """The input of a layer is overwritten: its bias does not need it, so that autograd has nothing
    to complain about."""
    h = x * 2
    y = m.layer(h)
    h += 1
    return m.head(y.tanh() + h)


def transpose(m: Any, x: Tensor) -> Tensor:
    """The transpose of a weight, kept from the beginning and used alone."""
    if not m.kept:
        m.kept.append(m.layer.weight.t())
    return m.head((x @ m.kept[0]).tanh())


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


class Blocked(torch.autograd.Function):
    """No gradient reaches the layer before, for which a structure would wait."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None


def branch(m: Any, x: Tensor) -> Tensor:
    """Numbers that are read in Python, so that samples cannot be vectorised."""
    rows = [row * m.scale if float(row[0]) > 0 else row for row in x]
    return m.head(torch.stack(rows))


def vector() -> nn.Parameter:
    return nn.Parameter(torch.linspace(0.5, 1, 4))


CACHE: dict[str, Callable[[], object]] = {**LAYERS, "kept": list}
USES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Callable[[], object]]]] = {
    "detached": (detached, LAYERS),
    "target": (target, LAYERS),
    "cached transpose": (transpose, CACHE),
    "cached transpose and layer": (lambda m, x: transpose(m, m.layer(x)), CACHE),
    "input changed": (reused, LAYERS | {"layer": bias_alone}),
    "own function": (lambda m, x: m.head(Square.apply(m.layer(x), m.w)), LAYERS | {"w": vector}),
    "blocked": (lambda m, x: m.head(x) + Blocked.apply(m.head2(x)), {"head": head, "head2": head}),
    "branch": (branch, {"scale": vector, "head": head}),
    "adapter": (
        lambda m, x: m.base(x).add_(m.up(m.down(x)), alpha=0.5),
        {
            "base": lambda: head().requires_grad_(False),
            "down": lambda: nn.Linear(4, 2, bias=False),
            "up": lambda: nn.Linear(2, OUTPUTS, bias=False),
        },
    ),
}


@pytest.mark.parametrize("name", USES)
def test_uses_of_parameters(name: str) -> None:
    """A tap that gets the gradient of one use only, or of one too many, or the sum of two layers,
    or that reads an input after it was overwritten;
    torch.func, which does not know what a module has kept of its parameters."""
    assert_right(made(*USES[name]), rows(SAMPLES))


def sparse(m: Any, x: Tensor) -> Tensor:
    return m.head((m.one(x) + m.two(x) * m.two(x.flip(1))).tanh().mean(1))


def test_words() -> None:
    """Gradients that autograd gives as sparse tensors, tied and not, and a layer without a rule
    whose inputs are whole numbers."""
    tables = {name: nn.Embedding(6, 4, sparse=True) for name in ("one", "two")}
    for build in (
        lambda: Written(sparse, **tables, head=head()),
        lambda: nn.Sequential(nn.EmbeddingBag(6, 4, mode="sum"), nn.Tanh(), head()),
    ):
        network = Network(build, (5,), tokens=True)
        assert_right(network.make(), network.inputs(SAMPLES))


def test_own_precision() -> None:
    """A network that lowers the precision of a part itself: the rule of the layer before has
    numbers of two kinds, and that of the layer inside too."""

    def lowered(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = m.layer(x).tanh()
        return m.head(h.float())

    model, x = made(lowered).float(), rows(SAMPLES).float()
    truth = brute_force(model, "categorical", x).diag()
    for structure in ("diag", "full"):
        found = measure(structure, x, model=model)
        assert difference(found.diag(), truth) < 0.02  # 2 eps


# --- what cannot be measured ---


HIDDEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "detach": lambda layer, x: layer(x).detach(),
    "no_grad": lambda layer, x: torch.no_grad()(layer)(x),
    "data": lambda layer, x: F.linear(x, layer.weight.data, layer.bias.data),
}


def hidden(how: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    parts = {"layer": lambda: nn.Linear(4, 4), "idle": lambda: nn.Linear(2, 2), "head": head}
    return made(lambda m, x: m.head(how(m.layer, x).tanh()), parts)


@pytest.mark.parametrize("way", HIDDEN)
def test_hidden_parameters(way: str) -> None:
    """Parameters that change the outputs and have no gradient: their information is not zero. An
    unused one's is, and a hidden one that is left out does not matter."""
    model, x = hidden(HIDDEN[way]), rows(SAMPLES)
    message = r"parameters must reach the outputs through autograd, got 'layer\.weight'.* leave it"
    for structure in ("diag", "full"):
        with pytest.raises(ValueError, match=message):
            measure(structure, x, model=model)
    found = assert_right(model, x, parameters=lambda name: not name.startswith("layer"))
    assert found.diag()[: 4 + 2].abs().max() == 0  # idle


@pytest.mark.parametrize("first", [True, False])
def test_reentrant_checkpoint(first: bool) -> None:
    """A checkpoint that hides its parameters, with and without a gradient at its input."""
    model = hidden(lambda layer, x: checkpoint(layer, x, use_reentrant=True))
    if not first:
        model = nn.Sequential(nn.Linear(4, 4).double(), model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        with pytest.raises(ValueError, match="use_reentrant"):
            fp.fisher(model, CATEGORICAL, rows(SAMPLES))


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 3).double()


NO_GRADIENTS = [
    (lambda: Written(lambda m, x: torch.igamma(m.w, x), w=vector()), RuntimeError, "alone, .* w;"),
    (lambda: nn.Linear(4, 3, dtype=torch.complex64), TypeError, "be real, got 'weight' of torch.c"),
    (lambda: nn.LazyLinear(3), ValueError, "have a shape, got 'weight' of a lazy"),
    (made_in_inference_mode, ValueError, "not be made in inference mode"),
]


@pytest.mark.parametrize(("build", "error", "message"), NO_GRADIENTS)
def test_parameters_without_gradients(
    build: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    """Errors of autograd's that do not say which parameters they are about, and gradients of which
    only the real part would be left."""
    with pytest.raises(error, match=f"parameters must .*{message}"):
        fp.fisher(build().eval(), CATEGORICAL, torch.ones(2, 4, dtype=torch.float64))


# --- wrappers ---


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "part": lambda model: nn.Sequential(torch.compile(model[0], backend="eager"), *model[1:]),
    "parallel": lambda model: nn.Sequential(nn.DataParallel(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(name: str) -> None:
    """A compiled network, or a compiled part, whose taps would be compiled into it or left out; a
    network in a wrapper, whose names and calls are another's."""
    model, x = make(linear)
    truth = brute_force(model, "categorical", x)
    wrapped = WRAPPERS[name](model)
    wrapped(x)
    assert difference(measure("full", x, model=wrapped).to_dense(), truth) < ROUNDING


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", ["conv2d strided", "windows", "windows mixed"])
def test_few_samples(name: str, samples: int) -> None:
    """Fewer samples than are examined."""
    assert_right(NETWORKS[name].make(), NETWORKS[name].inputs(samples))
