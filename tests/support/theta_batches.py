"""Training batches x ~ N(A theta, 1), theta uniform in [-1, 1], for tests of `observe`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

DIM = 6
BATCH = 128
SIGMAS = 4.0  # false alarm 6e-5 per comparison

generator = torch.Generator()


def uniform(n: int, parameters: int = 1) -> torch.Tensor:
    """theta [n, P]."""
    return 2 * torch.rand(n, parameters, generator=generator) - 1


def noise(n: int, dim: int = DIM) -> torch.Tensor:
    return torch.randn(n, dim, generator=generator)


def shifted(direction: torch.Tensor, batches: int, n: int = BATCH) -> Iterator:
    """x and theta of each batch, for A [DIM, P] or [DIM]."""
    direction = direction.reshape(DIM, -1)
    for _ in range(batches):
        theta = uniform(n, direction.shape[1])
        yield theta @ direction.T + noise(n), theta
