"""`LivePlot`: figures of a training run in a notebook, redrawn in place."""

from __future__ import annotations

import io
import sys
from typing import Any

from fisherfast.results import plots
from fisherfast.training import FisherMonitor
from fisherfast.training.plots import measured_flows

SIZE = (11.0, 4.0)
"""Size of both panels together in inches: the width of a notebook cell."""

SHOWN = 80
"""Pixels per inch on the page, half of those drawn, so that dense screens show it sharply."""


class LivePlot:
    """Two panels in a notebook's output, redrawn at each `update`: transmission and errors over
    epochs, and J / J_input against the layers with a line per epoch (twelve at most).

    Outside a notebook `update` does nothing and returns False, so that a script exported from a
    notebook runs unchanged. It then imports neither IPython nor matplotlib.

    Args:
        monitor: its history is drawn.

    Attributes:
        drawn: how many times the panels were drawn.

    Raises:
        TypeError: monitor is not a `FisherMonitor`.

    Cost: under a second per update, in a notebook.

    Example:
        >>> import torch, fisherfast as ff
        >>> from fisherfast.integrations.notebook import LivePlot
        >>> x = torch.randn(2, 1000, 4)
        >>> data = ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2)
        >>> monitor = ff.FisherMonitor(torch.nn.Linear(4, 1), data)
        >>> plot = LivePlot(monitor)
        >>> record = monitor.step()
        >>> plot.update()  # not in a notebook
        False
    """

    def __init__(self, monitor: FisherMonitor) -> None:
        if not isinstance(monitor, FisherMonitor):
            raise TypeError(f"monitor must be a FisherMonitor, got {type(monitor).__name__}")
        self._monitor = monitor
        self._handle: Any = None
        self.drawn = 0

    def update(self) -> bool:
        """Draw the history up to now, and return whether it was drawn.

        Raises:
            ImportError: in a notebook, but matplotlib is not installed.
        """
        if not self._monitor.history or not in_notebook():
            return False
        from IPython import display

        image = display.Image(data=self._png(), format="png", width=round(SIZE[0] * SHOWN))
        if self._handle is None:
            self._handle = display.display(image, display_id=True)
        else:
            self._handle.update(image)
        self.drawn += 1
        return True

    def _png(self) -> bytes:
        """Render a picture, since how a notebook shows figures is the user's setting."""
        flows = measured_flows(self._monitor.history)
        figure = plots.new_figure(*SIZE)
        left, right = figure.subplots(1, 2)
        self._monitor.plot(left)
        if flows:
            plots.plot_flows(flows, right, fraction=True, title="epoch")
        else:
            right.set_axis_off()
        file = io.BytesIO()
        figure.savefig(file, format="png")
        return file.getvalue()


def in_notebook() -> bool:
    """Return whether this runs in a notebook kernel, which can show pictures; IPython in a terminal
    cannot."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None
