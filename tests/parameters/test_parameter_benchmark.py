"""The benchmark of the parameters' Fisher matrix runs, and its rivals are right."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a script of the benchmarks as they import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


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


def test_a_step_of_the_benchmark_leaves_the_network(load):
    """Catches a training step between the contenders that changes what they are compared on."""
    bench, case = load("peers.parameters"), small(load)
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    bench.step(case)
    bench.limit(case, True)
    assert not case.model.training
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in case.parameters())


@pytest.mark.slow
def test_tiny_run_stores_its_rows(tmp_path):
    """Catches a benchmark that does not run, a rival that vanished without a reason, and ratios
    that are not those of the stored seconds. Without the other libraries it runs too, and names
    them."""
    out = tmp_path / "parameters.json"
    command = [sys.executable, BENCHMARKS / "peers" / "parameters.py", "--tiny", "--out", out]
    done = subprocess.run(
        [*command, "diagonal", "diagonal_memory"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
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
