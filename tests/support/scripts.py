"""Scripts of the repository, run as a user runs them."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_script(path: str, *options: Any) -> str:
    """What a script prints; it runs in this process, which has torch already."""
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(printed),
    ):
        warnings.simplefilter("default")
        patch.setattr(sys, "argv", [path, *map(str, options)])
        runpy.run_path(str(ROOT / path), run_name="__main__")
    return printed.getvalue()


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
