"""Compiles the CUDA kernels with the host compiler, with sanitizers, and calls their launchers.

`build` gives an executable (driver.cpp says what it reads and writes); `Kernels.run` sends it one
case and returns the results, after it has checked that they do not depend on the order in which
the threads had their turns.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

# Forward and reverse let one warp run far ahead of the others; the numbers are seeds of random
# turns, in which warps and lanes interleave.
ORDERS = ("forward", "reverse", "1", "20250131")

FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"),
    "-Wno-unknown-pragmas",  # unroll, which nvcc alone knows
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    *("-DFISHERFAST_CUDA_HOST", f"-I{HERE / 'include'}", f"-I{CSRC}", f"-I{HERE}"),
]

TIMEOUT = 300  # seconds; a kernel that does not end must not hold up the tests


def build(folder: Path) -> Path:
    """Compiles driver, scheduler, planted faults and all of csrc/ops/*/*.cu; returns the program."""
    program = folder / "cuda_host"
    plain = sorted(HERE.glob("*.cpp"))
    kernels = [HERE / "faults.cu", *sorted((CSRC / "ops").glob("*/*.cu"))]
    command = ["g++", *FLAGS, "-o", program, *plain, "-x", "c++", *kernels]
    subprocess.run(command, check=True)
    return program


class Kernels:
    """The launchers, by name; every one runs once for each order of the threads."""

    def __init__(self, program: Path) -> None:
        self._program = program

    def run(
        self,
        op: str,
        dtype: torch.dtype,
        outputs: dict[str, torch.dtype],
        *,
        limit: int | None = None,
        grid: tuple[int, int] | None = None,
        **items: object,
    ) -> dict[str, Tensor]:
        """The results of a launcher, flat, the same for all orders.

        Args:
            op: the name in cases.cpp or faults.cu.
            dtype: T of the launcher.
            outputs: dtype of each result.
            limit: bytes of shared memory that a block may have; default: those of an H200.
            grid: largest grid along x, and along y and z, for blocks that take several turns.
            items: tensors (sent as they lie in memory, see `memory`), numbers; None is left out.

        Raises:
            RuntimeError: the launcher threw, or a sanitizer reported; the message is its text.
            OrderError: two orders gave different bits.
        """
        request = _request(op, dtype, {"limit": limit, "grid": grid}, items)
        done = subprocess.run([self._program], input=request, capture_output=True, timeout=TIMEOUT)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.decode())
        return _same_results(done.stdout, outputs)


class OrderError(AssertionError):
    """The result depends on the order in which threads run."""


def memory(tensor: Tensor) -> bytes:
    """The elements that a tensor spans in memory, gaps included, as the kernel finds them."""
    if tensor.numel() == 0:
        return b""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,)).numpy().tobytes()


def _request(
    op: str, dtype: torch.dtype, settings: dict[str, object], items: dict[str, object]
) -> bytes:
    parts = [f"op {op}\ndtype {str(dtype).removeprefix('torch.')}\norders {' '.join(ORDERS)}\n"]
    for name, setting in settings.items():
        if setting is not None:
            values = setting if isinstance(setting, tuple) else (setting,)
            parts.append(f"{name} {' '.join(map(str, values))}\n")
    request = "".join(parts).encode()
    for name, item in items.items():
        if isinstance(item, Tensor):
            data = memory(item)
            # A view that starts inside a storage keeps its distance to an aligned address.
            offset = item.storage_offset() * item.element_size() % 64
            request += f"array {name} {len(data)} {offset}\n".encode() + data
        elif item is not None:
            request += f"number {name} {float(item)!r}\n".encode()
    return request + b"end\n"


def _same_results(answer: bytes, outputs: dict[str, torch.dtype]) -> dict[str, Tensor]:
    results = []
    while answer:
        result: dict[str, bytes] = {}
        while not answer.startswith(b"end\n"):
            header, _, answer = answer.partition(b"\n")
            _, name, size = header.split()
            result[name.decode()], answer = answer[: int(size)], answer[int(size) :]
        answer = answer.removeprefix(b"end\n")
        results.append(result)
    for order, result in zip(ORDERS, results, strict=True):
        for name, data in result.items():
            if data != results[0][name]:
                raise OrderError(f"{name} must be the same in order {order} and {ORDERS[0]}")
    return {name: _tensor(data, outputs[name]) for name, data in results[0].items()}


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
