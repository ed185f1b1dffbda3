"""Who may import whom (CONTRIBUTING.md), and what `import fisherfast` must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fisherfast

PACKAGE = Path(fisherfast.__file__).parent

# Floors of the house, from the top: a folder or root module imports from lower floors, and on its
# own floor without a circle.
FLOORS = [
    {"__main__", "demo", "integrations"},
    {"training", "parameters"},
    {"flow"},
    {"measurement"},
    {"estimation", "model", "dual", "parallel", "data", "results", "problems"},
    {"ops"},
    {"_native", "_errors", "_fields", "_files", "_progress", "_validation", "_version"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MOST_MODULES = {"": 12}  # of a folder; 15 elsewhere
ORACLES = ("ops.reference", "ops.reference_dual")


def modules() -> dict[str, Path]:
    """Path of every module, by its name without "fisherfast."; packages by that of their
    folder."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """Modules of fisherfast that a file imports: inside functions and for types alone, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} must import by full names"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "fisherfast":
                yield rest if rest in MODULES else rest.rpartition(".")[0]


IMPORTS = {name: set(imported(path)) - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    """The folder or root module that a module belongs to."""
    return module.partition(".")[0]


def test_no_circle_of_modules():
    """Catches two modules that need each other, even lazily or for types alone: a CycleError."""
    TopologicalSorter(IMPORTS).prepare()


def test_no_circle_of_folders():
    """Catches a folder that has to be read together with one that it serves."""
    arrows: dict[str, set[str]] = {}
    for name, targets in IMPORTS.items():
        if name:  # __init__ lists public names of all folders
            arrows.setdefault(room(name), set()).update(set(map(room, targets)) - {room(name), ""})
    TopologicalSorter(arrows).prepare()


def test_imports_go_down():
    """Catches an import from a higher floor, and a folder that has no floor."""
    assert {room(name) for name in MODULES if name} == set(FLOOR)
    wrong = [
        f"{name} imports {target}"
        for name, targets in IMPORTS.items()
        for target in targets
        if name and target and FLOOR[room(target)] < FLOOR[room(name)]
    ]
    assert not wrong


def test_folders_are_small():
    """Catches the next drawer for everything."""
    sizes: dict[str, int] = {}
    for path in MODULES.values():
        if path.name != "__init__.py":
            folder = ".".join(path.relative_to(PACKAGE).parent.parts)
            sizes[folder] = sizes.get(folder, 0) + 1
    assert {f: n for f, n in sizes.items() if n > MOST_MODULES.get(f, 15)} == {}


def test_results_and_ground_truths_stand_alone():
    """Catches results that import what measures them, ground truths computed with what they check,
    and library code that looks truths up."""
    rooms = {(room(name), room(target)) for name, targets in IMPORTS.items() for target in targets}
    for name, more in (("results", {"estimation", "model"}), ("problems", {"data", "model"})):
        assert {used for user, used in rooms if user == name} <= {name, *more, *FLOORS[-1]}
    users = {user for user, used in rooms if used == "problems"}
    assert users <= {"", "problems", *FLOORS[0]}


@pytest.mark.parametrize("module", [*ORACLES, *sorted(FLOORS[-1])])
def test_references_import_nothing_above(module):
    """Catches a reference that calls the op it is the oracle of."""
    assert IMPORTS[module] <= {*ORACLES, *FLOORS[-1]}


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
from fisherfast.integrations.notebook import LivePlot
x = torch.randn(2, 500, 4)
data = fisherfast.FiniteDifference(x[0] - 0.1, x[1], dtheta=0.1)
monitor = fisherfast.FisherMonitor(torch.nn.Linear(4, 1), data)
monitor.step()
assert not LivePlot(monitor).update(), "this is no notebook"
assert "torch._dynamo" not in sys.modules, "torch's compiler takes seconds to import"
heavy = {"matplotlib", "tqdm", "PIL", "scipy", "pandas", "torchvision"}
heavy |= {"lightning", "pytorch_lightning", "tensorboard", "IPython"}
print(sorted(heavy & {name.split(".")[0] for name in set(sys.modules) - known}))
"""


def test_import_is_light_and_changes_nothing():
    """Catches matplotlib, tqdm, PIL or scipy, at import or in a measurement, flushed denormals, and
    changed defaults."""
    done = subprocess.run(
        [sys.executable, "-c", SILENT_IMPORT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
