"""How many small faults in the library its tests find: mutation testing with cosmic-ray.

    pip install -c constraints.txt cosmic-ray     or make mutants, which does it
    python benchmarks/report/mutants.py                   80 faults, drawn once by their seed
    python benchmarks/report/mutants.py --seed 1          another sample
    python benchmarks/report/mutants.py --summary         the stored result in words

Faults are drawn at random over estimation, data, dual rules, training rules and parameters, one per
place in the code, the same number of each folder. Each is judged by the fast tests of its own
folder: killed if one of them fails. An interrupted run goes on with the same command; the faults
are those of the commit at which it began, until build/mutants is removed.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import ROOT, machine

RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
BUILD = ROOT / "build" / "mutants"
TREE = BUILD / "tree"
SECONDS = 900.0  # a fault that hangs the tests for so long counts as killed

# Source files of each part, and the tests that must find a fault in them.
PARTS = {
    "estimation": ("fisherfast/estimation/*.py", "tests/estimation"),
    "data": ("fisherfast/data/*.py", "tests/data"),
    "dual rules": ("fisherfast/dual/rules/*.py", "tests/dual"),
    "training rules": ("fisherfast/training/[rsu]*.py", "tests/training"),
    "parameters": ("fisherfast/parameters/**/*.py", "tests/parameters"),
}


def files_of(part: str, tree: Path) -> list[str]:
    """Paths of the source files of a part, relative to the tree."""
    found = tree.glob(PARTS[part][0])
    return sorted(str(p.relative_to(tree)) for p in found if p.name != "__init__.py")


def prepare_tree() -> None:
    """Copy the committed files, with the native module of this checkout."""
    if TREE.exists():
        return
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, TREE], check=True)
    for module in (ROOT / "fisherfast").glob("_C.*"):
        shutil.copy(module, TREE / "fisherfast")


def judge(folder: str) -> int:
    """Exit status of the fast tests of a folder, those first that name the changed file most."""
    changed = subprocess.check_output(["git", "diff", "--name-only"], text=True).split()
    stems = [Path(name).stem for name in changed if name.startswith("fisherfast/")]
    files = sorted(
        Path(folder).rglob("test_*.py"),
        key=lambda path: -sum(str(path).count(s) * 100 + path.read_text().count(s) for s in stems),
    )
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    return subprocess.call([*command, "-m", "not slow", *files])


def cosmic_ray(*arguments: object) -> None:
    """Run cosmic-ray in the tree."""
    command = [sys.executable, "-m", "cosmic_ray.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=TREE, env=environment, check=True)


def session_of(part: str, count: int, seed: int) -> Path:
    """A session of so many faults of a part; an existing one is taken as it is."""
    folder = BUILD / f"{part.replace(' ', '-')}-{seed}"
    session, config = folder / "session.sqlite", folder / "config.toml"
    if session.exists():
        return session
    folder.mkdir(parents=True, exist_ok=True)
    tests = json.dumps(f"{sys.executable} {Path(__file__).resolve()} --judge {PARTS[part][1]}")
    config.write_text(
        f"[cosmic-ray]\nmodule-path = {json.dumps(files_of(part, TREE))}\ntimeout = {SECONDS}\n"
        f"excluded-modules = []\ntest-command = {tests}\n"
        '[cosmic-ray.distributor]\nname = "local"\n'
    )
    cosmic_ray("init", config, session)
    keep_sample(session, count, random.Random(f"{part} {seed}"))
    return session


def no_faults(path: Path) -> set[int]:
    """Lines and columns, as line * 1000 + column, where a change is not a fault: type hints, which
    are never evaluated, and frozen= and strict=, which guard against a fault that is not there."""
    parts: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(path.read_text())):
        parts.append(getattr(node, "annotation", None))
        parts.append(getattr(node, "returns", None))
        if isinstance(node, ast.keyword) and node.arg in ("frozen", "strict"):
            parts.append(node.value)
    ranges = [
        range(part.lineno * 1000 + part.col_offset, end * 1000 + (part.end_col_offset or 0))
        for part in parts
        if isinstance(part, ast.expr) and (end := part.end_lineno)
    ]
    return set(itertools.chain.from_iterable(ranges))


def keep_sample(session: Path, count: int, generator: random.Random) -> None:
    """Leave so many faults of a session, at different places, each one of those that are possible
    there."""
    with sqlite3.connect(session) as database:
        rows = database.execute(
            "SELECT module_path, start_pos_row, start_pos_col, operator_name, occurrence, job_id"
            " FROM mutation_specs"
        ).fetchall()
        silent = {path: no_faults(TREE / path) for path in {row[0] for row in rows}}
        places: dict[tuple[str, int, int], list[str]] = {}
        for path, row, column, *_, job in sorted(rows):
            if row * 1000 + column not in silent[path]:
                places.setdefault((path, row, column), []).append(job)
        drawn = generator.sample(sorted(places), min(count, len(places)))
        kept = {generator.choice(places[place]) for place in drawn}
        gone = [(row[-1],) for row in rows if row[-1] not in kept]
        for table in ("work_items", "mutation_specs"):
            database.executemany(f"DELETE FROM {table} WHERE job_id = ?", gone)


def outcome_of(part: str, session: Path) -> dict[str, Any]:
    """Faults of a session: how many were killed, and the others with their change."""
    with sqlite3.connect(session) as database:
        rows = database.execute(
            "SELECT m.module_path, m.start_pos_row, m.operator_name, r.test_outcome, r.diff"
            " FROM mutation_specs m LEFT JOIN work_results r USING (job_id)"
        ).fetchall()
    counts = Counter(str(outcome).lower() for *_, outcome, _ in rows)
    survivors = [
        {"file": path, "line": line, "change": changed_lines(diff), "operator": operator}
        for path, line, operator, outcome, diff in rows
        if str(outcome).lower().endswith("survived")
    ]
    return {"part": part, "faults": len(rows), "outcomes": dict(counts), "survivors": survivors}


def changed_lines(diff: str | None) -> list[str]:
    """The lines of a difference that say what changed."""
    lines = (diff or "").splitlines()
    return [s for s in lines if s[:1] in "+-" and not s.startswith(("+++", "---"))]


def words(results: Sequence[dict[str, Any]]) -> list[str]:
    """The stored samples, one line per part, then the survivors."""
    lines = []
    for sample in results:
        killed = sum(
            n for part in sample["parts"] for o, n in part["outcomes"].items() if "killed" in o
        )
        faults = sum(part["faults"] for part in sample["parts"])
        lines.append(
            f"{sample['commit']}, seed {sample['seed']}: {killed} of {faults} faults killed"
        )
        for part in sample["parts"]:
            lines.append(f"  {part['part']}: {part['outcomes']}")
            lines += [f"    {s['file']}:{s['line']} {s['change']}" for s in part["survivors"]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=80, help="faults, over all parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="print what is stored instead")
    parser.add_argument("--judge", metavar="FOLDER", help="run the tests of a folder on a fault")
    options = parser.parse_args()
    if options.judge:
        sys.exit(judge(options.judge))
    stored = json.loads(options.out.read_text()) if options.out.exists() else []
    if not options.summary:
        prepare_tree()
        share = -(-options.count // len(PARTS))
        parts = []
        for part in PARTS:
            session = session_of(part, share, options.seed)
            cosmic_ray("exec", session.parent / "config.toml", session)
            parts.append(outcome_of(part, session))
        commit = subprocess.check_output(
            ["git", "rev-parse", "--short", "HEAD"], cwd=TREE, text=True
        )
        sample = {"seed": options.seed, "commit": commit.strip()}
        stored = [old for old in stored if {**old, **sample} != old]
        stored.append({**sample, "machine": machine(), "parts": parts})
        options.out.write_text(json.dumps(stored, indent=1) + "\n")
    print("\n".join(words(stored)))


if __name__ == "__main__":
    main()
