r"""The ridge: noise added to each feature before its covariance is inverted (docs/theory.md, 4).

.. math:: R = S + \Lambda, \qquad q_i = \sum_j \Lambda_{jj} (L^{-1})_{ij}^2, \qquad L L^T = R

S has unit diagonal, so Lambda is relative to the variance of each feature. q_i is the part of the
whitened feature i that is added noise: 0 if the ridge costs nothing, 1 if there is nothing else.

A ridge removes all information from directions whose variance is below it, so "auto" uses as little
as the arithmetic allows: the squared rounding of the activations and of the factorisation for raw
activations, and `LIFT_RIDGE` for the random lift, whose features are nearly collinear by
construction. Whitened raw features that are mostly ridge are rounding, and are left out.
"""

from __future__ import annotations

import numbers
from typing import Literal

import torch
from torch import Tensor

RidgeSetting = float | Literal["auto"]
"""A number for all features, relative to the variance of each, or "auto"."""

AUTO: Literal["auto"] = "auto"

LIFT_RIDGE = 1e-4
"""Ridge of lifted features: equivalent to noise of 1 % of the spread of each."""

ROUNDING = 16
"""Units in the last place below which a difference is rounding: the error of a dot product of a
thousand numbers is a few units."""

INPUT_ROUNDING = 2
"""The same for given rather than computed numbers: half a unit, and as much again in a lookup."""

FACTOR_ROUNDING = 4 * torch.finfo(torch.float64).eps
"""Least ridge per feature with which a factorisation in float64 is positive definite."""

MOSTLY_RIDGE = 0.5
"""q_i above which a whitened raw feature counts as rounding: with this ridge, 32 times the
rounding, linear copies in float32 have q = 0.99."""

HIDDEN_SHARE = 0.02
"""Part of J that the ridge may hide before a note says that the precision is too low for the
covariance."""


def check_ridge(ridge: object) -> RidgeSetting:
    """Return the setting ridge as "auto" or a float.

    Raises:
        TypeError: it is neither "auto" nor a number.
        ValueError: it is not in [0, 1).
    """
    if isinstance(ridge, str) and ridge == AUTO:
        return AUTO
    if not isinstance(ridge, numbers.Real) or isinstance(ridge, bool):
        raise TypeError(f'ridge must be "auto" or a number, got {ridge!r}')
    value = float(ridge)
    if not 0 <= value < 1:
        raise ValueError(f'ridge must be "auto" or in [0, 1), got {value}')
    return value


def relative_rounding(dtype: torch.dtype, units: int = ROUNDING) -> float:
    """Return the spread, relative to its size, that rounding may add to an activation of a dtype.

    Args:
        dtype: for half types it is one unit in the last place, as their products are summed in
            float32.
        units: in the last place, for other types.
    """
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    return max(units * torch.finfo(precision).eps, torch.finfo(dtype).eps)


def raw_ridge(variance: Tensor, rounding_variance: Tensor) -> Tensor:
    """Compute the smallest ridge [..., k] that the arithmetic allows.

    Args:
        variance: [..., k] of the features.
        rounding_variance: [..., k] the part of it from rounding of the activations.
    """
    factor = FACTOR_ROUNDING * variance.shape[-1]
    return rounding_variance / torch.where(variance > 0, variance, 1.0) + factor


def as_vector(ridge: float | Tensor, like: Tensor) -> Tensor:
    """Expand a ridge of one number or [k] to [k], on the device of `like`."""
    return ridge.to(like) if isinstance(ridge, Tensor) else torch.full_like(like, ridge)


def with_ridge(correlation: Tensor, ridge: float | Tensor) -> Tensor:
    """Compute R = S + Lambda [k, k] from a covariance with unit diagonal."""
    R = correlation.clone()
    R.diagonal().add_(ridge)
    return R
