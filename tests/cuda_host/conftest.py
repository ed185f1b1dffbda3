"""Fixtures of the host-run CUDA kernels: the compiled program, dtypes, numbers from a seed."""

import shutil
from collections.abc import Callable

import pytest
import torch
from cuda_host import harness
from support.pairwise import DTYPES


@pytest.fixture(scope="session")
def kernels() -> harness.Kernels:
    """The launchers of csrc/ops."""
    for tool in ("g++", "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} must be installed to run the CUDA kernels on the host")
    return harness.Kernels(harness.build())


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def normal() -> Callable[..., torch.Tensor]:
    """Draws normal numbers from a seed: normal(3, 4, dtype=...)."""
    generator = torch.Generator().manual_seed(20250131)

    def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw


@pytest.fixture
def systems(normal: Callable[..., torch.Tensor]) -> Callable[..., tuple]:
    """Well-conditioned systems: systems(B, d, P, dtype=...) -> cov, deriv."""

    def draw(batch: int, dim: int, params: int, dtype: torch.dtype):
        samples = normal(batch, dim, 2 * dim + 3)
        unit = torch.logspace(-3, 3, dim, dtype=torch.float64)  # features of very different units
        cov = unit[:, None] * (samples @ samples.mT / (2 * dim + 3)) * unit
        deriv = unit[:, None] * normal(batch, dim, params)
        return cov.to(dtype), deriv.to(dtype)

    return draw
