"""Are errors and outputs in the unit of theta? What the response of the output tells."""

from __future__ import annotations

from fisherfast.results.flow import FisherFlow
from fisherfast.training.record import Errors, output_of

__all__ = ["unit_note"]

FACTOR = 3.0
"""How far the response of an output may be from one per unit of theta before a unit is suspected:
no estimator that has learned anything overshoots threefold."""

TRAINED = 3.0
"""How far an error may be from the variance of the output for the network to count as trained: the
error of one that is not is that of its bias, and that of one that remembers is near zero."""

TRANSMITTED = 0.3
"""J_output / J_input below which a network counts as untrained whatever its error: where the output
is mostly noise, so is the error. Of 150 networks of random weights nine in ten were below 0.11, the
best at 0.35."""


def unit_note(flow: FisherFlow, mse: Errors, target_scale: float) -> list[str]:
    """A note where the output moves by another amount than theta, with the factor between them.

    An output that estimates theta moves by 1 / target_scale per unit of it. One that moves by
    another amount may only be untrained; but then its error is large beside its own variance, or
    it transmits little. So only a network that transmits and whose error *is* its variance is held
    to its unit, and a unit that is less than threefold another passes for the caution of an
    estimator.

    Args:
        flow: of the network on held-out samples.
        mse: in theta^2, as the caller's scale gives it, of held-out samples if those are known;
            None where unknown: there is no error then whose unit could be wrong.
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
