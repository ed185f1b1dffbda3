"""A monitor is a guest: what is the user's stays as it was, bit for bit."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from support.networks_zoo import untouched
from torch import nn

import fisherfast as ff
from fisherfast.problems import GaussianShift, mlp

DIM = 6
PROBLEM = GaussianShift(torch.ones(DIM))
DATA = PROBLEM.finite_difference(0.0, 0.2, 400, seed=1)


def draw(theta, n, generator):
    return theta + torch.randn(n, DIM, generator=generator)


def regular() -> nn.Module:
    """A network with everything that has a state, partly in eval mode."""
    torch.manual_seed(0)
    first = [nn.Linear(DIM, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    model = nn.Sequential(*first, nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    model[5].eval()
    return model


@pytest.mark.parametrize("broken", [False, True])
def test_nothing_of_the_users_is_changed(broken):
    """Catches running statistics that move, modes set for all modules at once, hooks left behind,
    random numbers taken from the training, and a mode that stays in eval after an error."""
    model = regular()
    model.register_forward_hook(lambda *_: None)
    model(torch.randn(32, DIM)).sum().backward()
    if broken:
        with torch.no_grad():
            model[6].weight.fill_(math.nan)
    training_data = ff.Simulator(draw, 0.0, samples=400)
    with warnings.catch_warnings(), untouched(model):
        warnings.simplefilter("ignore", ff.FisherWarning)
        monitor = ff.FisherMonitor(model, DATA, training_data=training_data, observe_every=1)
        record = monitor.step(train_mse=0.3)
        monitor.observe(torch.zeros(32))
        monitor.step(train_mse=0.3)
        monitor.load_state_dict(monitor.state_dict())
        monitor.rows(), monitor.live()
        monitor.close()
    assert (record.flow is None) is broken


def test_gradients_are_the_same_bits_with_a_monitor():
    """Catches a graph, a version counter or an activation that is touched between forward and
    backward, and a random number taken from dropout."""

    def gradients(watched: bool) -> list[torch.Tensor]:
        model = regular()
        monitor = ff.FisherMonitor(model, DATA, observe_every=1)
        found = []
        for step in range(4):
            theta = torch.linspace(-1, 1, 40)
            x = theta[:, None] + torch.randn(40, DIM)
            loss = nn.functional.mse_loss(model(x)[:, 0], theta)
            if watched:
                monitor.observe(theta)
                if step == 2:
                    monitor.step(train_mse=loss)
            model.zero_grad()
            first = torch.autograd.grad(loss, model[0].weight, create_graph=True)[0]
            (loss + first.square().sum()).backward()
            found += [p.grad.clone() for p in model.parameters()]
        assert not watched or monitor.live()
        monitor.close()
        return found

    plain, watched = gradients(False), gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


THETA = torch.linspace(-1, 1, 64)
X = THETA[:, None] + torch.randn(64, DIM, generator=torch.Generator().manual_seed(0))


def listening() -> ff.FisherMonitor:
    """It holds activations of a graph."""
    monitor = ff.FisherMonitor(mlp([DIM, 8, 1], seed=0), DATA, observe_every=1)
    monitor.observe(THETA)
    monitor.model(X)
    return monitor


def square(monitor: ff.FisherMonitor) -> torch.Tensor:
    """A sum of all layers that were read."""
    moments = monitor.state_dict()["observer"]["moments"]
    assert list(moments) == ["input", "fc1", "relu1", "output"]
    return moments["fc1"]["square"]


def test_a_network_that_is_listened_to_can_be_copied_and_saved():
    """Catches hooks that cannot be pickled, copies of the monitor inside of copies of the network,
    and copies that are still listened to."""
    monitor = listening()
    model = monitor.model
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        torch.optim.swa_utils.AveragedModel(model).module,
    ]
    monitor.observe(THETA)
    before = square(monitor)
    for other in copies:
        assert torch.equal(other(-X), model(-X))
    model(X)
    monitor.observe(THETA)
    monitor.close()
    keep = math.exp(-64 / 512)
    assert torch.allclose(square(monitor), before * (1 + keep), rtol=1e-6)  # X twice, and no -X
    assert b"fisherfast" not in pickle.dumps(copies[0].fc1._forward_hooks)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_monitor_that_listens_can_be_copied(copied):
    """Catches copies of activations of a graph, a copy that reads nothing any more because its
    hooks do nothing, and one that listens to the network of the original."""
    monitor = listening()
    other = copied(monitor)
    assert other.model is not monitor.model
    other.model(X)
    for each in (other, monitor):
        each.observe(THETA)
        each.close()
    assert torch.equal(square(monitor), square(other))
    other.step()
    assert (len(monitor.history), len(other.history)) == (0, 1)
    assert not monitor.model.fc1._forward_hooks
