"""What reaches a TensorBoard writer, of torch's own kind and of any other."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fisherfast as ff
from fisherfast.integrations.scalars import scalars
from fisherfast.integrations.tensorboard import log_to_tensorboard
from fisherfast.training.plots import measured_flows


def monitor_after(epochs: int, parameters: int = 1, **options: Any) -> ff.FisherMonitor:
    """A monitor of a small network with that many records."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    x = torch.randn(800, 4)
    data = ff.Pathwise(x, torch.randn(parameters, 4).expand(800, parameters, 4))
    monitor = ff.FisherMonitor(model, data, max_features=16, **options)
    for epoch in range(epochs):
        errors = [0.5 / (epoch + 1)] * parameters
        monitor.step(epoch=10 * epoch, train_mse=errors, val_mse=errors)
    return monitor


class Recorder:
    """Keeps what is written: (tag, step) to value."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.figures: dict[tuple[str, int], Any] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars[tag, global_step] = scalar_value

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None:
        self.figures[tag, global_step] = figure


def test_every_number_of_a_record_under_its_epoch():
    """Catches swapped tags, a step that counts calls rather than epochs, and other numbers than
    those of the record."""
    monitor, writer = monitor_after(2), Recorder()
    log_to_tensorboard(writer, monitor)
    record = monitor.history[-1]
    expected = {
        "fisher/train_level": record.train_level,
        "fisher/val_level": record.val_level,
        "fisher/transmission": record.transmission,
    }
    expected |= {f"fisher/J/{layer.name}": layer.value for layer in record.flow}
    shares = record.flow.fractions()
    expected |= {f"fisher/fraction/{name}": share for name, share in shares.items()}
    assert writer.scalars == {(tag, 10): value for tag, value in expected.items()}
    assert set(writer.figures) == {("fisher/training", 10), ("fisher/flow", 10)}
    axes = writer.figures["fisher/flow", 10].axes[0]
    assert axes.get_legend_handles_labels()[1] == ["0", "10"]


def test_epochs_without_a_measurement():
    """Catches NaN in a curve, and a figure of no flow."""
    monitor, writer = monitor_after(2, every=5), Recorder()
    log_to_tensorboard(writer, monitor, prefix="")
    assert set(writer.scalars) == {("train_level", 10), ("val_level", 10)}
    assert not any(map(math.isnan, writer.scalars.values()))
    assert set(writer.figures) == {("training", 10), ("flow", 10)}


@pytest.mark.parametrize("measured", [0, 1, 12, 13, 1000])
def test_figures_of_long_runs_are_thinned(measured):
    """Catches a thousand lines in one figure, the last epoch left out, and epochs by their place
    rather than their number."""
    record = monitor_after(1).history[0]
    history = [replace(record, epoch=7 * i, flow=None) for i in range(2 * measured)]
    history[1::2] = [replace(r, flow=record.flow) for r in history[1::2]]
    epochs = list(measured_flows(history))
    assert len(epochs) == min(measured, 12)
    assert set(epochs) <= {r.epoch for r in history[1::2]}
    assert epochs == sorted(set(epochs))
    if measured:
        assert (epochs[0], epochs[-1]) == (7, history[-1].epoch)


def test_live_trend_and_overfitting_are_written():
    """Catches a column of the record that the list of curves has forgotten, and columns that end in
    "[p]"."""
    row = monitor_after(1, parameters=2).history[0].row()
    row |= {"live/output": 0.5, "overfitting": 0.1}
    known = scalars(type("Record", (), {"row": lambda self: row})())
    assert {"live/output", "overfitting", "J/output[0]", "J/output[1]"} <= set(known)
    rest = {name.partition("/")[0].partition("[")[0] for name in set(row) - set(known)}
    expected = "epoch samples train_mse val_mse transmission_stderr seconds stderr lower"
    expected += " fraction_stderr"
    assert rest == set(expected.split())


def test_wrong_input():
    """Catches errors that do not say what is wanted, and half an epoch in the file."""
    monitor, recorder = monitor_after(1), Recorder()
    scalars_only = SimpleNamespace(add_scalar=recorder.add_scalar)
    for writer, source, error, message in (
        (recorder, 3, TypeError, "source must be a FisherMonitor or an EpochRecord, got int"),
        (recorder, monitor_after(0), ValueError, "source must hold a record, got a monitor before"),
        (object(), monitor, TypeError, "writer must have a method add_scalar, as a SummaryWriter"),
        (scalars_only, monitor, TypeError, "got SimpleNamespace; or pass figures=False"),
    ):
        with pytest.raises(error, match=message):
            log_to_tensorboard(writer, source)
    assert recorder.scalars == {}
    log_to_tensorboard(scalars_only, monitor, figures=False)
    assert ("fisher/transmission", 0) in recorder.scalars


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_writer_reads_back(tmp_path):
    """Catches arguments that the real writer does not take: its file is read back."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    monitor = monitor_after(2)
    with SummaryWriter(tmp_path) as writer:
        log_to_tensorboard(writer, monitor.history[0])
        log_to_tensorboard(writer, monitor)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    read = [(e.step, e.value) for e in events.Scalars("fisher/transmission")]
    expected = [(record.epoch, record.transmission) for record in monitor.history]
    assert [step for step, _ in read] == [0, 10]
    assert [v for _, v in read] == pytest.approx([v for _, v in expected], rel=1e-6)
    assert set(events.Tags()["images"]) == {"fisher/training", "fisher/flow"}
