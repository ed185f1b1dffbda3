"""Who may import whom (CONTRIBUTING.md), and what `import fisherfast` must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fisherfast

PACKAGE = Path(fisherfast.__file__).parent
ANYONE = {"_version", "_progress", "unwrap", "default_device"}
PARTS_OF_FLOW = {"meters", "recall", "settings", "streams", "memory_budget"}
MEASURE = {
    "data",
    "dealing",
    "distributed",
    "dual",
    "dither",
    "shares",
    "taps",
    "features",
    "derivatives",
    "leverage",
    "moments",
    "score",
    "uncertainty",
    "estimators",
    "batch_moments",
    "replicates",
    "ridge",
    "maps",
}
NUMBERS = {"comparison", "results", "status", "information_map", "marginal"}
WIDE_LAYERS = {"krylov"}
PROBES = {"probe", "reservoir"}
TOP = {
    "__main__",
    "plots",
    "demos",
    "reproduce",
    "training",
    "integrations",
    "parameters",
    "selfcheck",
}
BELOW_OPS = {"_native", "reference", "reference_dual"}
LAZY = {("results", "plots")}  # the only import that looks upwards: FisherFlow.plot

# level of each part: an import goes to a lower level, or stays within one level where that is said
LEVELS = {
    **dict.fromkeys(TOP, 7),
    "flow": 6,
    "agreement": 5,
    "measurement": 5,
    "halves": 5,
    "wide": 5,
    "probed": 5,
    **dict.fromkeys(PARTS_OF_FLOW, 4),
    "problems": 4,
    "loss": 4,
    **dict.fromkeys(MEASURE | NUMBERS | WIDE_LAYERS | PROBES, 3),
    "ops": 2,
    **dict.fromkeys(BELOW_OPS, 1),
    **dict.fromkeys(ANYONE, 0),
}
WITHIN_LEVEL = {7, 5, 3, 1}


def part_of(path: Path) -> str:
    """Name of the top-level module or folder that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    """All Python files of the package but its `__init__`."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def imported_parts(node: ast.AST, path: Path) -> list[str]:
    """Parts of fisherfast that one statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        folder = path.relative_to(PACKAGE.parent).parts[: -node.level or None]
        base = ".".join((*folder, node.module or "")) if node.level else node.module or ""
        names = [f"{base.strip('.')}.{alias.name}" for alias in node.names]
    else:
        return []
    return [
        parts[1] if len(parts) > 1 else ""
        for parts in (name.split(".") for name in names)
        if parts[0] == "fisherfast"
    ]


def imports() -> set[tuple[str, str, bool]]:
    """(part, part it imports, whether inside a function) over all files."""
    found = set()
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lazy = {
            id(inner)
            for outer in ast.walk(tree)
            if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
            for inner in ast.walk(outer)
        }
        for node in ast.walk(tree):
            for target in imported_parts(node, path):
                if target != part_of(path):
                    found.add((part_of(path), target, id(node) in lazy))
    return found


def test_every_file_has_its_level():
    """Catches a new file that the rule does not know."""
    assert {part_of(path) for path in sources()} <= set(LEVELS)


def test_parts_import_downwards_only():
    """Catches any import of a higher part, in functions too; the one exception is stated above."""
    wrong = []
    for part, target, lazy in imports():
        if (part, target) in LAZY and lazy:
            continue
        level, below = LEVELS.get(part, 0), LEVELS.get(target, 99)
        if below > level or (below == level and level not in WITHIN_LEVEL):
            wrong.append(f"{part} imports {target or 'fisherfast'}")
    assert not wrong


def test_plots_are_imported_lazily_by_results():
    """Catches matplotlib at import time, and a second upward import that hides behind the first."""
    upward = {(part, target, lazy) for part, target, lazy in imports() if (part, target) in LAZY}
    assert upward <= {("results", "plots", True)}


def test_results_stand_alone():
    """Results are plain numbers: catches an import of anything that measures."""
    used = {target for part, target, _ in imports() if part == "results"}
    assert used <= {"_version", "plots", "comparison", "information_map", "marginal"}


def test_problems_use_data_alone():
    """Catches ground truths that are computed with what they are to check."""
    used = {target for part, target, _ in imports() if part == "problems"}
    assert used <= {"data"} | ANYONE


def test_measurement_below_flow_knows_no_ground_truth():
    """Catches library code that looks up the answer."""
    users = {part for part, target, _ in imports() if target == "problems"}
    assert users <= TOP


@pytest.mark.parametrize(
    "part", ["_native", "reference", "reference_dual", "_version", "_progress"]
)
def test_the_ground_floor_imports_nothing_above(part):
    """Catches a reference that calls the op it is the oracle of."""
    used = {target for source, target, _ in imports() if source == part}
    assert used <= BELOW_OPS | ANYONE


SILENT_IMPORT = """
import random, sys, warnings
warnings.simplefilter("error")
import numpy, torch
def state():
    return [
        torch.get_default_dtype(), torch.get_num_threads(), torch.get_num_interop_threads(),
        torch.is_grad_enabled(), torch.get_rng_state().numpy().tobytes(), random.getstate(),
        repr(numpy.random.get_state(legacy=False)), torch.backends.mha.get_fastpath_enabled(),
        torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
        (torch.tensor([1e-310], dtype=torch.float64) * 1).item(), 5e-324 * 1.0,
        (torch.full((64,), 1e-40) * 1).tolist(), torch.overrides.resolve_name(torch.relu),
    ]
before, known = state(), set(sys.modules)
import fisherfast
assert state() == before, "import fisherfast changes a global setting"
heavy = {"matplotlib", "tqdm", "PIL", "scipy", "pandas", "torchvision"}
heavy |= {"lightning", "pytorch_lightning", "tensorboard", "IPython"}
print(sorted(heavy & {name.split(".")[0] for name in set(sys.modules) - known}))
"""


def test_import_is_light_and_changes_nothing():
    """Catches matplotlib, tqdm, PIL or scipy at import, flushed denormals, and changed defaults."""
    done = subprocess.run(
        [sys.executable, "-c", SILENT_IMPORT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
