"""fisher_solve against the best of torch, and its share of the machine's limits.

    python benchmarks/speed/fisher_solve.py [--tiny] [--out benchmarks/results/cpu.json]

Systems are covariances of 2 d + 3 samples with 1 % added to the diagonal: condition numbers near
30. P = 2. A system must move the lower triangle of C (its rows up to the diagonal, in whole cache
lines) and D, and Y, J, info and condition back; it must do d^3 / 6 multiply-adds for the factor,
d^2 P / 2 for Y and d P (P + 1) / 2 for J.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherfast import ops
from fisherfast.ops import reference

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness
from benchmarks.harness import OURS, TINY, Clock, Contender, Effort
from benchmarks.speed.limits import CACHE_LINE, GEMM_SIZES, copy_contenders, gemm_speed, shares

PARAMETERS = 2
DTYPES = (torch.float32, torch.float64)
# (d, systems): as many as a batch of feature maps or a network's layers have
CASES = (
    *((2, 65536), (4, 65536), (8, 32768), (16, 16384), (32, 4096)),
    *((64, 1024), (128, 256), (256, 64), (512, 8), (1024, 2), (2048, 1)),
    *((64, 1), (256, 1), (512, 1), (1024, 1)),
)
TINY_CASES = ((2, 64), (16, 8), (64, 1))
# Measured: at most 1.4e-6 and 2.3e-15 for any right contender, at all sizes.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 2e-14}
DIAGONAL = 0.01
CHUNK_NUMBERS = 1 << 24  # samples drawn at a time
BY_HAND = "by hand"  # the family of `by_columns`
UNROLLED_LIMIT = 16  # d up to which a Cholesky factorisation in torch operations makes sense


def draw_systems(
    dim: int, batch: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Well-conditioned cov [batch, d, d] and deriv [batch, d, P]."""
    generator = torch.Generator(device).manual_seed(dim * 1_000_003 + batch)
    kind: dict[str, Any] = {"generator": generator, "dtype": dtype, "device": device}
    samples = 2 * dim + 3
    cov = torch.empty(batch, dim, dim, dtype=dtype, device=device)
    for part in cov.split(max(1, CHUNK_NUMBERS // (dim * samples))):
        x = torch.randn(len(part), dim, samples, **kind)
        torch.matmul(x, x.mT, out=part).div_(samples)
    cov.diagonal(dim1=-2, dim2=-1).add_(DIAGONAL)
    return cov, torch.randn(batch, dim, PARAMETERS, **kind)


def torch_ways(cov: Tensor, deriv: Tensor) -> list[Contender]:
    """What a user of torch.linalg would write for J."""

    def triangular() -> Tensor:
        factor, _ = torch.linalg.cholesky_ex(cov)
        half = torch.linalg.solve_triangular(factor, deriv, upper=False)
        return half.mT @ half

    def general() -> Tensor:
        return deriv.mT @ torch.linalg.solve(cov, deriv)

    def cholesky() -> Tensor:
        factor, _ = torch.linalg.cholesky_ex(cov)
        return deriv.mT @ torch.cholesky_solve(deriv, factor)

    ways: dict[str, Callable[[], Tensor]] = {
        "cholesky + solve_triangular": triangular,
        "linalg.solve": general,
        "cholesky + cholesky_solve": cholesky,
    }
    return [Contender(name, call) for name, call in ways.items()]


def by_columns(cov: Tensor, deriv: Tensor) -> Tensor:
    """J by a Cholesky factorisation written in torch operations, each over the whole batch.

    Nobody's first idea, but the fastest that torch can do for the smallest d.
    """
    dim = cov.shape[-1]
    columns = torch.cat([cov, deriv], -1).movedim(0, -1).contiguous()
    for i in range(dim):
        columns[i, i:] *= columns[i, i].rsqrt()
        if i + 1 < dim:
            columns[i + 1 :, i + 1 :] -= columns[i, i + 1 : dim, None] * columns[i, i + 1 :]
    half = columns[:, dim:]
    return (half[:, :, None] * half[:, None, :]).sum(0).movedim(-1, 0)


def bytes_moved(dim: int, params: int, size: int) -> int:
    """Bytes a system must read and write; `size` of one number."""
    lines = (-(-(i + 1) * size // CACHE_LINE) * CACHE_LINE for i in range(dim))
    triangle = sum(min(dim * size, line) for line in lines)
    info = 4
    return triangle + (2 * dim * params + params**2 + 1) * size + info


def multiply_adds(dim: int, params: int) -> float:
    """d^3 / 6 + d^2 P / 2 + d P (P + 1) / 2."""
    return dim**3 / 6 + dim**2 * params / 2 + dim * params * (params + 1) / 2


def measure(
    dim: int,
    batch: int,
    dtype: torch.dtype,
    gemm: float,
    effort: Effort,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
) -> dict[str, Any]:
    """One case: times, ratio, limits."""
    cov, deriv = draw_systems(dim, batch, dtype, device)
    with harness.restored_threads(), harness.silent_libraries():
        torch.set_num_threads(1)  # the truth must not depend on MKL's threads
        truth = reference.fisher_solve(cov.double(), deriv.double())[0]
    others = torch_ways(cov, deriv)
    if dim <= UNROLLED_LIMIT:
        others.append(Contender("by columns", lambda: by_columns(cov, deriv), family=BY_HAND))
    if torch.device(device).type == "cpu":
        others = harness.on_one_thread_too(others)
    size = cov.element_size()
    working_set = batch * ((dim * dim + 2 * dim * PARAMETERS + PARAMETERS**2 + 1) * size + 4)
    contenders = [
        Contender(OURS, lambda: ops.fisher_solve(cov, deriv)[0], family=""),
        *others,
        *copy_contenders(working_set, device),
    ]
    comparison = harness.compare(
        contenders,
        lambda fisher: harness.relative_error(fisher, truth),
        TOLERANCES[dtype],
        effort,
        clock,
    )
    moved, work = bytes_moved(dim, PARAMETERS, size), multiply_adds(dim, PARAMETERS)
    seconds = comparison.seconds[OURS]
    limits = shares(seconds, batch * moved, batch * work, comparison, working_set, gemm)
    case = {"dtype": str(dtype).removeprefix("torch."), "d": dim, "systems": batch}
    return {
        **case,
        **comparison.as_dict(),
        "bytes per system": moved,
        "limits": limits,
    }


def run(
    cases: Sequence[tuple[int, int]] = CASES,
    effort: Effort | None = None,
    gemm_sizes: tuple[int, ...] = GEMM_SIZES,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
) -> list[dict[str, Any]]:
    """Every case in both dtypes."""
    results = []
    for dtype in DTYPES:
        gemm = gemm_speed(dtype, device, gemm_sizes, clock or harness.wall_clock)
        for dim, batch in cases:
            row = measure(dim, batch, dtype, gemm, effort or Effort(), device, clock)
            results.append(row)
            print(line(row), flush=True)
    return results


def line(row: dict[str, Any]) -> str:
    """One case for the eye."""
    rivals = "  ".join(f"{r['ratio']:.2f} x {r['best']}" for r in row["against"].values())
    limits = row["limits"]
    return (
        f"{row['dtype']} d={row['d']:<5}systems={row['systems']:<7}"
        f"{1e3 * row['seconds'][OURS]:9.3f} ms  {rivals}"
        f"  loads {limits['share of copy']:.0%} arithmetic {limits['share of gemm']:.0%}"
    )


def fisher_solve(tiny: bool) -> list[dict[str, Any]]:
    """fisher_solve, P = 2, against torch: seconds of a call, ratio, share of copy and of gemm."""
    return run(TINY_CASES, TINY, (64,)) if tiny else run()


if __name__ == "__main__":
    harness.main(__doc__, {"fisher_solve": fisher_solve})
