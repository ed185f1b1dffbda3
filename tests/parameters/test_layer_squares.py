"""Sums of squared gradients of each kind of layer against one backward pass for every sample."""

import pytest
import torch
from torch import nn

from fisherfast.parameters.layers.convolution import TransposedConvolution
from fisherfast.parameters.layers.registry import rule_for

# PyTorch says that it copies the input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

# Of the largest square, in float64. Measured: 9e-16.
TOLERANCE = 1e-13
TOLERANCE_FLOAT32 = 4e-6  # measured: 5e-7

LAYERS = {
    "linear": (nn.Linear(5, 3), (7, 5)),
    "linear, positions": (nn.Linear(5, 3), (7, 4, 5)),
    "linear, two dimensions of positions": (nn.Linear(5, 3), (7, 4, 2, 5)),
    "linear, no bias": (nn.Linear(5, 3, bias=False), (7, 4, 5)),
    "linear, no positions": (nn.Linear(5, 3), (7, 0, 5)),
    "conv 1d": (nn.Conv1d(3, 4, 3, padding=1), (5, 3, 9)),
    "conv 1d, strided": (nn.Conv1d(4, 6, 4, stride=3, dilation=2, groups=2), (5, 4, 19)),
    "conv 2d": (nn.Conv2d(3, 4, 3, padding=1), (5, 3, 6, 7)),
    "conv 2d, everything": (
        nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (1, 3), groups=2),
        (5, 4, 8, 9),
    ),
    "conv 2d, depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (5, 6, 5, 6)),
    "conv 2d, same": (nn.Conv2d(3, 4, (2, 4), padding="same"), (5, 3, 6, 7)),
    "conv 2d, reflected": (
        nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"),
        (5, 3, 6, 7),
    ),
    "conv 2d, circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (5, 3, 6, 7)),
    "conv 2d, no bias": (nn.Conv2d(3, 4, 1, bias=False), (5, 3, 6, 7)),
    "conv 3d": (nn.Conv3d(3, 4, (2, 3, 1), (1, 2, 1), (0, 1, 0)), (5, 3, 4, 6, 3)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1), (5, 3, 6)),
    "transposed 2d": (nn.ConvTranspose2d(3, 4, 3, padding=1), (5, 3, 6, 7)),
    "transposed 2d, everything": (
        nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2, dilation=(1, 2)),
        (5, 4, 3, 5),
    ),
    "transposed 2d, margin beyond the stride": (
        nn.ConvTranspose2d(3, 2, 2, stride=1, output_padding=1, dilation=2),
        (5, 3, 4, 4),
    ),
    "batch norm": (nn.BatchNorm2d(4).eval(), (5, 4, 3, 6)),
    "batch norm 1d": (nn.BatchNorm1d(4).eval(), (5, 4)),
    "layer norm": (nn.LayerNorm((3, 6)), (5, 4, 3, 6)),
    "RMS norm": (nn.RMSNorm(6), (5, 4, 6)),
    "group norm": (nn.GroupNorm(2, 4), (5, 4, 3, 6)),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), (5, 4, 3, 6)),
}


def seeded(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def prepared(layer, shape):
    """The layer in float64 with its own numbers, x, and gradients at its output."""
    layer = layer.double()
    with torch.no_grad():
        for number, (name, values) in enumerate(layer.state_dict().items()):
            if values.is_floating_point():
                draw = seeded(values.shape, 100 + number)
                values.copy_(draw.abs() + 0.5 if "var" in name else draw)
    x = seeded(shape, 1)
    return layer, x, seeded(layer(x).shape, 2)


def by_sample(layer, x, g):
    """G_i of every parameter, by autograd: one backward pass for each sample."""
    parameters = list(layer.parameters())
    rows = [
        torch.autograd.grad(layer(x[i : i + 1]), parameters, g[i : i + 1]) for i in range(len(x))
    ]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def rule_of(layer):
    own = dict.fromkeys(name for name, _ in layer.named_parameters())
    return rule_for(layer, {name: name for name in own})


def assert_near(got, truth, tolerance):
    assert got.shape == truth.shape
    if truth.numel():
        assert (got.double() - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("name", LAYERS)
def test_against_one_backward_pass_a_sample(name):
    """Catches positions that are squared before they are summed, a group or a margin at the wrong
    place, and parameters in another order."""
    layer, x, g = prepared(*LAYERS[name])
    rule = rule_of(layer)
    truth = by_sample(layer, x, g)
    with torch.no_grad():
        for got, rows in zip(rule.gradients(x, g), truth, strict=True):
            assert_near(got, rows, TOLERANCE)
        for got, rows in zip(rule.squares(x, g), truth, strict=True):
            assert_near(got, rows.square().sum(0), TOLERANCE)


@pytest.mark.parametrize("name", LAYERS)
def test_float32_and_channels_last(name):
    """Catches strides that are assumed, and products in less than float32."""
    layer, x, g = prepared(*LAYERS[name])
    truth = [rows.square().sum(0) for rows in by_sample(layer, x, g)]
    layer, x, g = layer.float(), x.float(), g.float()
    if x.dim() == 4:
        x, g = (part.contiguous(memory_format=torch.channels_last) for part in (x, g))
    before = x.clone(), g.clone()
    with torch.no_grad():
        got = rule_of(layer).squares(x, g)
    for mine, expected in zip(got, truth, strict=True):
        assert_near(mine, expected, TOLERANCE_FLOAT32)
    assert torch.equal(x, before[0])
    assert torch.equal(g, before[1])
    layer.double()


@pytest.mark.parametrize("name", ["conv 3d", "layer norm", "batch norm", "instance norm"])
def test_parts_of_a_batch_add_up(name, monkeypatch):
    """One sample at a time: catches a part that is lost, or whose sum is squared with another's."""
    layer, x, g = prepared(*LAYERS[name])
    for limit in ("layers.norm.IN_CACHE", "layers.linear.IN_MEMORY"):
        monkeypatch.setattr(f"fisherfast.parameters.{limit}", 1)
    rule, sizes = rule_of(layer), []
    gradients = rule.gradients

    def recorded(x, g):
        sizes.append(len(x))
        return gradients(x, g)

    monkeypatch.setattr(rule, "gradients", recorded)
    with torch.no_grad():
        got = rule.squares(x, g)
    for mine, rows in zip(got, by_sample(layer, x, g), strict=True):
        assert_near(mine, rows.square().sum(0), TOLERANCE)
    assert sizes == [1] * len(x)


@pytest.mark.parametrize("attribute", ["weight", "bias"])
@pytest.mark.parametrize("name", ["linear, positions", "conv 2d", "transposed 2d", "batch norm"])
def test_one_parameter_alone(name, attribute):
    """Catches results in the place of a parameter that is not measured."""
    layer, x, g = prepared(*LAYERS[name])
    rule = rule_for(layer, {attribute: "the only one"})
    index = [own for own, _ in layer.named_parameters()].index(attribute)
    with torch.no_grad():
        [got] = rule.squares(x, g)
    assert_near(got, by_sample(layer, x, g)[index].square().sum(0), TOLERANCE)


def test_reduced_matmul_precision_does_not_reach_a_linear_layer():
    """With bfloat16 products the error would be about 1e-3."""
    layer, x, g = prepared(nn.Linear(64, 48), (50, 64))
    truth = by_sample(layer, x, g)[0].square().sum(0)
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        got = rule_of(layer.float()).squares(x.float(), g.float())[0]
    finally:
        torch.set_float32_matmul_precision(former)
    assert_near(got, truth, TOLERANCE_FLOAT32)


def test_instance_norm_with_running_statistics_has_no_rule():
    """In eval mode it normalises by these, which the rule does not know."""
    assert rule_of(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)) is None
    assert isinstance(rule_of(nn.ConvTranspose2d(3, 2, 2)), TransposedConvolution)
