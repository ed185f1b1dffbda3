"""`python -m fisherfast`: verbs, wrong options, exit statuses."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

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
    """Catches a check whose failure nobody sees in CI."""
    row = selfcheck.CheckRow("moments", "cpu", "float32", 1.0, 1e-5)
    report = selfcheck.SelfCheckReport({"fisherfast": __version__}, [row])
    monkeypatch.setattr(selfcheck, "run_selfcheck", lambda stream: report)
    assert main(["check"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imaging", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["imaging", "--epochs", "many"], "invalid int value: 'many'"),
        (["imaging", "--samples", "10"], "--samples must be at least 250 per position"),
        (["gaussian", "--samples", "10"], "--samples must be at least 100 per theta, got 10"),
        (["lognormal", "--samples", "-1"], "--samples must be at least 100 per theta, got -1"),
        (["imaging", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["imaging", "--seed", "4294967296"], "--seed must be below 4294967296, got 4294967296"),
        (["imaging", "--learning-rate", "0"], "--learning-rate must be positive and finite"),
        (["imaging", "--learning-rate", "nan"], "--learning-rate must be positive and finite"),
        (["imaging", "--scene", "none.jpg"], "none.jpg"),
        (["imaging", "--data", "none.npz"], "none.npz"),
        (["imaging", "--scene", "a.jpg", "--data", "b.npz"], "--scene must not be given together"),
        (["gaussian", "--scene", "a.jpg"], "unrecognized arguments: --scene a.jpg"),
        (["painting"], "invalid choice: 'painting'"),
        ([], "required: task"),
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
    assert "text.txt" in fails_with(capsys, "imaging", "--scene", str(text))
    assert "text.txt" in fails_with(capsys, "imaging", "--data", str(text))
    assert "path must be" in fails_with(capsys, "imaging", "--scene", str(tmp_path))
    np.savez(tmp_path / "other.npz", values=np.zeros(3))
    message = fails_with(capsys, "imaging", "--data", str(tmp_path / "other.npz"))
    assert "position_center" in message


def test_report_folder_that_is_a_file(capsys, tmp_path):
    """Catches a run whose work is lost at its end."""
    taken = tmp_path / "taken"
    taken.write_text("")
    arguments = ["lognormal", "--samples", "100", "--out", str(taken)]
    assert "taken" in fails_with(capsys, *arguments)


def test_global_state_is_left_alone(tmp_path, capsys):
    """Catches a demo that seeds or uses the global random numbers, or sets threads."""
    threads = torch.get_num_threads()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    arguments = ["--samples", "100", "--epochs", "1", "--out", str(tmp_path)]
    assert main(["demo", "lognormal", *arguments]) == 0
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
