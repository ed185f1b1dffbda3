"""Every code block of the README and of the guides runs, and every file they show exists."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
PARAMETERS = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
LANGUAGES = {"python", "sh", "text"}
OPTIONAL = {"lightning", "tensorboard"}
"""Packages whose blocks are left out where they are not installed."""
SERVICES = {"wandb", "mlflow"}
"""Packages that want an account or a server: a stand-in takes what they are called with."""


def blocks(language: str, text: str = README) -> list[str]:
    return [code for name, code in all_blocks(text) if name == language]


def all_blocks(text: str) -> list[tuple[str, str]]:
    """Language and code."""
    return re.findall(r"```(\w+)\n(.*?)```", text, flags=re.S)


@pytest.mark.parametrize(
    "text", [README, TRAINING, PARAMETERS], ids=["README", "training", "parameters"]
)
def test_every_block_has_a_known_language(text):
    """Catches a block that none of the tests below would run."""
    assert {name for name, _ in all_blocks(text)} <= LANGUAGES
    assert blocks("python", text)
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


@pytest.mark.filterwarnings("ignore::Warning:lightning")
@pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_training_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    """Catches an example of the training guide that was never run, in an empty folder. A section
    goes on from the first one, and its blocks share a namespace; those of a package that is not
    there are left out, and only those."""
    monkeypatch.chdir(tmp_path)
    services = {name: MagicMock(name=name) for name in SERVICES}
    for name, service in services.items():
        monkeypatch.setitem(sys.modules, name, service)
    first: dict[str, object] = {}
    left_out = 0
    for section in TRAINING.split("\n## ")[1:]:
        namespace = dict(first)
        for code in blocks("python", section):
            imports = "\n".join(re.findall(r"^(?:import|from) .*", code, flags=re.M))
            wanted = [name for name in OPTIONAL if name in imports]
            if any(importlib.util.find_spec(name) is None for name in wanted):
                left_out += 1
            else:
                exec(compile(code, "training.md", "exec"), namespace)
        first = first or namespace
    assert left_out <= len(OPTIONAL)
    epochs = len(first["monitor"].history)
    logged = services["wandb"].init.return_value.log.call_args_list
    assert [call.args[0]["epoch"] for call in logged] == list(range(epochs))
    assert "transmission" in services["mlflow"].log_metrics.call_args.args[0]


def test_parameter_blocks_run_in_order(tmp_path, monkeypatch):
    """Catches an example of the parameters' guide that was never run, or whose assertion fails: all
    blocks share one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for code in blocks("python", PARAMETERS):
        exec(compile(code, "parameters.md", "exec"), namespace)
    assert "ewc" in namespace


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


@pytest.mark.parametrize(
    ("text", "folder"),
    [(README, ROOT), (TRAINING, ROOT / "docs"), (PARAMETERS, ROOT / "docs")],
    ids=["README", "training", "parameters"],
)
def test_pictures_and_links_exist(text, folder):
    """Catches a figure that was renamed."""
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert targets
    for target in targets:
        assert (folder / target).exists(), target


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
