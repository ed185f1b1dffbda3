"""The benchmarks of the parameters' Fisher matrix run, and their rivals are right.

Those against other libraries, which are no dependencies, are skipped where these are not installed:
`benchmarks/peers/peers.txt` says how.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PEERS = ("nngeometry", "curvlinops", "backpack")
MISSING = [name for name in PEERS if importlib.util.find_spec(name) is None]

with_peers = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: benchmarks/peers/peers.txt"
)
# what the others import and call is theirs to keep up to date
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def load(monkeypatch):
    """Imports a script of the benchmarks as they import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def run(script, *arguments):
    """Runs a script of the benchmarks on one core."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{script}.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def small(load, samples: int = 5):
    """A residual network in float64, with its data."""
    networks, peers = load("peers.networks"), load("peers.libraries")
    model = networks.drawn(lambda: networks.residual(2, 2, 1, classes=3), torch.float64)
    shape = (networks.CHANNELS, networks.SIZE, networks.SIZE)
    return peers.Case(model, "categorical", *networks.data(shape, 3, samples, torch.float64))


@pytest.mark.parametrize("exact", [True, False])
def test_every_way_of_the_diagonal_is_right(load, exact):
    """In float64 against the loop over samples and classes, in chunks that do not divide the batch.
    Catches a rival that is left out, or beaten, for a mistake of ours."""
    ways, peers, bench = (
        load(name) for name in ("peers.ways", "peers.libraries", "peers.parameters")
    )
    case = small(load)
    truth = peers.brute_force(case, "exact" if exact else "empirical").diag()
    error_of = bench.errors_by_parameter(case.model, truth)
    arguments = case.model, case.x, case.y, exact
    for chunk in (1, 2, 5, sys.maxsize):
        assert error_of(ways.by_vmap(*arguments, chunk)) < 1e-12
    for gradients in (ways.by_patches, ways.by_grouped_convolution):
        assert error_of(ways.by_hooks(*arguments, gradients)) < 1e-12


def test_wrong_diagonals_are_rejected(load):
    """The power of the check before the timing: labels of a neighbour, one sample left out, the
    square of the mean gradient, and a constant 1 % too large, exceed the tolerance."""
    bench, ways = load("peers.parameters"), load("peers.ways")
    case = small(load, samples=6)

    def diagonal(x, y):
        return ways.by_vmap(case.model, x, y, False, 2)

    truth = diagonal(case.x, case.y)
    error_of = bench.errors_by_parameter(case.model, truth)
    loss = torch.nn.functional.cross_entropy(case.model(case.x), case.y)
    mean = torch.cat([g.flatten() for g in torch.autograd.grad(loss, case.parameters())])
    for wrong in (
        diagonal(case.x, case.y.roll(1)),
        diagonal(case.x[1:], case.y[1:]),
        mean.square(),
        1.01 * truth,
    ):
        assert error_of(wrong) > bench.TOLERANCE


def test_labels_given_to_the_rivals_are_those_that_are_drawn(load):
    """Catches rivals that compute another matrix than `fisher_type="mc"`, by the labels."""
    bench, ways = load("peers.parameters"), load("peers.ways")
    case = small(load)
    drawn = bench.with_drawn_labels(case)
    theirs = ways.by_vmap(case.model, case.x, drawn.y, False, 2)
    error_of = bench.errors_by_parameter(case.model, theirs)
    assert error_of(bench.ours(case, "diag", "mc")) < 1e-12
    assert error_of(ways.by_vmap(case.model, case.x, case.y, False, 2)) > bench.TOLERANCE


@with_peers
def test_same_numbers_as_each_library(load):
    """Dense, block, diagonal and Kronecker matrices, entry by entry, of each label type. Catches a
    factor (mean or sum, 1/2 of a squared error), another order of the parameters, a sharing of
    another name, and a joint bias that is left out."""
    assert len(load("peers.parameters").same_numbers()) == 81  # it compares each


@with_peers
def test_ours_is_right_where_others_are_not(load):
    """Layers called twice, circular padding, the eps of a batch norm, outputs so confident that
    their probability rounds to 1. Catches ours going the way of the others: each of these networks
    is got wrong, or refused, by at least one of them (which the table says)."""
    rows = load("peers.differences").rows()
    assert len(rows) == 8
    for row in rows:
        errors = row["errors"]
        bound = 1e-5 if "float32" in row["network"] else 1e-13  # measured: 5e-7 and 6e-16
        assert errors.pop("fisherfast") < bound, row["network"]
        assert errors.pop("curvlinops") < bound, row["network"]
        others_right = [isinstance(e, float) and e < bound for e in errors.values()]
        assert not all(others_right), row["network"]


def test_errors_that_count_entry_by_entry(load):
    """The power of the comparison: an error of one small entry, of one that must be zero, and a
    matrix whose parameters are exchanged, are seen beside entries that are much larger."""
    error = load("peers.parameters").entrywise_error
    row = torch.tensor([1e-6, 1.0, 0.0], dtype=torch.float64)
    for truth in (row, torch.outer(row, row)):
        assert error(truth.clone(), truth) == 0
        first, last = (0,) * truth.dim(), (2,) * truth.dim()
        for where, change in ((first, 1e-20), (last, 1e-30)):
            wrong = truth.clone()
            wrong[where] += change
            assert error(wrong, truth) > 1e-15
        assert error(truth.flip(0), truth) > 0.1
    assert error(1.001 * row, row) == pytest.approx(1e-3)


@pytest.mark.slow
def test_tiny_run_stores_its_rows(tmp_path):
    """Catches a benchmark that does not run, a rival that vanished without a reason, and ratios
    that are not those of the stored seconds. Without the other libraries it runs too, and names
    them."""
    out = tmp_path / "parameters.json"
    run("peers/parameters", "--tiny", "--out", out, "diagonal", "diagonal_memory")
    results = json.loads(out.read_text())
    rows = results["diagonal"]["figures"]
    assert [row["fisher_type"] for row in rows] == ["empirical", "mc", "exact"]
    for row in rows:
        assert not row["left out"]
        families = {"vmap(grad)", "vmap(grad), whole batch", "hooks"}
        assert families <= set(row["against"])
        for name, reason in {"nngeometry": "nngeometry", "BackPACK": "backpack"}.items():
            assert (name in row["against"]) != (reason in row["not installed"])
        for rival in row["against"].values():
            ratio = row["seconds"][rival["best"]] / row["seconds"]["fisherfast"]
            assert rival["ratio"] == pytest.approx(ratio)
    [row] = results["diagonal_memory"]["figures"]
    assert set(row["bytes"]) == {"step, SGD", "fisherfast, mc", "vmap of all"}
    assert row["over a step of SGD"]["step, SGD"] == 1


@pytest.mark.slow
def test_spectrum_benchmark(tmp_path):
    """Catches a benchmark that does not run, or whose checks fail."""
    out = tmp_path / "results.json"
    run("speed/spectrum", "--tiny", "--out", out)
    figures = json.loads(out.read_text())["spectrum"]["figures"]
    assert figures["error on a small network"] < 1e-10
    for name in ("MLP", "CNN"):
        row = figures[name]
        assert 0 < row["rank"] <= row["rows"]
        assert row["rank"] <= row["parameters"]
        assert row["seconds"]["spectrum, all of it"] > 0


@pytest.mark.slow
def test_widths(tmp_path):
    """Catches a study that loses networks, and a figure that is not drawn."""
    out, figure = tmp_path / "results.json", tmp_path / "figures" / "widths.png"
    run("accuracy/parameter_widths", "measure", "--tiny", "--out", out)
    networks = json.loads(out.read_text())["widths"]["figures"]["networks"]
    assert len(networks) == 6
    assert len({row["parameters"] for row in networks}) == 3
    for row in networks:
        assert 1 <= row["participation ratio"] <= row["effective rank"] <= row["rank"]
    run("accuracy/parameter_widths", "figure", "--out", out, "--figure", figure)
    assert figure.stat().st_size > 10_000
