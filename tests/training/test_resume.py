"""A run that is killed anywhere and resumed gives the history of the unbroken one, bit for bit."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.problems import GaussianShift, mlp

DIM = 6
STEPS = 26
MEASURE = 5
PROBLEM = GaussianShift(torch.ones(DIM))
DATA = PROBLEM.finite_difference(0.0, 0.2, 300, seed=1, paired=True)
TRAINING = PROBLEM.finite_difference(0.0, 0.2, 300, seed=2, paired=True)


class Run:
    """A training with everything that has a state."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(DIM, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1)
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        self.monitor = ff.FisherMonitor(
            self.model, DATA, every=2, training_data=TRAINING, max_features=32, observe_every=3
        )

    def step(self, number: int) -> None:
        theta = 2 * torch.rand(64) - 1
        x = theta[:, None] + torch.randn(64, DIM)
        loss = nn.functional.mse_loss(self.model(x)[:, 0], theta)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.monitor.observe(theta)
        if number % MEASURE == MEASURE - 1:
            # the first and the last but one are NaN: one warning
            error = math.nan if number in (4, 19) else float(loss.detach())
            self.monitor.step(epoch=number, train_mse=error)

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        state = {name: getattr(self, name).state_dict() for name in NAMES}
        torch.save(state | {"rng": torch.get_rng_state()}, file)
        file.seek(0)
        return file

    @classmethod
    def resumed(cls, file: io.BytesIO) -> Run:
        run = cls(seed=99)  # other weights
        state = torch.load(file, weights_only=True)
        for name in NAMES:
            getattr(run, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        return run

    def trace(self) -> list[dict[str, Any]]:
        """All that the history holds but the time it took, NaN as text."""
        records = []
        for record in self.monitor.history:
            state = record.state_dict() | {"row": record.row()}
            del state["seconds"], state["row"]["seconds"]
            records.append({name: repr(value) for name, value in state.items()})
        live = {name: repr(estimate) for name, estimate in self.monitor.live().items()}
        return [*records, live]


NAMES = ("model", "optimizer", "monitor")


def history_of(*, kill: int | None = None) -> list[dict[str, Any]]:
    """Of a run that is killed before one of its steps, and resumed."""
    run = Run(seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(STEPS):
            if number == kill:
                file = run.save()
                run.monitor.close()
                run = Run.resumed(file)
            run.step(number)
    (warning,) = caught  # of the NaN error, once in both lives
    assert "mean square errors must be finite" in str(warning.message)
    run.monitor.close()
    return run.trace()


@pytest.fixture(scope="module")
def unbroken() -> list[dict[str, Any]]:
    return history_of()


# one in three is listened to: kills before, between and after what `observe` reads, before and
# after records with and without a flow; the rest as a die fell
@pytest.mark.parametrize("kill", [1, 2, 3, 4, 5, 6, 11, 17, 20, 25])
def test_a_resumed_run_has_the_same_history(unbroken, kill):
    """Catches a counter, a window of `observe`, a batch being listened to, the input's J or a
    warning already given that the state forgets."""
    trace = history_of(kill=kill)
    assert len(trace) == len(unbroken) == STEPS // MEASURE + 1
    assert trace == unbroken


def test_the_history_has_what_could_be_lost(unbroken):
    """The power of the tests above: epochs with and without a flow, NaN, live values."""
    flows = [record["flow"] != "None" for record in unbroken[:-1]]
    assert set(flows) == {True, False}
    assert any("live/" in record["row"] for record in unbroken[:-1])
    assert "'overfitting': nan" in unbroken[1]["row"]
    assert "'overfitting': nan" not in unbroken[0]["row"]
    assert unbroken[0]["train_mse"] == "(nan,)"
    assert set(unbroken[-1]) == {"input", "0", "1", "2", "output"}


def test_the_file_of_a_resumed_run_is_whole(tmp_path):
    """Catches a file that begins again at the resume."""
    model = mlp([DIM, 4, 1], seed=0)
    path = tmp_path / "history.csv"
    monitor = ff.FisherMonitor(model, DATA, max_features=32, path=path)
    monitor.step(train_mse=0.5)
    state = monitor.state_dict()
    again = ff.FisherMonitor(model, DATA, max_features=32, path=path)
    again.load_state_dict(state)
    again.step(train_mse=0.4)
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["epoch", "0", "1"]


def test_a_state_that_replaces_as_many_records_rewrites_the_file(tmp_path):
    """Catches a line appended to the history that was left, where both are equally long."""
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
    run = Run(seed=0)
    for number in range(4):
        run.step(number)
    state = run.monitor.state_dict()
    before = repr(state)
    with pytest.warns(ff.FisherWarning, match="mean square errors must be finite"):
        run.step(4)
    for number in range(5, 9):
        run.step(number)
    run.monitor.close()
    assert repr(state) == before


# --- states of other runs -------------------------------------------------------------------------


def other_networks() -> dict[str, tuple[nn.Module, str]]:
    return {
        "width": (
            mlp([DIM, 5, 1], seed=0),
            r"got 'fc1.weight' \[4, 6\] there and \[5, 6\] here",
        ),
        "names": (
            nn.Sequential(nn.Linear(DIM, 4), nn.ReLU(), nn.Linear(4, 1)),
            r"got '0.weight' missing there and \[4, 6\] here",
        ),
        "less": (nn.Sequential(), r"got 'fc1.weight' \[4, 6\] there and missing here"),
    }


@pytest.fixture
def state() -> dict[str, Any]:
    monitor = ff.FisherMonitor(mlp([DIM, 4, 1], seed=0), DATA, max_features=32)
    monitor.step(train_mse=0.5)
    return monitor.state_dict()


def assert_refused(monitor: ff.FisherMonitor, state: Any, message: str) -> None:
    """The error says what differs, and nothing has changed."""
    before = repr(monitor.state_dict())
    hooks = [len(m._forward_hooks) for m in monitor.model.modules()]
    with pytest.raises(ValueError, match=message):
        monitor.load_state_dict(state)
    assert repr(monitor.state_dict()) == before
    assert [len(m._forward_hooks) for m in monitor.model.modules()] == hooks


@pytest.mark.parametrize("case", ["width", "names", "less"])
def test_the_state_of_another_network_is_refused(state, case):
    """Catches two networks in one history; the message says what differs."""
    model, message = other_networks()[case]
    monitor = ff.FisherMonitor(model, DATA, max_features=32)
    assert_refused(monitor, state, f"state must be of the same network, {message}")


OTHER_SETTINGS = {
    "max_features": ({"max_features": 33}, "got max_features = 32 for 33"),
    "seed": ({"seed": 1}, "got seed = 0 for 1"),
    "folds": ({"settings": ff.Settings(folds=8)}, "got folds = 16 for 8"),
    "layers": ({"layers": ["fc1"]}, r"got layers = 'auto' for \['fc1'\]"),
    "target_scale": ({"target_scale": 2.0}, "got target_scale = 1.0 for 2.0"),
    "source": (
        {"data": PROBLEM.scored(0.0, 300)},
        r"got dtheta = \[0.2\] for \[\]",
    ),
    "dtheta": (
        {"data": PROBLEM.finite_difference(0.0, 0.1, 300)},
        r"got dtheta = \[0.2\] for \[0.1\]",
    ),
}


@pytest.mark.parametrize("case", OTHER_SETTINGS)
def test_the_state_of_other_settings_is_refused(state, case):
    """Catches a history of two scales: what was measured otherwise does not belong together."""
    changed, message = OTHER_SETTINGS[case]
    arguments = {"data": DATA, "max_features": 32} | changed
    monitor = ff.FisherMonitor(mlp([DIM, 4, 1], seed=0), **arguments)
    monitor.observe(torch.zeros(4))
    assert_refused(monitor, state, f"state must be of the same settings, {message}")
    monitor.close()


def test_the_state_of_other_parameters_is_refused():
    """Pathwise data have no dtheta that would tell: catches a history of J [2, 2] and [1, 1]."""
    model = mlp([DIM, 4, 2], seed=0)
    of_two = GaussianShift(torch.eye(DIM)[:, :2]).pathwise([0.0, 0.0], 300)
    state = ff.FisherMonitor(model, of_two, max_features=32).state_dict()
    monitor = ff.FisherMonitor(model, PROBLEM.pathwise(0.0, 300), max_features=32)
    assert_refused(monitor, state, "state must be of the same settings, got parameters = 2 for 1")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "state must be of a FisherMonitor, format 1, got None"),
        ({"format_version": 2}, "state must be of a FisherMonitor, format 1, got 2"),
        (None, "state must be of a FisherMonitor, format 1, got <class 'NoneType'>"),
        ([1], "state must be of a FisherMonitor, format 1, got <class 'list'>"),
    ],
)
def test_other_formats_are_refused(wrong, message):
    """Catches the state of something else, and of another version."""
    assert_refused(
        ff.FisherMonitor(mlp([DIM, 4, 1], seed=0), DATA, max_features=32), wrong, message
    )
