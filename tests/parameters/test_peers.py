"""The same Fisher matrices as nngeometry, curvlinops and BackPACK, after each one's conventions.

Skipped where they are not installed (`benchmarks/peers/peers.txt` says how): they are no
dependencies.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PEERS = ("nngeometry", "curvlinops", "backpack")
MISSING = [name for name in PEERS if importlib.util.find_spec(name) is None]
NETWORKS = ("perceptron", "convolutional", "normalised")

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


def cases(load):
    """Every small network, with labels of classes and with targets."""
    return dict(((name, case.kind), case) for name, case in load("peers.parameters").cases())


@with_peers
@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("network", NETWORKS)
def test_same_numbers_as_each_library(load, network, kind, fisher_type):
    """Dense, block, diagonal and Kronecker matrices, entry by entry. Catches a factor (mean or sum,
    1/2 of a squared error), another order of the parameters, a sharing of another name, and a
    joint bias that is left out."""
    bench = load("peers.parameters")
    case = cases(load)[network, kind]
    found = list(bench.rivals(case, fisher_type))
    kfac = 3 if network != "normalised" else 0
    assert len(found) == 4 + kfac + (kind == "categorical")
    for name, structure, settings, theirs in found:
        own = bench.ours(case, structure, fisher_type, **settings)
        assert bench.entrywise_error(own, theirs) < bench.EXACT_TOLERANCE, name


@with_peers
@pytest.mark.parametrize("network", NETWORKS)
def test_same_numbers_for_the_labels_that_curvlinops_draws(load, network):
    """Its Monte Carlo Fisher matrix is our empirical one at its labels. Catches a gradient of the
    drawn labels that is not that of the labels in the data."""
    bench, peers = load("peers.parameters"), load("peers.libraries")
    case = cases(load)[network, "categorical"]
    labelled = peers.Case(case.model, case.kind, case.x, peers.curvlinops_labels(case))
    own = bench.ours(labelled, "full", "empirical")
    theirs = peers.curvlinops_dense(case, "mc")
    assert bench.entrywise_error(own, theirs) < bench.EXACT_TOLERANCE


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


def test_sum_of_squares_is_no_square_of_a_sum(load):
    """The widespread loop that squares the mean gradient of a batch falls with the batch size (a
    third of the truth at 4, a 25th at 64); ours does not move. Catches per-sample gradients that
    are summed before they are squared."""
    rows = load("peers.differences").batch_loop()
    assert [row["batch"] for row in rows] == [1, 4, 16, 64]
    loop = [row["squared mean gradient / truth"] for row in rows]
    assert loop[0] == pytest.approx(1, rel=1e-12)
    assert loop[1] < 0.4
    assert loop[3] < 0.1
    for row in rows:
        assert row["fisherfast / truth"] == pytest.approx(1, rel=1e-12)


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
