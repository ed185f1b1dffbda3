"""Cuts, chains, copies and sums of networks with branches, against replaced activations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.networks_branching import NETWORKS, ResNet18, randomised, with_dead_paths
from support.networks_zoo import DTHETA, WIDTH, Written, measure, samples, seeded
from torch import Tensor, nn

import fisherfast as ff
from fisherfast.model.graph import merged, survey
from fisherfast.model.isolation import evaluation
from fisherfast.model.paths import follow
from fisherfast.model.sites import Site

SAME = 1e-4
"""Relative difference of equal outputs; rounding is 1e-6, one path past a layer 1e-2 or more."""


def pictures(n: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def sites_of(model: nn.Module, x: Tensor) -> dict[str, Site]:
    with evaluation(model, seed=0):
        sites = survey(model, x)
        follow(model, x, sites)
    return {site.name: site for site in sites}


def run(model: nn.Module, x: Tensor, call: tuple[nn.Module, int] | None = None, put: object = None):
    """The output, and that of one call of a module, which `put` replaces. Hooks of torch only."""
    if call is None:
        return model(x), None
    seen: list[object] = []

    def hook(module: nn.Module, args: object, output: object) -> object:
        seen.append(copy.deepcopy(output))
        return put if put is not None and len(seen) == call[1] else None

    handle = call[0].register_forward_hook(hook)
    try:
        return model(x), seen[call[1] - 1]
    finally:
        handle.remove()


def is_cut(model: nn.Module, name: str) -> bool:
    """Whether the output is that of other samples if the activations of this layer are."""
    module, _, number = name.split("[")[0].partition("#")
    call = model.get_submodule(module), int(number or 1)
    x, other = pictures(seed=1), pictures(seed=2)
    with torch.no_grad():
        expected, activations = run(model, x, call)
        found, _ = run(model, other, call, copy.deepcopy(activations))
    return bool((found - expected).abs().max() < SAME * expected.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_cuts_are_those_of_replaced_activations(name):
    """Catches cuts by the order of execution, past a skip, a concatenation, a class token, a second
    call, or two branches side by side; and cuts by values: dead paths change nothing. None may be
    wrong, none of these is missed."""
    model = randomised(seeded(NETWORKS[name])).eval()
    sites = sites_of(model, pictures())
    found = {each: site.cut for each, site in sites.items()}
    modules = [each for each, site in sites.items() if site.module is not None]
    expected = {each: is_cut(model, each) for each in modules if each != "output"}
    assert {each: found[each] for each in expected} == expected
    assert found["input"]
    assert found["output"]
    assert {True, False} == set(expected.values())
    dead = sites_of(with_dead_paths(copy.deepcopy(model)), pictures())
    assert {each: site.cut for each, site in dead.items()} == found
    assert {each: site.descendants for each, site in dead.items()} == {
        each: site.descendants for each, site in sites.items()
    }


def around(function, **parts: object) -> nn.Module:
    return seeded(lambda: Written(function, fc=nn.Linear(WIDTH, WIDTH), **parts))


def by_number(m: nn.Module, x: Tensor) -> Tensor:
    """The largest value of the input goes around the layer as a Python number."""
    return m.fc(x) * x.max().item()


def by_list(m: nn.Module, x: Tensor) -> Tensor:
    return m.fc(x) + torch.tensor(x.tolist())


def by_numpy(m: nn.Module, x: Tensor) -> Tensor:
    return m.fc(x) + torch.from_numpy(x.numpy() * 2)


def by_branch(m: nn.Module, x: Tensor) -> Tensor:
    """Two results of the layer, between which the input chooses."""
    y = m.fc(x)
    one, other = 2 * y, y.tanh()
    return one if x.sum() > 0 else other


def by_buffer(m: nn.Module, x: Tensor) -> Tensor:
    """The skip is written into memory that the layer filled."""
    y = m.fc(x).clone()
    y[:, :2] += x[:, :2]
    return y


def by_mask(m: nn.Module, x: Tensor) -> Tensor:
    return torch.where(x > 0, m.fc(x), 0.0)


def by_noise(m: nn.Module, x: Tensor) -> Tensor:
    """Noise that is added before the layer and taken away after it."""
    noise = torch.randn_like(x)
    return m.fc(x + noise) - noise


@pytest.mark.parametrize(
    "function", [by_number, by_list, by_numpy, by_branch, by_buffer, by_mask, by_noise]
)
def test_ways_around_a_layer(function):
    """Catches a path by values that leave torch, by control flow, by memory, by a mask or by noise
    that is used twice. The branches differ with the sign of the sum."""
    x = torch.rand(8, WIDTH)
    for signed in (x, -x):
        found = sites_of(around(function), signed)
        assert found["fc"].cut is False
        assert found["input"].cut


def by_shape(m: nn.Module, x: Tensor) -> Tensor:
    """Reads the shape of the input, and memory that the layer alone fills; draws nothing."""
    y = torch.zeros_like(x)
    y[:] = F.dropout(m.fc(x), training=False)
    return y + x.new_ones(len(x), WIDTH)


def test_what_is_no_way_around_a_layer():
    """Catches a cut that is lost to a shape, a buffer, or dropout that draws nothing."""
    assert sites_of(around(by_shape), torch.randn(8, WIDTH))["fc"].cut


# --- copies ---


def scaled(scale: float = 2.0, shift: float = 0.5) -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.scale(m.fc(x)).relu())

    layer = Written(lambda m, x: x * m.by + m.shift, by=torch.full((4,), scale), shift=shift)
    parts = {"fc": nn.Linear(WIDTH, 4), "scale": layer, "out": nn.Linear(4, 2)}
    return seeded(lambda: Written(forward, **parts))


def normalised(norm: nn.Module) -> nn.Module:
    """A convolution and what follows it."""
    layers = nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), norm, nn.ReLU(), nn.Flatten()
    return seeded(lambda: nn.Sequential(*layers, nn.Linear(8, 2)))


def batch_norm(*, weight: float = 1.0, bias: float = 0.0, **options) -> nn.Module:
    norm = nn.BatchNorm2d(4, **options)
    if norm.affine:
        nn.init.constant_(norm.weight[:1], weight)
        nn.init.constant_(norm.bias[:1], bias)
    return norm


@pytest.mark.parametrize(
    ("model", "name", "copies"),
    [
        (scaled(), "fc", ["scale"]),
        (scaled(scale=0.0), "fc", []),
        (scaled(scale=float("inf")), "fc", []),
        (scaled(shift=1e6), "fc", []),
        (normalised(batch_norm()), "1", ["2"]),
        (normalised(batch_norm(affine=False)), "1", ["2"]),
        (normalised(batch_norm(weight=0.0)), "1", []),
        (normalised(batch_norm(weight=1e-9, bias=1.0)), "1", []),
        (normalised(batch_norm(track_running_stats=False)), "1", []),
        (normalised(nn.InstanceNorm2d(4, track_running_stats=True)), "1", ["2"]),
        (normalised(nn.InstanceNorm2d(4)), "1", []),
        (normalised(nn.GroupNorm(2, 4)), "1", []),
        (normalised(nn.LayerNorm([4, 1, 2])), "1", []),
        (normalised(nn.Hardtanh(-1e9, 1e9)), "1", []),
    ],
)
def test_copies(model, name, copies):
    """Catches a scale of zero, one that leaves nothing above the rounding of a shift, batch
    statistics, norms by sample, and an activation that is linear on these samples."""
    sites = list(sites_of(model, torch.randn(8, WIDTH)).values())
    found = {site.name: site for site in merged(sites, lambda *_: False)}
    assert found[name].copies == copies
    assert all(each in found[name].aliases for each in copies)
    assert all(each not in found for each in copies)


def test_a_copy_is_measured_with_its_original():
    """One row; J of the copy is that of the layer before, as if it were measured itself. Catches a
    name that is lost, and chains that end at the copy."""
    model = normalised(batch_norm(weight=-3.0))
    flow = measure(model)
    assert flow.names == ["input", "1", "3", "output"]
    assert flow["2"] is flow["1"]
    assert flow["1"].copies == ("2",)
    assert set(flow["1"].descendants) == {"3", "output"}
    with torch.no_grad():
        data = ff.FiniteDifference(*(model[:3].eval()(x) for x in samples()), DTHETA)
    truth = ff.fisher_information(data, max_features=16).linear
    torch.testing.assert_close(flow["2"].linear, truth, rtol=1e-3, atol=1e-3)
    assert "1 = 2" in str(flow)


def test_a_scale_that_becomes_zero_between_measurements():
    """Catches J of a layer that is said to be that of the layer before, which no longer holds; and
    rows that come and go when a scale moves away from zero."""
    for first, second, rows in ((1.0, 0.0, [4, 5, 5]), (0.0, 1.0, [5, 5, 5])):
        model = normalised(batch_norm(weight=first))
        x = samples()[0]
        monitor = ff.FisherMonitor(model, ff.Pathwise(x, torch.ones_like(x)), max_features=16)
        found = [len(monitor.step().flow)]
        nn.init.constant_(model[2].weight, second)
        found += [len(monitor.step().flow), len(monitor.step().flow)]
        assert found == rows
        assert monitor.history[-1].flow["2"].J.any() == bool(second)


def test_outputs_are_measured_themselves():
    """Catches an output that is a second name of the layer before: its unit is that of theta."""
    model = normalised(batch_norm())
    assert measure(nn.Sequential(*model[:3])).names == ["input", "1", "output"]


# --- sums and choices ---


def test_sums_are_named_by_their_block_or_what_they_add_up():
    """Catches "relu#2" in a table, and a name that `flow[...]` does not know."""
    sites = sites_of(randomised(seeded(ResNet18)), pictures())
    assert sites["layer1.0.relu#2"].label == "layer1.0 (sum)"
    assert sites["layer1.0.relu"].label == "layer1.0.relu"
    found = sites_of(seeded(NETWORKS["two branches"]), pictures())
    assert [found[name].label for name in ("left", "act", "act#2")] == [
        "left",
        "left + right (sum)",
        "inner + act (sum)",
    ]


def test_cuts_of_resnet18():
    """At most 12 rows: one per stage, what the next layer with weights reads."""
    model = randomised(seeded(ResNet18)).eval()
    x = pictures(200)
    data = ff.Pathwise(x, torch.ones_like(x))
    flow = ff.fisher_flow(model, data, layers="cuts", max_features=16)
    blocks = [f"layer{stage}.{block}.relu#2" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert flow.names == ["input", "maxpool", *blocks[:-1], "avgpool", "output"]
    assert all(layer.cut for layer in flow)
    assert flow["layer1.0"].label == "layer1.0 (sum)"
    assert flow["layer1.0 (sum)"] is flow["layer1.0"]


def test_cuts_of_propagate():
    """Catches `layers="cuts"` that only a measurement knows."""
    model = seeded(NETWORKS["two branches"])
    x = pictures()
    assert list(ff.propagate(model, x, torch.ones_like(x)[None], layers="cuts")) == [
        "input",
        "stem",
        "act",
        "act#2",
        "output",
    ]


def test_cuts_that_are_unknown():
    """Catches a guess where no single output is known."""
    model = around(lambda m, x: m.fc(x).mean())
    assert all(site.cut is None for site in sites_of(model, torch.randn(8, WIDTH)).values())
    with pytest.raises(ValueError, match='got "cuts": its operations could not be'):
        measure(model, layers="cuts")
