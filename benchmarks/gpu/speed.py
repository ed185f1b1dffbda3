"""The kernels on a GPU against the best of torch, and their share of its copy bandwidth.

    python benchmarks/gpu/speed.py --out gpu.json [--tiny] [part ...]

Times are CUDA events around calls that are already warm. Inputs are larger than the cache of the
card where that is possible. A case that fails is stored with its message, and the others go on.
"""

from __future__ import annotations

import statistics
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import fisherfast as ff

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness
from benchmarks.harness import Effort, cuda_clock
from benchmarks.speed import curve as bench_curve
from benchmarks.speed import dual as bench_dual
from benchmarks.speed import fisher_solve as bench_fisher_solve
from benchmarks.speed import moments as bench_moments
from benchmarks.speed.dual_ways import op_cases
from benchmarks.speed.published_loop import (
    CUT_OFF,
    LIFT_NOISE,
    LIFT_SLOPE,
    WIDTHS,
    corrected,
    standard_error,
)

DEVICE = "cuda"
EFFORT = Effort(turns=11, turn_seconds=0.01, case_seconds=3.0)
TINY = Effort(turns=3, turn_seconds=0.0, case_seconds=1.0, least_turns=3)
NUMBERS = 1 << 26  # of a batch of covariances: 256 MB in float32
MOST_SYSTEMS = 1 << 22
SOLVE_DIMS = (2, 4, 8, 16, 32, 64, 128, 256)
SINGLE_DIMS = (64, 256)
MOMENT_ROWS = 1_000_000
SPATIAL_SHAPE = (1024, 64, 28, 28)
# Feature maps, rows of a layer norm, scores of an attention, P = 4: 260 to 340 MB before and after
DUAL_SHAPES = ((5, 64, 64, 64, 64), (5, 32768, 512), (5, 65536, 197))
GEMM_SIZES = (4096,)
PROBLEM = "log-normal"
CURVE_CALLS = 7
TORCH_LOOPS = 3


def guarded(cases: Iterable[Any], measure: Callable[[Any], list[dict[str, Any]]]) -> list[Any]:
    """The rows of every case; for one that raises, its name and the message."""
    rows: list[Any] = []
    for case in cases:
        try:
            rows += measure(case)
        except Exception as raised:  # the report must hold every failure, whatever its type
            rows.append(
                {
                    "case": str(getattr(case, "name", case)),
                    "failed": f"{type(raised).__name__}: {raised}",
                }
            )
            print(f"{case} failed\n{traceback.format_exc(limit=3)}", flush=True)
        torch.cuda.empty_cache()
    return rows


def fisher_solve(tiny: bool) -> list[Any]:
    """fisher_solve, P = 2, on the GPU against torch: seconds, ratio, share of copy and of gemm."""
    batches = [(d, min(MOST_SYSTEMS, NUMBERS // d**2)) for d in SOLVE_DIMS]
    cases = [*batches, *((d, 1) for d in SINGLE_DIMS)]
    if tiny:
        cases = [(2, 64), (32, 4)]
    effort, gemm = (TINY, (64,)) if tiny else (EFFORT, GEMM_SIZES)
    return guarded(
        cases, lambda case: bench_fisher_solve.run([case], effort, gemm, DEVICE, cuda_clock)
    )


def moments(tiny: bool) -> list[Any]:
    """moments of [1000000, d] float32 on the GPU against torch."""
    rows, cases = (500, [(10, 1), (10, 4)]) if tiny else (MOMENT_ROWS, bench_moments.CASES)
    effort, gemm = (TINY, (64,)) if tiny else (EFFORT, GEMM_SIZES)
    return guarded(
        cases,
        lambda case: bench_moments.run_moments(rows, [case], effort, gemm, DEVICE, cuda_clock),
    )


def spatial_moments(tiny: bool) -> list[Any]:
    """spatial_moments of [1024, 64, 28, 28] float32 on the GPU against torch, with peak memory."""
    shape = bench_moments.TINY_SHAPE if tiny else SPATIAL_SHAPE
    effort, gemm = (TINY, (64,)) if tiny else (EFFORT, GEMM_SIZES)
    return guarded(
        bench_moments.LAYOUTS,
        lambda layout: bench_moments.run_spatial(
            shape, effort, gemm, DEVICE, cuda_clock, layouts=[layout]
        ),
    )


def dual_ops(tiny: bool) -> list[Any]:
    """The fused dual ops, float32, on the GPU against torch: seconds, ratios, share of a copy's
    bandwidth."""
    shapes, effort = (bench_dual.TINY_OPS, TINY) if tiny else (DUAL_SHAPES, EFFORT)
    return guarded(
        op_cases(*shapes, DEVICE),
        lambda case: bench_dual.run_ops([case], effort, DEVICE, cuda_clock),
    )


def torch_loop(minus: torch.Tensor, plus: torch.Tensor, dtheta: float, k: int) -> float:
    """One turn of the published loop (see `published_loop`), in torch, where the samples are."""
    weight = torch.randn(minus.shape[1], k, dtype=minus.dtype, device=minus.device)
    lifted = []
    for x in (minus, plus):
        features = torch.nn.functional.leaky_relu(x @ weight, LIFT_SLOPE)
        lifted.append(features.add_(torch.randn_like(features), alpha=LIFT_NOISE))
    covariance = (lifted[0].mT.cov() + lifted[1].mT.cov()) / 2
    derivative = (lifted[1].mean(0) - lifted[0].mean(0)) / dtheta
    inverse = torch.linalg.pinv(covariance, rtol=CUT_OFF)
    J = float(derivative @ inverse @ derivative)
    return corrected(J, k, (len(minus), len(plus)), dtheta)


def curve(tiny: bool) -> dict[str, Any]:
    """J(k) to 500 features on the GPU: one call against the published loop in torch on the GPU, and
    in NumPy on the CPU."""
    samples, widths = (4000, (10, 20, 40)) if tiny else (bench_curve.SAMPLES, WIDTHS)
    row = bench_curve.run(PROBLEM, samples, widths, calls=CURVE_CALLS, device=DEVICE)
    drawn = bench_curve.draw(PROBLEM, samples)
    minus, plus = (torch.from_numpy(x).to(DEVICE) for x in drawn.arrays)
    last, seconds, calls = widths[-1], [], []
    torch_loop(minus, plus, bench_curve.DTHETA, last)
    data = bench_curve.draw(PROBLEM, samples, DEVICE).data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ff.FisherWarning)  # the published step is wide
        for _ in range(TORCH_LOOPS):
            time, values = bench_curve.timed(
                lambda: [torch_loop(minus, plus, bench_curve.DTHETA, k) for k in widths]
            )
            seconds.append(time)
            calls += [
                bench_curve.timed(lambda: ff.fisher_information(data, max_features=last))[0]
                for _ in range(bench_curve.CALLS_BETWEEN)
            ]
    error = standard_error(values[-1], last, (samples, samples), bench_curve.DTHETA)
    bench_curve.check("loop in torch", values[-1], error, drawn.truth)
    row["loop in torch on the GPU"] = bench_curve.estimate(values[-1], error, drawn.truth) | {
        "seconds": statistics.median(seconds),
        "runs": seconds,
        "ratio": statistics.median(seconds) / statistics.median(calls),
    }
    print(bench_curve.line(row), flush=True)
    return row


def guarded_curve(tiny: bool) -> Any:
    """J(k) to 500 features on the GPU, 150 000 samples per condition: one call against the loop."""
    return guarded(["curve"], lambda _: [curve(tiny)])


PARTS: dict[str, Callable[[bool], Any]] = {
    "fisher_solve": fisher_solve,
    "moments": moments,
    "spatial_moments": spatial_moments,
    "dual_ops": dual_ops,
    "curve": guarded_curve,
}

if __name__ == "__main__":
    harness.main(__doc__, PARTS)
