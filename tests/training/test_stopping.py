"""`FisherEarlyStopping`: weights that are kept and put back, resumed runs, errors, a training."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from support.training_histories import by_errors, by_shares
from torch import nn

import fisherfast as ff
from fisherfast.training.record import EpochRecord


@dataclass
class Replay:
    """What the stopping sees of a monitor: records that come one by one, and a model."""

    model: nn.Module
    history: list[EpochRecord] = field(default_factory=list)


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
    stopping: ff.FisherEarlyStopping, records: list[EpochRecord]
) -> tuple[Replay, list[dict[str, torch.Tensor]]]:
    """Train until the stop. Returns the monitor, and the weights after each epoch."""
    monitor, weights = Replay(network()), []
    for record in records:
        train_a_little(monitor.model, record.epoch)
        weights.append(state_of(monitor.model))
        monitor.history.append(record)
        if stopping.step(monitor):
            break
    return monitor, weights


def test_restores_the_best_weights_exactly():
    """The largest share is in epoch 2. Catches the weights of the last epoch, copies that share
    memory with the model, and buffers that are forgotten."""
    stopping = ff.FisherEarlyStopping(ff.Transmission(plateau=2, tolerance=0.0))
    monitor, weights = run(stopping, by_shares([0.2, 0.5, 0.8, 0.7, 0.6, 0.5]))
    assert (stopping.stopped_epoch, stopping.best_epoch) == (4, 2)
    assert same(monitor.model.state_dict(), weights[2])


def test_parameters_stay_the_same_tensors():
    """An optimizer holds them. Catches a model whose parameters are replaced."""
    stopping = ff.FisherEarlyStopping(ff.Transmission(plateau=1, tolerance=0.0))
    monitor = Replay(network())
    before = list(map(id, monitor.model.parameters()))
    for record in by_shares([0.5, 0.4]):
        monitor.history.append(record)
        stopped = stopping.step(monitor)
    assert stopped
    assert list(map(id, monitor.model.parameters())) == before


def test_restore_best_may_be_left_out():
    """Catches weights that change although they should not."""
    stopping = ff.FisherEarlyStopping(ff.Transmission(plateau=2), restore_best=False)
    monitor, weights = run(stopping, by_shares([0.2, 0.8, 0.5, 0.5]))
    assert same(monitor.model.state_dict(), weights[3])
    assert stopping.best_epoch == 1


def test_crlb_with_patience_restores_the_crossing():
    """Below 1 / J in epoch 1, stopped in 3. Catches the weights of the stop."""
    stopping = ff.FisherEarlyStopping("crlb", patience=2)
    monitor, weights = run(stopping, by_errors([0.3, 0.2, 0.15, 0.1, 0.05]))
    assert (stopping.stopped_epoch, stopping.best_epoch) == (3, 1)
    assert same(monitor.model.state_dict(), weights[1])
    assert "1 / J_input in epoch 1" in stopping.reason


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["train_mse", "val_mse"])
def test_an_error_that_is_not_finite_stops(name, value):
    """Catches a training that goes on with NaN, one that stops with NaN weights, and a reason that
    does not say so."""
    records = by_errors([0.5, 0.4, 0.3])
    records[2] = replace(records[2], **{name: (value,)})
    stopping = ff.FisherEarlyStopping("crlb")
    monitor, weights = run(stopping, records)
    assert (stopping.stopped_epoch, stopping.best_epoch) == (2, 1)
    assert f"error became {value} in epoch 2" in stopping.reason
    assert same(monitor.model.state_dict(), weights[1])


def test_an_error_that_is_not_finite_stops_the_other_rule_too():
    """Catches a check inside of one rule."""
    records = by_shares([0.3, 0.6, 0.5])
    records[2] = replace(records[2], train_mse=(math.nan,))
    stopping = ff.FisherEarlyStopping("transmission")
    run(stopping, records)
    assert (stopping.stopped_epoch, stopping.best_epoch) == (2, 1)


def test_check_finite_may_be_left_out():
    """Catches a NaN that counts as below the bound, or a check that is always made."""
    stopping = ff.FisherEarlyStopping(ff.CramerRao(check_finite=False))
    run(stopping, by_errors([0.5, math.nan, 0.3, 0.2, 0.1]))
    assert stopping.stopped_epoch == 3


def test_a_stop_is_final():
    """Catches weights that are put back again, over what a user did with them since."""
    stopping = ff.FisherEarlyStopping("crlb")
    monitor, _ = run(stopping, by_errors([0.5, 0.2]))
    train_a_little(monitor.model, 7)
    kept = state_of(monitor.model)
    monitor.history += by_errors([0.9], first=2)
    assert stopping.step(monitor)
    assert stopping.stopped_epoch == 1
    assert same(monitor.model.state_dict(), kept)


def test_step_twice_in_an_epoch_changes_nothing():
    """Catches patience that counts calls."""
    stopping = ff.FisherEarlyStopping(ff.Transmission(plateau=2))
    monitor = Replay(network(), by_shares([0.8, 0.5]))
    assert [stopping.step(monitor) for _ in range(5)] == [False] * 5


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rule", ["crlb", "transmission"])
def test_a_resumed_run_goes_on_bit_for_bit(rule, cut):
    """Broken after `cut` epochs, with everything through a file that holds weights only. Catches
    best weights that are lost (the model of the resumed run is another one until the stop), and
    counters that begin anew."""
    if rule == "crlb":
        records, patience = by_errors([0.5, 0.3, 0.2, 0.2, 0.2, 0.2, 0.1]), 3
    else:
        records, patience = by_shares([0.2, 0.5, 0.8, 0.7, 0.6, 0.5, 0.4]), 1
        rule = ff.Transmission(plateau=3)
    whole = ff.FisherEarlyStopping(rule, patience=patience)
    unbroken, weights = run(whole, records)

    first = ff.FisherEarlyStopping(rule, patience=patience)
    run(first, records[:cut])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = ff.FisherEarlyStopping(rule, patience=patience)
    second.load_state_dict(torch.load(file, weights_only=True))
    monitor = Replay(network(seed=1), list(records[:cut]))
    monitor.model.load_state_dict(weights[cut - 1])
    for record in records[cut:]:
        train_a_little(monitor.model, record.epoch)
        monitor.history.append(record)
        if second.step(monitor):
            break
    assert (second.stopped_epoch, second.best_epoch) == (whole.stopped_epoch, whole.best_epoch)
    assert second.reason == whole.reason
    assert same(monitor.model.state_dict(), unbroken.model.state_dict())


def test_state_is_a_copy():
    """Catches a saved state that the training goes on changing."""
    stopping = ff.FisherEarlyStopping("crlb")
    monitor, _ = run(stopping, by_errors([0.5, 0.4]))
    state = stopping.state_dict()
    kept = {name: value.clone() for name, value in state["weights"].items()}
    train_a_little(monitor.model, 2)
    monitor.history += by_errors([0.3], first=2)
    stopping.step(monitor)
    assert same(state["weights"], kept)


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


def test_states_that_do_not_fit():
    """Catches the state of another rule, of another object, or of a later version."""
    state = ff.FisherEarlyStopping("crlb").state_dict()
    other = ff.FisherEarlyStopping("transmission")
    with pytest.raises(ValueError, match="state must be of rule 'transmission', got 'crlb'"):
        other.load_state_dict(state)
    for version in (0, 2):
        with pytest.raises(ValueError, match=f"state must be of version 1, got {version}"):
            other.load_state_dict({**state, "version": version})
    with pytest.raises(ValueError, match=r"state must hold .*'weights'"):
        other.load_state_dict({"rule": "transmission"})


def test_settings_that_do_not_exist():
    """Catches a misspelled rule or option that is ignored."""
    for rule in ("CRLB", ff.Transmission):
        with pytest.raises(ValueError, match=r"^rule must be one of crlb, transmission, or a rule"):
            ff.FisherEarlyStopping(rule)
    with pytest.raises(TypeError, match="tolerance"):
        ff.CramerRao(tolerance=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": -1}, "patience must be at least 0, got -1"),
        ({"patience": 1.5}, "patience must be a whole number, got 1.5"),
        ({"min_delta": -0.1}, "min_delta must be at least 0 and finite, got -0.1"),
        ({"min_delta": "a lot"}, "min_delta must be at least 0 and finite, got 'a lot'"),
        ({"min_delta": 1.0}, "min_delta must be below 1, the level to stop at, got 1.0"),
    ],
)
def test_settings_out_of_range(options, message):
    """Catches settings that are found out in the middle of a training."""
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
        ff.FisherEarlyStopping("crlb", **options)
    if options.get("min_delta") == 1.0:
        ff.FisherEarlyStopping("transmission", **options)


def test_patience_and_margin_reach_the_rule():
    """Catches an argument that is checked and not passed on."""
    stopping = ff.FisherEarlyStopping("crlb", patience=np.int64(1), min_delta=0.1)
    run(stopping, by_errors([0.24, 0.22, 0.22, 0.22]))
    assert (stopping.stopped_epoch, stopping.best_epoch) == (2, 1)
    assert stopping.reason.startswith("stopped after epoch 2, best epoch 1: training error at 0.88")


def test_before_the_first_epoch():
    """Catches an IndexError."""
    with pytest.raises(ValueError, match=r"monitor must have made a step before stopping\.step"):
        ff.FisherEarlyStopping().step(Replay(network()))


def test_defaults():
    """Catches defaults that differ from those that were verified."""
    stopping = ff.FisherEarlyStopping()
    assert repr(stopping) == (
        "FisherEarlyStopping(rule='transmission', patience=0, best_epoch=None, stopped_epoch=None)"
    )
    assert repr(stopping.rule) == (
        "Transmission(min_epochs=0, check_finite=True, information='linear', tolerance=0.02,"
        " plateau=5)"
    )
    assert (stopping.min_delta, stopping.restore_best) == (0.0, True)


@pytest.mark.slow
def test_a_training_is_stopped_near_its_best():
    """A real monitor and a network that overfits by more than 15 %: x ~ N(theta 1, I_64), 1500
    samples, 60 epochs. The best epoch of either rule is within 6 % of the least validation loss.
    The seed is fixed. Catches rules that stop at once or never."""
    generator = torch.Generator().manual_seed(0)
    model = ff.problems.mlp([64, 128, 64, 1], seed=0)
    draws = []
    for count in (1500, 20_000):
        theta = 2 * torch.rand(count, 1, generator=generator) - 1
        draws.append((theta + torch.randn(count, 64, generator=generator), theta))
    (x, theta), (val_x, val_theta) = draws
    problem = ff.problems.GaussianShift(torch.ones(64))
    monitor = ff.FisherMonitor(model, problem.pathwise(0.0, 5000), layers=[])
    rules = [
        ff.FisherEarlyStopping(ff.CramerRao(prior=(-1.0, 1.0)), restore_best=False),
        ff.FisherEarlyStopping("transmission", restore_best=False),
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    losses = []
    for epoch in range(60):
        for batch in torch.randperm(len(x), generator=generator).split(32):
            loss = nn.functional.mse_loss(model(x[batch]), theta[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(float(nn.functional.mse_loss(model(val_x), val_theta)))
            error = float(nn.functional.mse_loss(model(x), theta))
        if not all(rule.stopped_epoch is not None for rule in rules):
            monitor.step(epoch=epoch, train_mse=error)
            for rule in rules:
                rule.step(monitor)
    assert losses[-1] > 1.15 * min(losses)
    for rule in rules:
        assert rule.stopped_epoch is not None
        assert losses[rule.best_epoch] < 1.06 * min(losses)


def test_several_records_of_one_epoch():
    """Measured within epoch 0 after each of three parts: the best is the last of them. Catches
    weights that are kept once per number of an epoch, which are those of the first part."""
    stopping = ff.FisherEarlyStopping(ff.Transmission(plateau=1, tolerance=0.0))
    records = [replace(record, epoch=0) for record in by_shares([0.2, 0.5, 0.8, 0.5])]
    monitor, weights = run(stopping, records)
    assert stopping.stopped_epoch == 0
    assert not same(weights[2], weights[0])
    assert same(monitor.model.state_dict(), weights[2])


@pytest.mark.parametrize("check_finite", [True, False])
def test_weights_that_are_not_finite_stop_without_any_error(check_finite):
    """A monitor that is given no error meets NaN weights. Catches a training that goes on for ever
    because nothing is measured any more, and one that ends with NaN weights."""
    model = nn.Linear(4, 1)
    x = torch.randn(2, 4000, 4, generator=torch.Generator().manual_seed(0))
    monitor = ff.FisherMonitor(model, ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2))
    stopping = ff.FisherEarlyStopping(ff.Transmission(plateau=3, check_finite=check_finite))
    monitor.step()
    assert not stopping.step(monitor)
    kept = state_of(model)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    with pytest.warns(ff.FisherWarning, match="must be finite"):
        monitor.step()
    assert stopping.step(monitor) == check_finite
    if check_finite:
        assert "epoch 1, best epoch 0: epoch 1: activations of layer" in stopping.reason
        assert same(model.state_dict(), kept)


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
    file that holds weights only."""
    model = nn.Sequential(Versioned(3, 1))
    stopping = ff.FisherEarlyStopping(ff.Transmission(plateau=1, tolerance=0.0))
    monitor = Replay(model)
    best = state_of(model)
    for number, record in enumerate(by_shares([0.8, 0.5])):
        if number == 1 and resumed:
            file = io.BytesIO()
            torch.save(stopping.state_dict(), file)
            file.seek(0)
            stopping = ff.FisherEarlyStopping(ff.Transmission(plateau=1, tolerance=0.0))
            stopping.load_state_dict(torch.load(file, weights_only=True))
        if number == 1:
            train_a_little(model, number)
        monitor.history.append(record)
        stopped = stopping.step(monitor)
    assert stopped
    assert same(model.state_dict(), best)


@pytest.mark.parametrize("rule", ["crlb", "transmission"])
def test_an_input_that_cannot_be_told_from_zero_stops_nothing(rule):
    """40 samples of each condition: J_input is noise, and any error times it below 1. Catches a
    stop at epoch 0, an error that ends the training, and a warning per epoch."""
    x = torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(0))
    data = ff.FiniteDifference(x[0] - 0.01, x[1] + 0.01, dtheta=0.02)
    monitor = ff.FisherMonitor(nn.Linear(4, 1), data, max_features=4)
    stopping = ff.FisherEarlyStopping(rule)
    record = monitor.step(train_mse=1e-9, val_mse=1e-9)
    with pytest.warns(ff.FisherWarning, match=f"J of input is within 3 errors of zero.*{rule!r}"):
        assert not stopping.step(monitor)
    for _ in range(3):  # a second warning is an error here
        monitor.step(train_mse=1e-9, val_mse=1e-9)
        assert not stopping.step(monitor)
    assert math.isnan(record.train_level)
    assert math.isnan(record.val_level)
    assert math.isnan(record.transmission)
    assert stopping.best_epoch is None


def test_a_rule_that_does_not_read_the_input_acts_without_it():
    """Catches a rule that waits for a J that it was given another for, and a warning of it."""
    x = torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(0))
    data = ff.FiniteDifference(x[0] - 0.01, x[1] + 0.01, dtheta=0.02)
    monitor = ff.FisherMonitor(nn.Linear(4, 1), data, max_features=4)
    stopping = ff.FisherEarlyStopping(ff.CramerRao(least_error=0.25))
    monitor.step(train_mse=0.2)
    assert stopping.step(monitor)
