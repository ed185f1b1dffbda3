"""Write files that a failure leaves as they were."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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
