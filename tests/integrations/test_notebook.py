"""The live plot, on a display that only keeps what it is shown."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import fisherfast as ff
from fisherfast.integrations.notebook import LivePlot


def ipython(monkeypatch: pytest.MonkeyPatch, shell: Any) -> MagicMock:
    """A process in which that shell runs, None for none; returns its display, where a picture is
    its bytes."""
    package = MagicMock(version_info=(9, 0))  # matplotlib asks
    package.get_ipython.return_value = shell
    package.display.Image = lambda data, format, width: data
    monkeypatch.setitem(sys.modules, "IPython", package)
    return package.display


def new_monitor() -> ff.FisherMonitor:
    x = torch.randn(2, 5000, 4, generator=torch.Generator().manual_seed(0))
    data = ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2)
    return ff.FisherMonitor(torch.nn.Linear(4, 1), data, max_features=8)


def test_one_display_that_is_drawn_again(monkeypatch):
    """Catches a new picture below the last at each epoch, one that never changes, and a plot that
    needs a measurement where the first one failed."""
    display = ipython(monkeypatch, SimpleNamespace(kernel=object()))
    monitor = new_monitor()
    plot = LivePlot(monitor)
    assert not plot.update()  # nothing to draw yet
    with torch.no_grad():
        monitor.model.weight.fill_(float("nan"))
    with pytest.warns(ff.FisherWarning, match="not measured"):
        monitor.step(train_mse=0.5)
    assert plot.update()
    with torch.no_grad():
        monitor.model.weight.fill_(1 / 4)  # unbiased: it is in the unit of theta
    for epoch in range(2):
        monitor.step(val_mse=0.5 / (epoch + 1))
        assert plot.update()
    display.display.assert_called_once()
    assert display.display.call_args.kwargs == {"display_id": True}
    handle = display.display.return_value
    shown = [display.display.call_args, *handle.update.call_args_list]
    pictures = [call.args[0] for call in shown]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert len(set(pictures)) == 3
    assert plot.drawn == 3


@pytest.mark.parametrize("shell", [None, SimpleNamespace()], ids=["script", "terminal"])
def test_nothing_happens_outside_of_notebooks(monkeypatch, shell):
    """Catches a line of text per epoch in a terminal, an error in a script, and a history in place
    of its monitor, which would never grow."""
    display = ipython(monkeypatch, shell)
    monitor = new_monitor()
    monitor.step()
    plot = LivePlot(monitor)
    assert not plot.update()
    display.display.assert_not_called()
    assert plot.drawn == 0
    with pytest.raises(TypeError, match="monitor must be a FisherMonitor, got list"):
        LivePlot(monitor.history)
