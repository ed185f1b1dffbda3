"""Checks of the arguments and the state of a monitor."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch

from fisherfast._fields import Count, has_version, read_fields
from fisherfast.training.record import EpochRecord, Errors

FORMAT_VERSION = 1

STATE = {
    "format_version": int,
    "version": str,
    "network": dict[str, list[Count]],
    "settings": dict[str, Any],
    "calls": Count,
    "history": list[EpochRecord],
    "observer": dict[str, object] | None,
    "spaces": dict[str, tuple[torch.Tensor, torch.Tensor]],
    "warned": list[str],
}
"""Of a monitor."""


def check_errors(name: str, value: Any, parameters: int, scale: float) -> Errors:
    """Return mean square errors in theta^2, one per parameter; None for None.

    Args:
        name: of the argument.
        value: a number or P of them, in the square of the targets' unit.
        parameters: P.
        scale: theta per unit of the targets.

    Raises:
        TypeError: the value is neither a number nor numbers.
        ValueError: there are not P of them, or one is negative.
    """
    if value is None:
        return None
    errors = numbers_of(name, value)
    if len(errors) != parameters:
        raise ValueError(f"{name} must hold one number per parameter ({parameters}), got {value!r}")
    if any(error < 0 for error in errors):
        raise ValueError(
            f"{name} must be a mean square error, at least 0, got {value!r}: leave it out for other"
            ' losses, such as a log-likelihood, and stop with rule="transmission"'
        )
    return tuple(error * scale**2 for error in errors)


def numbers_of(name: str, value: Any) -> list[float]:
    """Return one number or several as a list.

    Raises:
        TypeError: the value is neither a number nor numbers.
    """
    device = getattr(value, "device", "cpu")
    try:
        values = torch.as_tensor(value, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or one per parameter, got {value!r}") from None
    return values.flatten().tolist()


def check_scale(scale: Any) -> float:
    """Return the setting target_scale as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is 0, NaN or infinite.
    """
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"target_scale must be a number, got {scale!r}")
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"target_scale must be finite and not 0, got {scale}")
    return float(scale)


def read_state(state: Any) -> dict[str, Any]:
    """Return the values of the state of a monitor, with its history as records.

    Args:
        state: the result of `FisherMonitor.state_dict`.

    Raises:
        ValueError: it is damaged or of another version.
    """
    if not has_version(state, "format_version", FORMAT_VERSION):
        raise ValueError(
            f"state must be of a FisherMonitor, format {FORMAT_VERSION}, got"
            f" {state.get('format_version') if isinstance(state, Mapping) else type(state)}"
        )
    values = read_fields(STATE, state, "state")
    parameters, widths = values["settings"].get("parameters"), dict[str, int]()
    for number, record in enumerate(values["history"]):
        if len(record.input_J) != parameters:
            raise ValueError(
                f"state.history[{number}] must have {parameters} parameters, got"
                f" {len(record.input_J)}"
            )
        widths |= {layer.name: layer.dim for layer in record.flow or ()}
    for name, halves in values["spaces"].items():
        d = widths.get(name, halves[0].shape[-1] if halves[0].dim() else 0)
        if any(w.dim() != 2 or w.shape[1] != d or not w.is_floating_point() for w in halves):
            raise ValueError(
                f"state.spaces[{name!r}] must hold two floating matrices [k, {d}], got"
                f" {[list(weights.shape) for weights in halves]}"
            )
    return values
