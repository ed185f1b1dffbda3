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
            # the first and the last are NaN: one warning
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

SAME = {"model": mlp([DIM, 4, 1], seed=0), "data": DATA, "max_features": 32}
NETWORK, SETTINGS = "state must be of the same network, ", "state must be of the same settings, "
FORMAT = "state must be of a FisherMonitor, format 1, got "
OF_TWO = GaussianShift(torch.eye(DIM)[:, :2]).pathwise([0.0, 0.0], 300)
FINER = PROBLEM.finite_difference(0.0, 0.1, 300)


@pytest.mark.parametrize(
    ("message", "there", "here"),
    [
        (
            f"{NETWORK}got 'fc1.weight' [4, 6] there and [5, 6] here",
            {},
            {"model": mlp([DIM, 5, 1])},
        ),
        (
            f"{NETWORK}got '0.weight' missing there and [4, 6] here",
            {},
            {"model": nn.Sequential(nn.Linear(DIM, 4))},
        ),
        (
            f"{NETWORK}got 'fc1.weight' [4, 6] there and missing here",
            {},
            {"model": nn.Sequential()},
        ),
        (f"{SETTINGS}got max_features = 32 for 33", {}, {"max_features": 33}),
        (f"{SETTINGS}got layers = 'auto' for ['fc1']", {}, {"layers": ["fc1"]}),
        (f"{SETTINGS}got target_scale = 1.0 for 2.0", {}, {"target_scale": 2.0}),
        (f"{SETTINGS}got dtheta = [0.2] for [0.1]", {}, {"data": FINER}),
        # pathwise data have no dtheta that would differ
        (
            f"{SETTINGS}got parameters = 2 for 1",
            {"model": mlp([DIM, 4, 2]), "data": OF_TWO},
            {"model": mlp([DIM, 4, 2]), "data": PROBLEM.pathwise(0.0, 300)},
        ),
        (f"{FORMAT}2", {"format_version": 2}, {}),
        (f"{FORMAT}<class 'NoneType'>", None, {}),
    ],
)
def test_the_state_of_another_run_is_refused(message, there, here):
    """Catches two networks, or two scales, in one history, and the state of something else. The
    error says what differs, and nothing has changed."""
    state: Any = there
    if there is not None and "format_version" not in there:
        other = ff.FisherMonitor(**(SAME | there))
        other.step(train_mse=[0.5] * other.data.parameters)
        state = other.state_dict()
    monitor = ff.FisherMonitor(**(SAME | here))
    monitor.observe(torch.zeros(4, monitor.data.parameters))
    before = repr(monitor.state_dict())
    hooks = [len(m._forward_hooks) for m in monitor.model.modules()]
    with pytest.raises(ValueError, match=re.escape(message)):
        monitor.load_state_dict(state)
    assert repr(monitor.state_dict()) == before
    assert [len(m._forward_hooks) for m in monitor.model.modules()] == hooks
    monitor.close()
