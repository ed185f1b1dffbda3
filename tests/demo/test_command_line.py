"""`python -m fisherfast`: verbs, wrong options, exit statuses."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fisherfast import __version__
from fisherfast.__main__ import main
from fisherfast.ops import selfcheck

TINY = ("--samples", "250", "--epochs", "1")


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


def test_no_verb_lists_the_verbs(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "demo" in text
    assert "check" in text


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fisherfast {__version__}\n"


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "fisherfast", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert done.stderr == ""


def test_check_passes_here(capsys):
    assert main(["check"]) == 0
    assert "all checks passed" in capsys.readouterr().out


def test_failed_check_has_status_1(capsys, monkeypatch):
    """Catches a failed check that ends with status 0."""
    row = selfcheck.CheckRow("moments", "cpu", "float32", 1.0, 1e-5)
    report = selfcheck.SelfCheckReport({"fisherfast": __version__}, [row])
    monkeypatch.setattr(selfcheck, "run_selfcheck", lambda stream: report)
    assert main(["check"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imaging", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--samples", "10"], "--samples must be at least 250 per position"),
        (["--seed", str(2**63)], f"seed must be at least -2**63 and below 2**63, got {2**63}"),
        (["--learning-rate", "0"], "--learning-rate must be positive and finite"),
        (["--learning-rate", "nan"], "--learning-rate must be positive and finite"),
        (["--scene", "none.jpg"], "none.jpg"),
        (["--data", "none.npz"], "none.npz"),
        (["--scene", "a.jpg", "--data", "b.npz"], "--scene must not be given together"),
        (["painting"], "invalid choice: 'painting'"),
    ],
)
def test_wrong_options(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails_with(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_files(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("not a picture")
    assert "text.txt" in fails_with(capsys, "--scene", str(text))
    assert "text.txt" in fails_with(capsys, "--data", str(text))
    assert "path must be" in fails_with(capsys, "--scene", str(tmp_path))
    np.savez(tmp_path / "other.npz", values=np.zeros(3))
    message = fails_with(capsys, "--data", str(tmp_path / "other.npz"))
    assert "position_center" in message


def test_report_folder_that_is_a_file(capsys, tmp_path):
    """Catches a run whose work is lost at its end."""
    taken = tmp_path / "taken"
    taken.write_text("")
    assert "taken" in fails_with(capsys, *TINY, "--out", str(taken))


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_packages(capsys, tmp_path, monkeypatch, package):
    """Catches a run that trains first and fails in its report, and an error without a remedy."""
    monkeypatch.setitem(sys.modules, package, None)
    message = fails_with(capsys, *TINY, "--out", str(tmp_path / "out"))
    assert message == (
        f"fisherfast demo: the report needs {package}: pip install 'fisherfast[demo]'\n"
    )
    assert list(tmp_path.iterdir()) == []
