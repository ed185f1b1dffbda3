"""Exact derivatives through whole networks: every layer against forward mode in float64.

Every entry of the zoo is run. Deviations are relative to the largest entry of the layer's truth.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import dual_oracle
from support.dual_oracle import Function, Network, distance, map_tensors
from support.dual_zoo import NETWORKS, resnet
from support.dual_zoo_layers import LAYERS
from support.dual_zoo_operations import OPERATIONS
from support.dual_zoo_sequences import ATTENTION
from support.dual_zoo_spectral import COMPLEX
from torch import Tensor, nn
from torch.func import functional_call

import fisherfast as ff
from fisherfast.model.graph import survey
from fisherfast.model.isolation import evaluation
from fisherfast.model.sites import select

ALL: dict[str, Network] = {**NETWORKS, **ATTENTION, **LAYERS, **OPERATIONS, **COMPLEX}

WITHOUT_RULE = (
    *("batch_norm_of_batch", "max_unpool", "norm", "prod", "cumprod", "cummax", "atan2", "erf"),
    *("clamp_tensor", "remainder", "xlogy", "scattered", "index_put", "inverse"),
    *("complex_spread", "complex_activation", "spread"),
)
"""Entries of which an operation has no rule."""

EXACT = 1e-8
"""Against forward mode in float64: the same derivative, another order of sums."""

SINGLE = 1e-4
"""float32 against the truth in float64."""

HALF = {torch.bfloat16: 0.05, torch.float16: 0.006}
"""Against the truth: forward mode in the same dtype is off by 0.013 and 0.0016."""

ROUNDED = 1e-7
"""PyTorch's own derivatives of hardsigmoid and CELU hold a constant in float32, also in float64."""


def bound_of(name: str) -> float:
    """How far from its oracle an entry may be in float64."""
    return ROUNDED if name in ("hardsigmoid", "celu") else EXACT


def names_of(model: nn.Module, x: Tensor) -> list[str]:
    """The layers that `fisher_flow` measures."""
    model = copy.deepcopy(model)
    with evaluation(model, 0):
        return [site.name for site in select(survey(model, x), "auto", model)]


def assert_layers(seen: dict[str, tuple[Tensor, Tensor]], truth: Any, bound: float) -> None:
    """Every layer's primal and tangents are the oracle's."""
    assert {"input"} < set(seen) <= set(truth)
    deviations = {
        name: max(distance(primal, truth[name][0]), distance(tangents, truth[name][1]))
        for name, (primal, tangents) in seen.items()
    }
    wrong = {name: value for name, value in deviations.items() if not value <= bound}
    assert not wrong, wrong


def assert_outputs(y: Any, dy: Any, truth: Any, tangents: list[Any], bound: float) -> None:
    """The same structure, the same primal, the same tangent in each direction."""

    def same(expected: Tensor, seen: Tensor) -> None:
        assert type(seen) is torch.Tensor
        if expected.is_floating_point():
            assert distance(seen, expected) <= bound
        else:  # integers do not move
            assert torch.equal(seen.to(expected.dtype), expected)

    map_tensors(same, truth, y)
    for index, expected in enumerate(tangents):
        map_tensors(lambda one, every, index=index: same(one, every[index]), expected, dy)


@pytest.mark.parametrize("name", ALL)
def test_every_layer_has_the_exact_derivative(name):
    """Catches a wrong rule anywhere (P = 3, batch normalisation with statistics that are not 0 and
    1, axes that all differ), a layer that goes missing, float32 kernels that lose digits, and
    results of another dtype than the layer's."""
    network = ALL[name]
    model = network.make()
    x, dx = network.inputs()
    truth, output, tangents = dual_oracle.oracle(network, x, dx)
    bound = bound_of(name)

    seen = ff.propagate(model, x, dx)
    assert_layers(seen, truth, bound)
    assert list(seen) == names_of(model, x)

    y, dy = ff.jvp(model, x, dx)
    assert_outputs(y, dy, output, tangents, bound)

    coverage = ff.dual.coverage(model, x)
    assert not coverage.failures
    assert bool(coverage.fallbacks) == (name in WITHOUT_RULE)  # which costs more

    seen = ff.propagate(network.make(torch.float32), x.float(), dx.float())
    assert_layers(seen, truth, SINGLE)
    if name != "to_float":
        assert {t.dtype for pair in seen.values() for t in pair} == {torch.float32}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["lenet", "vit"])
def test_half_precision(name, dtype):
    """Catches half types that are refused or summed badly."""
    network = NETWORKS[name]
    x, dx = network.inputs()
    truth, _, _ = dual_oracle.oracle(network, x, dx)
    seen = ff.propagate(network.make(dtype), x.to(dtype), dx.to(dtype))
    assert_layers(seen, truth, HALF[dtype])
    assert {t.dtype for pair in seen.values() for t in pair} == {dtype}


@pytest.mark.parametrize(("number", "name"), list(enumerate(NETWORKS)))
def test_one_direction_or_one_sample(number, name):
    """Catches axes that are squeezed away or taken for each other when they are 1 long."""
    network = NETWORKS[name]
    x, dx = network.inputs(*((4, 1) if number % 2 else (1, None)))
    truth, output, tangents = dual_oracle.oracle(network, x, dx)
    assert_layers(ff.propagate(network.make(), x, dx), truth, bound_of(name))
    y, dy = ff.jvp(network.make(), x, dx)
    assert_outputs(y, dy, output, tangents, bound_of(name))


def test_width_is_no_limit():
    """A ResNet of other widths; catches kernels that are right for narrow layers only."""
    network = Network(lambda: resnet(20, channels=1), (1, 33, 41), samples=1)
    x, dx = network.inputs(2)
    truth, _, _ = dual_oracle.oracle(network, x, dx)
    assert_layers(ff.propagate(network.make(), x, dx), truth, EXACT)
    seen = ff.propagate(network.make(torch.float32), x.float(), dx.float())
    assert_layers(seen, truth, SINGLE)


class Square(torch.autograd.Function):
    """A function of the user's own, with a backward and no forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradients[0]


@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (F.hardsigmoid, lambda x: (x.abs() < 3).double() / 6),
        (lambda x: F.celu(x, 1.3), lambda x: (x / 1.3).clamp(max=0).exp()),
        (lambda x: Square.apply(x), lambda x: 2 * x),
    ],
)
def test_slopes_that_forward_mode_rounds_or_has_not(function, slope):
    """Catches slopes that are right to float32 only, and a function of the user's own that has a
    backward alone; here the closed form is the oracle."""
    x, dx = Network(nn.Identity, (5, 7)).inputs()
    _, dy = ff.jvp(Function(function), 3 * x, dx)
    assert distance(dy, slope(3 * x) * dx) <= 1e-14


def test_channels_last():
    """Catches kernels that take the memory format of the input for the contiguous one."""
    network = NETWORKS["resnet"]
    x, dx = network.inputs()
    truth, _, _ = dual_oracle.oracle(network, x, dx)
    model = network.make().to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    dx = dx.flatten(0, 1).to(memory_format=torch.channels_last).view(dx.shape)
    assert_layers(ff.propagate(model, x, dx), truth, EXACT)


@pytest.mark.parametrize(
    "wrap",
    [
        torch.fx.symbolic_trace,
        nn.DataParallel,
        lambda model: Function(lambda x: functional_call(model, dict(model.named_parameters()), x)),
    ],
    ids=["fx", "parallel", "functional_call"],
)
def test_model_inside_of_something(wrap):
    """Catches derivatives that depend on how the layers are called."""
    network = NETWORKS["lenet"]
    x, dx = network.inputs()
    _, output, tangents = dual_oracle.oracle(network, x, dx)
    assert_outputs(*ff.jvp(wrap(network.make()), x, dx), output, tangents, EXACT)


def test_autocast_of_the_user():
    """Catches a lower precision that is asked for and lost, or that breaks the derivative."""
    network = NETWORKS["lenet"]
    x, dx = network.inputs()
    _, output, tangents = dual_oracle.oracle(network, x, dx)
    with torch.autocast("cpu", torch.bfloat16):
        y, dy = ff.jvp(network.make(torch.float32), x.float(), dx.float())
    assert y.dtype == dy.dtype == torch.bfloat16
    assert_outputs(y, dy, output, tangents, HALF[torch.bfloat16])


@pytest.mark.parametrize(("parameters", "samples"), [(0, 3), (2, 0)])
def test_nothing_to_do(parameters, samples):
    """Catches reductions over nothing: no direction, or no sample."""
    model = NETWORKS["lenet"].make()
    x = torch.zeros(samples, 1, 16, 16, dtype=torch.float64)
    y, dy = ff.jvp(model, x, x.new_zeros(parameters, *x.shape))
    with torch.no_grad():
        torch.testing.assert_close(y, model(x))
    assert dy.shape == (parameters, samples, 5)


def test_directions_that_are_views():
    """Catches a buffer that is built from strides: expanded, transposed and sliced arguments."""
    network = NETWORKS["lenet"]
    x, dx = network.inputs()
    turned = dx.permute(2, 0, 1, 4, 3).contiguous().permute(1, 2, 0, 4, 3)
    views = (
        (x.mT.contiguous().mT, dx[:1].expand(3, *x.shape)),
        (torch.cat([x, x], -1)[..., :16], turned),
    )
    for start, directions in views:
        truth, _, _ = dual_oracle.oracle(network, start, directions)
        assert_layers(ff.propagate(network.make(), start, directions), truth, EXACT)


# --- which layers ---


def test_layers_are_chosen_as_in_fisher_flow():
    """Catches other names, another order, or ends that are left out."""
    model = NETWORKS["lenet"].make()
    x, dx = NETWORKS["lenet"].inputs()
    everything = ff.propagate(model, x, dx)
    assert list(everything) == ["input", *"01234578", "output"]
    for layers in (["3"], "3", lambda name, module: isinstance(module, nn.Conv2d) and name == "3"):
        chosen = ff.propagate(model, x, dx, layers=layers)
        assert list(chosen) == ["input", "3", "output"]
        for name, pair in chosen.items():
            for seen, truth in zip(pair, everything[name], strict=True):
                assert torch.equal(seen, truth)
    assert list(ff.propagate(model, x, dx, layers="^[01]$")) == ["input", "0", "1", "output"]
    with pytest.raises(ValueError, match="layers must name layers of the model, got 'nine'"):
        ff.propagate(model, x, dx, layers=["nine"])


# --- attention ---


@pytest.mark.parametrize("causal", [True, False])
def test_long_attention(causal):
    """Catches blocks of queries that are put together wrongly: 150 queries to 700 keys."""

    def forward(x: Tensor) -> Tensor:
        chosen = {"is_causal": True} if causal else {"attn_mask": _bands()[: len(x)]}
        return F.scaled_dot_product_attention(x[:, :, :150], x, x[..., :3], **chosen)

    network = Network(lambda: Function(forward), (2, 700, 4), samples=2)
    x, dx = network.inputs(2)
    truth, _, _ = dual_oracle.oracle(network, x, dx)
    assert_layers(ff.propagate(network.make(), x, dx), truth, EXACT)
    assert_layers(ff.propagate(network.make(), x.float(), dx.float()), truth, SINGLE)


def _bands() -> Tensor:
    """[2, 1, 150, 700]: each sample keeps the keys near its queries, another width for each."""
    gap = (torch.arange(700) - 4 * torch.arange(150)[:, None]).abs()
    return torch.stack([gap < 90, gap < 300])[:, None]
