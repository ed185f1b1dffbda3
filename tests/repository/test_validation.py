"""The measured accuracy: parts are stored beside each other, and the table shows what is stored."""

from __future__ import annotations

import copy
import json

import pytest
from support.scripts import ROOT, run_script

from benchmarks.accuracy import validation_derivatives
from benchmarks.accuracy.validation_table import table
from fisherfast.problems import CorrelatedImage

STORED = json.loads((ROOT / "benchmarks" / "results" / "validation.json").read_text())
SIGMAS = 4.0


@pytest.mark.slow
def test_a_part_leaves_the_others_as_they_were(tmp_path):
    """Catches a run of one part that drops or changes what is stored of the rest, a part that the
    command does not know, and operations that slip from the rules."""
    out = tmp_path / "validation.json"
    stored = copy.deepcopy(STORED)
    stored["operations"]["figures"] = {}
    out.write_text(json.dumps(stored))
    run_script("benchmarks/accuracy/validation.py", "operations", "--out", out)
    results = json.loads(out.read_text())
    measured = results.pop("operations")
    assert results == {part: entry for part, entry in stored.items() if part != "operations"}
    assert measured["machine"]["threads"] == 1
    figures = measured["figures"].values()
    executed = sum(sum(each.values()) for each in figures)
    assert sum(each["rule"] for each in figures) >= 0.95 * executed > 0
    assert not sum(each["failed"] for each in figures)


def test_every_part_of_derivatives_is_stored():
    """Catches a part that was never run, and one that does not say on what it ran."""
    for part in validation_derivatives.PARTS:
        entry = STORED[part.__name__]
        assert entry["what"] == " ".join(part.__doc__.split())
        assert {"commit", "torch", "threads"} <= set(entry["machine"])
        assert entry["figures"]


CHANGES = {
    # part, path to a number, another value, what the table then shows
    "tangents": (("untrained", "stderr ratio", "input"), 8.711, "| 8.71 |"),
    "tangents, layers": (("trained", "stderr ratio", "fc3"), 3.211, "3.21 trained"),
    "error_bars": (("scored", "Laplace", "coverage"), 0.123, "12.3% (Laplace)"),
    "score": (("200 seeds", "std of J"), 0.777, "0.777 (V on the same seeds"),
    "score, share": (("200 seeds", "mean J / V"), 0.666, "of J / V 0.666"),
    "camera": (("photon counts", "stderr"), 0.555, "± 0.555 |"),
    "camera, marginals": (("place and brightness, scored", "input", "marginal"), 7.7, "als 7.7"),
    "camera, linear": (("place and brightness, pathwise", "fc1", "marginal"), 8.8, "layers 8.8"),
    "wide": (("tangents", "position", "mean J"), 4.444, "| 4.44 ± "),
    "wide, lower": (("independent conditions", "amplitude", "mean lower"), 9.111, ", 9.11 |"),
    "memory": (("pathwise", "1000000"), 0.0, ", 0.00, "),
    "operations": (("ResNet-18", "failed"), 12, "12 failed |"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_table_shows_what_is_stored(name):
    """Catches a row that reads another number than it says."""
    (*path, last), value, expected = CHANGES[name]
    results = copy.deepcopy(STORED)
    figures = results[name.split(",")[0]]["figures"]
    for key in path:
        figures = figures[key]
    assert last in figures
    figures[last] = value
    assert expected not in table(STORED)
    assert expected in table(results)


def test_shares_of_an_image_are_in_units_of_its_information():
    """Catches shares of the wrong parameter: position and amplitude differ 5-fold here. Four
    numbers at 4 standard errors: a false alarm in 4000 seeds."""
    image = CorrelatedImage((20, 20), spot=2.0, correlation_length=3.0)
    theta = validation_derivatives.IMAGE_THETA
    shares = validation_derivatives.shares_of_image(
        image, lambda seed: image.pathwise(theta, 2000, seed=seed), 2
    )
    J, stderr, lower = shares[:, 1:].unbind(1)
    assert shares.shape == (2, 4, 2)
    assert float(((J - 1) / stderr).abs().max()) < SIGMAS
    assert float(((lower - J) / stderr).max()) < SIGMAS
    assert float(stderr.max()) < 0.1


def test_error_with_tangents_in_theory():
    """Catches a step or a number of samples that is not that of the task: 0.32 is in
    docs/theory.md."""
    assert validation_derivatives.ratio_in_theory() == pytest.approx(0.32, abs=0.005)
