"""Are errors and outputs in the unit of theta? What the response of the output tells."""

from __future__ import annotations

import torch

from fisherfast.results import FisherFlow
from fisherfast.training.record import Errors, output_of

__all__ = ["unit_note"]

FACTOR = 3.0
"""How far the response of an output may be from one per unit of theta before a unit is suspected:
no estimator that has learned anything overshoots threefold."""

TRAINED = 3.0
"""Training error, in variances of the output, below which a small response is no longer the
caution of an untrained network, whose error is that of never moving."""


def unit_note(flow: FisherFlow, train_mse: Errors, target_scale: float) -> list[str]:
    """A note where the output moves by another amount than theta, with the factor between them.

    An output that estimates theta moves by 1 / target_scale per unit of it. One that moves far more
    is in another unit. One that moves far less may only be untrained; but then its error is large
    beside its own variance.

    Args:
        flow: of the network on held-out samples.
        train_mse: in theta^2, as the caller's scale gives it; None where unknown.
        target_scale: theta per unit of the targets.
    """
    layer = flow[output_of(flow)]
    P = layer.parameters
    if layer.response is None or layer.response.shape != (P, P):
        return []
    for p in range(P):
        gain = float(layer.response[p, p].abs()) * abs(target_scale)
        J = float(layer.J[p, p])
        if gain == 0 or J <= 0:
            continue
        variance = gain**2 / J  # of the output, in theta^2: its own J is gain^2 / variance
        known = train_mse is not None
        cautious = not known or (train_mse or ())[p] > TRAINED * variance
        if gain > FACTOR or (gain < 1 / FACTOR and not cautious):
            factor = abs(target_scale) / gain
            which = f" of parameter {p}" if P > 1 else ""
            return [
                f"targets seem to be in another unit than theta: the output{which} moves by"
                f" {gain / abs(target_scale):.3g} per unit of theta, so errors are off by its"
                f" square; pass target_scale={torch.tensor(factor).item():.3g}"
            ]
    return []
