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
    "pathwise": lambda: ONE.pathwise(0.0, SAMPLES, seed=1),
    "score": lambda: ONE.scored(0.0, SAMPLES, seed=1),
    "simulator, pathwise": lambda: ff.Simulator(draw, 0.1, samples=SAMPLES),
    "simulator, paired": lambda: ff.Simulator(
        draw, 0.1, samples=SAMPLES, derivative="paired", dtheta=0.1
    ),
    "simulator, independent": lambda: ff.Simulator(
        draw, 0.1, samples=SAMPLES, derivative="independent", dtheta=0.1
    ),
    "loader": lambda: loaders(shuffle=False),
    "two, independent": lambda: TWO.finite_difference([0.0, 0.0], 0.2, SAMPLES, seed=1),
    "two, pathwise": lambda: TWO.pathwise([0.0, 0.0], SAMPLES, seed=1),
    "two, score": lambda: TWO.scored([0.0, 0.0], SAMPLES, seed=1),
}


def network(parameters: int = 1) -> nn.Module:
    return mlp([DIM, 8, parameters], seed=0)


def nudge(model: nn.Module) -> None:
    """What an epoch of training does to a network, as far as a measurement sees it."""
    with torch.no_grad():
        for order, parameter in enumerate(model.parameters()):
            parameter.mul_(1.1).add_(0.01 * (order + 1))


class Counter:
    """Counts forward passes."""

    def __init__(self, model: nn.Module) -> None:
        self.calls = 0
        model.register_forward_hook(self._count)

    def _count(self, *_given: object) -> None:
        self.calls += 1


# --- a measurement by the monitor is a measurement ------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_each_epoch_equals_a_flow_bit_for_bit(source):
    """Catches anything recalled that training changes, other samples, another lift, other folds."""
    data = SOURCES[source]()
    model = network(data.parameters)
    monitor = ff.FisherMonitor(model, data)
    for _ in range(3):
        flow = monitor.step().flow
        assert flow.to_dict() == ff.fisher_flow(model, data, max_features=128).to_dict()
        nudge(model)


def test_settings_and_layers_reach_the_measurement():
    """Catches an argument that the monitor takes and does not pass on."""
    settings = {"layers": ["fc2"], "max_features": 40, "seed": 5, "ridge": 1e-3}
    settings |= {"settings": ff.Settings(batch_size=128, folds=8)}
    model, data = network(), SOURCES["independent"]()
    monitor = ff.FisherMonitor(model, data, **settings)
    for _ in range(3):
        assert monitor.step().flow.to_dict() == ff.fisher_flow(model, data, **settings).to_dict()
        nudge(model)


def test_maps_are_kept_with_the_input():
    """Catches a second measurement without the map of the input."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 4, 1))
    x = torch.randn(2, 400, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    data = ff.FiniteDifference(x[0] - 0.04, x[1] + 0.04, dtheta=0.08)
    monitor = ff.FisherMonitor(model, data, settings=ff.Settings(maps=True))
    for _ in range(3):
        flow, once = (
            monitor.step().flow,
            ff.fisher_flow(model, data, max_features=128, settings=ff.Settings(maps=True)),
        )
        for name in ("input", "0"):
            assert torch.equal(flow.map(name).J, once.map(name).J)
        nudge(model)


def test_a_path_that_opens_later_is_seen():
    """A weight that begins at zero hides a path. Catches chains of the first epoch kept for good:
    they say that the output is a function of one branch alone, and `tightened` then bounds it."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(DIM, 4), nn.Linear(DIM, 4)
            self.gate, self.head = nn.Parameter(torch.zeros(())), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.left(x) + self.gate * self.right(x))

    model, data = Gated(), SOURCES["independent"]()
    monitor = ff.FisherMonitor(model, data)
    assert "output" in monitor.step().flow["left"].descendants
    with torch.no_grad():
        model.gate.fill_(1.0)
    for _ in range(3):
        flow = monitor.step().flow
        assert "output" not in flow["left"].descendants
        assert flow.to_dict() == ff.fisher_flow(model, data, max_features=128).to_dict()


# --- what is found out once -----------------------------------------------------------------------


def test_the_input_is_measured_once_and_layers_are_found_twice():
    """Catches a survey, a replay of chains or an input measured at every epoch."""
    model = network()
    counter = Counter(model)
    monitor = ff.FisherMonitor(model, SOURCES["paired"](), settings=ff.Settings(batch_size=100))
    passes, inputs = [], []
    for _ in range(4):
        before = counter.calls
        inputs.append(monitor.step().flow.layers[0])
        passes.append(counter.calls - before)
        nudge(model)
    batches = 2 * SAMPLES // 100
    assert passes[2:] == [2 * batches] * 2  # the pilot sees all of so few samples, and the pass
    assert passes[0] == passes[1] > passes[2]
    assert all(layer.J is inputs[0].J for layer in inputs)


@pytest.mark.parametrize("derivative", ["pathwise", "paired", "independent"])
def test_a_simulator_draws_once(derivative):
    """Catches samples drawn again at each measurement."""
    calls = 0

    def counting(theta, n, generator):
        nonlocal calls
        calls += 1
        return draw(theta, n, generator)

    step = None if derivative == "pathwise" else 0.1
    data = ff.Simulator(counting, 0.1, samples=SAMPLES, derivative=derivative, dtheta=step)
    model = network()
    monitor = ff.FisherMonitor(model, data)
    monitor.step()
    first = calls
    nudge(model)
    monitor.step()
    assert first > 0
    assert calls == first
    again = ff.FisherMonitor(model, data, keep=0)
    flows = []
    for _ in range(2):
        before = calls
        flows.append(again.step().flow.to_dict())
        assert calls > before
    assert flows[0] == flows[1] == monitor.history[1].flow.to_dict()


def test_a_loader_that_shuffles_gives_the_same_samples():
    """Catches differences between epochs that are those of the samples."""
    model, data = network(), loaders(shuffle=True)
    monitor = ff.FisherMonitor(model, data)
    flows = [monitor.step().flow.to_dict() for _ in range(3)]
    assert flows[0] == flows[1] == flows[2]
    assert ff.fisher_flow(model, data, max_features=128).to_dict() != flows[0]  # the test's power


@pytest.mark.parametrize("keep", [0, 1000])
def test_what_is_not_kept_is_read_and_measured_again(keep):
    """Catches the input of other samples beside layers of these."""
    torch.manual_seed(0)
    model = network()
    monitor = ff.FisherMonitor(model, loaders(shuffle=True), keep=keep)
    inputs = [monitor.step().flow["input"].value for _ in range(2)]
    assert inputs[0] != inputs[1]


@pytest.mark.parametrize(("every", "measured"), [(1, range(7)), (2, [0, 2, 4, 6]), (3, [0, 3, 6])])
def test_every_nth_call_measures(every, measured):
    """Catches a measurement that is due one call early or late."""
    monitor = ff.FisherMonitor(network(), SOURCES["independent"](), every=every)
    records = [monitor.step(train_mse=0.3) for _ in range(7)]
    assert [r.epoch for r in records if r.flow is not None] == list(measured)
    assert [r.epoch for r in monitor.history] == list(range(7))
    assert all(not math.isnan(r.train_level) for r in records)  # with J of the last measurement


def test_calls_with_nothing_to_record_count():
    """Catches calls that leave empty rows, or do not count towards the next measurement."""
    monitor = ff.FisherMonitor(network(), SOURCES["independent"](), every=3)
    records = [monitor.step(epoch=call) for call in range(7)]
    assert [call for call, record in enumerate(records) if record is not None] == [0, 3, 6]
    assert [record.epoch for record in monitor.history] == [0, 3, 6]


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("healthy_first", [True, False])
def test_nan_weights_leave_a_record_and_the_next_measurement_works(healthy_first):
    """Catches an exception in a training, a warning per epoch, and what a broken network taught."""
    model, data = network(), SOURCES["independent"]()
    monitor = ff.FisherMonitor(model, data)
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
        flow = monitor.step(train_mse=0.2).flow
        assert flow.to_dict() == ff.fisher_flow(model, data, max_features=128).to_dict()


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_an_error_that_is_not_finite_is_noted(error):
    """Catches a NaN loss that stops the training, or is taken for a targets' unit."""
    monitor = ff.FisherMonitor(network(), SOURCES["independent"]())
    with pytest.warns(ff.FisherWarning, match="mean square errors must be finite, got") as caught:
        record = monitor.step(train_mse=error, val_mse=0.5)
    assert len(caught) == 1
    assert record.flow is not None
    assert not record.train_level <= 1
    assert record.val_level == pytest.approx(0.5 * record.flow["input"].value)
    assert monitor.step(train_mse=error).notes


def test_an_error_of_the_caller_records_nothing():
    """Catches a call that counts although it failed."""
    model, data = network(), SOURCES["independent"]()
    monitor = ff.FisherMonitor(model, data, every=2)
    with pytest.raises(ValueError, match="train_mse must be a mean square error, at least 0, got"):
        monitor.step(train_mse=-1.2)
    assert monitor.history == []
    assert monitor.step().flow is not None  # the first call that goes through measures


BAD_ERRORS = {
    "words": ("low", TypeError, "must be a number or one per parameter, got 'low'"),
    "two": ([0.1, 0.2], ValueError, r"must hold one number per parameter \(1\), got"),
    "none": ([], ValueError, r"must hold one number per parameter \(1\), got"),
    "negative": (-0.1, ValueError, r"must be a mean square error, at least 0, got -0.1"),
}


@pytest.mark.parametrize("name", ["train_mse", "val_mse"])
@pytest.mark.parametrize("case", BAD_ERRORS)
def test_bad_errors_are_refused(name, case):
    """Catches errors that would be recorded and be wrong for the whole run."""
    value, kind, message = BAD_ERRORS[case]
    monitor = ff.FisherMonitor(network(), SOURCES["independent"]())
    with pytest.raises(kind, match=f"{name} {message}"):
        monitor.step(**{name: value})


@pytest.mark.parametrize(
    "value", [0.25, np.float32(0.25), torch.tensor(0.25), torch.tensor([0.25], requires_grad=True)]
)
def test_errors_may_be_any_kind_of_number(value):
    """Catches tensors and numpy numbers that are refused or rounded."""
    monitor = ff.FisherMonitor(network(), SOURCES["independent"]())
    assert monitor.step(train_mse=value).train_mse == (0.25,)


BAD_ARGUMENTS = {
    "every 0": ({"every": 0}, ValueError, "every must be at least 1, got 0"),
    "every -1": ({"every": -1}, ValueError, "every must be at least 1, got -1"),
    "every 1.5": ({"every": 1.5}, TypeError, "every must be a whole number, got 1.5"),
    "every True": ({"every": True}, TypeError, "every must be a whole number, got True"),
    "observe_every": ({"observe_every": 0}, ValueError, "observe_every must be at least 1, got 0"),
    "keep": ({"keep": -1}, ValueError, "keep must be at least 0, got -1"),
    "scale 0": ({"target_scale": 0.0}, ValueError, "target_scale must be finite and not 0, got 0"),
    "scale nan": ({"target_scale": math.nan}, ValueError, "target_scale must be finite and not 0"),
    "scale text": ({"target_scale": "1"}, TypeError, "target_scale must be a number, got '1'"),
    "path": ({"path": "history.txt"}, ValueError, "path must end in .csv, got 'history.txt'"),
    "grow": (
        {"settings": ff.Settings(grow=True)},
        ValueError,
        "grow must be False for a monitor, which compares the same features",
    ),
    "data": ({"data": torch.zeros(3)}, TypeError, "data must be a FiniteDifference, Pathwise"),
    "model": ({"model": torch.relu}, TypeError, "model must be a torch.nn.Module, got builtin"),
    "training data": ({"training_data": 3}, TypeError, "data must be a FiniteDifference"),
    "training parameters": (
        {"training_data": SOURCES["two, independent"]()},
        ValueError,
        "training_data must have 1 parameters like data, got 2",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(case):
    """Catches settings that are found out in the middle of a training."""
    changed, kind, message = BAD_ARGUMENTS[case]
    arguments = {"model": network(), "data": SOURCES["independent"]()} | changed
    with pytest.raises(kind, match=message):
        ff.FisherMonitor(**arguments)


@pytest.mark.parametrize("epoch", [True, 1.5, "3"])
def test_epochs_are_whole_numbers(epoch):
    """Catches an epoch that no later one can be counted on from."""
    monitor = ff.FisherMonitor(network(), SOURCES["independent"]())
    with pytest.raises(TypeError, match="epoch must be a whole number, got"):
        monitor.step(epoch=epoch)


def test_no_samples_are_refused():
    """Catches a measurement of nothing."""
    with pytest.raises(ValueError, match="got"):
        ff.FisherMonitor(
            network(), ff.FiniteDifference(torch.empty(0, DIM), torch.empty(0, DIM), dtheta=0.1)
        ).step()


# --- levels and the meter of overfitting ----------------------------------------------------------


def test_levels_are_errors_in_units_of_the_bound():
    """Catches J of another layer or epoch, and a scale of the targets that is not squared."""
    monitor = ff.FisherMonitor(network(), SOURCES["independent"](), target_scale=-0.5)
    record = monitor.step(train_mse=0.8, val_mse=1.2)
    J = record.flow["input"].value
    assert record.train_level == pytest.approx(0.8 / 4 * J)
    assert record.val_level == pytest.approx(1.2 / 4 * J)
    assert record.transmission == record.flow.fractions()["output"]
    assert record.transmission_error == record.flow.fraction_errors()["output"]


def test_levels_of_two_parameters():
    """Mean of mse_p / (J^-1)_pp. Catches mse_p J_pp, which takes the other parameter as known."""
    monitor = ff.FisherMonitor(network(2), SOURCES["two, pathwise"]())
    record = monitor.step(train_mse=[0.3, 0.6])
    J = record.flow["input"].J
    bound = torch.linalg.inv(J).diagonal()
    assert record.train_level == pytest.approx(float((0.3 / bound[0] + 0.6 / bound[1]) / 2))
    assert record.train_level != pytest.approx(float((0.3 * J[0, 0] + 0.6 * J[1, 1]) / 2), rel=0.01)


def test_a_bound_that_is_not_positive_gives_no_level():
    """An input whose J comes out negative says nothing. Catches a level below 1, which would stop
    the training."""
    record = ff.EpochRecord(0, None, (0.3,), (0.3,), torch.tensor([[-2.0]], dtype=torch.float64))
    assert math.isnan(record.train_level)


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ff.FisherWarning)  # the step is wide on purpose
            record = ff.FisherMonitor(
                model, held_out, layers=["output"], max_features=64, training_data=trained_on
            ).step()
        assert record.row()["overfitting"] == record.overfitting
        assert record.training_flow.names == ["input", "output"]
        error = math.hypot(
            record.transmission_error, record.training_flow.fraction_errors()["output"]
        )
        found[name] = record.overfitting / error
    assert found["memory"] > 8
    assert abs(found["none"]) < 4


def test_overfitting_is_unknown_without_training_data():
    """Catches a zero that nobody has measured."""
    assert math.isnan(ff.FisherMonitor(network(), SOURCES["paired"]()).step().overfitting)


def test_plot_and_rows_of_a_run_that_was_not_measured_every_time():
    """Catches a figure that needs a flow in each record, and rows that share their memory."""
    pytest.importorskip("matplotlib")
    monitor = ff.FisherMonitor(network(), SOURCES["independent"](), every=2)
    for level in (0.5, 0.4, 0.3):
        monitor.step(train_mse=level, val_mse=level)
    labels = [text.get_text() for text in monitor.plot().get_legend().get_texts()]
    assert "training MSE $\\times$ J$_{input}$" in labels
    rows = monitor.rows()
    rows[0]["epoch"] = "changed"
    assert [row["epoch"] for row in monitor.rows()] == [0, 1, 2]
    assert [math.isnan(row["transmission"]) for row in rows] == [False, True, False]


def test_compiled_and_wrapped_networks_are_measured_inside():
    """Catches names with a wrapper's prefix, and a network that is compiled again."""
    model, data = network(), SOURCES["independent"]()
    once = ff.fisher_flow(model, data, max_features=128)
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        monitor = ff.FisherMonitor(wrapped, data)
        assert monitor.model is model
        assert monitor.step().flow.to_dict() == once.to_dict()
