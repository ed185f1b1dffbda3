"""Measured inside of what others wrap around a network: compilers, processes, precisions, layouts.

Wherever the arithmetic is the same, J must be that of the plain network bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from integrations.wrapped_case import DATA, OPTIONS, Net, X, assert_same, hooks, network, plain_flow
from support.networks_zoo import untouched
from torch import nn
from torch._dynamo.testing import CompileCounter

import fisherfast as ff
from fisherfast.model import unwrap


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_place(backend: Any) -> nn.Module:
    model = network()
    model.compile(backend=backend)
    return model


def forward_compiled(backend: Any) -> nn.Module:
    class Compiled(Net):
        forward = torch.compile(Net.forward, backend=backend)

    return Compiled()


def wrapped(backend: Any) -> nn.Module:
    return torch.compile(network(), backend=backend)


COMPILED = {
    "wrapped": wrapped,
    "in place": in_place,
    "part wrapped": lambda backend: nn.Sequential(wrapped(backend), nn.Linear(2, 2)),
    "part in place": lambda backend: nn.Sequential(in_place(backend), nn.Linear(2, 2)),
    "forward": forward_compiled,
}


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_models_are_not_compiled_again(kind):
    """Catches hooks and modes that are compiled into a model, or that make it compile anew at the
    next training step; `fisher_flow`, `step` and `observe` between two steps of a training."""
    counter = CompileCounter()
    model = COMPILED[kind](counter)
    theta = torch.linspace(-1, 1, 400)

    def train_step() -> None:
        model.zero_grad()
        model(X[0]).square().mean().backward()

    train_step()
    train_step()
    compiled = counter.frame_count
    assert compiled > 0
    tangents = ff.Pathwise(X[0], torch.ones_like(X[0]))
    flows = [ff.fisher_flow(model, data, **OPTIONS) for data in (DATA, tangents)]
    monitor = ff.FisherMonitor(model, DATA, observe_every=2, **OPTIONS)
    for _ in range(2):
        train_step()
        monitor.observe(theta)
        train_step()
        monitor.observe(theta)
        monitor.step()
    monitor.close()
    train_step()
    assert counter.frame_count == compiled
    assert not torch._dynamo.utils.counters["graph_break"]
    assert hooks(model) == 0
    assert not any("_orig_mod" in name for name in flows[0].names)
    assert all("fc1/relu" in "|".join(flow.names) for flow in flows)


@pytest.mark.parametrize("make", [wrapped, in_place])
def test_compiled_models_give_the_same_and_are_observed(make):
    """Catches other numbers or names than those of the plain network; and an observer that a
    compiled call passes by, or that stays around it."""
    model = make("eager")
    assert_same(ff.fisher_flow(model, DATA, **OPTIONS), plain_flow())
    call = model._compiled_call_impl
    monitor = ff.FisherMonitor(model, DATA, observe_every=1, **OPTIONS)
    theta = torch.linspace(-1, 1, 400)
    for _ in range(4):
        model(X[0] + theta[:, None])
        monitor.observe(theta)
    assert list(monitor.live()) == ["input", "output"]
    monitor.close()
    assert model._compiled_call_impl is call


def test_a_compiled_training_step_is_not_compiled_again():
    """Catches an observer that is compiled into a step that holds the model, or breaks it."""
    counter = CompileCounter()
    model = network()
    step = torch.compile(lambda batch: model(batch).square().mean(), backend=counter)
    monitor = ff.FisherMonitor(model, DATA, observe_every=2, **OPTIONS)
    step(X[0]).backward()
    for _ in range(4):
        monitor.observe(torch.linspace(-1, 1, 400))
        step(X[0]).backward()
    monitor.step()
    monitor.close()
    step(X[0]).backward()
    assert counter.frame_count == 1


def test_jvp_of_a_compiled_model():
    """Catches dual tensors in a compiler."""
    counter = CompileCounter()
    model, x = wrapped(counter), X[0]
    dx = torch.ones(1, *x.shape)
    for one, other in zip(ff.jvp(model, x, dx), ff.jvp(network(), x, dx), strict=True):
        assert torch.equal(one, other)
    assert list(ff.propagate(model, x, dx)) == list(ff.propagate(network(), x, dx))
    assert counter.frame_count == 0


def test_the_compiler_comes_back_after_an_error():
    """Catches a compiler that stays switched off: only the speed would show it."""
    counter = CompileCounter()
    model = wrapped(counter)
    broken = X.clone()
    broken[0, 3, 2] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        ff.fisher_flow(model, ff.FiniteDifference(*broken, 0.1), **OPTIONS)
    model(X[0])
    assert counter.frame_count == 1


def test_data_parallel_and_averaged_models():
    """Catches names and numbers that are not those inside; an average is measured with its own
    weights, not those it averages; a module whose own name looks like a wrapper's is cut."""
    model = network()
    assert_same(ff.fisher_flow(nn.DataParallel(model), DATA, **OPTIONS), plain_flow())
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        model.fc1.weight.mul_(3)
    flow = ff.fisher_flow(average, DATA, **OPTIONS)
    assert flow.names == ["input", "module.fc1", "module.fc1/relu", "output"]
    assert torch.equal(flow["output"].J, plain_flow()["output"].J)
    assert unwrap.name_inside("_fsdp_wrapped_module.a._orig_mod.b") == "a.b"
    assert unwrap.name_inside("my_orig_mod.b") == "my_orig_mod.b"


def test_autocast_is_the_callers_and_statistics_are_not():
    """Catches activations in float32 inside of autocast, statistics in bfloat16 (three digits: J of
    the input would differ), and parameters or state of autocast that change."""
    model, data = network(), DATA
    monitor = ff.FisherMonitor(model, data, **OPTIONS)
    outside = monitor.step().flow
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = monitor.step().flow
        assert torch.is_autocast_enabled("cpu")
        assert model(X[0]).dtype == torch.bfloat16
    assert_same(monitor.step().flow, outside)
    by_hand = network().bfloat16()
    expected = ff.fisher_flow(by_hand, data, **OPTIONS)
    assert torch.equal(inside["input"].J, outside["input"].J)
    assert not torch.equal(inside["fc1"].J, outside["fc1"].J)
    # Weights and samples are rounded alike; float32 is 5e-3 of the standard error away: J itself is
    # within a quarter of its error of zero here.
    for name in ("fc1", "output"):
        error = 1e-2 * float(outside[name].stderr)
        torch.testing.assert_close(inside[name].J, expected[name].J, rtol=0, atol=error)
        torch.testing.assert_close(inside[name].J, outside[name].J, rtol=0, atol=error)
        assert inside[name].J.dtype == torch.float64
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 2e-2)]
)
def test_models_of_other_precision(dtype, tolerance):
    """Catches samples that are not given in the model's precision, and statistics in it. Seen:
    1e-6, 1e-3 and 3e-3, relative."""
    flow = ff.fisher_flow(network().to(dtype), DATA, **OPTIONS)
    for layer, other in zip(flow, plain_flow(), strict=True):
        torch.testing.assert_close(layer.J, other.J, rtol=tolerance, atol=tolerance)
        assert layer.J.dtype == torch.float64


@pytest.mark.parametrize("places", [(0, 1), (1,)], ids=["both", "plus"])
def test_channels_last(places):
    """Catches activations whose memory is read in the wrong order: J is that of the contiguous
    network. float32 convolutions differ by 2e-5 of J, seen; 1e-3 allowed."""
    torch.manual_seed(2)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head)
    x = torch.randn(2, 300, 3, 6, 6)
    sides = [x[0] - 0.02, x[1] + 0.02]
    plain = ff.fisher_flow(model, ff.FiniteDifference(*sides, 0.04), max_features=64)
    for place in places:
        sides[place] = sides[place].to(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    flow = ff.fisher_flow(model, ff.FiniteDifference(*sides, 0.04), max_features=64)
    for layer, other in zip(flow, plain, strict=True):
        torch.testing.assert_close(layer.J, other.J, rtol=1e-3, atol=1e-3)


def test_models_without_numbers():
    """Catches torch's own error about tensors that have no items."""
    message = r"model must hold numbers, got 'fc1.weight' on the meta device: .*to_empty"
    with pytest.raises(ValueError, match=message):
        ff.fisher_flow(network().to("meta"), DATA, **OPTIONS)
    monitor = ff.FisherMonitor(network().to("meta"), DATA, **OPTIONS)
    with pytest.raises(ValueError, match=message):
        monitor.step()


def shared() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


UNUSUAL = {
    "lazy": lambda: nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(2)),
    "shared": shared,
    "frozen": lambda: network().requires_grad_(False),
    "made in inference mode": torch.inference_mode()(network),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_parameters_stay_as_they_are(kind):
    """Catches a measurement that unties, copies, unfreezes or fails on them; a monitor measures
    twice the same, and its state loads into another one."""
    model = UNUSUAL[kind]()
    monitor, again = (ff.FisherMonitor(model, DATA, **OPTIONS) for _ in range(2))
    first = monitor.step().flow  # makes lazy parameters
    with untouched(model):
        assert_same(monitor.step().flow, first)
        again.load_state_dict(monitor.state_dict())
        assert_same(again.step().flow, first)


def test_inference_mode_around_it():
    """Catches inference tensors that the monitor keeps and cannot use outside; data made inside."""
    with torch.inference_mode():
        data = ff.FiniteDifference(X[0] - 0.05, X[1] + 0.05, 0.1)
        monitor = ff.FisherMonitor(network(), data, **OPTIONS)
        monitor.step()
        assert torch.is_inference_mode_enabled()
    assert_same(monitor.step().flow, plain_flow())
    with torch.inference_mode():
        assert_same(monitor.step().flow, plain_flow())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_models_on_a_gpu():
    """Catches samples that are not brought to the model, and results that stay there."""
    model = network().cuda()
    flow = ff.fisher_flow(torch.compile(model, backend="eager"), DATA, **OPTIONS)
    for layer, other in zip(flow, plain_flow(), strict=True):
        torch.testing.assert_close(layer.J, other.J, rtol=1e-3, atol=1e-3)
