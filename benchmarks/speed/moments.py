"""moments and spatial_moments against the best of torch, and their share of the machine's limits.

    python benchmarks/speed/moments.py [--tiny] [--out benchmarks/results/cpu.json]

moments: N = 100 000 rows, one group and 16 random ones; it must read x once (and the groups) and do
N d (d + 1) / 2 multiply-adds. spatial_moments: x [256, 64, 28, 28], contiguous and channels_last;
n H W C (C + 1) / 2 multiply-adds. Both in float32. Torch's ways sum in float32 throughout; ours
in float64, or float32 tiles: the errors are stored beside the times.
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
from benchmarks.speed.limits import GEMM_SIZES, copy_contenders, gemm_speed, shares
from benchmarks.speed.peak_memory import extra_bytes
from benchmarks.speed.spatial_ways import WAYS, draw_maps, truth_of

ROWS = 100_000
CASES = tuple((dim, groups) for groups in (1, 16) for dim in (10, 64, 256, 512))
TINY_CASES = ((10, 1), (10, 4))
SHAPE = (256, 64, 28, 28)
TINY_SHAPE = (6, 5, 4, 3)
LAYOUTS = ("contiguous", "channels_last")
# Of the largest entry. Measured: at most 2.4e-5 for torch, which sums 100 000 rows in float32, and
# 1.3e-7 for ours.
TOLERANCE = 1e-4
SCRATCH_NUMBERS = 1 << 25  # temporaries of at most 128 MB: more is no reasonable way

Pair = tuple[Tensor, Tensor]


def one_group_ways(x: Tensor) -> list[Contender]:
    """Sums and cross-products of all rows in torch."""

    def matmul() -> Pair:
        return x.sum(0)[None], (x.mT @ x)[None]

    def with_ones() -> Pair:
        both = torch.cat([x, x.new_ones(len(x), 1)], 1)
        product = both.mT @ both
        return product[None, -1, :-1], product[None, :-1, :-1]

    return [Contender("matmul", matmul), Contender("matmul with a column of ones", with_ones)]


def grouped_ways(x: Tensor, group: Tensor, groups: int) -> list[Contender]:
    """Sums and cross-products of every group in torch."""
    rows, dim = x.shape

    def masks() -> Pair:
        parts = [x[group == g] for g in range(groups)]
        return torch.stack([p.sum(0) for p in parts]), torch.stack([p.mT @ p for p in parts])

    def sort() -> Pair:
        counts = torch.bincount(group, minlength=groups).tolist()
        parts = x[group.argsort(stable=True)].split(counts)
        return torch.stack([p.sum(0) for p in parts]), torch.stack([p.mT @ p for p in parts])

    def outer_products() -> Pair:
        outer = (x[:, :, None] * x[:, None, :]).flatten(1)
        cross = x.new_zeros(groups, dim * dim).index_add_(0, group, outer)
        sums = x.new_zeros(groups, dim).index_add_(0, group, x)
        return sums, cross.view(groups, dim, dim)

    def one_hot() -> Pair:
        member = torch.nn.functional.one_hot(group, groups).to(x.dtype)
        spread = (member[:, :, None] * x[:, None, :]).flatten(1)
        return member.mT @ x, (spread.mT @ x).view(groups, dim, dim)

    ways: dict[str, Callable[[], Pair]] = {
        "mask + matmul of each group": masks,
        "sort + matmul of each group": sort,
    }
    if rows * dim * dim <= SCRATCH_NUMBERS:
        ways["index_add of outer products"] = outer_products
    if rows * dim * groups <= SCRATCH_NUMBERS:
        ways["matmul with one-hot groups"] = one_hot
    return [Contender(name, call) for name, call in ways.items()]


def error_of_pair(got: Pair, truth: Pair) -> float:
    """The larger of the relative errors of sums and cross-products."""
    return max(harness.relative_error(a, b) for a, b in zip(got, truth, strict=True))


def measure_moments(
    rows: int,
    dim: int,
    groups: int,
    gemm: float,
    effort: Effort,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
) -> dict[str, Any]:
    """One case of moments: times, ratio, limits."""
    generator = torch.Generator(device).manual_seed(dim)
    x = torch.randn(rows, dim, generator=generator, device=device) + 0.5
    group = None
    if groups > 1:
        group = torch.randint(groups, (rows,), generator=generator, device=device)
    truth = reference.moments(x, group, groups)[1:]
    others = one_group_ways(x) if group is None else grouped_ways(x, group, groups)
    if x.device.type == "cpu":
        others = harness.on_one_thread_too(others)
    result_bytes = groups * (dim * dim + dim + 1) * 8
    moved = x.nbytes + (0 if group is None else group.nbytes) + result_bytes
    ours = Contender(OURS, lambda: ops.moments(x, group, groups)[1:], family="")
    comparison = harness.compare(
        [ours, *others, *copy_contenders(moved, device)],
        lambda got: error_of_pair(got, truth),
        TOLERANCE,
        effort,
        clock,
    )
    work = rows * dim * (dim + 1) / 2
    limits = shares(comparison.seconds[OURS], moved, work, comparison, moved, gemm)
    return {"rows": rows, "d": dim, "groups": groups, **comparison.as_dict(), "limits": limits}


def measure_spatial(
    shape: tuple[int, int, int, int],
    layout: str,
    gemm: float,
    effort: Effort,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
) -> dict[str, Any]:
    """One case of spatial_moments: times, ratio, limits."""
    x = draw_maps(shape, layout, device)
    truth = truth_of(x)
    ours = Contender(OURS, lambda: WAYS[OURS](x), family="")
    others = [Contender(n, lambda f=f: f(x)) for n, f in WAYS.items() if n != OURS]
    if x.device.type == "cpu":
        others = harness.on_one_thread_too(others)
    n, channels, height, width = shape
    result_bytes = height * width * channels * (channels + 1) * 8
    moved = x.nbytes + result_bytes
    comparison = harness.compare(
        [ours, *others, *copy_contenders(moved, device)],
        lambda got: error_of_pair(got, truth),
        TOLERANCE,
        effort,
        clock,
    )
    work = n * height * width * channels * (channels + 1) / 2
    limits = shares(comparison.seconds[OURS], moved, work, comparison, moved, gemm)
    return {"shape": list(shape), "layout": layout, **comparison.as_dict(), "limits": limits}


def run_moments(
    rows: int = ROWS,
    cases: Sequence[tuple[int, int]] = CASES,
    effort: Effort | None = None,
    gemm_sizes: tuple[int, ...] = GEMM_SIZES,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
) -> list[dict[str, Any]]:
    """Every case of moments."""
    gemm = gemm_speed(torch.float32, device, gemm_sizes, clock or harness.wall_clock)
    results = []
    for dim, groups in cases:
        row = measure_moments(rows, dim, groups, gemm, effort or Effort(), device, clock)
        results.append(row)
        print(line(f"moments d={dim} groups={groups}", row), flush=True)
    return results


def run_spatial(
    shape: tuple[int, int, int, int] = SHAPE,
    effort: Effort | None = None,
    gemm_sizes: tuple[int, ...] = GEMM_SIZES,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
    layouts: Sequence[str] = LAYOUTS,
    memory_of: Sequence[str] = tuple(WAYS),
) -> list[dict[str, Any]]:
    """Layouts of spatial_moments, with the peak memory of ways."""
    gemm = gemm_speed(torch.float32, device, gemm_sizes, clock or harness.wall_clock)
    results = []
    for layout in layouts:
        row = measure_spatial(shape, layout, gemm, effort or Effort(), device, clock)
        memory = {name: extra_bytes(name, shape, layout, device) for name in memory_of}
        input_bytes = 4 * torch.Size(shape).numel()
        row["extra memory / input"] = {n: extra / input_bytes for n, extra in memory.items()}
        results.append(row)
        print(line(f"spatial_moments {layout}", row), flush=True)
        print("  extra memory / input", row["extra memory / input"], flush=True)
    return results


def line(title: str, row: dict[str, Any]) -> str:
    """One case for the eye."""
    rivals = "  ".join(f"{r['ratio']:.2f} x {r['best']}" for r in row["against"].values())
    limits = row["limits"]
    return (
        f"{title:<32}{1e3 * row['seconds'][OURS]:9.3f} ms  {rivals}"
        f"  loads {limits['share of copy']:.0%} arithmetic {limits['share of gemm']:.0%}"
    )


def moments(tiny: bool) -> list[dict[str, Any]]:
    """moments of [100000, d] float32 against torch: seconds, ratio, share of copy and of gemm."""
    return run_moments(500, TINY_CASES, TINY, (64,)) if tiny else run_moments()


def spatial_moments(tiny: bool) -> list[dict[str, Any]]:
    """spatial_moments of [256, 64, 28, 28] float32 against torch, with peak memory."""
    if not tiny:
        return run_spatial()
    return run_spatial(TINY_SHAPE, TINY, (64,), memory_of=(OURS, "einsum"))


if __name__ == "__main__":
    harness.main(__doc__, {"moments": moments, "spatial_moments": spatial_moments})
