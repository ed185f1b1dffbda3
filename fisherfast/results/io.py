"""Read and write the files of a flow: JSON, plain or inside a compressed .npz."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def write(path: Path, content: dict[str, Any]) -> None:
    """Write plain numbers, strings and lists. Raises ValueError unless path ends in .json or
    .npz."""
    text = json.dumps(content, indent=1, allow_nan=False)
    if path.suffix == ".json":
        path.write_text(text + "\n", encoding="utf-8")
    elif path.suffix == ".npz":
        np.savez_compressed(path, flow=np.frombuffer(text.encode(), dtype=np.uint8))
    else:
        raise ValueError(f"path must end in .json or .npz, got {path.name!r}")


def read(path: Path) -> Any:
    """Read a file of `write`. Raises ValueError for a damaged file, FileNotFoundError for none."""
    if path.suffix not in (".json", ".npz"):
        raise ValueError(f"path must end in .json or .npz, got {path.name!r}")
    try:
        if path.suffix == ".json":
            return json.loads(path.read_bytes())
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return json.loads(archive["flow"].tobytes())
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:
        raise ValueError(
            f"{path} must hold a saved flow, got a damaged or foreign file: {error}"
        ) from None
