"""patch_moments and gradient_gram against the best of torch, and their share of the matrix product.

    python benchmarks/speed/factors.py [part ...] [--tiny] [--out benchmarks/results/cpu.json]

patch_moments: the inputs' Kronecker factor of 3 x 3 convolutions, n positions K (K + 1) / 2
multiply-adds a group. gradient_gram: inner products of the weight gradients of samples that share
their weights over T positions, n^2 / 2 times T T (D + C M) + C C T M multiply-adds. Both in
float32. Torch's ways sum in float32 throughout; ours in float64, or float32 tiles.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import unfold

from fisherfast import ops
from fisherfast.ops import reference

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness
from benchmarks.harness import OURS, TINY, Contender, Effort
from benchmarks.speed.limits import GEMM_SIZES, copy_contenders, gemm_speed, shares

# n, C, size of the image, groups: first, early, later layers and a depthwise one.
PATCHES = ((64, 3, 32, 1), (64, 32, 32, 1), (64, 128, 8, 1), (64, 64, 16, 64))
# n, columns C, positions T, D, M: convolutions late in a network, with and without classes, and a
# sequence model.
GRAMS = (
    (64, 1, 16, 1152, 128),
    (64, 10, 16, 1152, 128),
    (32, 10, 64, 576, 64),
    (32, 1, 32, 512, 512),
)
TINY_PATCHES = ((3, 4, 5, 2),)
TINY_GRAMS = ((3, 2, 4, 5, 6),)
# Of the largest entry. Measured: at most 2e-6 for torch, 4e-7 for ours.
TOLERANCE = 1e-4


def patch_ways(x: Tensor, groups: int) -> list[Contender]:
    """Cross-products of 3 x 3 patches in torch."""

    def rows() -> Tensor:
        return unfold(x, 3, padding=1).unflatten(1, (groups, -1))

    def by_sample() -> Tensor:
        patches = rows()
        return (patches @ patches.mT).sum(0)

    def in_one() -> Tensor:
        patches = rows().permute(1, 2, 0, 3).flatten(2)
        return patches @ patches.mT

    return [Contender("unfold + bmm", by_sample), Contender("unfold + matmul", in_one)]


def gram_ways(a: Tensor, b: Tensor) -> list[Contender]:
    """Inner products of gradients in torch."""

    def gradients() -> Tensor:
        rows = (b.mT @ a.unsqueeze(1)).flatten(2).flatten(0, 1)
        return rows @ rows.T

    def positions() -> Tensor:
        inputs = torch.einsum("itd,jsd->itjs", a, a)
        return torch.einsum("itjs,ictm,jesm->icje", inputs, b, b).flatten(2).flatten(0, 1)

    return [Contender("gradients + matmul", gradients), Contender("einsum", positions)]


def compared(
    ours: Contender, others: list[Contender], truth: Tensor, moved: int, work: float, effort: Effort
) -> dict[str, Any]:
    """Times, ratio, limits of one case."""
    gemm = gemm_speed(torch.float32, "cpu", (64,) if effort is TINY else GEMM_SIZES)
    comparison = harness.compare(
        [ours, *harness.on_one_thread_too(others), *copy_contenders(moved)],
        lambda got: harness.relative_error(got, truth),
        TOLERANCE,
        effort,
    )
    limits = shares(comparison.seconds[OURS], moved, work, comparison, moved, gemm)
    return {**comparison.as_dict(), "limits": limits}


def patch_moments(tiny: bool) -> list[dict[str, Any]]:
    """patch_moments of 3 x 3 patches, float32, against torch: seconds, ratio, share of limits."""
    results = []
    for n, channels, size, groups in TINY_PATCHES if tiny else PATCHES:
        x = torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(size))
        geometry = {"kernel": (3, 3), "padding": (1, 1), "groups": groups}
        truth = reference.patch_moments(x, (3, 3), (1, 1), (1, 1), (1, 1), groups)[1]
        ours = Contender(OURS, lambda x=x, g=geometry: ops.patch_moments(x, **g)[1], family="")
        width = channels // groups * 9
        work = n * size**2 * groups * width * (width + 1) / 2
        row = compared(
            ours, patch_ways(x, groups), truth, x.nbytes + truth.nbytes, work,
            TINY if tiny else Effort(),
        )  # fmt: skip
        results.append({"shape": list(x.shape), "groups": groups, **row})
        print(line(f"patch_moments {list(x.shape)} / {groups}", row), flush=True)
    return results


def gradient_gram(tiny: bool) -> list[dict[str, Any]]:
    """gradient_gram, float32, against torch: seconds, ratio, share of limits."""
    results = []
    for n, columns, positions, inputs, outputs in TINY_GRAMS if tiny else GRAMS:
        generator = torch.Generator().manual_seed(positions)
        a = torch.randn(n, positions, inputs, generator=generator)
        b = torch.randn(n, columns, positions, outputs, generator=generator)
        truth = reference.gradient_gram(a, b, a, b).flatten(2).flatten(0, 1)
        ours = Contender(
            OURS, lambda a=a, b=b: ops.gradient_gram(a, b).flatten(2).flatten(0, 1), family=""
        )
        pair = positions**2 * (inputs + columns * outputs) + columns**2 * positions * outputs
        row = compared(
            ours, gram_ways(a, b), truth, a.nbytes + b.nbytes + truth.nbytes,
            n * (n + 1) / 2 * pair, TINY if tiny else Effort(),
        )  # fmt: skip
        sizes = {"n": n, "C": columns, "T": positions, "D": inputs, "M": outputs}
        results.append({**sizes, **row})
        print(line(f"gradient_gram {sizes}", row), flush=True)
    return results


def line(title: str, row: dict[str, Any]) -> str:
    """One case for the eye."""
    rivals = "  ".join(f"{r['ratio']:.2f} x {r['best']}" for r in row["against"].values())
    seconds, share = row["seconds"][OURS], row["limits"]["share of gemm"]
    return f"{title:<58}{1e3 * seconds:9.3f} ms  {rivals}  arithmetic {share:.0%}"


if __name__ == "__main__":
    harness.main(__doc__, {"patch_moments": patch_moments, "gradient_gram": gradient_gram})
