"""The status of each layer: how reliable its J is, judged from all layers of a flow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fisherfast.model.sites import INPUT
from fisherfast.results.comparison import (
    compare,
    covariance_of,
    relative,
    variance_along,
    weakest_direction,
)
from fisherfast.results.layer import LayerFisher

UNRESOLVED = 2.0
"""Standard errors from zero within which J may be zero."""

CLEAR = 3.0
"""Standard errors beyond which a difference between two numbers is more than noise."""

PRECISE = 10.0
"""Standard errors that J must be above zero in its worst direction: an error of a tenth."""

RISE = 1.1
"""Ratio of a later J to this one above which more features are needed: linear information rises by
a few per cent through a non-linear layer even if both J are right."""

BLIND = "more features that add a tenth of J would not have been noticed: use more samples"

TOO_LOW = "lower is above J by more than three errors: J is too low"

LATER = "a function of this layer, has more"

ATTAINED = 0.97
"""Fraction of a known upper bound from which more features can add only a negligible part."""


def with_status(layers: Sequence[LayerFisher], *, score: bool) -> tuple[LayerFisher, ...]:
    """Set the status of each layer of a flow, with a note if the table does not show the reason.

    The status is the first that applies, in the worst direction of theta:

    - "unresolved": J is within two errors of zero (or not finite), and a later layer, which is a
      function of this one alone, is clearly above zero;
    - "noisy": the error is above a tenth of J, the precision is too low for the covariance,
      neighbouring samples depend on each other, the honest bound is clearly above J, or more
      features that add a tenth of J would not have been noticed and J is not at a known upper
      bound;
    - "rising": a later layer has clearly more information, or the curve has not reached a plateau,
      unless J is at a known upper bound: V of a score, or the J of a resolved input;
    - "resolved".

    Args:
        layers: of one flow in execution order, as measured.
        score: the input's J is V, the Fisher information itself.
    """
    by_name = {layer.name: layer for layer in layers}
    source = layers[0] if layers and layers[0].name == INPUT else None
    bound = source if score else None
    judged = []
    for layer in layers:
        later = [by_name[name] for name in layer.descendants if name in by_name]
        status, notes = _status(layer, later, bound)
        judged.append(replace(layer, status=status, notes=(*layer.notes, *notes)))
        if layer is source and status == "resolved":
            bound = source
    return tuple(judged)


def is_judgement(note: str) -> bool:
    """Return whether a note explains a status, as opposed to the measurement."""
    return note in (BLIND, TOO_LOW) or LATER in note


def _status(
    layer: LayerFisher, later: Sequence[LayerFisher], bound: LayerFisher | None
) -> tuple[str, list[str]]:
    direction, known = weakest_direction(layer.J, covariance_of(layer))
    if known != known:
        return "unresolved", []
    if not bool(layer.J.any() or layer.stderr.any() or layer.naive.any()):
        return "resolved", []
    if known < UNRESOLVED:
        shown = [other.name for other in later if _shows(other, layer, direction)]
        if shown:
            return "unresolved", [
                f"J is zero within its error, but {shown[0]}, {LATER}:"
                " use more samples, or flow.tightened()"
            ]
    if known < PRECISE or not (layer.carried and layer.independent):
        return "noisy", []
    if _bound_is_above(layer):
        return "noisy", [TOO_LOW]
    attained = bound is not None and _attains(layer, bound)
    if not layer.sensitive and not attained:
        return "noisy", [BLIND]
    risen = next(_risen(later, layer), None)
    if risen is not None:
        return "rising", [f"{risen.name}, {LATER}: flow.tightened() applies it here"]
    if layer.plateau or attained:
        return "resolved", []
    return "rising", []


def _shows(later: LayerFisher, layer: LayerFisher, direction: torch.Tensor) -> bool:
    """Return whether a later layer is clearly above zero and above this one in a direction."""
    J = direction @ later.J @ direction
    error = variance_along(direction[:, None], covariance_of(later)).sqrt()
    return bool(CLEAR * error < J) and bool(direction @ layer.J @ direction < J)


def _bound_is_above(layer: LayerFisher) -> bool:
    """Return whether the honest bound is above J in some direction by more than three errors, those
    of both added in quadrature. This is more than the error of the difference, because they share
    their samples."""
    ratios, directions = relative(layer.lower, layer.J)
    weight = directions.abs()
    bound_error = torch.einsum("pi,pq,qi->i", weight, layer.lower_stderr, weight)
    variance = variance_along(directions, covariance_of(layer)) + bound_error.square()
    return bool((ratios - 1 > CLEAR * variance.sqrt()).any())


def _risen(later: Sequence[LayerFisher], layer: LayerFisher) -> Iterator[LayerFisher]:
    """Yield later layers with clearly more information in some direction; J itself is compared
    first, because there are many pairs of layers."""
    if not later:
        return
    ratios, _ = relative(torch.stack([other.J for other in later]), layer.J)
    for other, highest in zip(later, ratios.amax(1).tolist(), strict=True):
        if highest > RISE:
            found = compare(other, layer)
            clear = found.ratios - 1 > CLEAR * found.ratios_stderr
            if bool((clear & (found.ratios > RISE)).any()):
                yield other


def _attains(layer: LayerFisher, bound: LayerFisher) -> bool:
    """Return whether J is at least `ATTAINED` of an upper bound in every direction."""
    positive = weakest_direction(bound.J, covariance_of(bound))[1] > 0
    return positive and bool(relative(layer.J, bound.J)[0].min() >= ATTAINED)
