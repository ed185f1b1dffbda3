"""Exact derivatives leave what is the user's as it was, and depend on their arguments alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support import dual_oracle
from support.dual_oracle import Function, distance, map_tensors
from support.dual_zoo import NETWORKS
from support.networks_zoo import Failing, seeded, untouched
from torch import Tensor, nn

import fisherfast as ff

EXACT = 1e-8
"""In float64: the same derivative, another order of sums."""

SINGLE = 1e-4
"""float32 against float64."""


@pytest.mark.parametrize(
    ("name", "training"),
    [("resnet", False), ("resnet", True), ("vit", True), ("encoder_causal", True), ("rnn", True)],
)
def test_model_and_process_are_untouched(name, training):
    """Catches modes, running statistics, hooks, random states, dtype or fast path that change; and
    a model that runs in its training mode."""
    network = NETWORKS[name]
    model = network.make(torch.float32).train(training)
    x, dx = (t.float() for t in network.inputs())
    before = x.clone(), dx.clone()
    with untouched(model):
        y, dy = ff.jvp(model, x, dx)
        layers = ff.propagate(model, x, dx)
        ff.dual.coverage(model, x)
    assert torch.equal(x, before[0])
    assert torch.equal(dx, before[1])
    with torch.no_grad():
        expected = dual_oracle.run(model, x, torch.clone)[0]
    for seen, truth in zip(_leaves(y), _leaves(expected), strict=True):
        assert distance(seen.double(), truth.double()) <= SINGLE
    for tensor in [*_leaves(y), *_leaves(dy), *(t for pair in layers.values() for t in pair)]:
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
        assert not tensor.is_inference()


def _leaves(structure: Any) -> list[Tensor]:
    leaves: list[Tensor] = []
    map_tensors(leaves.append, structure)
    return leaves


IN_PLACE_FIRST: dict[str, Any] = {
    "sequential": lambda: nn.Sequential(nn.Hardswish(inplace=True), nn.Linear(5, 2)),
    "write": lambda: Function(lambda x: x.mul_(2).add_(1)),
    "fill": lambda: Function(lambda x: x[:, 0].zero_() + x.sum(1)),
    "identity": nn.Identity,
    "view": lambda: Function(lambda x: x.view(-1, 5, 1).transpose(1, 2)),
}


@pytest.mark.parametrize("name", IN_PLACE_FIRST)
def test_arguments_are_not_written_and_not_handed_out(name):
    """Catches an in-place first layer that writes into x or dx, and results that are their views:
    a caller who writes into a result must not change the data."""
    model = seeded(IN_PLACE_FIRST[name])
    for contiguous in (True, False):
        x, dx = torch.randn(4, 10)[:, ::2], torch.randn(3, 4, 10)[..., ::2]
        if contiguous:
            x, dx = x.contiguous(), dx.contiguous()
        before = x.clone(), dx.clone()
        results = [*ff.jvp(model, x, dx)]
        for pair in ff.propagate(model, x, dx).values():
            results += pair
        for result in results:
            result.fill_(float("nan"))
        assert torch.equal(x, before[0])
        assert torch.equal(dx, before[1])


def test_arguments_that_require_gradients():
    """Catches a graph that hangs on the arguments, or gradients that are written into them."""
    x = torch.randn(4, 5, requires_grad=True)
    dx = torch.randn(2, 4, 5, requires_grad=True)
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 3), nn.ReLU(inplace=True)))
    for tensor in ff.jvp(model, x, dx):
        assert not tensor.requires_grad
    assert x.requires_grad
    assert dx.requires_grad
    assert x.grad is None
    assert dx.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_under_any_gradient_mode(mode):
    """Catches results that depend on the mode of the caller, or a mode that is not put back."""
    network = NETWORKS["vit"]
    model = network.make()
    x, dx = network.inputs()
    expected = ff.jvp(model, x, dx)
    with mode():
        flags = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        y, dy = ff.jvp(model, x.clone(), dx.clone())
        assert flags == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert torch.equal(y, expected[0])
    assert torch.equal(dy, expected[1])


def test_default_dtype_of_the_user():
    """Catches constants that are made in the default dtype."""
    network = NETWORKS["encoder_causal"]
    x, dx = network.inputs()
    model = network.make()
    expected = ff.jvp(model, x, dx)
    torch.set_default_dtype(torch.float64)
    try:
        seen = ff.jvp(model, x, dx)
        assert torch.get_default_dtype() == torch.float64
        single = ff.jvp(network.make(torch.float32), x.float(), dx.float())
    finally:
        torch.set_default_dtype(torch.float32)
    for result, truth, short in zip(seen, expected, single, strict=True):
        assert torch.equal(result, truth)
        assert short.dtype == torch.float32


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (ff.jvp, KeyboardInterrupt()),
        (ff.propagate, ValueError("in the model")),
        (ff.dual.coverage, KeyboardInterrupt()),
    ],
)
def test_untouched_after_an_error(function, error):
    """Catches hooks, modes and statistics that stay behind when the model raises; and an error that
    is swallowed or turned into another."""
    model = seeded(lambda: Failing(error))
    model.norm.eval()
    x, dx = torch.randn(3, 6), torch.randn(2, 3, 6)
    model.seen = 0
    with untouched(model), pytest.raises(type(error)) as raised:
        function(model, x, dx)
    assert raised.value is error
    assert torch.ones(1, requires_grad=True).mul(2).requires_grad  # autograd works again
    assert type(torch.zeros(1)) is torch.Tensor  # and factories make plain tensors
    assert torch._C._len_torch_dispatch_stack() == 0


def test_hooks_of_the_user_run():
    """Catches hooks that are skipped: a hook that changes the output is a part of the model."""
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh())).double()
    x, dx = torch.randn(3, 5).double(), torch.randn(2, 3, 5).double()
    handle = model[0].register_forward_hook(lambda module, args, output: output * 3)
    try:
        y, dy = ff.jvp(model, x, dx)
    finally:
        handle.remove()
    with torch.no_grad():
        z = 3 * model[0](x)
        assert distance(y, z.tanh()) <= EXACT
        assert distance(dy, 3 * (dx @ model[0].weight.T) * (1 - z.tanh() ** 2)) <= EXACT


class Remembering(nn.Module):
    """Counts its calls, keeps a moving mean, a cache, its last input and a list of states."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(5))
        self.cache: Tensor | None = None
        self.states: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.ones(5, dtype=x.dtype)
        self.calls += 1
        self.mean = 0.9 * self.mean + x.mean(0)
        self.last = x
        self.states = [*self.states, x[:1]]
        return self.linear(x) * self.cache + self.mean


def _samples(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 5, generator=generator), torch.randn(2, n, 5, generator=generator)


def _flow(model: nn.Module) -> Any:
    x, dx = _samples(400)
    data = ff.Pathwise(x, dx.movedim(0, 1))
    return ff.fisher_flow(model, data, max_features=8, settings=ff.Settings(batch_size=150))


def _acts(function: Any) -> Any:
    return lambda model: function(model, *_samples(40))


CALLS = {"jvp": _acts(ff.jvp), "propagate": _acts(ff.propagate), "flow": _flow}


@pytest.mark.filterwarnings("ignore:neighbouring samples")  # the moving mean joins them
@pytest.mark.parametrize("call", CALLS)
def test_what_a_model_remembers(call):
    """Catches buffers that count the measurement's calls, and dual tensors that stay in the model:
    the next plain call would return them."""
    model = seeded(Remembering)
    with untouched(model):
        CALLS[call](model)
    kept = [*vars(model).values(), *model.buffers(), *model.states]
    assert not any(isinstance(item, ff.dual.DualTensor) for item in kept)
    assert type(model(torch.randn(3, 5))) is Tensor


@pytest.mark.parametrize("call", ["jvp", "propagate"])
def test_parameters_without_a_shape(call):
    """Catches lazy parameters that are made of dual tensors: torch crashes on them."""
    with pytest.raises(ValueError, match=r"'0\.weight' without a shape: run the model once"):
        CALLS[call](nn.Sequential(nn.LazyLinear(3)))


def test_threads_take_turns():
    """Catches two threads that borrow the mode of one model from each other: it came back in eval
    mode, with running statistics of a training step."""
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()).train()
    x, dx = torch.randn(256, 64), torch.randn(2, 256, 64)
    expected = ff.jvp(model, x, dx)[1]
    results: list[Any] = []

    def work() -> None:
        for _ in range(8):
            try:
                results.append(ff.jvp(model, x, dx)[1])
            except RuntimeError as error:
                results.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    with untouched(model):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 24
    for result in results:
        torch.testing.assert_close(result, expected, rtol=SINGLE, atol=SINGLE)
