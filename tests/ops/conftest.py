"""Fixtures of the op tests: every device, every dtype, both routes, a number of threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
from support.op_fixtures import dtype, normal, systems

from fisherfast import _native

__all__ = ["device", "dtype", "machine", "normal", "route", "systems", "with_threads"]

CUDA = [pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that is there."""
    return torch.device(request.param)


@pytest.fixture(params=["baseline", "avx2", "avx512", *CUDA])
def machine(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device, the CPU at each of its instruction sets."""
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    module, cpu = _native.load(), torch.device("cpu")
    if module is None:
        if request.param != "baseline":
            pytest.skip("FISHERFAST_DISABLE_NATIVE=1 is set: there is one way only")
        yield cpu
        return
    info = _native.build_info()
    if request.param not in info["simd_available"]:
        pytest.skip(f"this machine has no {request.param}")
    module.use_simd(request.param)
    yield cpu
    module.use_simd(info["simd"])


@pytest.fixture(params=["kernel", "torch"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The native kernel, and the plain torch that stands in for it."""
    if request.param == "torch":
        monkeypatch.setattr(_native, "serves", lambda tensor: False)
    return request.param


@pytest.fixture
def with_threads() -> Iterator[Callable]:
    """Calls a function with a number of torch threads; the former number is restored."""
    former = torch.get_num_threads()

    def call(threads: int, function: Callable) -> object:
        torch.set_num_threads(threads)
        return function()

    yield call
    torch.set_num_threads(former)
