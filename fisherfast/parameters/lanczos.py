"""The largest eigenvalues of a symmetric matrix of which only products with vectors are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Ritz", "lanczos"]

BREAKDOWN = 1e-13
"""Part of a product that must be new, relative to the largest eigenvalue: below it is rounding, and
the space holds everything that the start vector can reach."""


class Ritz(NamedTuple):
    """Eigenvalues as a Krylov space has them.

    Attributes:
        values: [k] descending.
        directions: [P, k], of unit length.
        residuals: [k], |F u - value u|: an eigenvalue of F is as close to the value as that.
        products: how many products with F it took.
    """

    values: Tensor
    directions: Tensor
    residuals: Tensor
    products: int


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    count: int,
    *,
    tolerance: float,
    most_products: int,
) -> Ritz:
    """Largest eigenpairs by Lanczos' method, every new vector orthogonalised twice to all others.

    With a start vector drawn at random every distinct eigenvalue is found, with probability 1; of
    eigenvalues that are equal to the last place, one is.

    Args:
        product: F v of v [P] float64, F symmetric and positive semi-definite.
        start: [P] float64, not zero.
        count: eigenpairs wanted.
        tolerance: of the residuals, relative to the largest eigenvalue.
        most_products: stop there at the latest.

    Cost: one product a step, and P numbers of memory.

    Reference: Parlett (1998), The Symmetric Eigenvalue Problem, chapters 11.7 and 13.
    """
    basis = [start / start.norm()]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    while True:
        following = product(basis[-1])
        diagonal.append(basis[-1].dot(following))
        for _ in range(2):  # the second time takes what rounding left of the first
            for vector in basis:
                following = following - vector.dot(following) * vector
        rest = following.norm()
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        wanted = min(count, len(values))
        residuals = (rest * vectors[-1, -wanted:]).abs()
        scale = values[-1].abs()
        done = len(values) >= count and bool((residuals <= tolerance * scale).all())
        if done or bool(rest <= BREAKDOWN * scale) or len(basis) >= most_products:
            break
        beside.append(rest)
        basis.append(following / rest)
    space = torch.stack(basis, dim=1)
    directions = space @ vectors[:, -wanted:].flip(1)
    return Ritz(values[-wanted:].flip(0), directions, residuals.flip(0), len(basis))


def _tridiagonal(diagonal: list[Tensor], beside: list[Tensor]) -> Tensor:
    found = torch.diag(torch.stack(diagonal))
    if beside:
        upper = torch.diag(torch.stack(beside), 1)
        found = found + upper + upper.T
    return found
