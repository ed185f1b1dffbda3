"""docs/reproduce.md shows what was measured."""

from __future__ import annotations

import json
import re

import pytest
from reproduce import FIGURES
from support.scripts import ROOT, run_script

PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
FOLDER = ROOT / "docs" / "figures" / "reproduce"
LARGEST = 150_000  # bytes of a picture


def test_tables_are_what_was_measured():
    """Catches a number typed by hand, and figures that were drawn anew without their tables."""
    assert run_script("benchmarks/report/reproduced.py") == PAGE
    assert PAGE.count("<!-- table") == PAGE.count("<!-- end -->") == 6
    assert not re.search(r"-->\n<!-- end", PAGE)  # no empty one


@pytest.mark.parametrize("name", list(FIGURES))
def test_figures_are_there_and_whole(name):
    """Catches a figure of a run that was cut short, of another size, or too large for a clone."""
    assert f"](figures/reproduce/{name}.png)" in PAGE
    assert (FOLDER / f"{name}.png").stat().st_size < LARGEST
    numbers = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert numbers["figure"] == name
    assert numbers["complete"] is True
    assert numbers["full"] is False
    assert numbers["settings"]["seed"] == 0
