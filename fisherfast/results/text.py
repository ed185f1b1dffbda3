"""Numbers and symbols as tables, figures and `repr` write them."""

from __future__ import annotations

import math
import sys

import torch

SMALL, LARGE = 0.01, 1e6
"""Sizes from which three decimals show two digits, and from which they are a row of noise."""

LAST_DECIMAL = 0.001
"""Size from which three decimals show one digit, which is enough of an error."""

ROUNDING = 1e-6
"""Errors below this fraction of a ratio are rounding: the ratio is known exactly."""


def number(value: float) -> str:
    """Format a number with three decimals, or as 4.0e-05 where these would show less than two
    digits; "-" for NaN.

    Example:
        >>> from fisherfast.results.text import number
        >>> number(64.4512), number(0.00004), number(0.0), number(1.5e8)
        ('64.451', '4.0e-05', '0.000', '1.5e+08')
    """
    size = abs(value)
    if math.isnan(value):
        return "-"
    if size == 0 or SMALL <= size < LARGE or math.isinf(value):
        return f"{value:.3f}"
    return f"{value:.1e}" if size < SMALL else f"{value:.3g}"


def with_error(value: float, error: float) -> str:
    """Format a ratio of J with its error; "-" for NaN."""
    if math.isnan(value):
        return "-"
    exact = error <= ROUNDING * abs(value)
    return f"{number(value)} +- {error_text(0.0 if exact else error)}"


def error_text(value: float) -> str:
    """Format a standard error: as `number`, with three decimals from one digit on."""
    return f"{value:.3f}" if LAST_DECIMAL <= value < SMALL else number(value)


def diagonal_text(matrix: torch.Tensor) -> str:
    """Format the diagonal of a matrix [P, P]."""
    return ", ".join(number(float(value)) for value in matrix.diagonal())


def error_diagonal(matrix: torch.Tensor) -> str:
    """Format the diagonal of a matrix [P, P] of standard errors."""
    return ", ".join(error_text(float(value)) for value in matrix.diagonal())


def theta(suffix: str = "") -> str:
    """Return "θ" and a suffix ("²" or "[0]"); in letters if standard output cannot show them."""
    try:
        f"θ{suffix}".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return f"theta{suffix}".replace("²", " squared")
    return f"θ{suffix}"
