"""`FisherEarlyStopping`: weights that are kept and put back, resumed runs, errors, warnings."""

from __future__ import annotations

import io
import logging
import math
import re
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from support.training_histories import by_errors, by_shares
from torch import nn

import fisherfast as ff
from fisherfast.training.record import EpochRecord, Stop

NAN = math.nan


@dataclass
class Replay:
    """What the stopping sees of a monitor: records that come one by one, and a model."""

    model: nn.Module
    history: list[EpochRecord] = field(default_factory=list)
    leads: bool = True
    stop: Stop | None = None


def network(seed: int = 0) -> nn.Module:
    """Weights, a bias, and a buffer that changes in training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def train_a_little(model: nn.Module, epoch: int) -> None:
    """Changes every parameter and buffer, in place."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value += epoch + 1


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def run(
    stopping: ff.FisherEarlyStopping, records: list[EpochRecord], monitor: Replay | None = None
) -> tuple[Replay, list[dict[str, torch.Tensor]]]:
    """Train until the stop. Returns the monitor, and the weights after each epoch."""
    monitor, weights = monitor or Replay(network()), []
    for record in records:
        train_a_little(monitor.model, len(monitor.history))
        weights.append(state_of(monitor.model))
        monitor.history.append(record)
        if stopping.step(monitor):
            break
    return monitor, weights


def through_a_file(stopping: ff.FisherEarlyStopping, fresh: ff.FisherEarlyStopping):
    """The state goes to another object, through a file that holds weights only."""
    file = io.BytesIO()
    torch.save(stopping.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def falling() -> ff.FisherEarlyStopping:
    """Stops when the share falls."""
    return ff.FisherEarlyStopping(ff.Transmission(plateau=1, tolerance=0.0))


# --- weights --------------------------------------------------------------------------------------


def test_restores_the_best_weights_exactly_and_once():
    """The largest share is in epoch 2. Catches the weights of the last epoch, copies that share
    memory with the model, buffers that are forgotten, a model whose parameters are replaced (an
    optimizer holds them), and weights that are put back again, over what a user did since."""
    stopping = ff.FisherEarlyStopping(ff.Transmission(plateau=2, tolerance=0.0))
    monitor = Replay(network())
    before = list(map(id, monitor.model.parameters()))
    _, weights = run(stopping, by_shares([0.2, 0.5, 0.8, 0.7, 0.6, 0.5]), monitor)
    assert (stopping.stopped_epoch, stopping.best_epoch) == (4, 2)
    assert same(monitor.model.state_dict(), weights[2])
    assert list(map(id, monitor.model.parameters())) == before
    train_a_little(monitor.model, 7)
    kept = state_of(monitor.model)
    monitor.history += by_shares([0.9])
    assert stopping.step(monitor)
    assert stopping.stopped_epoch == 4
    assert same(monitor.model.state_dict(), kept)


def test_restore_best_may_be_left_out():
    """Catches weights that change although they should not."""
    stopping = ff.FisherEarlyStopping(ff.Transmission(plateau=2), restore_best=False)
    monitor, weights = run(stopping, by_shares([0.2, 0.8, 0.5, 0.5]))
    assert same(monitor.model.state_dict(), weights[3])
    assert stopping.best_epoch == 1


def test_crlb_with_patience_and_margin_restores_the_crossing():
    """Below 0.9 / J in epoch 1, stopped in 3. Catches the weights of the stop, and an argument that
    is checked and not passed on."""
    stopping = ff.FisherEarlyStopping("crlb", patience=np.int64(2), min_delta=0.1)
    monitor, weights = run(stopping, by_errors([0.24, 0.22, 0.22, 0.22, 0.22]))
    assert (stopping.stopped_epoch, stopping.best_epoch) == (3, 1)
    assert same(monitor.model.state_dict(), weights[1])
    assert stopping.reason.startswith("stopped after epoch 3, best epoch 1: training error at 0.88")
    assert "1 / J_input in epoch 1" in stopping.reason


@pytest.mark.parametrize("value", [NAN, math.inf])
@pytest.mark.parametrize("name", ["train_mse", "val_mse"])
@pytest.mark.parametrize("rule", ["crlb", "transmission"])
def test_an_error_that_is_not_finite_stops(rule, name, value):
    """Catches a training that goes on with NaN, one that stops with NaN weights, a reason that
    does not say so, and a check inside of one rule."""
    records = by_errors([0.5, 0.4, 0.3]) if rule == "crlb" else by_shares([0.3, 0.6, 0.5])
    records[2] = replace(records[2], **{name: (value,)})
    stopping = ff.FisherEarlyStopping(rule)
    monitor, weights = run(stopping, records)
    assert (stopping.stopped_epoch, stopping.best_epoch) == (2, 1)
    assert f"error became {value} in epoch 2" in stopping.reason
    assert same(monitor.model.state_dict(), weights[1])


def test_step_twice_in_an_epoch_changes_nothing():
    """Catches patience that counts calls."""
    stopping = ff.FisherEarlyStopping(ff.Transmission(plateau=2))
    monitor = Replay(network(), by_shares([0.8, 0.5]))
    assert [stopping.step(monitor) for _ in range(5)] == [False] * 5


def test_several_records_of_one_epoch():
    """Measured within epoch 0 after each of three parts: the best is the last of them. Catches
    weights that are kept once per number of an epoch, which are those of the first part."""
    stopping = falling()
    records = [replace(record, epoch=0) for record in by_shares([0.2, 0.5, 0.8, 0.5])]
    monitor, weights = run(stopping, records)
    assert stopping.stopped_epoch == 0
    assert not same(weights[2], weights[0])
    assert same(monitor.model.state_dict(), weights[2])


def test_weights_never_seen_are_told():
    """A stopping that begins late cannot know the best weights. Catches silence."""
    monitor = Replay(network(), by_shares([0.2, 0.8, 0.5]))
    stopping = ff.FisherEarlyStopping(ff.Transmission(plateau=2))
    assert not stopping.step(monitor)
    monitor.history += [replace(by_shares([0.4])[0], epoch=3)]
    kept = state_of(monitor.model)
    with pytest.warns(ff.FisherWarning, match="weights of the best epoch 1 were not seen"):
        assert stopping.step(monitor)
    assert same(monitor.model.state_dict(), kept)


@pytest.mark.parametrize("leads", [True, False])
def test_a_stop_is_one_line_and_known_to_the_monitor(leads, caplog):
    """Catches a stop without a word, a line per later call or per rank, a level that Python hides
    where no handler is configured (INFO), and a figure that cannot know which rule ran."""
    stopping = ff.FisherEarlyStopping("crlb", patience=1)
    monitor = Replay(network(), leads=leads)
    run(stopping, by_errors([0.5, 0.24, 0.23]), monitor)
    assert stopping.step(monitor)
    lines = [(entry.name, entry.levelno, entry.getMessage()) for entry in caplog.records]
    assert lines == [("fisherfast", logging.WARNING, stopping.reason)] * leads
    assert "\n" not in stopping.reason
    assert monitor.stop == Stop("crlb", 2, 1, stopping.reason)


def test_a_plain_script_shows_the_line(monkeypatch, capsys):
    """No logging is configured: one line on stderr. Catches a print, a handler of our own, and a
    line of a process whose record another one has measured."""
    monkeypatch.setattr(logging.root, "handlers", [])
    for adopts in (False, True):
        monitor, stopping = monitor_of(4000), ff.FisherEarlyStopping("crlb")
        record = monitor.step(train_mse=1e-3)
        if adopts:
            monitor = monitor_of(4000)
            monitor.adopt(record)
        assert stopping.step(monitor)
        assert repr(monitor).splitlines()[-1] == stopping.reason
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == ("", "" if adopts else f"{stopping.reason}\n")


# --- resumed runs ---------------------------------------------------------------------------------

RESUMED = {
    "crlb": ("crlb", 3, by_errors([0.5, 0.3, 0.2, 0.2, 0.2, 0.2, 0.1])),
    "transmission": (ff.Transmission(plateau=3), 1, by_shares([0.2, 0.5, 0.8, 0.7, 0.6, 0.5, 0.4])),
}


@pytest.mark.parametrize("cut", [1, 3, 5])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_goes_on_bit_for_bit(name, cut):
    """Broken after `cut` epochs. Catches best weights that are lost (the model of the resumed run
    is another one until the stop), counters that begin anew, and a saved state that the training
    goes on changing."""
    rule, patience, records = RESUMED[name]
    whole, first, second = (ff.FisherEarlyStopping(rule, patience=patience) for _ in range(3))
    unbroken, weights = run(whole, records)
    monitor, _ = run(first, records[:cut])
    state = first.state_dict()
    before = repr(state)
    second = through_a_file(first, second)
    run(first, records[cut:], monitor)
    assert repr(state) == before
    monitor = Replay(network(seed=1), list(records[:cut]))
    monitor.model.load_state_dict(weights[cut - 1])
    run(second, records[cut:], monitor)
    assert (second.stopped_epoch, second.best_epoch) == (whole.stopped_epoch, whole.best_epoch)
    assert second.reason == whole.reason
    assert same(monitor.model.state_dict(), unbroken.model.state_dict())


class Versioned(nn.Linear):
    """A module that changed the meaning of its weights, as its version tells."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = -state_dict[f"{prefix}weight"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


@pytest.mark.parametrize("resumed", [False, True])
def test_weights_keep_the_versions_of_their_modules(resumed):
    """Catches weights that are put back as those of an old version (negated here), also through a
    file."""
    stopping, records = falling(), by_shares([0.8, 0.5])
    monitor, (best,) = run(stopping, records[:1], Replay(nn.Sequential(Versioned(3, 1))))
    if resumed:
        stopping = through_a_file(stopping, falling())
    run(stopping, records[1:], monitor)
    assert stopping.stopped_epoch == 1
    assert same(monitor.model.state_dict(), best)


def test_states_that_do_not_fit():
    """Catches the state of another rule, of another object, or of a later version."""
    state = ff.FisherEarlyStopping("crlb").state_dict()
    for wrong, message in (
        (state, "state must be of rule 'transmission', got 'crlb'"),
        (state | {"version": 0}, "state must be of version 1, got 0"),
        (state | {"version": 2}, "state must be of version 1, got 2"),
        ({"rule": "transmission"}, r"state must hold 'version', .*'weights', got \['rule'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ff.FisherEarlyStopping("transmission").load_state_dict(wrong)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": -1}, "patience must be at least 0, got -1"),
        ({"patience": 1.5}, "patience must be a whole number, got 1.5"),
        ({"min_delta": -0.1}, "min_delta must be at least 0 and finite, got -0.1"),
        ({"min_delta": "a lot"}, "min_delta must be at least 0 and finite, got 'a lot'"),
        ({"min_delta": 1.0}, "min_delta must be below 1, the level to stop at, got 1.0"),
        ({"rule": "CRLB"}, "rule must be one of crlb, transmission, or a rule"),
        ({"rule": ff.Transmission}, "rule must be one of crlb, transmission, or a rule"),
    ],
)
def test_settings_out_of_range(options, message):
    """Catches settings that are found out in the middle of a training, and a misspelled rule."""
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        ff.FisherEarlyStopping(**({"rule": "crlb"} | options))


def test_defaults_and_the_first_step():
    """Catches defaults that differ from those that were verified, a margin that is refused for the
    wrong rule, and an IndexError before the first epoch."""
    stopping = ff.FisherEarlyStopping()
    assert repr(stopping) == (
        "FisherEarlyStopping(rule='transmission', patience=0, best_epoch=None, stopped_epoch=None)"
    )
    assert repr(stopping.rule) == (
        "Transmission(min_epochs=0, check_finite=True, information='linear', tolerance=0.02,"
        " plateau=5)"
    )
    assert (stopping.min_delta, stopping.restore_best) == (0.0, True)
    assert ff.FisherEarlyStopping(min_delta=1.0).min_delta == 1
    with pytest.raises(ValueError, match=r"monitor must have made a step before stopping\.step"):
        stopping.step(Replay(network()))


# --- with a monitor -------------------------------------------------------------------------------


def monitor_of(samples: int, **options: object) -> ff.FisherMonitor:
    x = torch.randn(2, samples, 4, generator=torch.Generator().manual_seed(0))
    data = ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2)
    return ff.FisherMonitor(nn.Linear(4, 1), data, **options)


@pytest.mark.parametrize("check_finite", [True, False])
def test_weights_that_are_not_finite_stop_without_any_error(check_finite):
    """A monitor that is given no error meets NaN weights. Catches a training that goes on for ever
    because nothing is measured any more, and one that ends with NaN weights."""
    monitor = monitor_of(4000)
    model = monitor.model
    stopping = ff.FisherEarlyStopping(ff.Transmission(plateau=3, check_finite=check_finite))
    monitor.step()
    assert not stopping.step(monitor)
    kept = state_of(model)
    with torch.no_grad():
        model.weight.fill_(NAN)
    with pytest.warns(ff.FisherWarning, match="must be finite"):
        monitor.step()
    assert stopping.step(monitor) == check_finite
    if check_finite:
        assert "epoch 1, best epoch 0: epoch 1: activations of layer" in stopping.reason
        assert same(model.state_dict(), kept)


@pytest.mark.parametrize("rule", ["crlb", "transmission"])
def test_an_input_that_cannot_be_told_from_zero_stops_nothing(rule):
    """40 samples of each condition: J_input is noise, and any error times it below 1. Catches a
    stop at epoch 0, an error that ends the training, a warning per epoch, and a rule that waits for
    a J that it was given another for."""
    monitor = monitor_of(40, max_features=4)
    stopping = ff.FisherEarlyStopping(rule)
    record = monitor.step(train_mse=1e-9, val_mse=1e-9)
    with pytest.warns(ff.FisherWarning, match=f"J of input is within 3 errors of zero.*{rule!r}"):
        assert not stopping.step(monitor)
    for _ in range(3):  # a second warning is an error here
        monitor.step(train_mse=1e-9, val_mse=1e-9)
        assert not stopping.step(monitor)
    assert all(map(math.isnan, (record.train_level, record.val_level, record.transmission)))
    assert stopping.best_epoch is None
    assert ff.FisherEarlyStopping(ff.CramerRao(least_error=0.25), restore_best=False).step(monitor)
