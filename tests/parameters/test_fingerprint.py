"""A network that has been examined is not taken for what it was when it has changed since.

Without its last examination each of these would be found out at once: every test measures first,
then makes of the network one that mixes its samples, or one whose layer is not what it seems.
"""

from __future__ import annotations

import copy
import gc
import types
import weakref
from collections.abc import Callable

import pytest
import torch
from support.parameters_oracle import brute_force
from support.parameters_zoo import NETWORKS, Network
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import fisherfast as ff
from fisherfast.parameters.backward import layer_check as examination

CATEGORICAL = ff.parameters.Categorical()

ROUNDING = 1e-12
"""Relative to the largest entry; measured: below 1e-15."""

MIXED = "must treat every sample by itself"


class Settings:
    """A configuration, as models of language carry one."""

    mixing = False


class Switch(nn.Module):
    """Mixes the samples of its batch if any of its switches says so."""

    mixing = False
    outside = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)
        self.config = Settings()
        self.own = False
        self.share = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.config.mixing or self.mixing or self.own or Switch.outside:
            h = h - h.mean(0)
        return self.last(h + self.share * h.mean(0))


class Child(Switch):
    """Whose class a test may change."""


def mixing(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output - output.mean(0)


def of_class(model: nn.Module) -> None:
    Child.mixing = True


def of_method(model: nn.Module) -> None:
    Child.forward = lambda self, x: mixing(self, x, Switch.forward(self, x))  # type: ignore[method-assign]


def grown(model: nn.Module) -> None:
    with torch.no_grad():
        model.share.fill_(0.5)  # type: ignore[union-attr,operator]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "attribute": lambda model: setattr(model, "own", True),
    "configuration": lambda model: setattr(model.config, "mixing", True),
    "class": of_class,
    "method": of_method,
    "hook": lambda model: model.first.register_forward_hook(mixing),  # type: ignore[union-attr,operator]
    "layer": lambda model: setattr(
        model, "last", nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    ),
    "number": grown,
    "number, unseen": lambda model: model.share.data.fill_(0.5),  # type: ignore[union-attr,operator]
}


@pytest.mark.parametrize("change", CHANGES)
def test_samples_that_see_each_other_since(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a network that is still taken for one that keeps its samples apart."""
    monkeypatch.setattr(Child, "mixing", False, raising=False)
    monkeypatch.setattr(Child, "forward", Switch.forward, raising=False)
    model, x = Child().eval(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    ff.parameters.fisher(model, CATEGORICAL, x)
    CHANGES[change](model)
    model.train(change == "layer")
    text = "evaluation mode" if change == "layer" else MIXED
    for _ in range(2):
        with pytest.raises(ValueError, match=text):
            ff.parameters.fisher(model, CATEGORICAL, x)


def test_hooks_of_all_modules_since() -> None:
    """Catches hooks that no module holds."""
    model, x = Switch().eval(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    ff.parameters.fisher(model, CATEGORICAL, x)
    handle = register_module_forward_hook(
        lambda module, args, output: mixing(module, args, output) if module is model.first else None
    )
    try:
        with pytest.raises(ValueError, match=MIXED):
            ff.parameters.fisher(model, CATEGORICAL, x)
    finally:
        handle.remove()


def test_what_only_the_outputs_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches trust in what a network holds: this one reads a variable that it does not."""
    model, x = NETWORKS["linear"].make(), NETWORKS["linear"].inputs(5)
    share = torch.zeros(())
    held = types.SimpleNamespace(value=share)
    monkeypatch.setitem(globals(), "SHARE", held)
    model.register_forward_hook(reads_a_variable)
    ff.parameters.fisher(model, CATEGORICAL, x)
    held.value = torch.ones(())
    with pytest.raises(ValueError, match=MIXED):
        ff.parameters.fisher(model, CATEGORICAL, x)


SHARE = types.SimpleNamespace(value=torch.zeros(()))


def reads_a_variable(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output - SHARE.value * output.mean(0)


def test_functions_in_the_place_of_others() -> None:
    """Catches functions that are told apart by their address, which the next one is given."""
    model, x = Switch().eval(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        for harmless in (True, False):
            share = 0.0 if harmless else 1.0

            def forward(layer: nn.Linear, x: Tensor, share: float = share) -> Tensor:
                output = nn.functional.linear(x, layer.weight, layer.bias)
                return output - share * output.mean(0)

            model.first.forward = types.MethodType(forward, model.first)  # type: ignore[method-assign]
            if harmless:
                ff.parameters.fisher(model, CATEGORICAL, x)
            else:
                with pytest.raises(ValueError, match=MIXED):
                    ff.parameters.fisher(model, CATEGORICAL, x)
            del model.first.forward


def assert_right(model: nn.Module, x: Tensor, data: object = None) -> None:
    """The diagonal equals the brute force."""
    found = ff.parameters.fisher(model, CATEGORICAL, x if data is None else data).diag()
    truth = brute_force(model, "categorical", x).diag()
    assert float((found - truth).abs().max()) <= ROUNDING * float(truth.abs().max())


@pytest.mark.parametrize("name", ["windows mixed", "transformer, time first", "windows"])
def test_a_head_that_was_zero(name: str) -> None:
    """Catches layers that are trusted because their gradients were all zero when they were looked
    at, as they are before the first step of a network whose last layer begins at zero."""
    network = NETWORKS[name]
    model, x = network.make(), network.inputs(5)
    head = [parameter for part, parameter in model.named_parameters() if part.startswith("head")]
    before = copy.deepcopy(head)
    for parameter in head:
        parameter.data.zero_()
    assert_right(model, x)
    for parameter, value in zip(head, before, strict=True):
        parameter.data.copy_(value)
    assert_right(model, x)


@pytest.mark.parametrize("structure", ["diag", "full", "gram", "block", "lowrank"])
def test_gradients_that_begin_in_a_later_batch(structure: str) -> None:
    """Catches layers that are trusted because the first batch has shown nothing of them."""
    network = Network(Gated, (8,))
    model, x = network.make(), network.inputs(8)
    x[:4, 0], x[4:, 0] = -1, 1
    found = ff.parameters.fisher(model, CATEGORICAL, iter([x[:4], x[4:]]), structure)  # type: ignore[arg-type]
    truth = brute_force(model, "categorical", x).diag()
    assert float((found.diag() - truth).abs().max()) <= 1e-10 * float(truth.abs().max())


class Gated(nn.Module):
    """Windows of all samples mixed, of samples that a gate lets pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unfold(1, 4, 2).transpose(0, 1).reshape(-1, 4)
        windows = torch.tanh(self.layer(rows)).reshape(-1, len(x), 5).mean(0)
        return self.head(windows * (x[:, :1] > 0))


@pytest.mark.parametrize("first", [1, 4], ids=["one sample", "samples alike"])
def test_first_batches_that_tell_nothing(first: int) -> None:
    """Catches samples that see each other and are alike in the first batch, or call."""
    model, x = Switch().eval(), torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    x[:4] = x[0]
    grown(model)
    with pytest.raises(ValueError, match=MIXED):
        ff.parameters.fisher(model, CATEGORICAL, iter([x[:first], x[first:]]))
    ff.parameters.fisher(model, CATEGORICAL, x[:first])
    with pytest.raises(ValueError, match=MIXED):
        ff.parameters.fisher(model, CATEGORICAL, x)


def test_a_buffer_that_is_written_is_refused_every_time() -> None:
    """Catches an examination that is kept although it ended in an error."""

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = Counting(4, 3).eval()
    model.register_buffer("calls", torch.zeros(()))
    for _ in range(2):
        with pytest.raises(ValueError, match="buffers as they are"):
            ff.parameters.fisher(model, CATEGORICAL, torch.randn(5, 4))
    assert float(model.calls) == 0


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_once_for_a_network_that_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches networks that are examined at every call, and such that are kept alive for it."""
    seen = []
    original = examination.examined
    monkeypatch.setattr(examination, "examined", lambda *args: seen.append(None) or original(*args))
    model, x = NETWORKS[name].make(), NETWORKS[name].inputs(5)
    for _ in range(2):
        ff.parameters.fisher(model, CATEGORICAL, x, batch_size=4)
    assert len(seen) == 1
    assert_right(copy.deepcopy(model), x)
    assert len(seen) == 2
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_one_number_for_each_sample() -> None:
    """Catches an examination that asks for a second dimension of the inputs."""
    model = nn.Embedding(5, 3).double()
    assert_right(model, torch.tensor([0, 3, 3, 1]))


class Sorted(nn.Module):
    """Sorts the samples of its batch, as those of different lengths are, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort(descending=True)
        return self.head(torch.tanh(self.layer(x[order]))[order.argsort()])


@pytest.mark.parametrize("descending", [True, False])
def test_samples_in_an_order_of_the_networks_own(descending: bool) -> None:
    """Catches an order that is that of the samples looked at, and of no others."""
    network = Network(Sorted, (4,))
    model, x = network.make(), network.inputs(8)
    x[:3, 0] = x[:3, 0].sort(descending=descending).values
    assert_right(model, x)


def test_parameters_without_gradients_for_ever() -> None:
    """Catches an error about something else."""
    with torch.inference_mode():
        model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="parameters must not be made in inference mode"):
        ff.parameters.fisher(model, CATEGORICAL, torch.ones(2, 4))
