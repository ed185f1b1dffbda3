"""Shows that the sanitized module is the one under test, and that it stops at a fault.

As a pytest plugin (`-p sanitized`) it ends the run unless `fisherfast._C` is such a module. As a
script it makes every CPU kernel, at every instruction set of this machine, read past its input and
from an address between two numbers: AddressSanitizer and UndefinedBehaviorSanitizer must stop each
of these calls, with a report that names a line of csrc. `make sanitize` runs both.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fisherfast import _native, ops

TREE = Path(__file__).resolve().parents[2]  # of copies: `make sanitize` makes it


def fault_of_module() -> str | None:
    """The reason why the module is not the sanitized one of this tree, or None."""
    module = _native.load()
    if module is None:
        return f"fisherfast._C must be loaded, got {_native.DISABLE_VARIABLE}=1"
    path = Path(module.__file__)
    if TREE not in path.parents:
        return f"fisherfast._C must be the one in {TREE}, got {path}"
    code = path.read_bytes()
    for name in (b"__asan_report_load", b"__ubsan_handle"):
        if name not in code:
            return (
                f"fisherfast._C must call {name.decode()}, got a module without sanitizer: {path}"
            )
    return None


def pytest_configure() -> None:
    """No test runs on another module."""
    fault = fault_of_module()
    if fault is not None:
        raise pytest.UsageError(fault)


def shortened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without memory for its last number."""
    storage = tensor.untyped_storage()
    storage.resize_(storage.nbytes() - tensor.element_size())
    return tensor


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """Copies the numbers to an address one byte after an aligned one."""
    memory = torch.empty(tensor.nbytes + 1, dtype=torch.uint8)
    moved = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, offset=1).view(tensor.shape)
    return moved.copy_(tensor)


# Text of the reports. The kind that AddressSanitizer names depends on how much of a vector is past
# the memory.
FAULTS = {"ERROR: AddressSanitizer": shortened, "misaligned address": misaligned}


def calls(dtype: torch.dtype) -> dict[str, Callable]:
    """A call of every kernel, as a function of what is to be done to one of its inputs."""

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype)

    def solve(spoil: Callable, **wanted: bool) -> object:
        cov = torch.eye(5, dtype=dtype).expand(64, 5, 5).clone()
        return ops.fisher_solve_details(spoil(cov), ones(64, 5, 2), **wanted)

    def lift_moments(spoil: Callable) -> None:
        sums, cross = torch.zeros(2, 39).double(), torch.zeros(2, 39, 39).double()
        ops.lift_moments_(sums, cross, spoil(ones(64, 9)), ones(30, 9), ones(30), ones(30))

    return {
        "fisher_solve, lanes": solve,
        "fisher_solve, blocks": lambda spoil: solve(spoil, inverse_rows=True),
        "fisher_solve_backward": lambda spoil: ops.fisher_solve_backward(
            ones(64, 2, 2), spoil(ones(64, 5, 2)), 0.0
        ),
        "moments, few columns": lambda spoil: ops.moments(spoil(ones(64, 9))),
        "moments, many columns": lambda spoil: ops.moments(spoil(ones(64, 130))),
        "spatial_moments": lambda spoil: ops.spatial_moments(spoil(ones(9, 5, 7, 9))),
        "gradient_gram": lambda spoil: ops.gradient_gram(spoil(ones(3, 9, 35)), ones(3, 2, 9, 7)),
        "gradient_squares": lambda spoil: ops.gradient_squares(
            spoil(ones(9, 5, 7, 9)), ones(9, 6, 7, 9), (3, 3), padding=(1, 1)
        ),
        "gradient_squares, g": lambda spoil: ops.gradient_squares(
            ones(9, 5, 7, 9), spoil(ones(9, 6, 7, 9))
        ),
        "patch_moments": lambda spoil: ops.patch_moments(spoil(ones(2, 3, 9, 35)), (3, 3)),
        "lift_moments": lift_moments,
        "dual_activation": lambda spoil: ops.dual_activation(
            spoil(ones(3, 9, 7, 5)), "gelu", scale=ones(7)
        ),
    }


def output_of_child(function: Callable[[], object]) -> tuple[int, str]:
    """Runs a function in a fork of this process: its exit status and what it writes to stderr."""
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), sys.stderr.fileno())
            function()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        return os.waitstatus_to_exitcode(status), errors.read().decode(errors="replace")


def undetected() -> list[str]:
    """The faults that nothing stopped, and calls without fault that something did."""
    torch.set_num_threads(1)
    missed = []
    for level in _native.build_info()["simd_available"]:
        _native.load().use_simd(level)
        for dtype in (torch.float32, torch.float64):
            for name, call in calls(dtype).items():
                call(lambda tensor: tensor)
                for report, spoil in FAULTS.items():
                    code, errors = output_of_child(lambda call=call, spoil=spoil: call(spoil))
                    if code == 0 or report not in errors or "/csrc/" not in errors:
                        missed.append(f"{report} in {name}, {level}, {dtype}: {code} {errors}")
    return missed


if __name__ == "__main__":
    fault = fault_of_module()
    if fault is not None:
        raise SystemExit(fault)
    missed = undetected()
    if missed:
        raise SystemExit("every planted fault must be caught, got past:\n" + "\n".join(missed))
    print("every planted fault is caught")
