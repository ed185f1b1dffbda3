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


def run_ranks(*command: Any, **environment: str) -> None:
    """Run a Python command in two processes at once, which LOCAL_RANK tells apart. Neither outlives
    an error of the other, or two minutes."""
    common = os.environ | environment | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=common | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            out, _ = rank.communicate(timeout=120)
            assert rank.returncode == 0, out
    finally:
        for rank in ranks:
            rank.kill()
