"""The example of pruning as it runs by default: what smaller networks know of theta.

    python benchmarks/accuracy/pruning.py

What it stores is what the example writes, and it draws docs/figures/pruning_information.png.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import ROOT, main

RESULTS = ROOT / "benchmarks" / "results" / "parameters.json"
SEEDS = 3  # networks trained of each kind, with samples of their own
FIGURE = ROOT / "docs" / "figures" / "pruning_information.png"


def pruning(tiny: bool) -> dict[str, Any]:
    """Information about theta in the outputs of pruned and quantised networks, several trained."""
    sys.path.insert(0, str(ROOT / "examples"))
    import pruning_information as example

    torch.set_num_threads(1)  # sums in another order train another network
    runs = []
    for seed in range(1 if tiny else SEEDS):
        with tempfile.TemporaryDirectory() as folder:
            given = [*(["--quick"] if tiny else []), "--seed", str(seed), "--out", folder]
            runs.append(example.main(given))
            if seed == 0 and not tiny:
                FIGURE.write_bytes((Path(folder) / "pruning.png").read_bytes())
    return {"runs": json.loads(json.dumps(runs), parse_float=shortened)}


def shortened(number: str) -> float:
    """Five digits: a tenth of the smallest error, at half of the length."""
    return float(f"{float(number):.5g}")


if __name__ == "__main__":
    main(__doc__ or "", {"pruning": pruning}, results=RESULTS)
