"""The long run counts what was found, and is what the theory quotes."""

from __future__ import annotations

import json
import re

from hostile.judge import Check, Judgement, Verdict
from hostile.tally import Reading
from support.scripts import ROOT

from benchmarks.accuracy import run_hostile as script

STORED = ROOT / "benchmarks" / "results" / "hostile.json"


def found(*failed: str, again: tuple[str, ...] = ()) -> Verdict:
    """A verdict of two checks of which some fail."""
    checks = [Check(name, "input", name not in failed, 0.5) for name in ("J above", "J below")]
    first = Judgement(checks, should_resolve=2, resolved=1)
    return Verdict(first, [Check(name, "input", False, detail="why") for name in again])


def test_verdicts_are_counted():
    """Catches a failure that is not in the result, and one that is there without its seed."""
    result = script.empty()
    script.add(result, 0, found())
    script.add(result, 1, found("J below"))
    script.add(result, 2, found("J above", "J below", again=("J above",)))
    assert result["examples"] == 3
    assert result["checks"] == {"J above": 3, "J below": 3}
    assert result["expected first failures"] == {"J above": 1.5, "J below": 1.5}
    assert result["first failures"] == {"J above": 1, "J below": 2}
    assert result["violations"] == {"J above": 1}
    assert result["violating seeds"] == {"2": ["J above: input: why"]}
    assert (result["layers that should be resolved"], result["of these resolved"]) == (6, 3)
    assert "| J above | 3 | 1 | 1.5 | 1 |" in script.summary(result)


def test_kinds_are_counted():
    """Catches readings that are lost, or counted with another kind."""
    result = script.empty()
    for seed, (kind, J) in enumerate((("Laplace", 0.9), ("Laplace", 1.1), ("rare", 1.0))):
        one = found()
        shares = {"linear": 1.0, "J": J, "lower": 0.5}
        one.first.reading = Reading(kind, shares, {"J": 4.0, "lower": 0.0}, True, False)
        script.add(result, seed, one)
    row = ("Laplace", "2", "1.000 +- 0.000", "1.000 +- 0.100", "0.500 +- 0.000", "100.0 %")
    assert f"| {' | '.join(row)} | 0.0 % | 0.0 % |" in script.summary(result)
    assert script.wrong_kinds(result)[0] == "Laplace: J above the information in 2 of 2"


def test_the_theory_quotes_the_stored_run():
    """Catches a number typed by hand, and a stored run that is shorter than is said."""
    theory = (ROOT / "docs" / "theory.md").read_text()
    result = json.loads(STORED.read_text())
    assert script.summary(result) in theory
    assert set(result["machine"]) >= {"commit", "torch", "processor", "platform"}
    section = theory[theory.index("Generated problems") :]
    assert int(re.search(r"(\d+) problems", section)[1]) == result["examples"]
