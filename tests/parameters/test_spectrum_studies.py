"""The benchmarks of spectrum and effective dimension run, and store what they measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(script: str, *arguments: str | Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_benchmark(tmp_path: Path) -> None:
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
def test_widths(tmp_path: Path) -> None:
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
