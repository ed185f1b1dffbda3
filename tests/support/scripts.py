"""Scripts of the repository, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_script(path: str, *options: Any) -> str:
    """What a script prints with one thread; the test fails if the script does."""
    done = subprocess.run(
        [sys.executable, ROOT / path, *map(str, options)],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
