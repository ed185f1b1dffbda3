"""Files that are replaced: whole, or as they were."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

import fisherfast as ff
from fisherfast._files import replacing

FORMATS = [".json", ".npz"]


@pytest.fixture(scope="module")
def flow() -> ff.FisherFlow:
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    return ff.fisher_flow(torch.nn.Linear(2, 1), ff.Pathwise(x, torch.ones_like(x)), max_features=8)


def fail(*_given: object, **_more: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*_given: object, **_more: object) -> None:
    raise KeyboardInterrupt


FAILURES = {
    "full at the flush": (os, "fsync", fail),
    "no rename": (Path, "replace", fail),
    "full in the archive": (np, "savez_compressed", fail),
    "Ctrl-C": (os, "fsync", interrupt),
}
NO_ARCHIVE = ("full in the archive", ".json")


@pytest.mark.parametrize(
    ("how", "suffix"),
    [(how, suffix) for how in FAILURES for suffix in FORMATS if (how, suffix) != NO_ARCHIVE],
)
def test_a_failed_save_leaves_the_earlier_file(flow, how, suffix, tmp_path, monkeypatch):
    """Catches a file that is emptied before the new one is on the disk, and a part that is left
    beside it, also where there was no file before."""
    place, name, stand_in = FAILURES[how]
    path = tmp_path / f"flow{suffix}"
    flow.save(path)
    before = path.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(place, name, stand_in)
        for target in (path, tmp_path / f"new{suffix}"):
            with pytest.raises((OSError, KeyboardInterrupt)):
                flow.save(target)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_device_is_written_to_and_stays(flow, tmp_path):
    """Catches a device that is replaced by a file, and an error of a full disk that is lost."""
    path = tmp_path / "flow.json"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        flow.save(path)
    assert stat.S_ISCHR(path.stat().st_mode)


def test_links_and_permissions_stay(flow, tmp_path):
    """Catches a link that becomes a file, a private file that everyone can read afterwards, a new
    one without the permissions of the user's umask, and a folder that is taken for a file."""
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "flow.json", tmp_path / "flow.json"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    flow.save(link)
    assert link.is_symlink()
    assert ff.FisherFlow.load(target).names == flow.names
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    other, plain = tmp_path / "other.npz", tmp_path / "plain"
    flow.save(other)
    plain.write_text("")
    assert other.stat().st_mode == plain.stat().st_mode
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(IsADirectoryError):
        flow.save(tmp_path / "folder.json")


def test_write_protection_is_respected(tmp_path, monkeypatch):
    """Catches a write-protected file that is replaced because its folder may be written to."""
    path = tmp_path / "a.csv"
    path.write_text("keep")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for a user who is not root
    with pytest.raises(PermissionError, match="Permission denied"), replacing(path) as file:
        file.write(b"new")
    assert path.read_text() == "keep"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
