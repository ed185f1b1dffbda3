"""What docs/parameters.md says of measurements is what was measured."""

from __future__ import annotations

import json
import statistics
from typing import Any

import continual_digits
import pruning_information
from support.scripts import ROOT

from benchmarks.report import parameter_tables

STORED = json.loads((ROOT / "benchmarks" / "results" / "parameters.json").read_text())
RUNS = STORED["pruning"]["figures"]["runs"]
GUIDE = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
TEXT = " ".join(GUIDE.split())


def test_tables_are_the_measured_ones():
    """Catches tables older than the measurement, numbers typed by hand, and marks without a
    table."""
    assert len(RUNS) == 3
    assert pruning_information.table(RUNS) in GUIDE
    assert pruning_information.bits_table(RUNS[0]) in GUIDE
    assert continual_digits.table(STORED["continual"]["figures"]["protocols"]) in GUIDE
    found = parameter_tables.stored(STORED)
    assert set(found) == set(parameter_tables.TABLES)
    assert parameter_tables.written(GUIDE, found) == GUIDE
    for name, table in found.items():
        assert f"<!-- {name} -->\n{table}\n" in GUIDE, name


def test_the_text_quotes_the_first_run():
    """Catches sentences about another measurement than the one stored."""
    camera, lognormal = (RUNS[0][name] for name in ("camera", "lognormal"))

    def at(network: dict[str, Any], kind: str, way: str, size: float) -> dict[str, float]:
        axis = "bits" if kind == "bits" else "left"
        return next(row for row in network[kind][way] if row[axis] == size)

    def J(network: dict[str, Any], kind: str, way: str, size: float) -> str:
        return f"{at(network, kind, way, size)['transmission']:.2f}"

    last = at(lognormal, "weights", "importance", 0.3)
    coarse = at(lognormal, "bits", "importance", 2.0)
    second = RUNS[1]["camera"]
    for quoted in (
        "With 30 % of the weights the camera's network has"
        f" {J(camera, 'weights', 'magnitude', 0.3)} by magnitude and"
        f" {J(camera, 'weights', 'importance', 0.3)} by importance",
        f"({J(second, 'weights', 'importance', 0.14)} by importance,"
        f" {J(second, 'weights', 'magnitude', 0.14)} by magnitude)",
        f"20 % of the camera's units: {J(second, 'units', 'importance, each layer', 0.2)} and"
        f" {J(second, 'units', 'magnitude, each layer', 0.2)})",
        f"({at(camera, 'bits', 'magnitude', 1.0)['nats']:.3f} nats, importance"
        f" {at(camera, 'bits', 'importance', 1.0)['nats']:.3f})",
        f"({J(camera, 'weights', 'importance, each layer', 0.3)} at 30 %,"
        f" {J(camera, 'weights', 'importance, each layer', 0.2)} at 20 %, where magnitude over the"
        f" whole network has {J(camera, 'weights', 'magnitude', 0.2)})",
        f"({J(camera, 'units', 'importance', 0.14)} of the information at 14 % of the camera's"
        f" units, where each layer's own order keeps"
        f" {J(camera, 'units', 'importance, each layer', 0.14)}, and chance at 20 % of the"
        f" log-normal network's units"
        f" {J(lognormal, 'units', 'chance', 0.2)} where the sum of weights keeps"
        f" {J(lognormal, 'units', 'importance, sum of weights', 0.2)})",
        f"promises {last['predicted']:.2f} nats and costs {last['nats']:.2f}",
        f"keeps {coarse['transmission']:.3f} of J_input while the mean square error"
        f" grows {coarse['level']:.1f}-fold",
        f"with 10 % of its weights ({J(camera, 'weights', 'importance', 0.1)}) than with all"
        f" ({camera['whole']['transmission']:.2f} ± {camera['whole']['transmission_error']:.2f})",
    ):
        assert quoted in TEXT, quoted


def test_importance_is_never_behind():
    """The claims of the section, of every run: over the whole network importance needs no more
    weights than magnitude, and fewer in four of six networks; fewer units; and keeps more with 1.5
    bits or less. Catches results that are stored although the claims fail."""
    fewer = 0
    for run in RUNS:
        for network, found in run.items():
            whole = found["whole"]["transmission"]
            sizes = {
                (kind, way): pruning_information.intact(found[kind][way], "left", whole) or 1.0
                for kind in ("weights", "units")
                for way in ("importance", "magnitude")
            }
            assert sizes["weights", "importance"] <= sizes["weights", "magnitude"], network
            assert sizes["units", "importance"] < sizes["units", "magnitude"], network
            fewer += sizes["weights", "importance"] < sizes["weights", "magnitude"]
            by_importance, by_magnitude = (found["bits"][w] for w in ("importance", "magnitude"))
            for row, other in zip(by_importance, by_magnitude, strict=True):
                assert row["bits"] > 1.5 or row["transmission"] > other["transmission"], network
    assert fewer == 4


def test_the_text_quotes_the_gains_of_the_tasks():
    """Catches a gain of another run than the one stored."""
    permuted = STORED["continual"]["figures"]["protocols"]["permuted"]
    gains = {way: 100 * statistics.mean(found["gain"]) for way, found in permuted.items()}
    assert (
        f"the online variant keeps {gains['online']:.1f} points more than fine-tuning, the sum"
        f" over all tasks {gains['consolidation']:.1f} more; joint training is"
        f" {gains['joint'] - gains['online']:.1f} above the better of the two"
    ) in TEXT


def test_what_is_said_of_widths_is_what_was_measured():
    """Medians over seeds. Catches a caption that the figure does not show."""
    networks = STORED["widths"]["figures"]["networks"]

    def middle(name: str) -> list[float]:
        widths = sorted({row["width"] for row in networks})
        return [statistics.median(r[name] for r in networks if r["width"] == w) for w in widths]

    assert max(middle("rank")) <= STORED["widths"]["figures"]["samples"] == 128
    for name in ("effective rank", "participation ratio"):
        assert all(2.5 < value < 4.5 for value in middle(name)), name
    dimension = middle("effective dimension")
    assert dimension == sorted(dimension)
    assert dimension[-1] < 4 * dimension[1] < middle("rank")[-1]
    assert all(1.3 < error < 1.5 for error in middle("test error")[1:])
