"""The README, the guides and CONTRIBUTING: every code block runs, every file that they name exists,
and every number comes from a stored measurement.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from support.scripts import ROOT, run_script

from fisherfast.__main__ import main

PAGES = {
    path.stem: path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
}
README, CONTRIBUTING, TRAINING, BENCHMARKS = (
    PAGES[name].read_text(encoding="utf-8")
    for name in ("README", "CONTRIBUTING", "training", "benchmarks")
)
LANGUAGES = {"python", "sh", "text"}
LONGEST_README, LONGEST_ROW = 140, 200
OPTIONAL = {"lightning", "tensorboard"}
"""Packages whose blocks are left out where they are not installed."""
SERVICES = {"wandb", "mlflow"}
"""Packages that need an account or a server: a stand-in records what they are called with."""


def blocks(language: str, text: str = README) -> list[str]:
    return [code for name, code in all_blocks(text) if name == language]


def all_blocks(text: str) -> list[tuple[str, str]]:
    """Language and code."""
    return re.findall(r"```(\w*)\n(.*?)```", text, flags=re.S)


@pytest.mark.parametrize("name", PAGES)
def test_every_block_has_a_known_language(name):
    """Catches a block that none of the tests below would run."""
    text = PAGES[name].read_text(encoding="utf-8")
    assert {language for language, _ in all_blocks(text)} <= LANGUAGES
    assert name in {"README", "training", "parameters", "forecasts", "sources"} or not blocks(
        "python", text
    )


@pytest.mark.parametrize(
    "page", ["README", "forecasts", "sources", pytest.param("parameters", marks=pytest.mark.slow)]
)
def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys, page):
    """Catches an example that was never run, or whose assertion fails, and a table that it does not
    print.

    All blocks share one namespace, in an empty folder. Other processors round differently: J may
    differ from what is shown by a tenth of its error.
    """
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    codes = blocks("python", PAGES[page].read_text(encoding="utf-8"))
    assert codes
    for code in codes:
        exec(compile(code, f"{page}.md", "exec"), namespace)
    if page == "README":
        printed = table_rows(capsys.readouterr().out)
        for name, (J, error) in table_rows(blocks("text")[0]).items():
            assert printed[name][0] == pytest.approx(J, abs=0.1 * error)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning:lightning")
@pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_training_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    """Catches an example of the training guide that was never run, in an empty folder. Each section
    continues from the first one, and its blocks share a namespace; blocks of a package that is not
    installed are left out, and only those."""
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


def table_rows(text: str) -> dict[str, tuple[float, float]]:
    """J and its error of each layer in a printed flow."""
    rows = re.findall(r"^(\w+(?: = \w+)?) +\d+ +\d+ +(\S+) +(\S+)", text, flags=re.M)
    assert rows
    return {name: (float(J), float(error)) for name, J, error in rows}


def test_shell_lines_exist(capsys):
    """Catches a verb that is not there: targets are resolved, commands asked for their help."""
    for line in "".join(blocks("sh", README) + blocks("sh", CONTRIBUTING)).splitlines():
        command = line.split("#")[0].split()
        if command[0] == "make":
            if shutil.which("make") is not None:
                subprocess.run(
                    ["make", "-n", *command[1:]], cwd=ROOT, check=True, capture_output=True
                )
        elif command[:3] == ["python", "-m", "fisherfast"]:
            verbs = [word for word in command[3:] if word.isalpha()][:2]
            with pytest.raises(SystemExit) as stop:
                main([*verbs, "--help"])
            assert stop.value.code == 0, capsys.readouterr().err
        elif command[0] == "python":
            assert (ROOT / command[1]).is_file(), line
        else:
            assert command[:2] == ["pip", "install"], line


@pytest.mark.parametrize("name", PAGES)
def test_pictures_and_links_exist(name):
    """Catches a figure, page or heading that was renamed."""
    page = PAGES[name]
    for target, anchor in re.findall(
        r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")
    ):
        found = page.parent / target if target else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), (target, anchor)


def anchors(page: Path) -> set[str]:
    """Names of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_are_short():
    """Catches a README that cannot be read in two minutes, and a table that has to be decoded."""
    assert len(README.splitlines()) <= LONGEST_README
    rows = [line for line in CONTRIBUTING.splitlines() if line.startswith("|")]
    assert max(map(len, rows)) < LONGEST_ROW


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", ["accuracy/validation.py", "report/tables.py", "peers/architectures.py"]
)
def test_tables_are_what_was_measured(script):
    """Catches a number typed by hand: the tables come from benchmarks/results."""
    assert run_script(f"benchmarks/{script}", "--table").strip() in BENCHMARKS


def test_the_readme_quotes_the_tables():
    """Catches a number of the README that no longer is in the tables."""
    section = README.partition("](docs/benchmarks.md)")[2].partition("\n## ")[0]
    quoted = numbers(section) | numbers(README.partition("no finite step; ")[2].partition("|")[0])
    assert len(quoted) > 10
    assert quoted <= numbers(BENCHMARKS)


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", text))


# --- paths ---------------------------------------------------------------------------------------


def named_paths(text: str) -> set[str]:
    """Paths in backticks, and those of a tree: each line names a folder, indented lines belong to
    the folder above them, and the description names files of the folder."""
    found = {word for word in re.findall(r"`([\w./*-]+)`", text) if "/" in word}
    for tree in blocks("text", text):
        folders: list[str] = []
        for line in tree.splitlines():
            if name := re.match(r"( *)([\w.]+/)  ", line):
                folders[len(name[1]) // 2 :] = [name[2]]
                found.add("".join(folders))
            files = re.findall(r"(?<!\S)(?!x\.)[\w*]+\.(?:py|cpp|md)\b|(?<= )\w+/(?= )", line)
            found |= {"".join(folders) + file for file in files if file not in folders}
    return found


@pytest.mark.parametrize("name", PAGES)
def test_every_named_path_exists(name):
    """Catches a file that was moved. A star stands for any name."""
    paths = named_paths(PAGES[name].read_text(encoding="utf-8"))
    assert [path for path in paths if not list(ROOT.glob(path.rstrip("/")))] == []
    assert name != "CONTRIBUTING" or len(paths) > 40


def test_every_folder_is_in_the_tree():
    """Catches a folder of the package that the tree of CONTRIBUTING leaves out."""
    folders = {
        f"fisherfast/{path.name}/"
        for path in (ROOT / "fisherfast").iterdir()
        if (path / "__init__.py").exists()
    }
    assert folders <= named_paths(CONTRIBUTING)
