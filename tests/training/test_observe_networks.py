"""What `FisherMonitor.observe` reads: which forward pass, and of which layers of which networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import fisherfast as ff
from fisherfast.problems import GaussianShift, mlp

DIM = 6
BATCH = 128
SIGMAS = 4.0  # false alarm 6e-5 per comparison

generator = torch.Generator()


def uniform(n: int) -> torch.Tensor:
    """theta in [-1, 1], [n, 1]."""
    return 2 * torch.rand(n, 1, generator=generator) - 1


def noise(n: int, dim: int = DIM) -> torch.Tensor:
    return torch.randn(n, dim, generator=generator)


def shifted(direction: torch.Tensor, batches: int, n: int = BATCH) -> Iterator:
    """x ~ N(a theta, 1), theta uniform."""
    for _ in range(batches):
        theta = uniform(n)
        yield theta * direction + noise(n), theta


@pytest.fixture(autouse=True)
def seeded() -> None:
    generator.manual_seed(0)


# --- which pass is read ---------------------------------------------------------------------------


def monitored(model: nn.Module, every: int = 1, parameters: int = 1) -> ff.FisherMonitor:
    direction = torch.eye(DIM)[:, :parameters]
    data = GaussianShift(direction).finite_difference([0.0] * parameters, 0.2, 200, seed=1)
    return ff.FisherMonitor(model, data, max_features=16, observe_every=every)


def train(monitor: ff.FisherMonitor, model: nn.Module, batches: int, n: int = BATCH) -> None:
    for x, theta in shifted(torch.ones(DIM), batches, n):
        model(x)
        monitor.observe(theta)


def read(monitor: ff.FisherMonitor) -> dict[str, object]:
    """The sums of an observer, to be compared bit for bit."""
    moments = monitor.state_dict()["observer"]["moments"]
    return {
        f"{name}/{key}": value.tolist() if isinstance(value, torch.Tensor) else value
        for name, sums in moments.items()
        for key, value in sums.items()
    }


@pytest.mark.parametrize("every", [1, 3, 7])
def test_one_batch_in_so_many_is_read(every):
    """Catches a cadence that is off by one: the k-th read is of batch k n + 2. Hooks are there for
    that batch alone."""
    model = mlp([DIM, 4, 1], seed=0)
    monitor = monitored(model, every)
    for call in range(1, 30):
        listening = len(model._forward_hooks) > 0
        assert listening is (call > 1 and (call - 2) % every == 0)
        train(monitor, model, 1)
    monitor.close()
    reference = mlp([DIM, 4, 1], seed=0)
    other = monitored(reference)
    other.observe(torch.zeros(1))
    generator.manual_seed(0)
    for call, (x, theta) in enumerate(shifted(torch.ones(DIM), 29), start=1):
        if call > 1 and (call - 2) % every == 0:
            reference(x)
            other.observe(theta)
    other.close()
    assert read(monitor) == read(other)


def test_passes_that_are_not_of_the_training_are_not_read():
    """Validation with another batch size before, and after, the forward pass of the training; a
    measurement by `fisher_flow` and by `step`. Catches samples of one under thetas of the other."""
    plain, disturbed = mlp([DIM, 4, 1], seed=0), mlp([DIM, 4, 1], seed=0)
    quiet, other = monitored(plain), monitored(disturbed)
    for _ in range(2):
        train(quiet, plain, 4)
    generator.manual_seed(0)
    fresh = torch.Generator().manual_seed(1)

    def validate(measured: bool) -> None:
        disturbed.eval()
        with torch.no_grad():
            for n in (10, BATCH):
                disturbed(torch.randn(n, DIM, generator=fresh))
        disturbed.train()
        if not measured:
            return
        ff.fisher_flow(disturbed, other.data, max_features=8)
        x = torch.randn(100, DIM, generator=fresh)
        ff.fisher_flow(disturbed, ff.Pathwise(x, torch.ones(100, DIM)), max_features=8)

    for round_ in range(2):
        for number, (x, theta) in enumerate(shifted(torch.ones(DIM), 4)):
            validate(number == 1)
            disturbed(x)
            validate(number == 2)
            other.observe(theta)
        if round_ == 0:
            assert disturbed._forward_hooks
            other.step()
            assert disturbed._forward_hooks  # the next batch is still listened to
    assert read(quiet) == read(other)
    quiet.close(), other.close()


def test_of_several_passes_in_training_the_last_is_read():
    """Catches the first one, which may be of other samples."""
    model, reference = mlp([DIM, 4, 1], seed=0), mlp([DIM, 4, 1], seed=0)
    monitor, other = monitored(model), monitored(reference)
    monitor.observe(torch.zeros(1)), other.observe(torch.zeros(1))
    for x, theta in shifted(torch.ones(DIM), 4):
        model(noise(17)), model(x)
        monitor.observe(theta)
    generator.manual_seed(0)
    for x, theta in shifted(torch.ones(DIM), 4):
        noise(17), reference(x)
        other.observe(theta)
    monitor.close(), other.close()
    assert read(monitor).keys() == read(other).keys()


def test_a_call_without_a_pass_reads_nothing():
    """Catches an error, or a batch made of nothing, where the model did not run."""
    model = mlp([DIM, 4, 1], seed=0)
    monitor = monitored(model)
    for _ in range(3):
        monitor.observe(torch.zeros(5))
    assert monitor.live() == {}
    monitor.close()


def test_inference_tensors_are_read():
    """They count no changes. Catches a question for their version."""
    model = mlp([DIM, 4, 1], seed=0)
    monitor = monitored(model)
    with torch.inference_mode():
        train(monitor, model, 4)
    monitor.close()
    assert set(monitor.live()) == {"input", "fc1", "relu1", "output"}


def test_activations_that_are_overwritten_are_left_out():
    """ReLU in place: the layer before it holds what comes after. Catches its values taken for
    that layer's."""
    model = nn.Sequential(nn.Linear(DIM, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    other = nn.Sequential(nn.Linear(DIM, 4), nn.ReLU(), nn.Linear(4, 1))
    other.load_state_dict(model.state_dict())
    monitor, reference = monitored(model), monitored(other)
    train(monitor, model, 6)
    generator.manual_seed(0)
    train(reference, other, 6)
    assert set(monitor.live()) == {"input", "1", "output"}
    assert set(reference.live()) == {"input", "0", "1", "output"}
    for name, estimate in monitor.live().items():
        assert torch.equal(estimate.J, reference.live()[name].J)
    monitor.close(), reference.close()


# --- networks of every kind -----------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same, self.head = nn.Linear(DIM, DIM), nn.Linear(DIM, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.same(torch.relu(self.same(x)))))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.split = nn.Linear(DIM, 4), nn.GRU(4, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        body = self.body(x)
        states, _ = self.split(body[:, None])
        return body.sum(1), {"states": states}


class Ends(nn.Module):
    """Layers that are called like the ends of the network, which they are not."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.output = nn.Linear(DIM, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.output(self.input(x)))


class TimeFirst(nn.Module):
    """Sequences [T, n, 1], as recurrent layers take them by default."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(1, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(x)[0][-1])


class Words(nn.Module):
    """Whole numbers as input, folded into one long batch on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.word, self.head = nn.Embedding(9, 4), nn.Linear(4, 2), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = self.word(self.table(x).flatten(0, 1))
        return self.head(words.unflatten(0, (-1, 3)).flatten(1))


KINDS = {
    "dropout": (
        lambda: nn.Sequential(nn.Linear(DIM, 4), nn.Dropout(0.5), nn.Linear(4, 1)),
        lambda x: x,
        {"input", "0", "output"},
    ),
    "twice": (Twice, lambda x: x, {"input", "same", "output"}),
    "tuples": (Pair, lambda x: x, {"input", "body"}),
    "time first": (TimeFirst, lambda x: x.T[:, :, None], {"output"}),
    "words": (Words, lambda x: (x[:, :3] + 4).round().clamp(0, 8).long(), {"table", "output"}),
    "half": (
        lambda: mlp([DIM, 4, 1], seed=0).bfloat16(),
        lambda x: x.bfloat16(),
        {"input", "fc1", "relu1", "output"},
    ),
    "images": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 2, 2), nn.Flatten()),
        lambda x: x,
        {"input", "1", "output"},
    ),
    "ends": (Ends, lambda x: x, {"input", "self.input", "self.output", "output"}),
    "parametrized": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(DIM, BATCH)), nn.Linear(BATCH, 1)
        ),
        lambda x: x,
        {"input", "0", "output"},
    ),
    "one module": (lambda: nn.Linear(DIM, 1), lambda x: x, {"input", "output"}),
    "one number": (
        lambda: nn.Sequential(nn.Linear(DIM, 1), nn.Flatten(0)),
        lambda x: x,
        {"input", "0", "output"},
    ),
    "wide": (
        lambda: mlp([DIM, 300, 2, 1], seed=0),
        lambda x: x,
        {"input", "fc2", "relu2", "output"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_every_kind(kind):
    """Catches a training that is stopped by its layers: tuples, a batch that does not come first or
    becomes longer, whole numbers, layers that are called twice or are too wide."""
    make, form, names = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    monitor = monitored(model)
    for x, theta in shifted(torch.ones(DIM), 12):
        output = model(form(x))
        first = output[0] if isinstance(output, tuple) else output
        monitor.observe(theta)
        first.float().mean().backward()
    monitor.close()
    assert set(monitor.live()) == names
    assert all(bool(estimate.J.isfinite().all()) for estimate in monitor.live().values())


def test_a_module_that_is_called_twice_is_read_at_its_first_call():
    """Catches a mixture of two layers under one name."""
    model = Twice()
    monitor = monitored(model)
    train(monitor, model, 40)
    monitor.close()
    truth = GaussianShift(torch.ones(DIM)).fisher_after(model.same.weight.detach()).item()
    found = monitor.live()["same"]
    assert abs(found.J.item() - truth) < SIGMAS * found.stderr.item()


def test_sequences_of_changing_length():
    """Catches a training that is stopped by a covariance of another size."""
    model = nn.Sequential(nn.Linear(1, 2), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten())
    monitor = monitored(model)
    for length in (4, 5, 4, 6, 4, 4, 4):
        theta = uniform(BATCH)
        model(theta[:, :, None] + noise(BATCH, length)[:, :, None])
        monitor.observe(theta)
    monitor.close()
    assert monitor._observer.moments["0"].dim == 10  # of the first batch that is read
    assert bool(monitor.live()["output"].J.isfinite())


def test_a_compiled_network_is_read_at_its_ends():
    """Catches hooks inside of a compiled graph: it would be compiled again and again."""
    torch._dynamo.reset()
    compiled_times = 0

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable:
        nonlocal compiled_times
        compiled_times += 1
        return graph.forward

    model = mlp([DIM, 4, 1], seed=0)
    compiled = torch.compile(model, backend=backend)
    monitor = monitored(compiled, every=2)
    train(monitor, compiled, 12)
    monitor.close()
    assert set(monitor.live()) == {"input", "output"}
    assert compiled_times == 1
    assert not compiled._forward_hooks


def test_a_compiled_part_is_not_read_inside():
    """Catches hooks inside of what is compiled, which compile it again."""
    torch._dynamo.reset()
    inside = torch.compile(mlp([DIM, 4, 3], seed=0), backend="eager")
    model = nn.Sequential(inside, nn.Linear(3, 2), nn.Linear(2, 1))
    monitor = monitored(model)
    train(monitor, model, 3)
    monitor.close()
    assert set(monitor._observer.moments) == {"input", "1", "output"}


def test_a_network_that_is_compiled_in_place_is_read_at_its_ends():
    """Catches a graph that is compiled again for each batch that is read (after eight times it
    would run uncompiled for good), and a network that the observer passes by."""

    class Own(nn.Module):  # torch leaves its own containers uncompiled
        def __init__(self) -> None:
            super().__init__()
            self.inside = mlp([DIM, 4, 1], seed=0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside(x)

    torch._dynamo.reset()
    counter, model = CompileCounter(), Own()
    model.compile(backend=counter)
    call = model._compiled_call_impl
    monitor = monitored(model, every=2)
    train(monitor, model, 12)
    monitor.close()
    assert set(monitor.live()) == {"input", "output"}
    assert counter.frame_count == 1
    assert model._compiled_call_impl is call


def test_a_network_spread_over_threads_is_read_at_its_ends():
    """Catches hooks that are copied into replicas, each of which sees a part of the batch."""
    wrapped = nn.DataParallel(mlp([DIM, 4, 1], seed=0))
    monitor = monitored(wrapped)
    train(monitor, wrapped, 6)
    monitor.close()
    assert set(monitor.live()) == {"input", "output"}


def test_several_models_do_not_meet():
    """Catches hooks that are shared, by a layer that both networks have."""
    shared = nn.Linear(DIM, 3)
    models = [nn.Sequential(shared, nn.Linear(3, 1)) for _ in range(2)]
    monitors = [monitored(model) for model in models]
    for x, theta in shifted(torch.ones(DIM), 20):
        for sign, model in zip((1, 0), models, strict=True):
            model(x * sign)
        for monitor in monitors:
            monitor.observe(theta)
    first, second = (monitor.live() for monitor in monitors)
    assert abs(first["input"].J.item() - DIM) < SIGMAS * first["input"].stderr.item()
    assert second["input"].J.item() == 0
    for monitor in monitors:
        monitor.close()
    assert not shared._forward_hooks


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_state_that_comes_back_on_another_device(place, tmp_path):
    """Catches sums that stay where a state was loaded to, away from the activations."""
    model = mlp([DIM, 4, 1], seed=0).cuda()
    monitor = monitored(model)
    for x, theta in shifted(torch.ones(DIM), 4):
        model(x.cuda())
        monitor.observe(theta.cuda())
    monitor.step(train_mse=0.5)
    monitor.close()
    torch.save(monitor.state_dict(), tmp_path / "state.pt")
    again = monitored(model)
    again.load_state_dict(torch.load(tmp_path / "state.pt", map_location=place, weights_only=True))
    for each in (monitor, again):
        generator.manual_seed(1)
        for x, theta in shifted(torch.ones(DIM), 4):
            model(x.cuda())
            each.observe(theta)
        each.step(train_mse=torch.tensor(0.5, device="cuda"))
        each.close()
    assert again.history[0].train_level == monitor.history[0].train_level
    for name, estimate in monitor.live().items():
        assert torch.allclose(again.live()[name].J, estimate.J, rtol=1e-4)


def test_live_values_are_shares_of_the_input_that_was_observed():
    """Catches J at one theta under a mean over all, and the layers' unit."""
    model = mlp([DIM, 3, 1], nn.Identity, seed=0)
    monitor = monitored(model)
    train(monitor, model, 60)
    record = monitor.step(train_mse=1.0)
    monitor.close()
    live_ = monitor.live()
    assert set(record.live) == set(live_) - {"input"}
    for name, share in record.live.items():
        assert share == pytest.approx(live_[name].J.item() / live_["input"].J.item())
    assert record.row()["live/output"] == record.live["output"]


@pytest.mark.parametrize("first", [0, 1])
def test_two_monitors_of_a_network_that_is_compiled_in_place(first):
    """They let go in either order. Catches the hooks of one that stay for ever because the other
    has put back the call that it found, and one that loses its own."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 1))
    model.compile(backend="eager")
    call = model._compiled_call_impl
    x = torch.randn(2, 400, 4, generator=torch.Generator().manual_seed(0))
    data = ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2)
    monitors = [ff.FisherMonitor(model, data, observe_every=1) for _ in range(2)]
    theta = torch.linspace(-1, 1, 32)
    for monitor in monitors:
        monitor.observe(theta)
    monitors[first].close()
    model(theta[:, None] + x[0, :32])
    monitors[1 - first].observe(theta)
    assert set(monitors[1 - first]._observer.moments) == {"input", "output"}
    assert not monitors[first]._observer.moments
    monitors[1 - first].close()
    assert model._compiled_call_impl is call
