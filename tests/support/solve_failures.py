"""Covariances that fisher_solve must refuse, each at a known pivot."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Entries put into the identity, and the pivot that fails.
FAILURES = [
    ([(2, 2, 0.0)], 3),
    ([(0, 0, -1.0)], 1),
    ([(4, 4, math.nan)], 5),
    ([(3, 3, math.inf)], 4),
    ([(3, 1, math.nan)], 4),
    ([(2, 0, -math.inf)], 3),
    ([(1, 0, 1.5)], 2),  # not positive definite
    ([(4, 2, 1.0)], 5),  # singular
    ([(3, 0, 2.0), (4, 4, math.nan)], 4),  # the first of two
    ([(1, 1, 0.0), (3, 0, 2.0)], 2),  # the first of two, diagonal first
]
COUNT = 2 * len(FAILURES) + 1


def with_failures(cov: Tensor) -> tuple[Tensor, list[int]]:
    """Puts a failure at every second of COUNT systems; returns them and what info must be."""
    broken, pivots = cov.clone(), [0] * COUNT
    for i, (entries, pivot) in enumerate(FAILURES):
        broken[2 * i + 1] = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
        for row, column, value in entries:
            broken[2 * i + 1, row, column] = value
        pivots[2 * i + 1] = pivot
    return broken, pivots
