"""What is the user's stays as it is: weights, gradients, modes, hooks, random numbers, defaults."""

from __future__ import annotations

import contextlib
import copy
import operator
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.networks_zoo import untouched
from support.pairwise import pairwise
from support.parameters_oracle import brute_force
from support.parameters_small import CATEGORICAL, difference, labels, measure
from support.parameters_zoo import NETWORKS, Network, Written, linear
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fisherfast import parameters as fp
from fisherfast.parameters.fisher import ACCUMULATORS, FISHER_TYPES

ROUNDING = 1e-12
"""Relative to the largest entry; measured: below 2e-15."""

SAMPLES = 20
DENSE = Network(linear, (4,))
X, Y = DENSE.inputs(SAMPLES, torch.float32), labels(SAMPLES)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # of torch, on copies


def with_gradients(network: Network = DENSE) -> nn.Module:
    """A network in the middle of its training, with hooks and modes of its own."""
    model = network.make(torch.float32)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    model.register_forward_hook(lambda module, args, output: None)
    return model


@pairwise(structure=list(ACCUMULATORS), fisher_type=list(FISHER_TYPES), source=["x", "set", "mix"])
def test_a_measurement_touches_nothing(structure: str, fisher_type: str, source: str) -> None:
    """Gradients left in .grad, random numbers taken (a DataLoader that shuffles takes some), modes,
    hooks and defaults that stay, parameters that move."""
    model, x = with_gradients(), X.clone().requires_grad_()
    model[2].train()
    pairs = TensorDataset(X, Y)
    data = {"x": (x, Y), "set": pairs, "mix": DataLoader(pairs, batch_size=6, shuffle=True)}[source]
    versions = [p._version for p in model.parameters()]
    with untouched(model):
        measure(structure, data, fisher_type, model=model, batch_size=8)
    assert x.grad is None
    assert [p._version for p in model.parameters()] == versions


@pytest.mark.parametrize("name", ["LSTM", "batch norm", "tied head", "checkpoint", "transformer"])
def test_no_network_is_touched(name: str) -> None:
    """Weights that a recurrent layer lists, buffers, gradients that are filled or freed: all as
    before, and a training step gives what it gives without."""
    network = NETWORKS[name]
    model, x = with_gradients(network), network.inputs(5, torch.float32)
    other = copy.deepcopy(model)
    with untouched(model):
        measure("block", (x, labels(5)), "empirical", model=model, batch_size=3)
    if name == "LSTM":  # torch.func.functional_call leaves the weights of its call there
        rnn = model.rnn
        assert all(map(operator.is_, rnn._flat_weights, rnn.parameters()))
    for net in (model, other):
        net.zero_grad()
        F.cross_entropy(net(x), labels(5)).backward()
    for here, there in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(here.grad, there.grad)


ANALYSES: dict[str, Callable[[nn.Module], object]] = {
    "unit": lambda model: fp.fisher(model, CATEGORICAL, X).importance(per="unit"),
    "layer": lambda model: fp.fisher(model, CATEGORICAL, X).importance(per="layer"),
    **{s: lambda model, s=s: measure(s, X, "mc", model=model).diag() for s in ACCUMULATORS},
    "spectrum": lambda model: measure("gram", X, model=model).spectrum(3),
    "scores": lambda model: list(fp.score(model, CATEGORICAL, X, Y)),
    "matrix": lambda model: fp.score(model, CATEGORICAL, X, Y).matrix(),
    "mean": lambda model: fp.score(model, CATEGORICAL, X, Y).mean(),
    "test": lambda model: fp.score(model, CATEGORICAL, X, Y).mean_zero_test(directions=2),
    "task": lambda model: fp.ElasticWeightConsolidation(1.0).consolidate(model, CATEGORICAL, X),
}


@pytest.mark.parametrize("analysis", ANALYSES)
def test_an_analysis_touches_nothing(analysis: str) -> None:
    """Gradients left in .grad, random numbers taken, hooks and modes that stay; numbers made on the
    user's default device, where "meta" holds none, or of the default dtype, which is not that of
    the network."""
    model = with_gradients()
    with untouched(model):
        expected = ANALYSES[analysis](model)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        found = ANALYSES[analysis](model)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert repr(found) == repr(expected)


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["forward", "backward", "data"])
def test_an_error_leaves_everything_as_it_was(where: str, error: BaseException) -> None:
    """Hooks, modes and random states that stay when the network, its gradients or the data raise:
    an error of theirs, or Ctrl-C."""

    def fail(*_: object) -> None:
        raise error

    def middle(x: Tensor) -> Tensor:
        if where == "forward":
            fail()
        elif where == "backward" and x.requires_grad:
            x.register_hook(fail)
        return x

    def data() -> Iterator[Tensor]:
        yield X[:10]
        raise error

    model = nn.Sequential(nn.Linear(4, 4), Written(lambda m, x: middle(x)), nn.Linear(4, 3)).eval()
    with untouched(model), pytest.raises(type(error)):
        fp.fisher(model, CATEGORICAL, data(), fisher_type="mc")


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
def test_the_default_device_is_the_users(fisher_type: str) -> None:
    """A network, a source or a likelihood that sees another default than its author."""
    seen = []

    def note(f: Tensor) -> Tensor:
        seen.append(torch.empty(0).device.type)
        return f

    def source() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, SAMPLES, 5):
            yield note(X[i : i + 5]), Y[i : i + 5]

    model = nn.Sequential(DENSE.make(torch.float32), Written(lambda m, f: note(f)))
    own = fp.Likelihood(lambda f, y: note(f).log_softmax(1).gather(1, y[:, None])[:, 0])
    torch.set_default_device("meta")
    try:
        measure("diag", source(), fisher_type, model=model)
        measure("diag", source(), "empirical", model=model, likelihood=own)
        assert torch.empty(0).device.type == "meta"
    finally:
        torch.set_default_device(None)
    assert set(seen) == {"meta"}


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "save on CPU": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_the_caller(mode: str) -> None:
    """Gradients that are off, or numbers of lower precision, because the caller wanted so."""
    network = NETWORKS["transformer"]
    model, x = network.make(), network.inputs(5)
    truth = brute_force(model, "categorical", x)
    mean = fp.score(model, CATEGORICAL, x, labels(5)).mean()
    with MODES[mode]():
        given = x.clone()  # in inference mode, a tensor that autograd refuses
        found = measure("full", given, model=model, batch_size=3).to_dense()
        again = fp.score(model, CATEGORICAL, given, labels(5)).mean()
    assert difference(found, truth) < ROUNDING
    assert difference(again, mean) < ROUNDING


def test_measurements_at_once_and_inside_of_each_other() -> None:
    """Hooks of one thread, or of a measurement in the data, in the passes of another, and locks
    that never open: all measure the same network."""
    model, x = DENSE.make(), DENSE.inputs(6)
    expected = fp.fisher(model, CATEGORICAL, x).diag()

    def diagonal(size: int) -> Tensor:
        batches = (batch for batch in x.split(size) if fp.fisher(model, CATEGORICAL, batch))
        return fp.fisher(model, CATEGORICAL, batches).diag()

    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(diagonal, [1, 2, 3] * 4):
            assert difference(found, expected) < ROUNDING


@pytest.mark.parametrize(
    ("data", "total"),
    [
        ((np.zeros((SAMPLES, 4)), None), SAMPLES),
        (DataLoader(TensorDataset(X), batch_size=7), SAMPLES),
        ([X[:8], X[8:], X[:0]], None),
    ],
)
def test_progress(monkeypatch: pytest.MonkeyPatch, data: Any, total: int | None) -> None:
    """A bar that is shown unasked, counts batches for samples, or is not closed."""
    bar = mock.Mock()
    tqdm = mock.Mock(return_value=bar)
    monkeypatch.setitem(sys.modules, "tqdm.auto", mock.Mock(tqdm=tqdm))
    model = DENSE.make()
    fp.fisher(model, CATEGORICAL, X)
    tqdm.assert_not_called()
    fp.fisher(model, CATEGORICAL, data, batch_size=6, progress=True)
    assert tqdm.call_args.kwargs["total"] == total
    first = tqdm.call_args.kwargs["initial"]
    assert first + sum(call.args[0] for call in bar.update.call_args_list) == SAMPLES
    bar.close.assert_called_once()
