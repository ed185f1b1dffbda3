"""Information about some parameters if the others are unknown as well."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fisherfast._validation import check_whole
from fisherfast.results.text import diagonal_text

SINGULAR = 1e-9
"""Fraction of the information about a parameter that must remain when the others are unknown; less
is rounding. A parameter that is the sum of two others keeps 3e-10 after a float32 layer."""


Keep = int | str | Sequence[int | str]
"""Parameters by their numbers or names."""


@dataclass(frozen=True, eq=False, repr=False)
class MarginalFisher:
    """Fisher information about the kept parameters, with the others as nuisances.

    Attributes:
        parameters: [a] the kept parameters.
        J: [a, a] float64, J_aa - J_ab J_bb^-1 J_ba, per unit of theta squared. NaN if the
            information about the nuisances is not positive semi-definite.
        stderr: [a, a] standard errors; NaN if the errors of J are unknown.
        names: [a] of the kept parameters; empty if they have none.
    """

    parameters: tuple[int, ...]
    J: torch.Tensor
    stderr: torch.Tensor
    names: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        """J as a number; for one parameter only."""
        if len(self.parameters) != 1:
            raise ValueError(
                f"value needs exactly one parameter, got {len(self.parameters)}: use .J"
            )
        return float(self.J)

    def __float__(self) -> float:
        return self.value

    @property
    def crlb(self) -> torch.Tensor:
        """Cramer-Rao bound [a] in the unit of theta, the same as in `LayerFisher.crlb`."""
        return cramer_rao(self.J)

    def __repr__(self) -> str:
        J, stderr = map(diagonal_text, (self.J, self.stderr))
        kept = list(self.names or self.parameters)
        return f"MarginalFisher(parameters={kept}, J={J}, stderr={stderr})"


def cramer_rao(J: torch.Tensor, rounding: float = SINGULAR) -> torch.Tensor:
    """Compute the square root of the diagonal of J^-1 [P]; infinite if J is not positive definite
    within rounding, a fraction of the information about a parameter."""
    correlation, scale = _unit_diagonal(J)
    factor, failed = torch.linalg.cholesky_ex(correlation)
    left = factor.diagonal().square()
    if int(failed) or not bool((left > rounding).all() and torch.isfinite(left).all()):
        return torch.full((len(J),), math.inf, dtype=torch.float64, device="cpu")
    return torch.cholesky_inverse(factor).diagonal().sqrt() / scale


def _unit_diagonal(J: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale J so that each parameter has information 1 (or 0, or -1); also returns the scale
    [P]."""
    scale = J.diagonal().abs().sqrt()
    scale = torch.where(scale > 0, scale, 1)
    return (J + J.T) / 2 / scale[:, None] / scale, scale


def _pseudo_inverse(J: torch.Tensor, rounding: float) -> torch.Tensor | None:
    """Compute the pseudo-inverse of a J that may be singular, if parameters are equivalent or have
    no information; None if it is not positive semi-definite."""
    correlation, scale = _unit_diagonal(J)
    if not bool(torch.isfinite(correlation).all()):
        return None
    values, vectors = torch.linalg.eigh(correlation)
    if bool((values < -rounding).any()):
        return None
    seen = torch.where(values > rounding, values, math.inf).reciprocal()
    return (vectors * seen) @ vectors.T / scale[:, None] / scale


def marginal_fisher(
    J: torch.Tensor,
    error_covariance: torch.Tensor | None,
    keep: Keep,
    rounding: float = SINGULAR,
    names: Sequence[str] = (),
) -> MarginalFisher:
    r"""Compute the Schur complement of J, and its standard error to first order.

    .. math:: M = J_{aa} - J_{ab} J_{bb}^{-1} J_{ba}, \qquad dM = X^T\, dJ\, X, \quad
              X = \begin{pmatrix} 1 \\ -J_{bb}^{-1} J_{ba} \end{pmatrix}

    Args:
        J: [P, P].
        error_covariance: [m, m] of the lower triangle of J, m = P (P + 1) / 2, or None.
        keep: parameters to keep, numbers or names.
        rounding: fraction of the information about a parameter below which J is rounding.
        names: [P] of all parameters; empty if they have none.

    Raises:
        ValueError: keep is empty, or holds a parameter twice or one that does not exist.
        TypeError: keep is not a whole number or a sequence of these.
    """
    kept = _check_keep(keep, len(J), names)
    kept_names = tuple(names[p] for p in kept) if names else ()
    rest = [p for p in range(len(J)) if p not in kept]
    J = (J + J.T) / 2
    size = len(kept)
    X = torch.zeros(len(J), size, dtype=torch.float64, device="cpu")
    X[kept] = torch.eye(size, dtype=torch.float64, device="cpu")
    if rest:
        inverse = _pseudo_inverse(J[rest][:, rest], rounding)
        if inverse is None:
            nothing = torch.full((size, size), math.nan, dtype=torch.float64, device="cpu")
            return MarginalFisher(tuple(kept), nothing, nothing.clone(), kept_names)
        X[rest] = -inverse @ J[rest][:, kept]
    marginal = X.T @ J @ X
    stderr = torch.full_like(marginal, math.nan)
    if error_covariance is not None:
        full = unpack_covariance(error_covariance, len(J))
        variance = torch.einsum("pi,qj,pqrs,ri,sj->ij", X, X, full, X, X)
        stderr = variance.clamp_min(0).sqrt()
    return MarginalFisher(tuple(kept), marginal, stderr, kept_names)


def pack_covariance(full: torch.Tensor) -> torch.Tensor:
    """Reduce [P, P, P, P] of the entries of a symmetric matrix to [m, m] of its lower triangle."""
    row, column = torch.tril_indices(len(full), len(full), device=full.device)
    return full[row, column][:, row, column]


def unpack_covariance(packed: torch.Tensor, parameters: int) -> torch.Tensor:
    """Expand [m, m] of the lower triangle of a symmetric matrix to [P, P, P, P] of all entries."""
    row, column = torch.tril_indices(parameters, parameters, device="cpu")
    place = torch.zeros(parameters, parameters, dtype=torch.int64, device="cpu")
    place[row, column] = place[column, row] = torch.arange(len(row), device="cpu")
    return packed[place.flatten()][:, place.flatten()].reshape((parameters,) * 4)


def _check_keep(keep: Keep, parameters: int, names: Sequence[str]) -> list[int]:
    single = isinstance(keep, str) or not isinstance(keep, Iterable)
    given: Any = [keep] if single else keep
    entries = [_number_of(entry, names) for entry in given]
    kept = [p + parameters if p < 0 else p for p in entries]
    valid = all(0 <= p < parameters for p in kept)
    if not kept or not valid or len(set(kept)) < len(kept):
        raise ValueError(
            f"keep must name different parameters of the {parameters} there are, got {keep!r}"
        )
    return kept


def _number_of(entry: int | str, names: Sequence[str]) -> int:
    if not isinstance(entry, str):
        return check_whole("keep", entry)
    if entry not in names:
        known = f"one of {list(names)}" if names else "a number, or named in the data (names=)"
        raise ValueError(f"keep must be {known}, got {entry!r}")
    return list(names).index(entry)
