"""The data of figures of a training run, for all integrations."""

from __future__ import annotations

from collections.abc import Sequence

from fisherfast.results.flow import FisherFlow
from fisherfast.results.plots import thinned
from fisherfast.training import EpochRecord

__all__ = ["measured_flows"]


def measured_flows(history: Sequence[EpochRecord]) -> dict[int, FisherFlow]:
    """Return flows by epoch, at most twelve, evenly spaced, with the first and the last.

    Args:
        history: the epochs in their order.

    Example:
        >>> from fisherfast.integrations.figures import measured_flows
        >>> measured_flows([])
        {}
    """
    measured = [record for record in history if record.flow is not None]
    return {record.epoch: record.flow for record in thinned(measured)}
