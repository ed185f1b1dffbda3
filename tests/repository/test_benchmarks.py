"""The benchmarks run and leave out who is wrong; tables and reports hold what was measured."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fisherfast import ops

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results" / "cpu.json"
SIGMAS = 4.0


@pytest.fixture
def load(monkeypatch):
    """Imports a script of the benchmarks as they import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


# --- the runner ----------------------------------------------------------------------------------


def compare(harness: ModuleType, **ways) -> object:
    """Contenders given by name; the right result is 1."""
    contenders = [
        harness.Contender(name, way, family="" if name == harness.OURS else harness.TORCH)
        for name, way in ways.items()
    ]
    return harness.compare(contenders, lambda got: abs(got - 1.0), 1e-6, harness.TINY)


def test_wrong_and_raising_contenders_are_left_out(load):
    """Catches a ratio against a contender that gives no right answer, and a NaN that passes."""

    def raising() -> float:
        raise RuntimeError("no")

    found = compare(
        load("harness"),
        fisherfast=lambda: 1.0,
        right=lambda: 1.0,
        wrong=lambda: 1.1,
        nan=lambda: math.nan,
        raising=raising,
    )
    assert set(found.left_out) == {"wrong", "nan", "raising"}
    assert found.left_out["raising"] == "raised RuntimeError: no"
    assert set(found.seconds) == {"fisherfast", "right"}
    assert found.against()["torch"]["best"] == "right"


def test_a_contender_that_turns_wrong_later_is_left_out(load):
    """Catches results that are checked in the warm-up only."""
    harness = load("harness")
    calls = iter(range(1000))
    found = compare(
        harness,
        fisherfast=lambda: 1.0,
        late=lambda: 1.0 if next(calls) < harness.WARM_UPS else 2.0,
    )
    assert found.left_out == {"late": "wrong: relative error 1.0e+00"}


def test_ours_must_be_right(load):
    """Catches a speed that is reported for wrong results."""
    with pytest.raises(AssertionError, match="fisherfast must give right results"):
        compare(load("harness"), fisherfast=lambda: 1.5, right=lambda: 1.0)


def test_contenders_take_turns(load):
    """Catches one contender timed after another: the order of calls is a, b, a, b, ..."""
    harness, order = load("harness"), []
    compare(
        harness,
        fisherfast=lambda: order.append("a") or 1.0,
        other=lambda: order.append("b") or 1.0,
    )
    turns = harness.TINY.turns
    assert "".join(order) == "a" * harness.WARM_UPS + "b" * harness.WARM_UPS + "ab" * turns


def test_threads_are_given_and_restored(load):
    """Catches a contender on one thread that runs on all, and a changed setting afterwards."""
    harness, seen = load("harness"), []
    former = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ours = harness.Contender(harness.OURS, lambda: 1.0, family="")
        other = harness.Contender("x", lambda: seen.append(torch.get_num_threads()) or 1.0)
        both = harness.on_one_thread_too([other])
        harness.compare([ours, *both], lambda got: got - 1.0, 0.0, harness.TINY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(former)
    assert set(seen[: harness.WARM_UPS]) == {2}
    assert set(seen[harness.WARM_UPS : 2 * harness.WARM_UPS]) == {1}


def test_what_libraries_print_is_dropped(load, capfd):
    """Catches the thousands of lines of a failing MKL; what is printed outside must stay."""
    harness = load("harness")
    print("before", flush=True)
    with harness.silent_libraries():
        subprocess.run([sys.executable, "-c", "import os; os.write(1, b'x'); os.write(2, b'y')"])
    print("after", flush=True)
    assert capfd.readouterr() == ("before\nafter\n", "")


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
def test_bytes_of_a_system(load, dim, size, triangle):
    """By hand: rows up to the diagonal in lines of 64 bytes, D and Y, J, condition, info."""
    results = (2 * dim * 2 + 4 + 1) * size + 4
    assert load("speed.fisher_solve").bytes_moved(dim, 2, size) == triangle + results


def test_multiply_adds_are_counted(load):
    """The leading terms of what a factorisation in scalar loops does; catches a factor of 2."""
    d, P = 200, 2
    factor = sum((d - 1 - j) * (d - j) / 2 for j in range(d))
    half = P * sum(i for i in range(d))
    product = d * P * (P + 1) / 2
    counted = load("speed.fisher_solve").multiply_adds(d, P)
    assert counted == pytest.approx(factor + half + product, rel=0.02)


def test_factorisation_by_hand_is_right(load):
    """Catches a rival that is left out for being wrong, although it need not be."""
    bench = load("speed.fisher_solve")
    cov, deriv = bench.draw_systems(5, 7, torch.float64)
    truth = deriv.mT @ torch.linalg.inv(cov) @ deriv
    assert torch.allclose(bench.by_columns(cov, deriv), truth, rtol=1e-11)


# --- the published loop --------------------------------------------------------------------------


def gaussian_shift(samples: int, dim: int, dtheta: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(2, samples, dim))
    return noise[0] - dtheta / 2, noise[1] + dtheta / 2


def test_published_loop_finds_the_information(load):
    """N(theta 1, 1_4), I = 4: J at every width within 4 standard errors, a false alarm in 1 of 16
    000 for another seed. 60 features of 4 numbers leave out much less: 120 find 0.2 % more."""
    loop = load("speed.published_loop")
    samples, dtheta = 20_000, 0.2
    curve = loop.published_curve(*gaussian_shift(samples, 4, dtheta), dtheta, (60, 120))
    for k, J in curve.items():
        error = loop.standard_error(J, k, (samples, samples), dtheta)
        assert 0 < error < 0.1 * 4
        assert abs(J - 4) < SIGMAS * error


@pytest.mark.parametrize("power", [1, 0])
def test_a_forgotten_dtheta_is_rejected(load, power):
    """The power of the test above: J times dtheta or dtheta^2 (a derivative that is not divided by
    dtheta, once or at all) leaves the same bounds by far."""
    loop = load("speed.published_loop")
    samples, dtheta = 20_000, 0.2
    minus, plus = gaussian_shift(samples, 4, dtheta)
    right = loop.published_curve(minus, plus, dtheta, (60,))[60]
    wrong = right * dtheta ** (2 - power)
    assert abs(wrong - 4) > SIGMAS * loop.standard_error(right, 60, (samples, samples), dtheta)


def test_the_correction_matters(load):
    """Few samples, many features: uncorrected J leaves the bounds that the corrected one keeps."""
    loop = load("speed.published_loop")
    samples, dtheta, k = 1000, 0.2, 100
    minus, plus = gaussian_shift(samples, 4, dtheta)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, k))
    naive = loop.linear_fisher(loop.lift(minus, weight, rng), loop.lift(plus, weight, rng), dtheta)
    J = loop.corrected(naive, k, (samples, samples), dtheta)
    bound = SIGMAS * loop.standard_error(J, k, (samples, samples), dtheta)
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
LIMITED = {
    "fisher_solve",
    "moments",
    "spatial_moments",
    "gradient_squares",
    "patch_moments",
    "gradient_gram",
}  # by loads or by arithmetic


@pytest.fixture(scope="module")
def tiny_results(tmp_path_factory) -> Path:
    """What a tiny run of every script stores."""
    out = tmp_path_factory.mktemp("bench") / "cpu.json"
    for script in SCRIPTS:
        command = [
            sys.executable,
            BENCHMARKS / f"{script}.py",
            "--tiny",
            "--out",
            out,
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("script", SCRIPTS)
def test_tiny_runs_store_their_rows(tiny_results, script):
    """Catches a benchmark that does not run, loses rows, or does not say on what it ran."""
    results = json.loads(tiny_results.read_text())
    for part, rows in SCRIPTS[script].items():
        assert len(results[part]["figures"]) == rows
        facts = results[part]["machine"]
        assert {"processor", "threads", "torch", "compiler", "simd", "commit"} <= set(facts)
        assert facts["torch"] == torch.__version__
    for part in set(SCRIPTS[script]) & LIMITED:
        for row in results[part]["figures"]:
            best = row["against"]["torch"]
            ratio = row["seconds"][best["best"]] / row["seconds"]["fisherfast"]
            assert best["ratio"] == pytest.approx(ratio)
            shares = row["limits"]["share of copy"], row["limits"]["share of gemm"]
            assert row["limits"]["limit"] == ("loads", "arithmetic")[shares[0] < shares[1]]


def test_rows_of_exact_derivatives_add_up(tiny_results):
    """Ratios by hand from the stored seconds. Catches 1 + P that is forgotten or taken twice, a
    share of the wrong copy, and a contender that vanished without a reason."""
    results = json.loads(tiny_results.read_text())
    for row in results["jvp"]["figures"]:
        seconds, passes = row["seconds"], row["passes / (1 + P)"]
        ours = seconds["fisherfast"] / (1 + row["P"])
        assert passes["contiguous"] == pytest.approx(ours / seconds["plain"])
        assert passes["of the fastest"] == pytest.approx(ours / plain_seconds(seconds))
        best = seconds[row["against"]["torch"]["best"]]
        assert best == min(time for n, time in seconds.items() if n.startswith(("loop", "vmap")))
        assert row["ratio by layout"]["contiguous"] == pytest.approx(best / seconds["fisherfast"])
        layouts = 1 if row["network"] == "ViT" else 2
        assert len(seconds) + len(row["left out"]) == 4 * layouts
        assert not [name for name in row["left out"] if not name.startswith(("loop", "vmap"))]
        assert not [why for why in row["left out"].values() if "best of its family" not in why]
    for row in results["dual_ops"]["figures"]:
        seconds, limits = row["seconds"], row["limits"]
        copies = [limits["copy GB/s"], limits["memmove GB/s"]]
        speed = limits["bytes"] / seconds["fisherfast"] / 1e9
        assert limits["share of copy"] == pytest.approx(speed / copies[0])
        assert limits["share of the fastest copy"] == pytest.approx(speed / max(copies))
        assert row["against"]["plain"]["ratio"] == pytest.approx(
            seconds["plain"] / seconds["fisherfast"]
        )
    [row] = results["dual_memory"]["figures"]
    assert set(row["bytes"]) == {"jvp", "propagate", "reductions"}


def plain_seconds(seconds: dict[str, float]) -> float:
    """Of the fastest plain forward pass."""
    return min(time for name, time in seconds.items() if name.startswith("plain"))


def test_bytes_of_a_dual_op(load):
    """By hand: relu reads and writes 3 slices of 2 x 4 x 8 x 8 floats, a pool writes a quarter of
    what it reads. Catches the results left out, or counted at the size of the input."""
    bench, ways = load("speed.dual"), load("speed.dual_ways")
    maps = bench.TINY_OPS[0]
    read = 4 * 3 * 2 * 4 * 8 * 8
    for case, moved in (
        (ways.activation("relu", maps, False, "cpu"), 2 * read),
        (ways.max_pool(maps, 2, 0), read + read // 4),
    ):
        assert bench.measure_op(case, bench.TINY)["limits"]["bytes"] == moved


@pytest.mark.parametrize("number", range(12))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch compiles decompositions
def test_every_way_of_a_dual_op_is_right(load, number):
    """A float64 run of each against the formula. Catches a rival that is left out for a mistake of
    ours."""
    bench, ways = load("speed.dual"), load("speed.dual_ways")
    case = ways.op_cases(*bench.TINY_OPS)[number]
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    truth = case.formula(x.double())
    assert bench.error_of_result(case.ours(x), truth) < bench.OP_TOLERANCE
    for name, way in case.ways().items():
        assert bench.error_of_result(way(x), truth) < bench.OP_TOLERANCE, name


@pytest.mark.parametrize("number", range(3))
def test_wrong_tangents_of_a_network_are_rejected(load, number):
    """The power of the check before the timing: tangents in bfloat16, of a neighbour in the batch,
    5 % too small, or an output off by 1 % exceed the tolerance that right ones keep by far."""
    bench, networks = load("speed.dual"), load("speed.networks")
    case = bench.TINY_CASES[number]
    model = networks.built(case.name, **case.sizes).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *case.shape[1:], generator=generator, dtype=torch.float64)
    dx = torch.randn(2, *x.shape, generator=generator, dtype=torch.float64)
    y, dy = bench.by_loop(model, x, dx)
    for way in (bench.by_vmap, bench.ff.jvp):
        assert bench.error_of_pair(way(model, x, dx), (y, dy)) < 1e-12
    swapped = dy.roll(1, dims=1)
    for wrong in ((y, dy.bfloat16()), (y, swapped), (y, 0.95 * dy), (1.01 * y, dy)):
        assert bench.error_of_pair(wrong, (y, dy)) > bench.JVP_TOLERANCE


def test_peak_memory_of_derivatives_counts_the_tangents(load):
    """Twice as many directions need more memory, and a plain pass the least. Catches a way that is
    not run, and a peak that is read before the call."""
    extra = load("speed.dual_memory").extra_bytes
    sizes = {"samples": 4, "size": 128, "width": 16}
    plain = extra("plain", directions=1, **sizes)
    few, many = (extra("jvp", directions=directions, **sizes) for directions in (2, 5))
    assert 0 < plain < few
    assert 1.5 * few < many < 3 * few  # 6 slices to 3


KEPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from benchmarks.speed.limits import kept_memory
from benchmarks.speed.peak_memory import _resident
size = 64 << 20
torch.ones(1)
before = _resident()
with kept_memory():
    del_soon = torch.ones(size // 4)
    del del_soon
    inside = _resident() - before
after = _resident() - before
passing = torch.ones(size // 4)
del passing
print(inside > size // 2, after < size // 2, _resident() - before < size // 2)
"""


def test_kept_memory_ends():
    """Freed memory stays inside and leaves afterwards. Catches a setting of the process that the
    rest of a run inherits. In a process of its own: one that has freed much reuses that."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc for the resident memory")
    command = [sys.executable, "-c", KEPT, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 3


def test_peak_memory_sees_a_copy(load):
    """A copy of 16 MB costs 16 MB, a view less than half of it. Catches a peak that is read before
    the call, and results or input counted as extra."""
    extra = load("speed.peak_memory").extra_bytes
    shape, size = (64, 64, 32, 32), 64 * 64 * 32 * 32 * 4
    assert 0.8 * size < extra("bmm of a copy [HW, n, C]", shape, "channels_last") < 1.5 * size
    assert extra("bmm of the view [HW, n, C]", shape, "channels_last") < 0.5 * size


def test_every_way_of_spatial_moments_is_right(load):
    """Catches a rival that is left out for a mistake of ours."""
    ways = load("speed.spatial_ways")
    for layout in ("contiguous", "channels_last"):
        x = ways.draw_maps((6, 5, 4, 3), layout)
        truth = ways.truth_of(x)
        for name, way in ways.WAYS.items():
            for got, expected in zip(way(x), truth, strict=True):
                assert torch.allclose(got.double(), expected, atol=1e-5), name


@pytest.mark.parametrize("groups", [1, 5])
def test_every_way_of_moments_is_right(load, groups):
    """The same for `moments`, in float64 against the op."""
    bench = load("speed.moments")
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    group = torch.arange(50) % groups
    truth = ops.moments(x, group, groups)[1:]
    ways = bench.one_group_ways(x) if groups == 1 else bench.grouped_ways(x, group, groups)
    assert len(ways) == (2 if groups == 1 else 4)
    for way in ways:
        assert bench.error_of_pair(way.call(), truth) < 1e-12, way.name


def test_every_way_of_gradient_squares_is_right(load):
    """The same for `gradient_squares`, in float64 against the op."""
    bench = load("speed.gradients")
    for layer in bench.TINY_CASES.values():
        x, g = (part.double() for part in layer.draw("cpu"))
        kernel = (layer.kernel, layer.kernel)
        truth = ops.gradient_squares(x, g, kernel, **layer.settings)
        for way in bench.ways(layer, x, g).values():
            torch.testing.assert_close(way(), truth, rtol=1e-12, atol=1e-12)


# --- tables and figure ---------------------------------------------------------------------------


def test_table_and_figure(load, tiny_results, tmp_path):
    """Catches a table that drops a row, or a script that does not fit what the benchmarks store."""
    pytest.importorskip("matplotlib")
    table, target = run_tables(tiny_results, tmp_path)
    assert target.stat().st_size > 10_000
    for words in (
        *("d = 64, 1 system |", "10, 4 groups", "channels last", "J(k) to 40", "commit"),
        *("`ff.jvp` | small CNN [2, 1, 16, 16], P = 2", "| ViT [", "peak memory", "max pool 3"),
    ):
        assert words in table
    ratio = json.loads(tiny_results.read_text())["moments"]["figures"][0]["against"]["torch"]
    assert f"| {load('tables').number(ratio['ratio'])} " in table


@pytest.mark.skipif(not RESULTS.exists(), reason="benchmarks/results/cpu.json is not stored yet")
def test_table_and_figure_of_the_stored_results(tmp_path):
    """Catches stored results that the script can no longer read."""
    pytest.importorskip("matplotlib")
    table, target = run_tables(RESULTS, tmp_path)
    assert "d = 2048" in table
    assert target.stat().st_size > 10_000


def run_tables(results: Path, folder: Path) -> tuple[str, Path]:
    """The table, and the file of the figure."""
    target = folder / "performance.png"
    options = ["--table", "--figure", "--results", results, "--to", target]
    done = subprocess.run(
        [sys.executable, "-W", "error", BENCHMARKS / "report" / "tables.py", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, target


def test_dual_ops_of_the_gpu_benchmark_run(load, monkeypatch):
    """On the CPU in place of the card, by the wall clock. Catches a part that fails before it
    reaches the card, and failed cases that `guarded` turns into rows."""
    bench = load("gpu.speed")
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "cuda_clock", load("harness").wall_clock)
    rows = bench.dual_ops(tiny=True)
    assert len(rows) == SCRIPTS["speed/dual"]["dual_ops"]
    for row in rows:
        assert "failed" not in row, row
        assert row["limits"]["share of copy"] > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tiny_run_on_a_gpu(tmp_path):
    """Catches a benchmark that fails on a device: its rows then say so."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, BENCHMARKS / "gpu" / "speed.py", "--tiny", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    rows = [row for part in json.loads(out.read_text()).values() for row in part["figures"]]
    assert len(rows) == 9 + SCRIPTS["speed/dual"]["dual_ops"]
    assert not [row for row in rows if "failed" in row]
