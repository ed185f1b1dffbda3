"""The largest eigenvalues of a symmetric matrix of which only products with vectors are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fisherfast.measurement.settings import bytes_of
from fisherfast.parameters.checks import check_fits

TOLERANCE = 1e-8
"""Residual at which ARPACK stops, relative to the trace."""

LEAST_VECTORS = 20
"""Vectors of a Krylov space, SciPy's own choice."""


class Eigenpairs(NamedTuple):
    """Eigenvalues and their directions.

    Attributes:
        values: [k] descending.
        directions: [P, k], orthonormal.
        residuals: [k], |F u - value u|: an eigenvalue of F is as close to the value as that.
    """

    values: Tensor
    directions: Tensor
    residuals: Tensor


def check_not_zero(largest: float) -> None:
    """Raise ValueError unless the largest eigenvalue, or the trace, is positive."""
    if not largest > 0:
        raise ValueError(f"F must not be zero, got a largest eigenvalue of {largest}")


def _krylov_vectors(count: int, size: int) -> int:
    """Vectors [P] that are kept at a time, for `count` of `size` eigenvalues."""
    return min(size, max(2 * count + 1, LEAST_VECTORS))


def largest_eigenpairs(
    product: Callable[[Tensor], Tensor],
    size: int,
    count: int,
    *,
    trace: float,
    seed: int,
    device: torch.device,
    memory_budget: int | str | None = None,
) -> Eigenpairs:
    """Largest eigenpairs by the implicitly restarted Lanczos method (ARPACK, through SciPy).

    A Krylov space of one start vector holds one direction of each distinct eigenvalue in exact
    arithmetic, and eigenvalues are often equal: with several outputs that no layer mixes, each
    comes several times. ARPACK alone misses copies: of 40 triples 0.9^i it returned two of the
    first in place of three. So what was found is projected out and searched for one more, until
    the largest of the rest is no larger than the last one found.

    Args:
        product: F V of V [P, m] float64, F symmetric and positive semi-definite.
        size: P.
        count: eigenpairs wanted; all P at most.
        trace: of F: the unit of the tolerance.
        seed: of the start vectors.
        device: where products are computed.
        memory_budget: bytes for the vectors; None for no bound.

    Raises:
        ValueError: F is zero.
        MemoryError: the vectors do not fit.

    Cost: two or three products for each eigenpair wanted, at least 20; about 20 more to see that
    none is missing, and again for each that was. Twice as many vectors of P numbers as eigenpairs,
    at least 20; where that is P, one product with the identity matrix and an eigendecomposition.

    Reference: Lehoucq, Sorensen, Yang (1998), ARPACK Users' Guide; deflation: Parlett (1998), The
    Symmetric Eigenvalue Problem, chapter 5.3.
    """
    check_not_zero(trace)
    vectors = _krylov_vectors(count, size)
    # the Krylov space, and the directions with their products
    check_fits(
        f"{vectors} vectors of {size} parameters",
        8 * size * (vectors + 3 * min(count, size)),
        bytes_of(memory_budget) or math.inf,
        "ask for a smaller count=, or choose some parameters=",
    )
    if vectors == size:
        matrix = product(torch.eye(size, dtype=torch.float64, device=device))
        values, directions = torch.linalg.eigh((matrix + matrix.T) / 2)
        values, directions = values.flip(0)[:count], directions.flip(1)[:, :count]
    else:
        found = _search(product, size, count, vectors, trace, seed, device)
        values, directions = (torch.from_numpy(part).to(device) for part in found)
    residuals = (product(directions) - directions * values).norm(dim=0)
    return Eigenpairs(values, directions, residuals)


def _search(
    product: Callable[[Tensor], Tensor],
    size: int,
    count: int,
    vectors: int,
    trace: float,
    seed: int,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [k] descending and directions [P, k]."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    generator = np.random.default_rng(seed % 2**64)  # NumPy refuses negative seeds
    values, directions = np.empty(0), np.empty((size, 0))

    def without_known(v: np.ndarray) -> np.ndarray:
        for _ in range(2):  # the second time removes what rounding left of the first
            v = v - directions @ (directions.T @ v)
        return v

    def shifted(v: np.ndarray) -> np.ndarray:
        """(1 + F / trace) v across the known directions: zero eigenvalues converge as well."""
        column = torch.from_numpy(without_known(v.ravel()))[:, None].to(device)
        return v.ravel() + without_known(product(column)[:, 0].cpu().numpy()) / trace

    operator = LinearOperator((size, size), matvec=shifted, dtype=np.float64)
    while True:
        first = not len(values)
        found, columns = eigsh(
            operator,
            count if first else 1,
            which="LA",
            v0=without_known(generator.standard_normal(size)),
            ncv=vectors if first else _krylov_vectors(1, size),
            tol=TOLERANCE,
        )
        found = (found - 1) * trace
        if not first and found[0] <= values[-1] + TOLERANCE * trace:
            return values, directions
        values = np.concatenate([values, found])
        order = np.argsort(-values, kind="stable")[:count]
        values = values[order]
        directions = np.concatenate([directions, columns], axis=1)[:, order]
