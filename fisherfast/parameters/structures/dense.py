"""A dense positive semi-definite matrix with the rounding error of its numbers."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 8
"""Steps of the power method for the largest and the smallest eigenvalue. For a singular matrix the
first step is enough: it amplifies the null space by 1e10 and more."""


class PositiveMatrix:
    """F [p, p], a sum of outer products of gradients.

    Gradients that cancel in some direction cancel to the rounding of their own dtype, u, and leave
    an eigenvalue of about u^2 times the largest; the sums are in float64. An eigenvalue that is
    below p max(u^2, 2.2e-16) times the largest counts as zero.

    Args:
        matrix: [p, p] float64.
        rounding: u, of the dtype of the gradients.
    """

    def __init__(self, matrix: Tensor, rounding: float) -> None:
        self.matrix = matrix
        self.rounding = rounding
        self._factored: tuple[float, Tensor | None] | None = None

    @property
    def tolerance(self) -> float:
        """Share of the largest eigenvalue below which one counts as zero."""
        return len(self.matrix) * max(self.rounding**2, torch.finfo(torch.float64).eps)

    def solve(self, columns: Tensor, damping: float) -> Tensor | None:
        """(F + damping)^-1 V of V [p, m]; None where F is singular to rounding."""
        if not len(self.matrix):
            return columns
        factor = self._factor(damping)
        return None if factor is None else torch.cholesky_solve(columns, factor)

    def logdet(self, damping: float) -> float:
        """log det(F + damping); -inf where F is singular to rounding and damping is 0."""
        if not len(self.matrix):
            return 0.0
        factor = self._factor(damping)
        if factor is not None:
            return float(2 * factor.diagonal().log().sum())
        if damping == 0:
            return -float("inf")
        return float((self.eigenvalues() + damping).log().sum())

    def eigenvalues(self) -> Tensor:
        """All p, ascending; what rounding made negative is 0."""
        return torch.linalg.eigvalsh(self.matrix).clamp_min(0.0)

    def _factor(self, damping: float) -> Tensor | None:
        """Lower Cholesky factor of F + damping, or None; that of the last damping is kept."""
        if self._factored is None or self._factored[0] != damping:
            self._factored = None  # free it before the next one is computed
            self._factored = damping, self._factorise(damping)
        return self._factored[1]

    def _factorise(self, damping: float) -> Tensor | None:
        factor = cholesky(self.matrix, damping)
        if factor is None:
            return None
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(len(factor), 1, generator=generator, dtype=factor.dtype, device="cpu")
        largest = smallest = start.to(factor.device)
        for _ in range(ITERATIONS):
            largest = largest / largest.norm()
            largest = self.matrix @ largest + damping * largest
            smallest = torch.cholesky_solve(smallest / smallest.norm(), factor)
        # the norms are about the largest eigenvalue and one over the smallest
        regular = largest.norm() * smallest.norm() * self.tolerance < 1
        return factor if bool(regular) else None


def cholesky(matrix: Tensor, damping: float) -> Tensor | None:
    """The lower Cholesky factor of matrix + damping; None where that is not positive definite."""
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    return None if bool(failed) else factor


def singular(what: str, damping: float = 0.0) -> ValueError:
    """The error of `solve` where the matrix is singular in spite of the damping."""
    if damping > 0:
        return ValueError(
            f"damping must be larger than the rounding of F, got {damping:g}: {what}; pass more"
        )
    return ValueError(
        f"damping must be positive, got 0: {what}, so that F has no inverse; pass damping="
    )
