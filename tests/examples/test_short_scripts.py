"""The short scripts of `examples/`: each runs, is short, and prints what it says."""

from __future__ import annotations

import ast

import pytest
from support.scripts import ROOT, run_script

MOST_LINES = 15

SCRIPTS = {
    "regression_set": ["labelled; 20000 samples"],
    "tokens": ["labelled; 6000 samples", "x holds integers alone"],
    "two_inputs": ["input   65", "pathwise; 5000 samples"],
    "resnet": ["1 (sum)", "2 (sum)", "output = 4"],
    "forecast": ["MarginalFisher(parameters=['x']"],
}
"""What each script prints."""
FIGURES = {"regression_set": "profile.png", "forecast": "ellipses.png"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_short_scripts_run(name, tmp_path, monkeypatch):
    """Catches an example that no longer runs, or that measures another network than it says."""
    if name in FIGURES:
        pytest.importorskip("matplotlib", reason="the example draws a figure")
    monkeypatch.chdir(tmp_path)
    printed = run_script(f"examples/{name}.py")
    assert all(text in printed for text in SCRIPTS[name]), printed
    if name in FIGURES:
        assert (tmp_path / FIGURES[name]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", SCRIPTS)
def test_short_scripts_are_short(name):
    """Lines of code, without the docstring and empty lines."""
    tree = ast.parse((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8"))
    lines = {
        node.lineno for node in ast.walk(ast.Module(tree.body[1:], [])) if hasattr(node, "lineno")
    }
    assert len(lines) <= MOST_LINES
