"""The callback under both names of Lightning: what it records, logs, stops, saves, and leaves."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fisherfast as ff

pytest.importorskip("lightning", reason="Lightning is not installed")
import lightning.pytorch
from integrations.lightning_case import (
    StopAt,
    held_out,
    loader,
    module_of,
    rows,
    trainer_of,
)

from fisherfast.integrations import lightning as integration
from fisherfast.integrations.lightning import FisherCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning:lightning"),
    pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
PACKAGE = lightning.pytorch
SETTINGS = {"max_features": 16, "settings": ff.Settings(batch_size=1000)}


def callback(**options: Any) -> FisherCallback:
    common = {"train_metric": "train_mse", **SETTINGS}
    return FisherCallback(held_out(), **(common | options))


def fit(
    own: FisherCallback | None, package: Any = PACKAGE, module: Any = None, **options: Any
) -> tuple[Any, Any]:
    """Trainer and module after a fit of three epochs."""
    trainer = trainer_of(package, [] if own is None else [own], **({"max_epochs": 3} | options))
    module = module or module_of(package)
    torch.manual_seed(3)
    trainer.fit(module, loader(), loader(128))
    return trainer, module


@pytest.mark.parametrize("name", integration.PACKAGES)
def test_records_follow_the_epochs(name):
    """Catches a trainer that refuses the callback, sanity checks that count as epochs, validation
    errors of the sanity check or of an earlier epoch, and the metric of the last batch."""
    package = pytest.importorskip(name, reason=f"{name} is not installed")
    own, losses, module = callback(val_metric="val_mse"), [], module_of(package)
    module.on_train_batch_end = lambda outputs, *args: losses.append(float(outputs["loss"]))
    trainer, _ = fit(own, package, module, max_epochs=4, check_val_every_n_epoch=2)
    history = own.monitor.history
    assert [record.epoch for record in history] == [0, 1, 2, 3]
    assert [record.val_mse is None for record in history] == [True, False, True, False]
    assert history[-1].val_mse == pytest.approx([float(trainer.callback_metrics["val_mse"])])
    epochs = torch.tensor(losses).view(4, -1).mean(1)
    found = [record.train_mse[0] for record in history]
    assert found == pytest.approx(epochs.tolist(), rel=1e-5)


def test_training_is_the_same_without_it():
    """Catches a changed mode (dropout), random state, or gradient: weights agree bit for bit."""
    own = callback(theta=lambda batch: batch[1], observe_every=2)
    _, watched = fit(own)
    _, alone = fit(None)
    for a, b in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())
    assert "output" in own.monitor.history[-1].live


def test_what_is_logged():
    """Catches values that reach no logger, and NaN where nothing was measured."""
    logged: list[tuple[int, dict[str, float]]] = []

    class Recorder(PACKAGE.loggers.logger.DummyLogger):  # type: ignore[misc, name-defined]
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.append((step or 0, dict(metrics)))

    own = callback(every=2, prefix="info")
    trainer, _ = fit(own, logger=Recorder())
    written = {key: value for _, metrics in logged for key, value in metrics.items()}
    history = own.monitor.history
    assert written["info/train_level"] == pytest.approx(history[-1].train_level, rel=1e-6)
    assert written["info/transmission"] == pytest.approx(history[2].transmission, rel=1e-6)
    assert written["info/J/net.0"] == pytest.approx(history[2].flow["net.0"].value, rel=1e-6)
    times = sum("info/transmission" in metrics for _, metrics in logged)
    assert times == 2
    assert not any(math.isnan(value) for _, metrics in logged for value in metrics.values())
    assert "info/transmission" in trainer.callback_metrics


def test_stops_and_keeps_what_the_rule_restored():
    """Catches a rule that is not asked, or whose verdict or weights are lost."""
    own = callback(stopping=StopAt(1))
    trainer, module = fit(own, max_epochs=8)
    assert own.stopping.asked == [0, 1]
    assert trainer.current_epoch == 2
    for name, value in module.state_dict().items():
        assert torch.equal(value, own.stopping.weights[name])


def test_the_stop_is_one_line(capsys, monkeypatch):
    """On the terminal of a fit, whose package configures logging of its own. Catches a stop without
    a word, and two lines."""
    monkeypatch.setattr(logging.root, "handlers", [])
    own = callback(stopping=ff.FisherEarlyStopping(ff.CramerRao(least_error=1e9)))
    fit(own)
    assert own.stopping.stopped_epoch == 0
    assert capsys.readouterr().err.count(own.stopping.reason) == 1


def test_trainers_that_would_not_stop_are_refused():
    """Catches weights that are restored while the trainer goes on all the same."""
    message = "min_epochs must be given to the stopping rule, which restores weights when it stops"
    for options in ({"min_epochs": 3}, {"min_steps": 40}):
        with pytest.raises(ValueError, match=message):
            fit(callback(stopping=StopAt(0)), **options)
    fit(callback(), min_epochs=3)


def run_saved(folder: Path, resume: int | None = None, *, early: bool, **options: Any) -> Any:
    """Three epochs, a checkpoint after each; or the rest after one of them."""
    own = callback(stopping=StopAt(50), val_metric="val_mse", **options)
    saver = PACKAGE.callbacks.ModelCheckpoint(
        folder if resume is None else folder / "resumed",
        filename="{epoch}",
        save_top_k=-1,
        save_on_train_epoch_end=not early,
    )
    trainer = trainer_of(PACKAGE, [own, saver], max_epochs=3, enable_checkpointing=True)
    module = module_of(PACKAGE)
    module.net[2].p = 0.0  # Lightning saves no random state
    path = None if resume is None else folder / f"epoch={resume}.ckpt"
    trainer.fit(module, loader(), loader(128), ckpt_path=path)
    return own


@pytest.mark.parametrize("early", [False, True], ids=["train end", "validation end"])
def test_resumed_run_has_the_history_of_the_unbroken(tmp_path, early):
    """Catches states that are not saved, not loaded, or loaded before there is a network; and, of a
    checkpoint that was written before its record, an epoch without, or with another, error."""
    options = {"train_metric": None} if early else {}
    unbroken = run_saved(tmp_path, early=early, **options)
    resumed = run_saved(tmp_path, 1, early=early, **options)
    assert resumed.stopping.asked == unbroken.stopping.asked == [0, 1, 2]
    assert [str(row) for row in rows(resumed.monitor)] == [str(r) for r in rows(unbroken.monitor)]


def test_lost_training_errors_are_not_made_up(tmp_path):
    """Catches the training error of no batch, where the checkpoint came before the epoch's end."""
    run_saved(tmp_path, early=True)
    with pytest.warns(ff.FisherWarning, match="epoch 1 is not in the history: its checkpoint"):
        resumed = run_saved(tmp_path, 1, early=True)
    assert [record.epoch for record in resumed.monitor.history] == [0, 2]


def test_checkpoint_before_the_fit_keeps_what_was_loaded():
    """Catches a state that is lost between loading and the fit, and one that is made of nothing."""
    own = callback()
    assert own.state_dict() == {}
    own.load_state_dict({"monitor": {"calls": 3}, "stopping": None})
    assert own.state_dict()["monitor"] == {"calls": 3}
    for wrong in (
        {"stopping": None},
        {"monitor": {}, "val_mse": "low"},
        {"monitor": {}, "more": 1},
    ):
        with pytest.raises(ValueError, match=r"^state(\.val_mse)? must "):
            own.load_state_dict(wrong)


def test_second_fit_goes_on():
    """Catches a history that starts again when the same network is trained further; another network
    gets a history of its own."""
    own = callback()
    _, module = fit(own, max_epochs=2)
    first = own.monitor
    trainer_of(PACKAGE, [own], max_epochs=1).fit(module, loader())
    assert own.monitor is first
    assert len(first.history) == 3
    fit(own, max_epochs=1)
    assert own.monitor is not first
    assert len(own.monitor.history) == 1


def test_network_inside_and_options():
    """Catches names of the whole module, and options that do not arrive."""
    own = callback(network="net", layers="0", target_scale=2.0)
    trainer, _ = fit(own, max_epochs=1)
    record = own.monitor.history[-1]
    assert record.flow.names == ["input", "0", "output"]
    assert record.train_mse[0] == pytest.approx(4 * float(trainer.callback_metrics["train_mse"]))


def test_mixed_precision_is_measured_as_it_runs():
    """Catches a measurement in float32 of a network that runs in bfloat16, and statistics of too
    few digits: J is that of `fisher_flow` inside of autocast, bit for bit, and not that without."""
    own = callback()
    _, module = fit(own, precision="bf16-mixed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ff.fisher_flow(module, held_out(), **SETTINGS)
    outside = ff.fisher_flow(module, held_out(), **SETTINGS)
    last = own.monitor.history[-1].flow
    assert torch.equal(last["output"].J, inside["output"].J)
    assert not torch.equal(last["output"].J, outside["output"].J)


def test_wrong_arguments():
    """Catches errors that are late or do not say what there is, and a measurement that waits for
    ever for the other processes' parts of the model."""
    logged = "train_metric must name a metric that is logged before the epoch ends, got 'mse';"
    for options, message in (
        ({"train_metric": "mse"}, f"{logged} logged are: val_mse, train_mse"),
        ({"network": "nets"}, "network must name a submodule, got 'nets'; there are: net, net.0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            fit(callback(**options), max_epochs=1)
    sharded = SimpleNamespace(strategy=type("FSDPStrategy", (), {})())
    with pytest.raises(ValueError, match="strategy must keep the whole model on every process"):
        callback().on_fit_start(sharded, module_of(PACKAGE))


def test_without_lightning_the_error_says_what_to_install(monkeypatch):
    """Catches an import error of this module, or an object that fails in the trainer."""
    monkeypatch.setattr(integration, "_BASES", ())
    with pytest.raises(ImportError, match=r"pip install 'fisherfast\[lightning\]'"):
        FisherCallback(held_out())
