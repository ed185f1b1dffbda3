"""The example of pruning as it runs by default: what smaller networks know of theta.

    python benchmarks/bench_pruning.py

What it stores is what the example writes, and it draws docs/figures/pruning_information.png.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import ROOT, main

RESULTS = ROOT / "benchmarks" / "results" / "parameters.json"
FIGURE = ROOT / "docs" / "figures" / "pruning_information.png"


def pruning(tiny: bool) -> dict[str, Any]:
    """Information about theta in the outputs of pruned and quantised networks."""
    sys.path.insert(0, str(ROOT / "examples"))
    import pruning_information as example

    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = example.main(
            [*(["--quick"] if tiny else []), "--out", str(Path(folder))]
        )
        if not tiny:
            FIGURE.write_bytes((Path(folder) / "pruning.png").read_bytes())
    return result


if __name__ == "__main__":
    main(__doc__ or "", {"pruning": pruning}, results=RESULTS)
