"""Write files that a failure leaves as they were, and those of a flow: JSON, plain or inside a
compressed .npz."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new binary file that takes the place of `path` when the block ends.

    It is written next to `path` and renamed after a flush to the disk, because a full disk may
    raise an error only then. After an error, also an interrupt, the earlier file is as it was and
    nothing lies beside it. A link keeps pointing to its file, which keeps its permissions. Devices
    and pipes are written to directly.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    known = target.exists()
    if known and not target.is_file():
        with target.open("wb") as file:
            yield file
        return
    if known and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            yield file
            synchronise(file)
        if known:
            part.chmod(target.stat().st_mode & 0o7777)
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def synchronise(file: BinaryIO) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_flow(path: Path, content: dict[str, Any]) -> None:
    """Write plain numbers, strings and lists; after an error the earlier file is as it was. Raises
    ValueError unless path ends in .json or .npz."""
    _check_suffix(path)
    text = json.dumps(content, indent=1, allow_nan=False).encode()
    with replacing(path) as file:
        if path.suffix == ".json":
            file.write(text + b"\n")
        else:
            np.savez_compressed(file, flow=np.frombuffer(text, dtype=np.uint8))


def read_flow(path: Path) -> Any:
    """Read a file of `write_flow`.

    Raises:
        ValueError: the file is damaged or foreign.
        FileNotFoundError: there is none.
    """
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
