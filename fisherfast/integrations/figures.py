"""The data of figures of a training run, for all integrations."""

from __future__ import annotations

from collections.abc import Sequence

from fisherfast.results.flow import FisherFlow
from fisherfast.training import EpochRecord

__all__ = ["measured_flows"]

LINES = 12
"""Most flows in one figure: as many as a legend can name, and quick to draw in a long run."""


def measured_flows(history: Sequence[EpochRecord]) -> dict[int, FisherFlow]:
    """Return flows by epoch, at most twelve, evenly spaced, with the first and the last.

    Args:
        history: the epochs in their order.

    Example:
        >>> from fisherfast.integrations.figures import measured_flows
        >>> measured_flows([])
        {}
    """
    known = [(record.epoch, record.flow) for record in history if record.flow is not None]
    steps = max(LINES, len(known)) - 1
    places = [round(i * steps / (LINES - 1)) for i in range(LINES)]
    return dict(known[place] for place in places if place < len(known))
