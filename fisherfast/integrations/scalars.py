"""The numbers of a record that are logged as curves."""

from __future__ import annotations

import math

from fisherfast.training import EpochRecord

CURVES = ("train_level", "val_level", "transmission", "overfitting", "J/", "fraction/", "live")
"""Prefixes of the columns of `EpochRecord.row` that are curves: errors in units of the bound,
transmission, J and J / J_input of each layer, and the live trend with its age in batches."""


def scalars(record: EpochRecord) -> dict[str, float]:
    """Return the known columns of `EpochRecord.row`, without standard errors.

    Args:
        record: one epoch.

    Returns:
        Plain numbers by column: "transmission", "train_level", "J/fc1" in 1/theta^2,
        "fraction/fc1", ...

    Example:
        >>> import torch, fisherfast as ff
        >>> from fisherfast.integrations.scalars import scalars
        >>> x = torch.randn(2, 1000, 4)
        >>> data = ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2)
        >>> record = ff.FisherMonitor(torch.nn.Linear(4, 1), data).step()
        >>> list(scalars(record))
        ['transmission', 'J/input', 'fraction/input', 'J/output', 'fraction/output']
    """
    return {
        name: value
        for name, value in record.row().items()
        if name.startswith(CURVES) and name != "transmission_stderr" and not math.isnan(value)
    }
