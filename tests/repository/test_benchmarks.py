"""The benchmarks run and leave out who is wrong; tables and reports hold what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.scripts import ROOT, run_script

from benchmarks import harness
from benchmarks.accuracy import sources
from benchmarks.gpu import speed as gpu_speed
from benchmarks.report import tables
from benchmarks.speed import (
    dual,
    dual_memory,
    dual_ways,
    fisher_solve,
    networks,
    peak_memory,
    published_loop,
)

RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
SIGMAS = 4.0


# --- the runner ----------------------------------------------------------------------------------


def compare(**ways) -> object:
    """Contenders given by name; the right result is 1."""
    contenders = [
        harness.Contender(name, way, family="" if name == harness.OURS else harness.TORCH)
        for name, way in ways.items()
    ]
    return harness.compare(contenders, lambda got: abs(got - 1.0), 1e-6, harness.TINY)


def test_wrong_and_raising_contenders_are_left_out():
    """Catches a ratio against a contender that gives no right answer, a NaN that passes, results
    that are checked in the warm-up only, and a speed that is reported for wrong results of ours."""
    calls = iter(range(1000))
    found = compare(
        fisherfast=lambda: 1.0,
        right=lambda: 1.0,
        wrong=lambda: 1.1,
        late=lambda: 1.0 if next(calls) < harness.WARM_UPS else 2.0,
        nan=lambda: math.nan,
        raising=lambda: 1 / 0,
    )
    assert set(found.left_out) == {"wrong", "late", "nan", "raising"}
    assert found.left_out["raising"] == "raised ZeroDivisionError: division by zero"
    assert found.left_out["late"] == "wrong: relative error 1.0e+00"
    assert set(found.seconds) == {"fisherfast", "right"}
    assert found.against()["torch"]["best"] == "right"
    with pytest.raises(AssertionError, match="fisherfast must give right results"):
        compare(fisherfast=lambda: 1.5, right=lambda: 1.0)


def test_contenders_take_turns():
    """Catches one contender timed after another: the order of calls is a, b, a, b, ..."""
    order: list[str] = []
    compare(
        fisherfast=lambda: order.append("a") or 1.0,
        other=lambda: order.append("b") or 1.0,
    )
    turns = harness.TINY.turns
    assert "".join(order) == "a" * harness.WARM_UPS + "b" * harness.WARM_UPS + "ab" * turns


# --- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "size", "triangle"),
    [
        (2, 4, 16),  # all of it: 8 bytes a row
        (16, 4, 16 * 64),  # a row is a line
        (32, 4, 16 * 64 + 16 * 128),  # 16 rows of one line, 16 of two
        (16, 8, 8 * 64 + 8 * 128),
    ],
)
def test_bytes_of_a_system(dim, size, triangle):
    """By hand: rows up to the diagonal in lines of 64 bytes, D and Y, J, condition, info."""
    results = (2 * dim * 2 + 4 + 1) * size + 4
    assert fisher_solve.bytes_moved(dim, 2, size) == triangle + results


def test_multiply_adds_are_counted():
    """The leading terms of what a factorisation in scalar loops does; catches a factor of 2."""
    d, P = 200, 2
    factor = sum((d - 1 - j) * (d - j) / 2 for j in range(d))
    half = P * sum(i for i in range(d))
    product = d * P * (P + 1) / 2
    counted = fisher_solve.multiply_adds(d, P)
    assert counted == pytest.approx(factor + half + product, rel=0.02)


# --- the published loop --------------------------------------------------------------------------


def gaussian_shift(samples: int, dim: int, dtheta: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(2, samples, dim))
    return noise[0] - dtheta / 2, noise[1] + dtheta / 2


def test_published_loop_finds_the_information():
    """N(theta 1, 1_4), I = 4: J at every width within 4 standard errors, a false alarm in 1 of 16
    000 for another seed. 60 features of 4 numbers leave out much less: 120 find 0.2 % more. A
    derivative that is not divided by dtheta, once or at all, fails by far."""
    samples, dtheta = 20_000, 0.2
    curve = published_loop.published_curve(*gaussian_shift(samples, 4, dtheta), dtheta, (60, 120))
    for k, J in curve.items():
        error = published_loop.standard_error(J, k, (samples, samples), dtheta)
        assert 0 < error < 0.1 * 4
        assert abs(J - 4) < SIGMAS * error
        assert abs(J * dtheta - 4) > SIGMAS * error


def test_the_correction_matters():
    """Few samples, many features: uncorrected J leaves the bounds that the corrected one keeps."""
    samples, dtheta, k = 1000, 0.2, 100
    minus, plus = gaussian_shift(samples, 4, dtheta)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, k))
    naive = published_loop.linear_fisher(
        published_loop.lift(minus, weight, rng), published_loop.lift(plus, weight, rng), dtheta
    )
    J = published_loop.corrected(naive, k, (samples, samples), dtheta)
    bound = SIGMAS * published_loop.standard_error(J, k, (samples, samples), dtheta)
    assert abs(J - 4) < bound < abs(naive - 4)


# --- tiny runs -----------------------------------------------------------------------------------

SCRIPTS = {
    "speed/fisher_solve": {"fisher_solve": 6},
    "speed/moments": {"moments": 2, "spatial_moments": 2},
    "speed/gradients": {"gradient_squares": 2},
    "speed/curve": {"curve": 2},
    "speed/factors": {"patch_moments": 1, "gradient_gram": 1},
    "speed/dual": {"jvp": 3, "dual_memory": 1, "dual_ops": 12},
}
UNLIMITED = {"curve", "jvp", "dual_memory", "dual_ops"}  # neither by loads nor by arithmetic


@pytest.fixture(scope="module")
def tiny_results(tmp_path_factory) -> Path:
    """What a tiny run of every script stores, in this process: peaks of memory are tested below."""
    out = tmp_path_factory.mktemp("bench") / "cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        for module in (peak_memory, dual_memory):
            patch.setattr(module, "printed_by", lambda *call: int(run_script(*call).split()[-1]))
        for script in SCRIPTS:
            run_script(f"benchmarks/{script}.py", "--tiny", "--out", out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_tiny_runs_store_their_rows(tiny_results, script):
    """Catches a benchmark that does not run, loses rows, leaves out a rival for a mistake of ours,
    or does not say on what it ran."""
    results = json.loads(tiny_results.read_text())
    for part, rows in SCRIPTS[script].items():
        assert len(results[part]["figures"]) == rows
        facts = results[part]["machine"]
        assert {"processor", "threads", "torch", "compiler", "simd", "commit"} <= set(facts)
        assert facts["torch"] == torch.__version__
        for row in results[part]["figures"]:
            for name, why in row.get("left out", {}).items():
                assert "times the best of its family" in why, (part, name, why)
    for part in set(SCRIPTS[script]) - UNLIMITED:
        for row in results[part]["figures"]:
            best = row["against"]["torch"]
            ratio = row["seconds"][best["best"]] / row["seconds"]["fisherfast"]
            assert best["ratio"] == pytest.approx(ratio)
            shares = row["limits"]["share of copy"], row["limits"]["share of gemm"]
            assert row["limits"]["limit"] == ("loads", "arithmetic")[shares[0] < shares[1]]


@pytest.mark.slow
def test_rows_of_exact_derivatives_add_up(tiny_results):
    """Ratios by hand from the stored seconds. Catches 1 + P that is forgotten or taken twice, a
    share of the wrong copy, and a contender that vanished without a reason."""
    results = json.loads(tiny_results.read_text())
    for row in results["jvp"]["figures"]:
        seconds, passes = row["seconds"], row["passes / (1 + P)"]
        ours = seconds["fisherfast"] / (1 + row["P"])
        plain = min(time for name, time in seconds.items() if name.startswith("plain"))
        assert passes["contiguous"] == pytest.approx(ours / seconds["plain"])
        assert passes["of the fastest"] == pytest.approx(ours / plain)
        best = seconds[row["against"]["torch"]["best"]]
        assert best == min(time for n, time in seconds.items() if n.startswith(("loop", "vmap")))
        assert row["ratio by layout"]["contiguous"] == pytest.approx(best / seconds["fisherfast"])
        layouts = 1 if row["network"] == "ViT" else 2
        assert len(seconds) + len(row["left out"]) == 4 * layouts
        assert not [name for name in row["left out"] if not name.startswith(("loop", "vmap"))]
    for row in results["dual_ops"]["figures"]:
        limits = row["limits"]
        copies = limits["copy GB/s"], limits["memmove GB/s"]
        speed = limits["bytes"] / row["seconds"]["fisherfast"] / 1e9
        assert limits["share of copy"] == pytest.approx(speed / copies[0])
        assert limits["share of the fastest copy"] == pytest.approx(speed / max(copies))
    [row] = results["dual_memory"]["figures"]
    assert set(row["bytes"]) == {"jvp", "propagate", "reductions"}


def test_bytes_of_a_dual_op():
    """By hand: relu reads and writes 3 slices of 2 x 4 x 8 x 8 floats, a pool writes a quarter of
    what it reads. Catches the results left out, or counted at the size of the input."""
    maps = dual.TINY_OPS[0]
    read = 4 * 3 * 2 * 4 * 8 * 8
    for case, moved in (
        (dual_ways.activation("relu", maps, False, "cpu"), 2 * read),
        (dual_ways.max_pool(maps, 2, 0), read + read // 4),
    ):
        assert dual.measure_op(case, dual.TINY)["limits"]["bytes"] == moved


@pytest.mark.parametrize("number", range(3))
def test_wrong_tangents_of_a_network_are_rejected(number):
    """The power of the check before the timing: tangents in bfloat16, of a neighbour in the batch,
    5 % too small, or an output off by 1 % exceed the tolerance that right ones keep by far."""
    case = dual.TINY_CASES[number]
    model = networks.built(case.name, **case.sizes).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *case.shape[1:], generator=generator, dtype=torch.float64)
    dx = torch.randn(2, *x.shape, generator=generator, dtype=torch.float64)
    y, dy = dual.by_loop(model, x, dx)
    for way in (dual.by_vmap, dual.ff.jvp):
        assert dual.error_of_pair(way(model, x, dx), (y, dy)) < 1e-12
    swapped = dy.roll(1, dims=1)
    for wrong in ((y, dy.bfloat16()), (y, swapped), (y, 0.95 * dy), (1.01 * y, dy)):
        assert dual.error_of_pair(wrong, (y, dy)) > dual.JVP_TOLERANCE


@pytest.mark.slow
def test_peak_memory():
    """Six slices need more than twice a plain pass; a copy of 16 MB costs 16 MB. Catches a way that
    is not run, a peak that is read before the call, and results or input counted as extra."""
    sizes = {"samples": 4, "size": 128, "width": 16}
    plain, many = (dual_memory.extra_bytes(way, directions=5, **sizes) for way in ("plain", "jvp"))
    assert 0 < 2 * plain < many
    shape, size = (64, 64, 32, 32), 64 * 64 * 32 * 32 * 4
    copied, seen = (
        peak_memory.extra_bytes(f"bmm of {way} [HW, n, C]", shape, "channels_last")
        for way in ("a copy", "the view")
    )
    assert 0.8 * size < copied < 1.5 * size
    assert seen < 0.5 * size


# --- tables and figure ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stored", [False, True])
def test_table_and_figure(tiny_results, tmp_path, stored):
    """Catches a table that drops a row, and results that the script cannot read: those that the
    benchmarks store now, and those in the repository."""
    pytest.importorskip("matplotlib")
    results, target = RESULTS if stored else tiny_results, tmp_path / "performance.png"
    options = ["--table", "--figure", "--results", results, "--to", target]
    printed = run_script("benchmarks/report/tables.py", *options)
    assert target.stat().st_size > 10_000
    for words in (
        *("d = 64, 1 system |", "10, 4 groups", "channels last", "J(k) to 40", "commit"),
        *("`ff.jvp` | small CNN [2, 1, 16, 16], P = 2", "| ViT [", "peak memory", "max pool 3"),
    ):
        assert stored or words in printed
    moments = json.loads(results.read_text())["moments"]["figures"]
    ratio = moments[0]["against"]["torch"]["ratio"]
    assert f"| {tables.number(ratio)} " in printed


def test_dual_ops_of_the_gpu_benchmark_run(monkeypatch):
    """On the CPU in place of the card, by the wall clock. Catches a part that fails before it
    reaches the card, and failed cases that `guarded` turns into rows."""
    monkeypatch.setattr(gpu_speed, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_speed, "cuda_clock", harness.wall_clock)
    rows = gpu_speed.dual_ops(tiny=True)
    assert len(rows) == SCRIPTS["speed/dual"]["dual_ops"]
    for row in rows:
        assert "failed" not in row, row
        assert row["limits"]["share of copy"] > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tiny_run_on_a_gpu(tmp_path):
    """Catches a benchmark that fails on a device: its rows then say so."""
    out = tmp_path / "gpu.json"
    run_script("benchmarks/gpu/speed.py", "--tiny", "--out", out)
    rows = [row for part in json.loads(out.read_text()).values() for row in part["figures"]]
    assert len(rows) == 9 + SCRIPTS["speed/dual"]["dual_ops"]
    assert not [row for row in rows if "failed" in row]


def test_table_of_sources_holds_the_stored_results():
    """Catches a number in docs/sources.md that was not measured."""
    stored = json.loads(sources.RESULTS.read_text(encoding="utf-8"))["sources"]["figures"]
    page = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    assert sources.table(stored) in page
