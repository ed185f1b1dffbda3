"""Compiles the CUDA kernels with the host compiler, with sanitizers, and calls their launchers.

`build` gives an executable (driver.cpp describes its input and output). `Kernels.call` sends it one
case and checks that the results do not depend on the order in which the threads take their turns;
`Kernels.serving` lets the ops of fisherfast call it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from support.kernel_calls import kernels_called_by, memory, request
from torch import Tensor

BUILD = Path(__file__).parents[2] / "build" / "cuda_host"

# Forward and reverse let one warp run far ahead of the others; the number is the seed of random
# turns, in which warps and lanes interleave.
ORDERS = ("forward", "reverse", "20250131")

TIMEOUT = 300  # seconds; a kernel that does not end must not hold up the tests


def build() -> Path:
    """Compiles what changed since the last time, on all cores; returns the program."""
    BUILD.mkdir(parents=True, exist_ok=True)
    command = [
        "make",
        "-s",
        f"-j{os.cpu_count()}",
        "-C",
        BUILD,
        "-f",
        "../../tests/cuda_host/Makefile",
    ]
    with (BUILD / "lock").open("w") as lock:  # other test processes start at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(command, check=True)
    return BUILD / "cuda_host"


class Kernels:
    """The launchers; every one runs once for each order of the threads."""

    def __init__(self, program: Path) -> None:
        self._program = program

    @contextmanager
    def serving(self, *, in_place: bool = False, **settings: object) -> Iterator[None]:
        """Lets the ops of fisherfast run these kernels on CPU tensors within the block.

        Args:
            in_place: the kernel writes its result y to x.
            settings: those of `call`.
        """

        def call(op: str, like: Tensor, /, **fields: object) -> None:
            if in_place:
                fields["y"] = fields["x"]
            self.call(op, like, **fields, **settings)

        with kernels_called_by(call):
            yield

    def call(
        self,
        op: str,
        like: Tensor,
        /,
        *,
        orders: Sequence[str] = ORDERS,
        limit: int | None = None,
        grid: tuple[int, int] | None = None,
        **fields: object,
    ) -> None:
        """Runs one launcher on the fields of its argument struct, and writes to its results.

        Args:
            orders: of the threads; one suffices where a kernel has run in all of them before.
            limit: bytes of shared memory that a block may have; default: those of an H200.
            grid: largest grid along x, and along y and z, for blocks that take several turns.

        Raises:
            RuntimeError: the launcher threw, or a sanitizer reported; the message is its text.
            OrderError: two orders gave different bits.
        """
        case = request(op, like.dtype, fields, orders=orders, limit=limit, grid=grid)
        done = subprocess.run([self._program], input=case, capture_output=True, timeout=TIMEOUT)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.decode())
        for name, data in _same_results(done.stdout, orders).items():
            target = memory(fields[name])
            target.copy_(torch.frombuffer(bytearray(data), dtype=target.dtype))


class OrderError(AssertionError):
    """The result depends on the order in which threads run."""


def _same_results(answer: bytes, orders: Sequence[str]) -> dict[str, bytes]:
    results = []
    while answer:
        result: dict[str, bytes] = {}
        while not answer.startswith(b"end\n"):
            header, _, answer = answer.partition(b"\n")
            _, name, size = header.split()
            result[name.decode()], answer = answer[: int(size)], answer[int(size) :]
        answer = answer.removeprefix(b"end\n")
        results.append(result)
    for order, result in zip(orders, results, strict=True):
        for name, data in result.items():
            if data != results[0][name]:
                raise OrderError(f"{name} must be the same in order {order} and {orders[0]}")
    return results[0]
