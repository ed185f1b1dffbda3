"""Fixtures of the tests of ops and CUDA kernels: dtypes, numbers from a seed, systems."""

from collections.abc import Callable

import pytest
import torch
from support.pairwise import DTYPES


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype that the ops accept."""
    return request.param


@pytest.fixture
def normal() -> Callable[..., torch.Tensor]:
    """Normal numbers from a seed: normal(3, 4, dtype=..., device=...)."""
    generator = torch.Generator().manual_seed(20250131)

    def draw(*shape: int, dtype: torch.dtype = torch.float64, device: object = "cpu"):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return draw


@pytest.fixture
def systems(normal: Callable[..., torch.Tensor]) -> Callable[..., tuple]:
    """Well-conditioned systems: systems((B, ...), d, P, dtype=..., device=...) -> cov, deriv."""

    def draw(batch: tuple, dim: int, params: int, **kind: object):
        samples = normal(*batch, dim, 2 * dim + 3)
        unit = torch.logspace(-3, 3, dim, dtype=torch.float64)  # features of very different units
        cov = unit[:, None] * (samples @ samples.mT / (2 * dim + 3)) * unit
        deriv = unit[:, None] * normal(*batch, dim, params)
        return cov.to(**kind), deriv.to(**kind)

    return draw
