"""The live plot, on a display that only keeps what it is shown."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import fisherfast as ff
from fisherfast.integrations.notebook import LivePlot

PNG = b"\x89PNG"


class Display(ModuleType):
    """Stands in for IPython.display."""

    def __init__(self) -> None:
        super().__init__("IPython.display")
        self.shown: list[bytes] = []
        self.updated: list[bytes] = []

    def Image(self, data: bytes, format: str, width: int) -> bytes:
        assert format == "png"
        return data

    def display(self, image: bytes, display_id: bool = False) -> Any:
        assert display_id
        self.shown.append(image)
        return SimpleNamespace(update=self.updated.append)


def ipython(monkeypatch: pytest.MonkeyPatch, shell: Any) -> Display:
    """A process in which that shell runs; None for none."""
    package, display = ModuleType("IPython"), Display()
    package.get_ipython = lambda: shell
    package.version_info = (9, 0)  # matplotlib asks
    package.display = display
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return display


def new_monitor(every: int = 1) -> ff.FisherMonitor:
    x = torch.randn(2, 5000, 4, generator=torch.Generator().manual_seed(0))
    data = ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2)
    model = torch.nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.fill_(1 / 4)  # unbiased: it is in the unit of theta
    return ff.FisherMonitor(model, data, every=every, max_features=8)


def test_one_display_that_is_drawn_again(monkeypatch):
    """Catches a new picture below the last at each epoch, and one that never changes."""
    display = ipython(monkeypatch, SimpleNamespace(kernel=object()))
    monitor = new_monitor(every=2)
    plot = LivePlot(monitor)
    assert not plot.update()  # nothing to draw yet
    for epoch in range(3):
        monitor.step(val_mse=0.5 / (epoch + 1))
        assert plot.update()
    assert len(display.shown) == 1
    assert len(display.updated) == 2
    pictures = display.shown + display.updated
    assert all(picture.startswith(PNG) for picture in pictures)
    assert len(set(pictures)) == 3
    assert plot.drawn == 3


def test_before_the_first_flow(monkeypatch):
    """Catches a plot that needs a measurement where the first one failed."""
    display = ipython(monkeypatch, SimpleNamespace(kernel=object()))
    monitor = new_monitor()
    with torch.no_grad():
        monitor.model.weight.fill_(float("nan"))
    with pytest.warns(ff.FisherWarning, match="not measured"):
        monitor.step(train_mse=0.5)
    assert LivePlot(monitor).update()
    assert len(display.shown) == 1


@pytest.mark.parametrize("shell", [None, SimpleNamespace()], ids=["script", "terminal"])
def test_nothing_happens_outside_of_notebooks(monkeypatch, shell):
    """Catches a line of text per epoch in a terminal, and an error in a script."""
    display = ipython(monkeypatch, shell)
    monitor = new_monitor()
    monitor.step()
    plot = LivePlot(monitor)
    assert not plot.update()
    assert not display.shown
    assert plot.drawn == 0


SCRIPT = """
import sys, torch, fisherfast as ff
from fisherfast.integrations.notebook import LivePlot
x = torch.randn(2, 500, 4)
monitor = ff.FisherMonitor(torch.nn.Linear(4, 1), ff.FiniteDifference(x[0] - 0.1, x[1], dtheta=0.1))
monitor.step()
assert not LivePlot(monitor).update()
print(sorted({"IPython", "matplotlib"} & set(sys.modules)))
"""


def test_nothing_is_imported_outside_of_notebooks():
    """Catches an import of what a script on a cluster does not have."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_wrong_monitor():
    """Catches a history in place of its monitor, which would never grow."""
    with pytest.raises(TypeError, match="monitor must be a FisherMonitor, got list"):
        LivePlot([])
