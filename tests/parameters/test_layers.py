"""Contractions of the per-sample gradients of each kind of layer against one backward pass for
every sample."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fisherfast.parameters.layers import linear as ways
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layers.linear import MatrixRule
from fisherfast.parameters.layers.registry import rule_for

# PyTorch says that it copies the input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

# Of the largest number, in float64. Measured: 9e-16.
TOLERANCE = 1e-13
TOLERANCE_FLOAT32 = 4e-6  # measured: 5e-7
GRAM_FLOAT32 = 2e-6

LAYERS = {
    "linear": (nn.Linear(5, 3), (7, 5)),
    "linear, positions": (nn.Linear(5, 3), (7, 4, 2, 5)),
    "linear, no positions": (nn.Linear(5, 3, bias=False), (7, 0, 5)),
    "conv 1d": (nn.Conv1d(4, 6, 4, stride=3, dilation=2, groups=2), (5, 4, 19)),
    "conv 2d": (nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (1, 3), groups=2), (5, 4, 8, 9)),
    "conv 2d, same": (
        nn.Conv2d(3, 4, (2, 4), padding="same", padding_mode="circular", bias=False),
        (5, 3, 6, 7),
    ),
    "conv 3d": (nn.Conv3d(3, 4, (2, 3, 1), (1, 2, 1), (0, 1, 0)), (5, 3, 4, 6, 3)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1), (5, 3, 6)),
    "transposed 2d": (
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
    "embedding, padded": (nn.Embedding(6, 4, padding_idx=2), (7, 5)),
}


def seeded(shape: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def prepared(layer: nn.Module, shape: Sequence[int]) -> tuple[nn.Module, Tensor, Tensor]:
    """The layer in float64 with its own numbers, x, and gradients at its output."""
    layer = layer.double()
    with torch.no_grad():
        for number, (name, values) in enumerate(layer.state_dict().items()):
            if values.is_floating_point():
                draw = seeded(values.shape, 100 + number)
                values.copy_(draw.abs() + 0.5 if "var" in name else draw)
    x = seeded(shape, 1)
    if isinstance(layer, nn.Embedding):
        x = x.mul(10).long() % 6
    return layer, x, seeded(layer(x).shape, 2)


def by_sample(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """G_i of every parameter, by autograd: one backward pass for each sample."""
    parameters = list(layer.parameters())
    rows = [
        torch.autograd.grad(layer(x[i : i + 1]), parameters, g[i : i + 1]) for i in range(len(x))
    ]
    parts = [torch.stack(each) for each in zip(*rows, strict=True)]
    return dict(zip((name for name, _ in layer.named_parameters()), parts, strict=True))


def rule_of(layer: nn.Module, *names: str) -> Rule:
    """The rule for some parameters of a layer; for all of them where none are named."""
    names = names or tuple(name for name, _ in layer.named_parameters())
    rule = rule_for(layer, {name: f"own.{name}" for name in names})
    assert rule is not None
    assert rule.names == tuple(f"own.{name}" for name in names)
    return rule


def assert_near(got: Tensor, truth: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == truth.shape
    if truth.numel():
        assert (got.double() - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("name", LAYERS)
def test_against_one_backward_pass_a_sample(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that are squared before they are summed, a group or a margin at the wrong place,
    parameters in another order or in the place of one that is not measured, columns and samples
    exchanged, samples of another portion, a portion that is lost or whose sum is squared with
    another's."""
    layer, x, g = prepared(*LAYERS[name])
    truth = by_sample(layer, x, g)
    u = seeded([len(x)], 3)
    choices = [tuple(truth), *((own,) for own in truth)] if len(truth) > 1 else [tuple(truth)]
    for names in choices:
        rule, rows = rule_of(layer, *names), [truth[own] for own in names]
        v = [seeded(each.shape[1:], 4) for each in rows]
        flat = torch.cat([each.flatten(1) for each in rows], 1)
        with torch.no_grad():
            for got, each in zip(rule.gradients(x, g), rows, strict=True):
                assert_near(got, each)
            for limit in (1, 2**25):  # one sample at a time, and all
                for name in ("layers.norm.IN_CACHE", "layers.linear.IN_MEMORY"):
                    monkeypatch.setattr(f"fisherfast.parameters.{name}", limit)
                for got, each in zip(rule.squares(x, g), rows, strict=True):
                    assert_near(got, each.square().sum(0))
            for got, each in zip(rule.weighted_sum(x, g, u), rows, strict=True):
                assert_near(got, torch.tensordot(u, each, 1))
            assert_near(rule.products(x, g, v), flat @ torch.cat([each.flatten() for each in v]))
        if isinstance(rule, MatrixRule) and x.numel():
            columns = torch.stack([g, g.roll(1, 0)])
            other = by_sample(layer, x, columns[1])
            both = torch.stack([flat, torch.cat([other[own].flatten(1) for own in names], 1)])
            pairs = torch.einsum("rnp,qmp->rnqm", both, both)
            for portion, tile, without in ((1, 1, True), (2**25, 1, False), (2**25, 2**22, True)):
                monkeypatch.setattr(ways, "PORTION_BYTES", portion)
                monkeypatch.setattr(ways, "TILE_NUMBERS", tile)
                monkeypatch.setattr(ways, "_cheaper_without_gradients", lambda *_, w=without: w)
                assert_near(rule.columns_gram(x, columns, x, columns), pairs)
                some = rule.columns_gram(x, columns, x[1:], columns[:1, 1:])
                assert_near(some, pairs[:, :, :1, 1:])


@pytest.mark.parametrize("name", LAYERS)
def test_float32_and_channels_last(name: str) -> None:
    """Strides that are assumed, and products in less than float32."""
    layer, x, g = prepared(*LAYERS[name])
    rows = by_sample(layer, x, g).values()
    truth = [each.square().sum(0) for each in rows]
    flat = torch.cat([each.flatten(1) for each in rows], 1)
    layer, g = layer.float(), g.float()
    x = x.float() if x.is_floating_point() else x
    if x.dim() == 4:
        x, g = (part.contiguous(memory_format=torch.channels_last) for part in (x, g))
    before = x.clone(), g.clone()
    rule = rule_of(layer)
    with torch.no_grad():
        got = rule.squares(x, g)
        if isinstance(rule, MatrixRule) and x.numel():
            pairs = rule.columns_gram(x, g[None], x, g[None])[0, :, 0]
            assert_near(pairs, flat @ flat.T, GRAM_FLOAT32)
    for mine, expected in zip(got, truth, strict=True):
        assert_near(mine, expected, TOLERANCE_FLOAT32)
    assert torch.equal(x, before[0])
    assert torch.equal(g, before[1])
    layer.double()


def test_reduced_matmul_precision_does_not_reach_a_linear_layer() -> None:
    """With bfloat16 products the error would be about 1e-3."""
    layer, x, g = prepared(nn.Linear(64, 48), (50, 64))
    truth = by_sample(layer, x, g)["weight"].square().sum(0)
    torch.set_float32_matmul_precision("medium")
    try:
        got = rule_of(layer.float()).squares(x.float(), g.float())[0]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_near(got, truth, TOLERANCE_FLOAT32)


def test_layers_without_a_rule() -> None:
    """A rule for a norm whose statistics it does not know, or for a table that changes when it is
    read."""
    for layer in (
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        nn.BatchNorm2d(3, track_running_stats=False).eval(),
        nn.BatchNorm2d(3),
        nn.Embedding(5, 3, max_norm=1.0),
        nn.Embedding(5, 3, scale_grad_by_freq=True),
        nn.Bilinear(3, 3, 3),
    ):
        assert rule_for(layer, {"weight": "weight"}) is None


@pytest.mark.parametrize(("T", "D", "M", "cheaper"), [(6, 300, 20, True), (90, 5, 3, False)])
def test_the_cheaper_way_of_a_gram_matrix(T: int, D: int, M: int, cheaper: bool) -> None:
    """The dearer way for few positions of many features, or for many of few."""
    side = torch.empty(4, T, D), torch.empty(3, 4, T, M)
    assert ways._cheaper_without_gradients(side, side) == cheaper
