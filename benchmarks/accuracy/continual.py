"""The example of continual learning as it runs by default: accuracy with and without consolidation.

    python benchmarks/accuracy/continual.py

What it stores is what the example writes; the figure goes where the documentation shows it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import ROOT, main

RESULTS = ROOT / "benchmarks" / "results" / "parameters.json"
FIGURE = ROOT / "docs" / "figures" / "continual_digits.png"
TINY = ("--quick", "--seeds", "1", "--epochs", "1")


def continual(tiny: bool) -> dict[str, Any]:
    """Five tasks of digits in turn: average accuracy after the last one."""
    sys.path.insert(0, str(ROOT / "examples"))
    import continual_digits as example

    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = example.main([*(TINY if tiny else ()), "--out", folder])
        if not tiny:
            shutil.copy(Path(folder) / FIGURE.name, FIGURE)
    return result


if __name__ == "__main__":
    main(__doc__ or "", {"continual": continual}, results=RESULTS)
