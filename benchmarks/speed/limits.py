"""What the machine can do at most: copy and multiply, measured in the same run.

A kernel cannot be faster than its loads and stores, nor than its multiply-adds. The share of a
copy's bandwidth and the share of a matrix product's speed say how near it is; the larger one names
what limits it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness import COPY, Clock, Comparison, Contender, on_one_thread_too, wall_clock

CACHE_LINE = 64  # bytes: memory moves in these
GEMM_SIZES = (1024, 2048)
GEMM_RUNS = 7
# mallopt(3) of the GNU C library, and what it begins with
TRIM_THRESHOLD, MOST_MAPPINGS = -1, -4
KEPT, KEPT_BEFORE = 2**31 - 1, 128 * 1024
MAPPINGS_BEFORE = 65536


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Memory that is freed stays with the process and is used again.

    The GNU C library gives large blocks back at once, and the kernel clears every page of the next
    one: a result then costs more than its computation. Every contender gains. Elsewhere nothing
    changes.
    """
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        yield
        return
    library.mallopt(MOST_MAPPINGS, 0)
    library.mallopt(TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        library.mallopt(MOST_MAPPINGS, MAPPINGS_BEFORE)
        library.mallopt(TRIM_THRESHOLD, KEPT_BEFORE)
        library.malloc_trim(0)


def copy_contenders(working_set: int, device: torch.device | str = "cpu") -> list[Contender]:
    """A copy whose source and target together are `working_set` bytes; on the CPU also on one
    thread."""
    source = torch.ones(max(1, working_set // 8), dtype=torch.float32, device=device)
    target = torch.zeros_like(source)

    def call() -> None:
        target.copy_(source)

    copy = [Contender(COPY, call, family="")]
    return on_one_thread_too(copy) if source.device.type == "cpu" else copy


def copied_bytes(working_set: int) -> int:
    """Bytes that `copy_contenders` reads and writes."""
    return max(1, working_set // 8) * 8


def gemm_speed(
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    sizes: tuple[int, ...] = GEMM_SIZES,
    clock: Clock = wall_clock,
) -> float:
    """Multiply-adds per second of torch.matmul, the best of several sizes and runs."""
    best = 0.0
    for size in sizes:
        a, b = torch.randn(2, size, size, dtype=dtype, device=device)
        out = torch.empty_like(a)
        torch.matmul(a, b, out=out)
        seconds = min(clock(lambda: torch.matmul(a, b, out=out), 1) for _ in range(GEMM_RUNS))  # noqa: B023
        best = max(best, size**3 / seconds)
    return best


def share_of_copy(
    seconds: float, moved: float, comparison: Comparison, working_set: int
) -> dict[str, float]:
    """How near a call is to the bandwidth of the faster copy; arguments as for `shares`."""
    copies = [t for name, t in comparison.seconds.items() if name.startswith(COPY)]
    bandwidth = copied_bytes(working_set) / min(copies)
    return {
        "bytes": moved,
        "GB/s": moved / seconds / 1e9,
        "copy GB/s": bandwidth / 1e9,
        "share of copy": moved / seconds / bandwidth,
    }


def shares(
    seconds: float,
    moved: float,
    operations: float,
    comparison: Comparison,
    working_set: int,
    gemm: float,
) -> dict[str, Any]:
    """How near a call is to the limits.

    Args:
        seconds: of the call.
        moved: bytes it must read and write.
        operations: multiply-adds it must do.
        comparison: holds the times of the copies.
        working_set: of the copy.
        gemm: multiply-adds per second of a matrix product.
    """
    of_copy = share_of_copy(seconds, moved, comparison, working_set)
    loads, arithmetic = of_copy["share of copy"], operations / seconds / gemm
    return {
        **of_copy,
        "multiply-adds": operations,
        "Gmadd/s": operations / seconds / 1e9,
        "gemm Gmadd/s": gemm / 1e9,
        "share of gemm": arithmetic,
        "limit": "loads" if loads >= arithmetic else "arithmetic",
    }
