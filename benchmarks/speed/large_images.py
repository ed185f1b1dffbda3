"""The example of large images as it runs by default: accuracy, throughput, memory.

    python benchmarks/speed/large_images.py

Needs an idle machine for its seconds. What it stores is what the example writes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import ROOT, main

RESULTS = ROOT / "benchmarks" / "results" / "training.json"
TINY = ("--size", "64", "--samples", "160", "--epochs", "2", "--images", "64")


def large_images(tiny: bool) -> dict[str, Any]:
    """Pose of a photograph in 512 x 512 pictures, read by a network in training."""
    sys.path.insert(0, str(ROOT / "examples"))
    import large_images as example

    with tempfile.TemporaryDirectory() as folder:
        given = [*(TINY if tiny else ()), "--out", str(Path(folder))]
        result: dict[str, Any] = example.main(given)
    return result


if __name__ == "__main__":
    main(__doc__ or "", {"large_images": large_images}, results=RESULTS)
