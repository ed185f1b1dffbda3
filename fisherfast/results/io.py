"""Read and write the files of a flow: JSON, plain or inside a compressed .npz."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fisherfast._files import replacing


def write(path: Path, content: dict[str, Any]) -> None:
    """Write plain numbers, strings and lists; after an error the earlier file is as it was. Raises
    ValueError unless path ends in .json or .npz."""
    _check_suffix(path)
    text = json.dumps(content, indent=1, allow_nan=False).encode()
    with replacing(path) as file:
        if path.suffix == ".json":
            file.write(text + b"\n")
        else:
            np.savez_compressed(file, flow=np.frombuffer(text, dtype=np.uint8))


def read(path: Path) -> Any:
    """Read a file of `write`. Raises ValueError for a damaged file, FileNotFoundError for none."""
    _check_suffix(path)
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


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".json", ".npz"):
        raise ValueError(f"path must end in .json or .npz, got {path.name!r}")
