"""Every code block of the README runs, and every file it shows exists."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
LANGUAGES = {"python", "sh", "text"}


def blocks(language: str) -> list[str]:
    return [code for name, code in BLOCKS if name == language]


def test_every_block_has_a_known_language():
    """Catches a block that none of the tests below would run."""
    assert {name for name, _ in BLOCKS} <= LANGUAGES
    assert blocks("python")
    assert blocks("sh")


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    """Catches an example that was never run, and a table that it does not print.

    All blocks share one namespace, in an empty folder. Other processors round differently: J may
    differ from what is shown by a tenth of its error.
    """
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), namespace)
    printed = table_rows(capsys.readouterr().out)
    for name, (J, error) in table_rows(blocks("text")[0]).items():
        assert printed[name][0] == pytest.approx(J, abs=0.1 * error)


def table_rows(text: str) -> dict[str, tuple[float, float]]:
    """J and its error of each layer in a printed flow."""
    rows = re.findall(r"^(\w+(?: = \w+)?) +\d+ +\d+ +(\S+) +(\S+)", text, flags=re.M)
    assert rows
    return {name: (float(J), float(error)) for name, J, error in rows}


@pytest.mark.parametrize("line", [x for code in blocks("sh") for x in code.splitlines() if x])
def test_shell_lines_exist(line, tmp_path):
    """Catches a verb that is not there: targets are resolved, commands asked for their help."""
    command = line.split("#")[0].split()
    if command[0] == "make":
        if shutil.which("make") is None:
            pytest.skip("make is not installed")
        subprocess.run(["make", "-n", *command[1:]], cwd=ROOT, check=True, capture_output=True)
    elif command[:3] == ["python", "-m", "fisherfast"]:
        verbs = [word for word in command[3:] if not word.startswith("-") and word.isalpha()][:2]
        subprocess.run(
            [sys.executable, "-m", "fisherfast", *verbs, "--help"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
    else:
        assert command[:2] == ["pip", "install"]


def test_pictures_and_links_exist():
    """Catches a figure that was renamed."""
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_accuracy_table_is_what_was_measured():
    """Catches a number typed by hand: the table comes from benchmarks/results/validation.json."""
    script = ROOT / "benchmarks" / "validation.py"
    done = subprocess.run(
        [sys.executable, script, "--table"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in README


def test_performance_table_is_what_was_measured():
    """The same for speed: the table comes from benchmarks/results/cpu.json."""
    script = ROOT / "benchmarks" / "tables.py"
    done = subprocess.run(
        [sys.executable, script, "--table"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in README
