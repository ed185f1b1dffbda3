"""A run that is killed anywhere and resumed gives the history of the unbroken one, bit for bit."""

from __future__ import annotations

import io
import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.problems import GaussianShift, mlp

DIM = 6
STEPS = 20
MEASURE = 5
PROBLEM = GaussianShift(torch.ones(DIM))
DATA = PROBLEM.finite_difference(0.0, 0.2, 300, seed=1, paired=True)
TRAINING = PROBLEM.finite_difference(0.0, 0.2, 300, seed=2, paired=True)


def monitor_of(seed: int) -> ff.FisherMonitor:
    """Of a network with everything that has a state, listening to one batch in three."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(DIM, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    options = {"every": 2, "max_features": 32, "observe_every": 3}
    return ff.FisherMonitor(model, DATA, training_data=TRAINING, **options)


def go_on(monitor: ff.FisherMonitor, number: int) -> None:
    """A batch of a training that changes all weights; after every fifth a record."""
    generator = torch.Generator().manual_seed(number)
    theta = 2 * torch.rand(64, generator=generator) - 1
    monitor.model(theta[:, None] + torch.randn(64, DIM, generator=generator))
    monitor.observe(theta)
    with torch.no_grad():
        for parameter in monitor.model.parameters():
            parameter.mul_(1.05).add_(0.01)
    if number % MEASURE == MEASURE - 1:  # the first and the last are NaN: one warning
        monitor.step(epoch=number, train_mse=math.nan if number in (4, 19) else 1 / number)


def resumed(monitor: ff.FisherMonitor) -> ff.FisherMonitor:
    """Another process, with what was saved in a file."""
    file = io.BytesIO()
    torch.save((monitor.model.state_dict(), monitor.state_dict()), file)
    file.seek(0)
    monitor.close()
    weights, state = torch.load(file, weights_only=True)
    other = monitor_of(seed=99)
    other.model.load_state_dict(weights)
    other.load_state_dict(state)
    return other


def history_of(*, kill: int | None = None) -> list[dict[str, Any]]:
    """All that the history of a run holds but the time it took, NaN as text, then the live values;
    it is killed before one of its steps, and resumed."""
    monitor = monitor_of(seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(STEPS):
            if number == kill:
                monitor = resumed(monitor)
            go_on(monitor, number)
    (warning,) = caught  # of the NaN error, once in both lives
    assert "mean square errors must be finite" in str(warning.message)
    monitor.close()
    trace = []
    for record in monitor.history:
        state = record.state_dict() | {"row": record.row()}
        del state["seconds"], state["row"]["seconds"]
        trace.append({name: repr(value) for name, value in state.items()})
    return [*trace, {name: repr(estimate) for name, estimate in monitor.live().items()}]


@pytest.fixture(scope="module")
def unbroken() -> list[dict[str, Any]]:
    """With all that could be lost: epochs with and without a flow, NaN, live values."""
    trace = history_of()
    assert len(trace) == STEPS // MEASURE + 1
    assert [record["flow"] != "None" for record in trace[:-1]] == [True, False, True, False]
    assert any("live/" in record["row"] for record in trace[:-1])
    assert ["'overfitting': nan" in record["row"] for record in trace[:2]] == [False, True]
    assert trace[0]["train_mse"] == "(nan,)"
    assert set(trace[-1]) == {"input", "0", "1", "2", "output"}
    return trace


# one in three is listened to: kills before, between and after what `observe` reads, before and
# after records with and without a flow
@pytest.mark.parametrize("kill", [1, 5, 12])
def test_a_resumed_run_has_the_same_history(unbroken, kill):
    """Catches a counter, a window of `observe`, a batch being listened to, the input's J or a
    warning already given that the state forgets."""
    assert history_of(kill=kill) == unbroken


def test_the_file_of_a_resumed_run_is_whole(tmp_path):
    """Catches a file that begins again at the resume, and a line appended to the history that was
    left, where both are equally long."""
    model = mlp([DIM, 4, 1], seed=0)
    path = tmp_path / "history.csv"
    other = ff.FisherMonitor(model, DATA, max_features=32)
    other.step(epoch=7, train_mse=0.5)
    monitor = ff.FisherMonitor(model, DATA, max_features=32, path=path)
    monitor.step(epoch=3, train_mse=0.9)
    monitor.load_state_dict(other.state_dict())
    monitor.step(train_mse=0.4)
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["epoch", "7", "8"]


def test_a_state_does_not_change_with_the_run():
    """Catches tensors that a state shares with the monitor."""
    monitor = monitor_of(seed=0)
    for number in range(5, 12):  # a record after 9
        if number == 8:
            state = monitor.state_dict()
            before = repr(state)
        go_on(monitor, number)
    monitor.close()
    assert repr(state) == before


# --- states of other runs -------------------------------------------------------------------------

SAME = {"model": mlp([DIM, 4, 1], seed=0), "data": DATA, "max_features": 32}
NETWORK, SETTINGS = "state must be of the same network, ", "state must be of the same settings, "
RENAMED, TWO = nn.Sequential(nn.Linear(DIM, 4)), mlp([DIM, 4, 2])
PATHWISE = [PROBLEM.pathwise(0.0, 300), GaussianShift(torch.eye(DIM)[:, :2]).pathwise([0, 0], 300)]
REFUSED = {  # what the new monitor, and sometimes also the saved one, has in place of SAME
    f"{NETWORK}got 'fc1.weight' [4, 6] there and [5, 6] here": [{"model": mlp([DIM, 5, 1])}],
    f"{NETWORK}got '0.weight' missing there and [4, 6] here": [{"model": RENAMED}],
    f"{NETWORK}got 'fc1.weight' [4, 6] there and missing here": [{"model": nn.Sequential()}],
    f"{SETTINGS}got max_features = 32 for 33": [{"max_features": 33}],
    f"{SETTINGS}got layers = 'auto' for ['fc1']": [{"layers": ["fc1"]}],
    f"{SETTINGS}got target_scale = 1.0 for 2.0": [{"target_scale": 2.0}],
    f"{SETTINGS}got dtheta = [0.2] for [0.1]": [{"data": PROBLEM.finite_difference(0.0, 0.1, 300)}],
    # pathwise data have no dtheta that would differ
    f"{SETTINGS}got parameters = 2 for 1": [{"model": TWO, "data": data} for data in PATHWISE],
}


@pytest.mark.parametrize("message", REFUSED)
def test_the_state_of_another_run_is_refused(message):
    """Catches two networks, or two scales, in one history. The error says what differs, and nothing
    has changed."""
    monitor, other = (ff.FisherMonitor(**(SAME | its)) for its in (*REFUSED[message], {})[:2])
    other.step(train_mse=[0.5] * other.data.parameters)
    state = other.state_dict()
    monitor.observe(torch.zeros(4, monitor.data.parameters))
    before = repr(monitor.state_dict())
    hooks = [len(m._forward_hooks) for m in monitor.model.modules()]
    with pytest.raises(ValueError, match=re.escape(message)):
        monitor.load_state_dict(state)
    assert repr(monitor.state_dict()) == before
    assert [len(m._forward_hooks) for m in monitor.model.modules()] == hooks
    monitor.close()


@pytest.mark.parametrize(("state", "got"), [({"format_version": 2}, "2"), (None, "<class 'None")])
def test_the_state_of_something_else_is_refused(state, got):
    with pytest.raises(ValueError, match=f"state must be of a FisherMonitor, format 1, got {got}"):
        ff.FisherMonitor(**SAME).load_state_dict(state)
