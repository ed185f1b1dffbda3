"""Detect outputs and errors in another unit than theta, from the response of the output."""

from __future__ import annotations

from fisherfast.results.flow import FisherFlow
from fisherfast.training.record import Errors, output_of

FACTOR = 3.0
"""Factor by which the response of an output may differ from one per unit of theta before another
unit is suspected: no trained estimator overshoots threefold."""

TRAINED = 3.0
"""Factor by which the error may differ from the variance of the output for the network to count as
trained: the error of an untrained network is its bias, that of one that memorises is near zero."""

TRANSMITTED = 0.3
"""J_output / J_input below which a network counts as untrained whatever its error: if the output is
mostly noise, so is the error. Of 150 networks with random weights nine in ten were below 0.11, the
best at 0.35."""


def unit_note(flow: FisherFlow, mse: Errors, target_scale: float) -> list[str]:
    """Make a note if the output changes by another amount than theta, with the factor.

    An output that estimates theta changes by 1 / target_scale per unit of it. An output that
    changes by another amount may belong to an untrained network; but then its error is large
    compared with its variance, or it transmits little. So only a network that transmits, and whose
    error *is* its variance, gets a note. A factor below three is normal for a cautious estimator.

    Args:
        flow: of the network on held-out samples.
        mse: in theta^2 by the caller's scale, of held-out samples if known; None if unknown, when
            there is no error whose unit could be wrong.
        target_scale: theta per unit of the targets.
    """
    layer = flow[output_of(flow)]
    P = layer.parameters
    if mse is None or layer.response is None or layer.response.shape != (P, P):
        return []
    if not flow.fractions()[layer.name] >= TRANSMITTED:
        return []
    for p in range(P):
        gain = float(layer.response[p, p].abs()) * abs(target_scale)
        J = float(layer.J[p, p])
        if gain == 0 or J <= 0:
            continue
        variance = gain**2 / J  # of the output, in theta^2: its own J is gain^2 / variance
        trained = variance / TRAINED <= mse[p] <= TRAINED * variance
        if trained and not 1 / FACTOR <= gain <= FACTOR:
            factor = abs(target_scale) / gain
            which = f" of parameter {p}" if P > 1 else ""
            return [
                f"targets seem to be in another unit than theta: the output{which} moves by"
                f" {gain / abs(target_scale):.3g} per unit of theta, so errors are off by its"
                f" square; pass target_scale={factor:.3g}"
            ]
    return []
