"""The monitor against single measurements: reuse, cadence, failures, and what is the user's."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherfast as ff
from fisherfast.problems import GaussianShift, mlp

DIM = 6
ONE = GaussianShift(torch.ones(DIM))
TWO = GaussianShift(torch.eye(DIM)[:, :2] + 0.5)
SAMPLES = 400
MANY = 10 * SAMPLES  # independent conditions that resolve J of the input


def draw(theta, n, generator):
    return torch.tanh(theta.sum() + torch.randn(n, DIM, generator=generator))


def loaders(*, shuffle: bool) -> ff.FiniteDifference:
    sides = [side for (side,) in ONE.conditions(0.0, 0.2, SAMPLES, seed=1)]
    generator = torch.Generator().manual_seed(1)  # of its own: measurements seed torch's
    settings = {"batch_size": 100, "shuffle": shuffle, "generator": generator}
    sources = [DataLoader(TensorDataset(side), **settings) for side in sides]
    return ff.FiniteDifference(*sources, dtheta=0.2)


SOURCES = {
    "independent": lambda: ONE.finite_difference(0.0, 0.2, MANY, seed=1),
    "paired": lambda: ONE.finite_difference(0.0, 0.2, SAMPLES, seed=1, paired=True),
    "score": lambda: ONE.scored(0.0, SAMPLES, seed=1),
    "simulator": lambda: ff.Simulator(draw, 0.1, samples=SAMPLES),
    "loader": lambda: loaders(shuffle=False),
    "two, pathwise": lambda: TWO.pathwise([0.0, 0.0], SAMPLES, seed=1),
}
OWN = {"layers": ["fc2"], "max_features": 40, "seed": 5, "ridge": 1e-3}
OWN |= {"settings": ff.Settings(batch_size=128, folds=8)}
SMALL = {"max_features": 16}
MAPPED = SMALL | {"settings": ff.Settings(maps=True)}
PAIRED = SOURCES["paired"]()


def network(parameters: int = 1) -> nn.Module:
    return mlp([DIM, 8, parameters], seed=0)


def nudge(model: nn.Module) -> None:
    """What an epoch of training does to a network, as far as a measurement sees it."""
    with torch.no_grad():
        for order, parameter in enumerate(model.parameters()):
            parameter.mul_(1.1).add_(0.01 * (order + 1))


# --- a measurement by the monitor is a measurement ------------------------------------------------


def assert_same_flow(flow: ff.FisherFlow, model: nn.Module, data: object, **settings) -> None:
    once = ff.fisher_flow(model, data, **({"max_features": 128} | settings))
    assert flow.to_dict() == once.to_dict()


@pytest.mark.parametrize(
    ("source", "settings"),
    [*((s, SMALL) for s in SOURCES), ("paired", {}), ("two, pathwise", OWN), ("images", MAPPED)],
)
def test_each_epoch_equals_a_flow_bit_for_bit(source, settings):
    """Catches anything recalled that training changes, other samples, another lift, other folds,
    an argument that the monitor takes and does not pass on, and a second measurement without the
    map of the input."""
    if source == "images":
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 4, 1))
        x = torch.randn(2, 200, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        data = ff.FiniteDifference(x[0] - 0.04, x[1] + 0.04, dtheta=0.08)
    else:
        data = SOURCES[source]()
        model = network(data.parameters)
    monitor = ff.FisherMonitor(model, data, **settings)
    for _ in range(3):
        flow = monitor.step().flow
        assert_same_flow(flow, model, data, **settings)
        nudge(model)
    assert set(flow.maps) == ({"input", "0", "1"} if source == "images" else set())


def test_a_path_that_opens_later_is_seen():
    """A weight that begins at zero hides a path. Catches paths that are found by values: they say
    that the output is a function of one branch alone, and `tightened` then bounds it."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(DIM, 4), nn.Linear(DIM, 4)
            self.gate, self.head = nn.Parameter(torch.zeros(())), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.left(x) + self.gate * self.right(x))

    model, data = Gated(), PAIRED
    monitor = ff.FisherMonitor(model, data, **SMALL)
    assert "output" not in monitor.step().flow["left"].descendants
    with torch.no_grad():
        model.gate.fill_(1.0)
    for _ in range(3):
        flow = monitor.step().flow
        assert "output" not in flow["left"].descendants
        assert_same_flow(flow, model, data, **SMALL)


# --- what is found out once -----------------------------------------------------------------------


def test_input_and_layers_are_found_once():
    """Catches a survey or an input measured at every epoch; the model is followed in one pass."""
    model, calls = network(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    monitor = ff.FisherMonitor(model, PAIRED, **SMALL, settings=ff.Settings(batch_size=100))
    passes, inputs = [], []
    for _ in range(4):
        calls.clear()
        inputs.append(monitor.step().flow.layers[0])
        passes.append(len(calls))
        nudge(model)
    batches = 2 * SAMPLES // 100
    assert passes[1:] == [2 * batches + 1] * 3  # the pilot sees all of so few samples as well
    assert passes[0] == passes[1] + 2
    assert all(layer.J is inputs[0].J for layer in inputs)


def test_a_simulator_draws_once():
    """Catches samples drawn again at each measurement, and other ones where they are not kept."""
    drawn = []

    def counting(theta, n, generator):
        drawn.append(n)
        return draw(theta, n, generator)

    data, model = ff.Simulator(counting, 0.1, samples=SAMPLES), network()
    flows = []
    for keep, again in (({}, False), ({"keep": 0}, True)):
        monitor = ff.FisherMonitor(model, data, **SMALL, **keep)
        flows.append(monitor.step().flow.to_dict())
        drawn.clear()
        flows.append(monitor.step().flow.to_dict())
        assert bool(drawn) is again
    assert flows[0] == flows[1] == flows[2] == flows[3]


def test_a_loader_that_shuffles_gives_the_same_samples():
    """Catches differences between epochs that are those of the samples; and, of samples that are
    not kept, the input of others beside layers of these."""
    model, data = network(), loaders(shuffle=True)
    monitor = ff.FisherMonitor(model, data, **SMALL)
    flows = [monitor.step().flow.to_dict() for _ in range(3)]
    assert flows[0] == flows[1] == flows[2]
    assert ff.fisher_flow(model, data, **SMALL).to_dict() != flows[0]  # the test's power
    for keep in (0, 1000):
        monitor = ff.FisherMonitor(model, data, **SMALL, keep=keep)
        inputs = [monitor.step().flow["input"].value for _ in range(2)]
        assert inputs[0] != inputs[1]


def test_every_nth_call_measures():
    """Catches a measurement that is due one call early or late, calls that leave empty rows, or do
    not count towards the next measurement, and an overfitting of zero without training data."""
    monitor = ff.FisherMonitor(network(), PAIRED, **SMALL, every=3)
    records = [monitor.step(epoch=c, train_mse=0.3 if c < 3 else None) for c in range(7)]
    measured = [c for c, record in enumerate(records) if record and record.flow is not None]
    assert measured == [0, 3, 6]
    assert [record.epoch for record in monitor.history] == [0, 1, 2, 3, 6]
    assert all(record.train_level > 0 for record in monitor.history[:3])  # J of the last flow
    assert monitor.step(train_mse=0.3).epoch == 7
    rows = monitor.rows()
    assert [math.isnan(row["transmission"]) for row in rows] == [
        False,
        True,
        True,
        False,
        False,
        True,
    ]
    assert all(math.isnan(row["overfitting"]) for row in rows)


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("healthy_first", [True, False])
def test_nan_weights_leave_a_record_and_the_next_measurement_works(healthy_first):
    """Catches an exception in a training, a warning per epoch, and results of a
    broken network that are used again."""
    model = network()
    monitor = ff.FisherMonitor(model, PAIRED, **SMALL)
    if healthy_first:
        monitor.step()
    healthy = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.fc1.weight.fill_(math.nan)
    with pytest.warns(ff.FisherWarning, match="not measured: activations of layer 'fc1' must be"):
        record = monitor.step(train_mse=0.3)
    assert record.flow is None
    assert math.isnan(record.transmission)
    assert math.isnan(record.train_level) is not healthy_first
    assert "not measured" in record.notes[0]
    assert monitor.step(train_mse=0.2).notes  # no second warning: they are errors here
    model.load_state_dict(healthy)
    for _ in range(2):
        assert_same_flow(monitor.step(train_mse=0.2).flow, model, PAIRED, **SMALL)


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_an_error_that_is_not_finite_is_noted(error):
    """Catches a NaN loss that stops the training, or is taken for a targets' unit."""
    monitor = ff.FisherMonitor(network(), PAIRED, **SMALL)
    with pytest.warns(ff.FisherWarning, match="mean square errors must be finite, got") as caught:
        record = monitor.step(train_mse=error, val_mse=0.5)
    assert len(caught) == 1
    assert record.flow is not None
    assert not record.train_level <= 1
    assert record.val_level == pytest.approx(0.5 * record.flow["input"].value)
    assert monitor.step(train_mse=error).notes


BAD_STEPS = [
    ("low", TypeError, "must be a number or one per parameter, got 'low'"),
    ([0.1, 0.2], ValueError, r"must hold one number per parameter \(1\), got"),
    ([], ValueError, r"must hold one number per parameter \(1\), got"),
    (-0.1, ValueError, r"must be a mean square error, at least 0, got -0.1"),
]


def test_what_a_step_takes():
    """Catches errors that would be recorded and be wrong for the whole run, an epoch that no later
    one can be counted on from, a call that counts although it failed; and tensors and numpy numbers
    that are refused or rounded."""
    monitor = ff.FisherMonitor(network(), PAIRED, **SMALL, every=9)
    for name in ("train_mse", "val_mse"):
        for value, kind, message in BAD_STEPS:
            with pytest.raises(kind, match=f"{name} {message}"):
                monitor.step(**{name: value})
    with pytest.raises(TypeError, match=r"epoch must be a whole number, got 1\.5"):
        monitor.step(epoch=1.5)
    assert monitor.history == []
    wanting = torch.tensor([0.25], requires_grad=True)
    records = [monitor.step(train_mse=v) for v in (0.25, np.float32(0.25), wanting[0], wanting)]
    assert [record.train_mse for record in records] == [(0.25,)] * 4
    assert records[0].flow is not None  # the first call that goes through measures


BAD_ARGUMENTS = [
    ("every must be at least 1, got 0", {"every": 0}),
    ("every must be a whole number, got 1.5", {"every": 1.5}),
    ("observe_every must be at least 1, got 0", {"observe_every": 0}),
    ("keep must be at least 0, got -1", {"keep": -1}),
    ("target_scale must be finite and not 0, got 0", {"target_scale": 0.0}),
    ("target_scale must be finite and not 0", {"target_scale": math.nan}),
    ("target_scale must be a number, got '1'", {"target_scale": "1"}),
    ("path must end in .csv, got 'history.txt'", {"path": "history.txt"}),
    ("grow must be False for a monitor", {"settings": ff.Settings(grow=True)}),
    ("data must be a FiniteDifference, Pathwise", {"data": torch.zeros(3)}),
    ("model must be a torch.nn.Module, got builtin", {"model": torch.relu}),
    ("data must be a FiniteDifference", {"training_data": 3}),
    ("must have 1 parameters like data, got 2", {"training_data": SOURCES["two, pathwise"]()}),
]


@pytest.mark.parametrize(("message", "changed"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(message, changed):
    """Catches settings that are found out in the middle of a training."""
    with pytest.raises((TypeError, ValueError), match=message):
        ff.FisherMonitor(**({"model": network(), "data": PAIRED} | changed))


# --- levels and the meter of overfitting ----------------------------------------------------------


def test_levels_are_errors_in_units_of_the_bound():
    """Catches J of another layer or epoch, and a scale of the targets that is not squared."""
    monitor = ff.FisherMonitor(network(), PAIRED, **SMALL, target_scale=-0.5)
    record = monitor.step(train_mse=0.8, val_mse=1.2)
    J = record.flow["input"].value
    assert record.train_level == pytest.approx(0.8 / 4 * J)
    assert record.val_level == pytest.approx(1.2 / 4 * J)
    assert record.transmission == record.flow.fractions()["output"]
    assert record.transmission_error == record.flow.fraction_errors()["output"]


def test_levels_of_two_parameters():
    """Mean of mse_p / (J^-1)_pp. Catches mse_p J_pp, which takes the other parameter as known; and
    of a J that came out negative, a level below 1, which would stop the training."""
    monitor = ff.FisherMonitor(network(2), SOURCES["two, pathwise"](), **SMALL)
    record = monitor.step(train_mse=[0.3, 0.6])
    J = record.flow["input"].J
    bound = torch.linalg.inv(J).diagonal()
    assert record.train_level == pytest.approx(float((0.3 / bound[0] + 0.6 / bound[1]) / 2))
    assert record.train_level != pytest.approx(float((0.3 * J[0, 0] + 0.6 * J[1, 1]) / 2), rel=0.01)
    negative = torch.tensor([[-2.0]], dtype=torch.float64)
    assert math.isnan(ff.EpochRecord(0, None, (0.3,), (0.3,), negative).train_level)


def memorised(x: torch.Tensor, target: torch.Tensor) -> nn.Module:
    """A wide network trained on few samples until it knows them."""
    model = mlp([x.shape[1], 200, 1], seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x)[:, 0], target).backward()
        optimizer.step()
    return model


def test_overfitting_shows_memory_and_nothing_else():
    """By the standard errors of both measurements: a memoriser is more than eight above zero, its
    untrained twin within four (false alarm 6e-5). Catches a meter that sees no training samples, or
    compares other layers."""
    problem = GaussianShift(0.2 * torch.ones(60))
    x = torch.cat([side for (side,) in problem.conditions(0.0, 1.0, 250, seed=1)])
    side = torch.tensor([-0.5, 0.5]).repeat_interleave(250)
    trained_on = ff.FiniteDifference(x[:250], x[250:], dtheta=1.0)
    held_out = problem.finite_difference(0.0, 1.0, 4000, seed=2)
    found = {}
    for name, model in (("memory", memorised(x, side)), ("none", mlp([60, 200, 1], seed=0))):
        options = {"layers": ["output"], "max_features": 64, "training_data": trained_on}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ff.FisherWarning)  # the step is wide on purpose
            record = ff.FisherMonitor(model, held_out, **options).step()
        assert record.row()["overfitting"] == record.overfitting
        assert record.training_flow.names == ["input", "output"]
        error = record.training_flow.fraction_errors()["output"]
        found[name] = record.overfitting / math.hypot(record.transmission_error, error)
    assert found["memory"] > 8
    assert abs(found["none"]) < 4
