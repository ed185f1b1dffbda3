"""The benchmarks of the parameters' Fisher matrix run, and their rivals are right.

Those against other libraries, which are no dependencies, are skipped where these are not installed:
`benchmarks/peers/peers.txt` says how.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys

import pytest
import torch
from support.scripts import ROOT

from benchmarks.peers import differences, libraries, networks, ways
from benchmarks.peers import parameters as bench

MISSING = [
    name
    for name in ("nngeometry", "curvlinops", "backpack")
    if importlib.util.find_spec(name) is None
]
with_peers = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: benchmarks/peers/peers.txt"
)
# what the others import and call is theirs to keep up to date
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.mark.parametrize("exact", [True, False])
def test_every_way_of_the_diagonal_is_right(exact):
    """A residual network in float64 against the loop over samples and classes, in chunks that do
    not divide the batch. Catches a rival that is left out, or beaten, for a mistake of ours; the
    labels of a neighbour, a lost sample and a constant 1 % too large exceed the tolerance."""
    model = networks.drawn(lambda: networks.residual(2, 2, 1, classes=3), torch.float64)
    shape = (networks.CHANNELS, networks.SIZE, networks.SIZE)
    case = libraries.Case(model, "categorical", *networks.data(shape, 3, 5, torch.float64))
    truth = libraries.brute_force(case, "exact" if exact else "empirical").diag()
    error_of = bench.errors_by_parameter(case.model, truth)
    for chunk in (1, 2, sys.maxsize):
        assert error_of(ways.by_vmap(case.model, case.x, case.y, exact, chunk)) < 1e-12
    for gradients in (ways.by_patches, ways.by_grouped_convolution):
        assert error_of(ways.by_hooks(case.model, case.x, case.y, exact, gradients)) < 1e-12
    wrong = [1.01 * truth, ways.by_vmap(case.model, case.x[1:], case.y[1:], exact, 2)]
    if not exact:
        wrong.append(ways.by_vmap(case.model, case.x, case.y.roll(1), exact, 2))
        drawn = bench.with_drawn_labels(case)  # the rivals' labels are those of fisher_type="mc"
        theirs = ways.by_vmap(case.model, case.x, drawn.y, False, 2)
        error_of_drawn = bench.errors_by_parameter(case.model, theirs)
        assert error_of_drawn(bench.ours(case, "diag", "mc")) < 1e-12
    assert min(map(error_of, wrong)) > bench.TOLERANCE


@with_peers
def test_same_numbers_as_each_library():
    """Dense, block, diagonal and Kronecker matrices, entry by entry, of each label type. Catches a
    factor (mean or sum, 1/2 of a squared error), another order of the parameters, a sharing of
    another name, and a joint bias that is left out."""
    assert len(bench.same_numbers()) == 81  # it compares each


@with_peers
def test_ours_is_right_where_others_are_not():
    """Layers called twice, circular padding, the eps of a batch norm, outputs so confident that
    their probability rounds to 1. Catches ours going the way of the others: each of these networks
    is got wrong, or refused, by at least one of them (which the table says)."""
    rows = differences.rows()
    assert len(rows) == 8
    for row in rows:
        errors = row["errors"]
        bound = 1e-5 if "float32" in row["network"] else 1e-13  # measured: 5e-7 and 6e-16
        assert errors.pop("fisherfast") < bound, row["network"]
        assert errors.pop("curvlinops") < bound, row["network"]
        others_right = [isinstance(e, float) and e < bound for e in errors.values()]
        assert not all(others_right), row["network"]


@pytest.mark.slow
def test_tiny_runs_store_their_rows(tmp_path, monkeypatch):
    """Catches a benchmark that does not run, ratios that are not those of the stored seconds, a
    study that loses networks, and a figure that is not drawn."""

    def run(script, *arguments):
        out = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments), "--out", str(out)])
        runpy.run_path(str(ROOT / f"benchmarks/{script}.py"), run_name="__main__")
        return json.loads(out.read_text())

    rows = run("peers/parameters", "--tiny", "diagonal")["diagonal"]["figures"]
    assert [row["fisher_type"] for row in rows] == ["empirical", "mc", "exact"]
    for row in rows:
        assert not row["left out"]
        assert {"vmap(grad)", "vmap(grad), whole batch", "hooks"} <= set(row["against"])
        for rival in row["against"].values():
            ratio = row["seconds"][rival["best"]] / row["seconds"]["fisherfast"]
            assert rival["ratio"] == pytest.approx(ratio)
    figures = run("speed/spectrum", "--tiny")["spectrum"]["figures"]
    assert figures["error on a small network"] < 1e-10
    found = run("accuracy/parameter_widths", "measure", "--tiny")["widths"]["figures"]["networks"]
    assert len({row["parameters"] for row in found}) == 3
    figure = tmp_path / "widths.png"
    run("accuracy/parameter_widths", "figure", "--figure", figure)
    assert figure.stat().st_size > 10_000
