"""What figures of a run in training are made of, whatever shows them."""

from __future__ import annotations

from collections.abc import Sequence

from fisherfast.results.flow import FisherFlow
from fisherfast.training import EpochRecord

__all__ = ["measured_flows"]

LINES = 12
"""Flows in one figure: what a legend names, and what keeps a figure of a long run as quick."""


def measured_flows(history: Sequence[EpochRecord]) -> dict[int, FisherFlow]:
    """Flows by epoch, evenly thinned to twelve of them, with the first and the last.

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
