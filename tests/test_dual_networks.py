"""Exact derivatives through whole networks: every layer against forward mode in float64.

Every entry of the zoo is run. Deviations are relative to the largest entry of the layer's truth.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import dual_oracle
import pytest
import torch
import torch.nn.functional as F
from dual_oracle import Function, Network, distance, map_tensors
from dual_zoo import NETWORKS, ResNet18
from dual_zoo_layers import LAYERS
from dual_zoo_sequences import ATTENTION
from networks_zoo import seeded, untouched
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fisherfast as ff
from fisherfast import taps

ALL: dict[str, Network] = {**NETWORKS, **ATTENTION, **LAYERS}

EXACT = 1e-8
"""Against forward mode in float64: the same derivative, another order of sums."""

DIFFERENCES = 1e-6
"""Against central differences of step 1e-5: rounding of 1e-16 / 1e-5, and the step squared."""

SINGLE = 1e-4
"""float32 against the truth in float64."""

HALF = {torch.bfloat16: 0.05, torch.float16: 0.006}
"""Against the truth: forward mode in the same dtype is off by 0.013 and 0.0016."""

BOUND = {"forward": EXACT, "differences": DIFFERENCES}


def names_of(model: nn.Module, x: Tensor) -> list[str]:
    """The layers that `fisher_flow` measures."""
    model = copy.deepcopy(model)
    with taps.evaluation(model, 0):
        return [site.name for site in taps.select(taps.survey(model, x), "auto", model)]


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
    map_tensors(lambda *pair: _same(*pair, bound), y, truth)
    for index, expected in enumerate(tangents):
        map_tensors(lambda *pair, index=index: _same(pair[0][index], pair[1], bound), dy, expected)


def _same(seen: Tensor, truth: Tensor, bound: float) -> None:
    assert type(seen) is torch.Tensor
    if truth.is_floating_point():
        assert distance(seen, truth) <= bound
    else:
        assert torch.equal(seen, truth)


def floating(structure: Any) -> Any:
    """Without integer tensors and None, which have no derivative to compare."""
    if isinstance(structure, dict):
        return {key: floating(value) for key, value in structure.items()}
    if isinstance(structure, tuple | list):
        return [floating(value) for value in structure]
    return structure if isinstance(structure, Tensor) and structure.is_floating_point() else None


@pytest.mark.parametrize("name", ALL)
def test_every_layer_has_the_exact_derivative(name):
    """Catches a wrong rule anywhere: P = 3, float64, batch normalisation with statistics that are
    not 0 and 1, axes that all differ; and a layer that goes missing."""
    network = ALL[name]
    model = network.make()
    x, dx = network.inputs()
    truth, output, tangents = dual_oracle.oracle(network, x, dx)
    bound = BOUND[network.oracle]

    seen = ff.propagate(model, x, dx)
    assert_layers(seen, truth, bound)
    assert list(seen) == names_of(model, x)

    y, dy = ff.jvp(model, x, dx)
    assert_outputs(y, floating(dy), output, [floating(each) for each in tangents], bound)


@pytest.mark.parametrize("name", ALL)
def test_single_precision(name):
    """Catches float32 kernels that lose digits, and results of another dtype than the layer's."""
    network = ALL[name]
    x, dx = network.inputs()
    truth, _, _ = dual_oracle.oracle(network, x, dx)
    seen = ff.propagate(network.make(torch.float32), x.float(), dx.float())
    assert_layers(seen, truth, SINGLE)
    if name not in EXPLICITLY_DOUBLE:
        assert {t.dtype for pair in seen.values() for t in pair} == {torch.float32}


EXPLICITLY_DOUBLE = {"to_float"}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["mlp", "lenet", "vit"])
def test_half_precision(name, dtype):
    """Catches half types that are refused or summed badly."""
    network = NETWORKS[name]
    x, dx = network.inputs()
    truth, _, _ = dual_oracle.oracle(network, x, dx)
    seen = ff.propagate(network.make(dtype), x.to(dtype), dx.to(dtype))
    assert_layers(seen, truth, HALF[dtype])
    assert {t.dtype for pair in seen.values() for t in pair} == {dtype}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("parameters", "samples"), [(1, None), (1, 1), (4, 1)])
def test_one_direction_and_one_sample(name, parameters, samples):
    """Catches axes that are squeezed away or taken for each other when they are 1 long."""
    network = NETWORKS[name]
    x, dx = network.inputs(parameters, samples)
    truth, output, tangents = dual_oracle.oracle(network, x, dx)
    assert_layers(ff.propagate(network.make(), x, dx), truth, EXACT)
    y, dy = ff.jvp(network.make(), x, dx)
    assert_outputs(y, floating(dy), output, [floating(each) for each in tangents], EXACT)


def test_width_is_no_limit():
    """A ResNet-18 of other widths; catches kernels that are right for narrow layers only."""
    network = Network(lambda: ResNet18(20, channels=1), (1, 33, 47), samples=2)
    x, dx = network.inputs(2)
    truth, _, _ = dual_oracle.oracle(network, x, dx)
    assert_layers(ff.propagate(network.make(), x, dx), truth, EXACT)
    seen = ff.propagate(network.make(torch.float32), x.float(), dx.float())
    assert_layers(seen, truth, SINGLE)


@pytest.mark.parametrize("name", ["resnet18", "unet", "mobilenet"])
def test_channels_last(name):
    """Catches kernels that take the memory format of the input for the contiguous one."""
    network = NETWORKS[name]
    x, dx = network.inputs()
    truth, _, _ = dual_oracle.oracle(network, x, dx)
    model = network.make().to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    dx = dx.flatten(0, 1).to(memory_format=torch.channels_last).view(dx.shape)
    assert_layers(ff.propagate(model, x, dx), truth, EXACT)


def test_directions_that_are_views():
    """Catches a buffer that is built from strides: expanded, transposed and sliced arguments."""
    network = NETWORKS["lenet"]
    x, dx = network.inputs()
    views = (
        (x.mT.contiguous().mT, dx[:1].expand(3, *x.shape)),
        (
            torch.cat([x, x], -1)[..., :16],
            dx.permute(2, 0, 1, 4, 3).contiguous().permute(1, 2, 0, 4, 3),
        ),
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


def test_layers_hold_what_they_were_before_the_next_one_wrote_over_them():
    """Catches a layer that is handed out without a copy before an in-place activation."""
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Tanh()).double()
    x, dx = Network(lambda: model, (5,)).inputs()
    seen = ff.propagate(model, x, dx)
    with torch.no_grad():
        assert distance(seen["0"][0], model[0](x)) <= EXACT
        assert distance(seen["0"][1], dx @ model[0].weight.T) <= EXACT
    assert (seen["0"][0] < 0).any()


# --- how much by rule ---


@pytest.fixture(scope="module")
def coverages() -> dict[str, Any]:
    """Of all networks, with random directions."""
    return {
        name: ff.dual.coverage(network.make(), network.inputs()[0])
        for name, network in NETWORKS.items()
    }


def test_at_least_95_percent_of_the_operations_run_by_rule(coverages):
    """Catches operations that slip from the rules to the fallback; the share is in the output."""
    by_rule = sum(sum(each.rules.values()) for each in coverages.values())
    by_fallback = sum(sum(each.fallbacks.values()) for each in coverages.values())
    share = by_rule / (by_rule + by_fallback)
    print(f"{share:.4f} of {by_rule + by_fallback} operations by rule")
    print({name: dict(each.fallbacks) for name, each in coverages.items() if each.fallbacks})
    assert not {name: each.failures for name, each in coverages.items() if each.failures}
    assert share >= 0.95


@pytest.mark.parametrize("name", NETWORKS)
def test_share_is_that_of_the_counts(coverages, name):
    """Catches counts and share that tell different stories, and an empty count."""
    coverage = coverages[name]
    counts = [
        sum(each.values()) for each in (coverage.rules, coverage.fallbacks, coverage.failures)
    ]
    assert counts[0] > 0
    assert coverage.share == pytest.approx(counts[0] / sum(counts), abs=1e-12)


class Mixed(nn.Module):
    """A layer by rule, one by the fallback, one that has no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.curious = Function(lambda x: torch.polygamma(1, x.abs() + 1))
        self.impossible = Function(lambda x: torch.special.zeta(x.abs() + 2, x.abs() + 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.impossible(self.curious(self.linear(x))) * 2


def test_coverage_reports_and_does_not_raise():
    """Catches a report that fails where it is needed, or that names no layer."""
    model = seeded(Mixed)
    x = torch.rand(3, 5)
    with untouched(model):
        coverage = ff.dual.coverage(model, x, torch.rand(2, 3, 5))
    assert any("polygamma" in operation for operation in coverage.fallbacks)
    assert any("zeta" in operation for operation in coverage.failures)
    assert 0 < coverage.share < 1
    lines = str(coverage).splitlines()
    for operation, way, layer in (
        ("polygamma", "fallback", "curious"),
        ("zeta", "failed", "impossible"),
        ("mm", "rule", "linear"),
    ):
        line = next(line for line in lines if operation in line)
        assert way in line
        assert layer in line


# --- attention ---


def test_fused_attention_that_forward_mode_refuses():
    """PyTorch has no forward derivative of its fused attention: there it raises, ours does not."""
    network = ATTENTION["attention"]
    x, dx = network.inputs()
    truth, _, _ = dual_oracle.oracle(network, x, dx)
    model = network.make()
    level = torch.autograd.forward_ad.dual_level()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad(), level:
        dual = torch.autograd.forward_ad.make_dual(x, dx[0])
        with pytest.raises(NotImplementedError, match=r"forward AD.*flash_attention"):
            F.scaled_dot_product_attention(dual, dual, dual)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert_layers(ff.propagate(model, x, dx), truth, EXACT)


@pytest.mark.parametrize("name", ["plain", "causal", "kept"])
def test_long_attention(name):
    """Catches blocks of queries that are put together wrongly: 150 queries to 700 keys."""
    options: dict[str, Any] = {"causal": {"is_causal": True}, "kept": {"attn_mask": _bands()}}

    def forward(x: Tensor) -> Tensor:
        chosen = dict(options.get(name, {}))
        if "attn_mask" in chosen:
            chosen["attn_mask"] = chosen["attn_mask"][: len(x)]
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


def test_large_logits():
    """Catches a softmax without its maximum taken out: logits of some 1000 overflow."""
    network = Network(
        lambda: Function(lambda x: F.scaled_dot_product_attention(20 * x, 20 * x, x)), (6, 4)
    )
    x, dx = network.inputs()
    truth, _, _ = dual_oracle.oracle(network, x, dx)
    assert_layers(ff.propagate(network.make(), x, dx), truth, EXACT)


# --- the dual tensor ---


def test_dual_tensor_is_the_stack_of_its_parts():
    """Catches parts in another order, and a shape that shows the stack to the model."""
    x, dx = torch.randn(2, 5), torch.randn(3, 2, 5)
    dual = ff.dual.DualTensor.pack(x, dx)
    assert torch.equal(dual.primal, x)
    assert torch.equal(dual.tangents, dx)
    assert torch.equal(dual.stack, torch.cat([x[None], dx]))
    assert (dual.shape, dual.dtype, dual.ndim, len(dual)) == (x.shape, x.dtype, 2, 2)
    assert (dual.numel(), dual.size(-1), dual.requires_grad) == (10, 5, False)


class Pair(NamedTuple):
    """A named tuple of outputs."""

    mean: Tensor
    scale: Tensor


def test_structures_of_outputs_stay():
    """Catches lists, tuples, dicts and named tuples that come back as something else."""
    x, dx = torch.randn(2, 5), torch.randn(3, 2, 5)
    for structure in (
        lambda x: (x + 1, [x * 2, (x.exp(),)]),
        lambda x: {"a": {"b": x + 1}, "c": [x]},
        lambda x: Pair(x + 1, x.exp()),
        lambda x: [Pair(x, x[:, 0])],
    ):
        y, dy = ff.jvp(Function(structure), x, dx)
        expected = structure(x)
        map_tensors(lambda seen, truth: _same(seen, truth, 1e-6), y, expected)
        map_tensors(lambda seen, truth: _shaped(seen, (3, *truth.shape)), dy, expected)
        assert type(y) is type(dy) is type(expected)


def _shaped(seen: Tensor, shape: tuple[int, ...]) -> None:
    assert seen.shape == shape


def test_dual_tensor_through_operators():
    """Catches operators that leave the dual world, or enter it from a constant wrongly."""
    x, dx = torch.randn(2, 5).double(), torch.randn(3, 2, 5).double()
    dual = ff.dual.DualTensor.pack(x, dx)
    y = 2 - torch.ones(5).double() * dual.exp() / 3
    assert isinstance(y, ff.dual.DualTensor)
    assert distance(y.primal, 2 - x.exp() / 3) <= EXACT
    assert distance(y.tangents, -dx * x.exp() / 3) <= EXACT


def test_comparisons_and_indices_are_plain():
    """Catches duals of booleans and integers, which have no derivative."""
    dual = ff.dual.DualTensor.pack(torch.randn(2, 5), torch.randn(3, 2, 5))
    for plain in (dual > 0, dual.argmax(-1), dual.sort(1).indices, dual.isnan(), dual.long()):
        assert type(plain) is torch.Tensor
        assert not plain.is_floating_point()
    assert dual.max(1).indices.shape == (2,)
