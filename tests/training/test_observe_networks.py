"""What `FisherMonitor.observe` reads: which forward pass, and of which layers of which networks."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from support.networks_zoo import input_output, recurrent, twice
from support.theta_batches import BATCH, DIM, SIGMAS, generator, noise, shifted, uniform
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import fisherfast as ff
from fisherfast import FisherWarning
from fisherfast.problems import GaussianShift, mlp

ONES = torch.ones(DIM)
DATA = GaussianShift(torch.eye(DIM)[:, 0]).finite_difference(0.0, 0.2, 200, seed=1)


def monitored(model: nn.Module, every: int = 1) -> ff.FisherMonitor:
    return ff.FisherMonitor(model, DATA, max_features=16, observe_every=every)


def small(every: int = 1) -> tuple[nn.Module, ff.FisherMonitor]:
    """The same network each time."""
    model = mlp([DIM, 4, 1], seed=0)
    return model, monitored(model, every)


def train(monitor: ff.FisherMonitor, model: nn.Module, batches: int) -> None:
    for x, theta in shifted(ONES, batches):
        model(x)
        monitor.observe(theta)


def sums(monitor: ff.FisherMonitor) -> dict[str, object]:
    """Of its observer, to be compared bit for bit; it lets go."""
    moments = monitor.state_dict()["observer"]["moments"]
    monitor.close()
    return tree_map(lambda it: it.tolist() if isinstance(it, torch.Tensor) else it, moments)


# --- which pass is read ---------------------------------------------------------------------------


def test_one_batch_in_three_is_read():
    """Catches a cadence that is off by one: the k-th read is of batch 3 k + 2. Hooks are there for
    that batch alone."""
    (model, monitor), (reference, other) = small(every=3), small()
    other.observe(torch.zeros(1))
    for call, (x, theta) in enumerate(shifted(ONES, 12)):
        due = call % 3 == 1
        assert bool(model._forward_hooks) is due
        model(x)
        monitor.observe(theta)
        if due:
            reference(x)
            other.observe(theta)
    assert sums(monitor) == sums(other) != {}


def test_the_trend_says_how_old_it_is():
    """One in eight of 5 batches in an epoch: batches 2, 10 and 18 are read. Catches an age that
    counts batches in which hooks were on, one of the last record, silence where an epoch is
    shorter, and a warning where it is not (an error here) or in each epoch."""
    (model, monitor), ages = small(every=8), []
    monitor.step()  # nothing observed yet
    warned = pytest.warns(FisherWarning, match="live may .* pass observe_every=5")
    for context in (warned, *[nullcontext()] * 3):
        train(monitor, model, 5)
        with context:
            record = monitor.step()
        ages.append((monitor.live()["output"].age, record.live_age))
    monitor.close()
    assert ages == [(3, 3), (0, 0), (5, 5), (2, 2)]
    assert record.row()["live_age"] == 2
    model, monitor = small(every=5)
    for _ in range(2):
        train(monitor, model, 5)
        assert monitor.step().notes == ()
    monitor.close()


def test_passes_that_are_not_of_the_training_are_not_read():
    """Validation with another batch size before, and after, the forward pass of the training; a
    measurement by `fisher_flow` and by `step`; of several passes in training all but the last.
    Catches samples of one under thetas of the other."""
    (plain, quiet), (disturbed, other) = small(), small()
    fresh = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(1))

    def validate(measured: bool) -> None:
        disturbed.eval()
        with torch.no_grad():
            disturbed(fresh[:10]), disturbed(fresh)
        disturbed.train()
        if measured:
            ff.fisher_flow(disturbed, DATA, max_features=8)
            tangents = ff.Pathwise(fresh, torch.ones(BATCH, DIM))
            ff.fisher_flow(disturbed, tangents, max_features=8)

    for number, (x, theta) in enumerate(shifted(ONES, 8)):
        plain(x)
        quiet.observe(theta)
        validate(number == 1)
        disturbed(2 * x), disturbed(x)
        validate(number == 2)
        other.observe(theta)
        if number == 3:
            assert disturbed._forward_hooks
            other.step()
            assert disturbed._forward_hooks  # the next batch is still listened to
    assert sums(quiet) == sums(other) != {}


def test_a_call_without_a_pass_reads_nothing():
    """Catches an error, or a batch made of nothing, where the model did not run; then inference
    tensors, which count no changes and are read: a question for their version."""
    model, monitor = small()
    for _ in range(3):
        monitor.observe(torch.zeros(5))
    assert monitor.live() == {}
    with torch.inference_mode():
        train(monitor, model, 4)
    monitor.close()
    assert set(monitor.live()) == {"input", "fc1", "relu1", "output"}


def test_activations_that_are_overwritten_are_left_out():
    """ReLU in place: the layer before it holds what comes after. Catches its values taken for
    that layer's."""
    found = []
    for inplace in (True, False):
        model = nn.Sequential(nn.Linear(DIM, 4), nn.ReLU(inplace=inplace), nn.Linear(4, 1))
        model.load_state_dict(dict(zip(model.state_dict(), small()[0].parameters(), strict=True)))
        monitor = monitored(model)
        generator.manual_seed(0)
        train(monitor, model, 6)
        monitor.close()
        found.append(monitor.live())
    assert set(found[0]) == {"input", "1", "output"}
    assert set(found[1]) == {"input", "0", "1", "output"}
    assert all(torch.equal(found[0][name].J, found[1][name].J) for name in found[0])


# --- networks of every kind -----------------------------------------------------------------------


class FeaturesFirst(nn.Linear):
    """The batch is the last dimension of the input, as recurrent layers take it by default."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.T)


class Named(nn.Sequential):
    """Returns a dict."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
        return {"mean": super().forward(x), "rest": None}


def words() -> nn.Module:
    """Whole numbers as input, folded into one long batch on the way."""
    fold, unfold = nn.Flatten(0, 1), nn.Unflatten(0, (BATCH, DIM))
    last = [nn.Flatten(), nn.Linear(2 * DIM, 1)]
    return nn.Sequential(nn.Embedding(9, 4), fold, nn.Linear(4, 2), unfold, *last)


def normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(DIM, 9)), nn.Linear(9, 1))


def images() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 2, 2), nn.Flatten())


def one_number() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 1), nn.Flatten(0))


KINDS = {
    "named": (lambda: Named(nn.Linear(DIM, 3), nn.Linear(3, 1)), {"input", "0", "output"}),
    "tuples": (recurrent, {"input", "output"}),
    "batch last": (lambda: FeaturesFirst(DIM, 1), {"output"}),
    "words": (words, {"0", "output"}),
    "half": (lambda: small()[0].bfloat16(), {"input", "fc1", "relu1", "output"}),
    "images": (images, {"input", "1", "output"}),
    "ends": (input_output, {"input", "self.input", "self.output", "output"}),
    "parametrized": (normed, {"input", "0", "output"}),
    "one number": (one_number, {"input", "0", "output"}),
    # hooks that are copied into replicas, each of which sees a part of the batch
    "spread over threads": (lambda: nn.DataParallel(small()[0]), {"input", "output"}),
    "wide": (lambda: mlp([DIM, 300, 2, 1], seed=0), {"input", "fc2", "relu2", "output"}),
}
FORMS = {
    "batch last": lambda x: x.T,
    "words": lambda x: (x + 4).round().clamp(0, 8).long(),
    "half": lambda x: x.bfloat16(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_every_kind(kind):
    """Catches a training that is stopped by its layers: tuples, a batch that does not come first or
    becomes longer, whole numbers, layers that are called twice or are too wide."""
    make, names = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    monitor = monitored(model)
    for x, theta in shifted(ONES, 12):
        output = model(FORMS.get(kind, lambda x: x)(x))
        monitor.observe(theta)
        tree_leaves(output)[0].float().mean().backward()
    monitor.close()
    assert set(monitor.live()) == names
    assert all(bool(estimate.J.isfinite().all()) for estimate in monitor.live().values())


def test_a_module_that_is_called_twice_is_read_at_its_first_call():
    """Catches a mixture of two layers under one name."""
    model = twice()
    monitor = monitored(model)
    train(monitor, model, 40)
    monitor.close()
    truth = GaussianShift(ONES).fisher_after(model.fc.weight.detach()).item()
    found = monitor.live()["fc"]
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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_state_that_comes_back_on_another_device(place, tmp_path):
    """Catches sums that stay where a state was loaded to, away from the activations."""
    model = mlp([DIM, 4, 1], seed=0).cuda()
    monitor, again = monitored(model), monitored(model)

    def go_on(each: ff.FisherMonitor) -> None:
        generator.manual_seed(1)
        for x, theta in shifted(ONES, 4):
            model(x.cuda())
            each.observe(theta.cuda())
        each.step(train_mse=torch.tensor(0.5, device="cuda"))
        each.close()

    go_on(monitor)
    torch.save(monitor.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", map_location=place, weights_only=True))
    go_on(monitor)
    go_on(again)
    assert again.history[0].train_mse == monitor.history[0].train_mse == (0.5,)
    for name, estimate in monitor.live().items():
        assert torch.allclose(again.live()[name].J, estimate.J, rtol=1e-4)


def test_live_values_are_shares_of_the_input_that_was_observed():
    """Catches J at one theta under a mean over all, and the layers' unit."""
    model, monitor = small()
    train(monitor, model, 20)
    record = monitor.step(train_mse=1.0)
    monitor.close()
    live = monitor.live()
    assert set(record.live) == set(live) - {"input"}
    for name, share in record.live.items():
        assert share == pytest.approx(live[name].J.item() / live["input"].J.item())
    assert record.row()["live/output"] == record.live["output"]


@pytest.mark.parametrize("first", [0, 1])
def test_two_monitors_of_a_network_that_is_compiled_in_place(first):
    """They let go in either order. Catches the hooks of one that stay for ever because the other
    has put back the call that it found, and one that loses its own."""
    model = nn.Sequential(nn.Linear(DIM, 1))
    model.compile(backend="eager")
    call = model._compiled_call_impl
    monitors = [monitored(model) for _ in range(2)]
    theta = uniform(BATCH)
    for monitor in monitors:
        monitor.observe(theta)
    monitors[first].close()
    model(theta + noise(BATCH))
    monitors[1 - first].observe(theta)
    assert set(monitors[1 - first]._observer.moments) == {"input", "output"}
    assert not monitors[first]._observer.moments
    monitors[1 - first].close()
    assert model._compiled_call_impl is call
