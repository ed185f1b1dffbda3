"""`python -m fisherfast`: verbs, wrong options, exit statuses."""

from __future__ import annotations

import runpy
import sys

import numpy as np
import pytest

from fisherfast import __version__
from fisherfast.__main__ import main
from fisherfast.ops import selfcheck


def fails_with(capsys, *arguments: str) -> str:
    """The one line that a wrong option gives."""
    try:
        status = main(["demo", *arguments])
    except SystemExit as stop:  # argparse's own way out
        status = stop.code
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert output.err.endswith("\n")
    assert output.err.count("\n") == 1, output.err
    assert "Traceback" not in output.err
    return output.err


def test_runs_as_a_module(capsys, monkeypatch):
    """Catches a verb that the help leaves out, and another version than that of the package."""
    monkeypatch.setattr(sys, "argv", ["fisherfast", "--version"])
    monkeypatch.delitem(sys.modules, "fisherfast.__main__")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("fisherfast", run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr() == (f"fisherfast {__version__}\n", "")
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "demo" in text
    assert "check" in text


def test_check(capsys, monkeypatch):
    """Catches a failed check that ends with status 0."""
    assert main(["check"]) == 0
    assert "all checks passed" in capsys.readouterr().out
    row = selfcheck.CheckRow("moments", "cpu", "float32", 1.0, 1e-5)
    report = selfcheck.SelfCheckReport({"fisherfast": __version__}, [row])
    monkeypatch.setattr(selfcheck, "run_selfcheck", lambda stream: report)
    assert main(["check"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("imaging --epochs 0", "--epochs must be at least 1, got 0"),
        ("--epochs many", "invalid int value: 'many'"),
        ("--samples 10", "--samples must be at least 250 per position"),
        (f"--seed {2**63}", f"seed must be at least -2**63 and below 2**63, got {2**63}"),
        ("--learning-rate nan", "--learning-rate must be positive and finite"),
        ("--scene none.jpg", "none.jpg"),
        ("--scene text.txt", "text.txt"),
        ("--scene .", "path must be"),
        ("--data text.txt", "text.txt"),
        ("--data other.npz", "position_center"),
        ("--scene a.jpg --data b.npz", "--scene must not be given together"),
        ("painting", "invalid choice: 'painting'"),
        ("--samples 250 --epochs 1 --out text.txt", "text.txt"),
    ],
)
def test_wrong_options(capsys, tmp_path, monkeypatch, arguments, message):
    """Catches a traceback, and a run whose work is lost at its end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("not a picture")
    np.savez(tmp_path / "other.npz", values=np.zeros(3))
    assert message in fails_with(capsys, *arguments.split())
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "other.npz"}


def test_missing_packages(capsys, tmp_path, monkeypatch):
    """Catches a run that trains first and fails in its report, and an error without a remedy."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    message = fails_with(capsys, "--out", str(tmp_path / "out"))
    assert message == "fisherfast demo: the report needs jinja2: pip install 'fisherfast[demo]'\n"
    assert list(tmp_path.iterdir()) == []
