"""Fixtures of the host-run CUDA kernels: the compiled program, dtypes, numbers from a seed."""

import shutil

import pytest
from cuda_host import harness
from support.op_fixtures import dtype, normal

__all__ = ["dtype", "kernels", "normal"]


@pytest.fixture(scope="session")
def kernels() -> harness.Kernels:
    """The launchers of csrc/ops."""
    for tool in ("g++", "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} must be installed to run the CUDA kernels on the host")
    return harness.Kernels(harness.build())
