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

SETTLED = 1e-3
"""Residual, relative to the eigenvalue, from which on the largest of the rest is the largest: a
vector at random has 1 / sqrt(P) of every direction, and that of the largest one grows fastest."""


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
    draw: Callable[[], Tensor],
    count: int,
    *,
    tolerance: float,
    most_products: int,
) -> Ritz:
    """Largest eigenpairs by Lanczos' method, every new vector orthogonalised twice to all others.

    A Krylov space holds one direction of each distinct eigenvalue, however many there are: with
    several outputs that no layer mixes, all eigenvalues come several times. So what was found is
    projected out and the search begins anew, until the largest of the rest is no larger than the
    last one found.

    Args:
        product: F v of v [P] float64, F symmetric and positive semi-definite.
        draw: start vectors [P] float64 at random, another one each time.
        count: eigenpairs wanted.
        tolerance: of the residuals, relative to the largest eigenvalue.
        most_products: of one search; it stops there at the latest, and is then the last.

    Cost: one product a step, and P numbers of memory; to see that nothing is missing takes a search
    for one eigenvalue, and those that come several times a search for each time.

    Reference: Parlett (1998), The Symmetric Eigenvalue Problem, chapters 11.7, 13 and 5.3
    (deflation).
    """
    start = draw()
    known = Ritz(start.new_empty(0), start.new_empty(len(start), 0), start.new_empty(0), 0)
    while len(known.values) < len(start):
        start = _without(known.directions, start)
        found = _search(product, start, known, count, tolerance, most_products)
        values = torch.cat([known.values, found.values])
        order = values.argsort(descending=True, stable=True)[:count]
        known = Ritz(
            values[order],
            torch.cat([known.directions, found.directions], dim=1)[:, order],
            torch.cat([known.residuals, found.residuals])[order],
            known.products + found.products,
        )
        if not len(found.values) or found.products >= most_products:
            break
        start = draw()
    return known


def _search(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    known: Ritz,
    count: int,
    tolerance: float,
    most_products: int,
) -> Ritz:
    """At most `count` of the largest eigenpairs across the known directions, those that are larger
    than what is not among the `count` largest; maybe none."""
    basis = [start / start.norm()]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    first = len(known.values) == 0
    while True:
        following = _without(known.directions, product(basis[-1]))
        diagonal.append(basis[-1].dot(following))
        for _ in range(2):  # the second time takes what rounding left of the first
            for vector in basis:
                following = following - vector.dot(following) * vector
        rest = following.norm()
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        scale = values[-1].abs() if first else known.values[0]
        residuals = (rest * vectors[-1]).abs()
        if first:
            wanted = min(count, len(values))
            settled = wanted == count
        else:  # more to come, or the largest of the rest is no larger than those that are there
            enough = known.values[-1] if len(known.values) == count else BREAKDOWN * scale
            above = enough + tolerance * scale
            wanted = min(count, int((values > above).sum()))
            largest = values[-1] + residuals[-1]
            settled = wanted > 0 or bool((largest <= above) & (residuals[-1] <= SETTLED * largest))
        kept = slice(len(values) - wanted, None)
        done = settled and bool((residuals[kept] <= tolerance * scale).all())
        if done or bool(rest <= BREAKDOWN * scale) or len(basis) >= most_products:
            break
        beside.append(rest)
        basis.append(following / rest)
    directions = torch.stack(basis, dim=1) @ vectors[:, kept]
    return Ritz(values[kept].flip(0), directions.flip(1), residuals[kept].flip(0), len(basis))


def _without(directions: Tensor, vector: Tensor) -> Tensor:
    """What of a vector is orthogonal to the directions."""
    for _ in range(2):  # the second time takes what rounding left of the first
        vector = vector - directions @ (directions.T @ vector)
    return vector


def _tridiagonal(diagonal: list[Tensor], beside: list[Tensor]) -> Tensor:
    found = torch.diag(torch.stack(diagonal))
    if beside:
        upper = torch.diag(torch.stack(beside), 1)
        found = found + upper + upper.T
    return found
