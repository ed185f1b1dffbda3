"""`LivePlot`: figures of a run that are drawn again in place, in a notebook."""

from __future__ import annotations

import io
import sys
from typing import Any

from fisherfast.integrations.figures import measured_flows
from fisherfast.training import FisherMonitor

__all__ = ["LivePlot"]

SIZE = (11.0, 4.0)
"""Of both panels together, in inches: the width of a notebook's cell."""

SHOWN = 80
"""Pixels per inch on the page, half of those drawn: sharp on dense screens."""


class LivePlot:
    """Two panels in a notebook's output, drawn again at each `update`: what reaches the output and
    the errors over epochs, and J / J_input against the layers with a line per epoch (twelve at
    most).

    Outside of a notebook `update` does nothing and says so with False: a script that came out of a
    notebook runs as it is. Neither IPython nor matplotlib is imported there.

    Args:
        monitor: whose history is drawn.

    Attributes:
        drawn: how many times the panels were drawn.

    Raises:
        TypeError: monitor is none.

    Cost: of an update under a second, in a notebook.

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
        """Draw the history as it is now; returns whether it was drawn.

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
        """A picture rather than the figure: how those are shown is the user's setting."""
        from fisherfast.results import plots

        flows = measured_flows(self._monitor.history)
        figure = plots.new_figure(*SIZE)
        left, right = figure.subplots(1, 2)
        plots.plot_training(self._monitor.history, left)
        if flows:
            plots.plot_flows(flows, right, fraction=True, title="epoch")
        else:
            right.set_axis_off()
        file = io.BytesIO()
        figure.savefig(file, format="png")
        return file.getvalue()


def in_notebook() -> bool:
    """Whether a kernel runs this, which can show pictures; a terminal with IPython cannot."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None
