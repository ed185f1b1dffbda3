"""Checks of the arguments of a monitor and its rules."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch

from fisherfast.training.record import Errors


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
