"""The CSV file of a run: always whole, never in the way of the training."""

from __future__ import annotations

import csv
import errno
import math
import os
import resource
import signal
import threading
import warnings
from pathlib import Path

import pytest
import torch

import fisherfast as ff
from fisherfast.problems import GaussianShift, mlp
from fisherfast.training import history
from fisherfast.training.history import HistoryFile, as_csv, columns_of

ROWS = [{"epoch": e, "mse": 1 / (e + 3), "J": math.nan if e % 2 else 10.0 * e} for e in range(6)]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cells(rows: list[dict[str, object]]) -> list[dict[str, str]]:
    """What the file must hold of these rows."""
    columns = columns_of(rows)
    return [
        {
            name: "" if row.get(name) is None or row[name] != row[name] else repr(row[name])
            for name in columns
        }
        for row in rows
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.csv"


# --- what stands in it ----------------------------------------------------------------------------


def test_each_record_adds_its_line(path):
    """Catches lines written twice, a second header, and files that lag behind."""
    file = HistoryFile(path)
    for count in range(1, 7):
        file.write(ROWS[:count])
        assert read(path) == cells(ROWS[:count])
    assert path.read_text().count("epoch") == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing is left beside it


def test_lines_are_appended(path, monkeypatch):
    """Catches a file that is rewritten at every record: the cost of a run would be quadratic."""
    file = HistoryFile(path)
    file.write(ROWS[:1])
    monkeypatch.setattr(HistoryFile, "_rewrite", lambda *_: pytest.fail("the file is rewritten"))
    monkeypatch.setattr(history, "columns_of", lambda *_: pytest.fail("all rows are looked at"))
    for count in range(2, 7):
        file.write(ROWS[:count])
    assert read(path) == cells(ROWS)


def test_numbers_keep_every_digit(path):
    """Catches numbers that are rounded on their way into the file."""
    values = [1 / 3, 1e-320, -0.0, 123456789.123456789, math.pi * 1e300, math.inf, -math.inf]
    HistoryFile(path).write([{"value": value} for value in values])
    assert [float(row["value"]) for row in read(path)] == values
    assert math.copysign(1, float(read(path)[2]["value"])) == -1


def test_unknown_numbers_are_empty_cells():
    """Catches "nan", which a spreadsheet takes for text, and columns out of step."""
    rows = [{"a": 1, "b": math.nan}, {"b": None, "c": 2.5}, {"a": 3}]
    assert as_csv(rows, columns_of(rows)) == "a,b,c\n1,,\n,,2.5\n3,,\n"


def test_names_with_commas_and_quotes_come_back(path):
    """Catches names of layers that break a row."""
    rows = [{'J/a,b"c\nd': 1.5, "µ": 2}]
    HistoryFile(path).write(rows)
    assert read(path) == [{'J/a,b"c\nd': "1.5", "µ": "2"}]


def test_new_columns_rewrite_the_file(path):
    """Catches a row under the wrong header."""
    file = HistoryFile(path)
    rows = [{"epoch": 0}, {"epoch": 1, "J": 2.0}, {"epoch": 2}, {"live": 0.5, "epoch": 3}]
    for count in range(1, 5):
        file.write(rows[:count])
        assert read(path) == cells(rows[:count])


# --- other hands ----------------------------------------------------------------------------------


def test_a_file_of_that_name_is_replaced(path):
    """Catches rows appended to the file of another run."""
    path.write_text("epoch,other\n0,1\n1,2\n")
    HistoryFile(path).write(ROWS[:2])
    assert read(path) == cells(ROWS[:2])


@pytest.mark.parametrize("harm", ["cut", "gone", "longer"])
def test_a_file_that_somebody_changed_is_written_anew(path, harm):
    """Catches an append to half a line, or to nothing: a file without a header."""
    file = HistoryFile(path)
    file.write(ROWS[:2])
    if harm == "cut":
        path.write_text(path.read_text()[:-5])
    elif harm == "longer":
        path.write_text(path.read_text() + "by hand")
    else:
        path.unlink()
    file.write(ROWS[:3])
    assert read(path) == cells(ROWS[:3])


def test_a_reader_never_sees_half_a_file(path):
    """A reader in another thread, while columns are added all the time: each file that it sees is
    the whole file of some moment. Catches a rewrite in place."""
    rows = [{f"column {i}": i for i in range(j + 1)} for j in range(150)]
    whole = {as_csv(rows[:n], columns_of(rows[:n])) for n in range(1, len(rows) + 1)}
    seen: list[str] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            if path.exists():
                seen.append(path.read_text())

    reader = threading.Thread(target=look)
    reader.start()
    file = HistoryFile(path)
    for count in range(1, len(rows) + 1):
        file.write(rows[:count])
    done.set()
    reader.join()
    assert len(set(seen)) > 3
    assert set(seen) <= whole


# --- a disk that is full, a folder that is gone ---------------------------------------------------


def refuse(*_given: object, **_more: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["fsync", "open", "replace", "stat"])
def test_a_full_disk_is_told_once_and_nothing_is_lost(path, monkeypatch, where):
    """Catches an exception in a training, a warning per epoch, and rows that are missing when there
    is room again, wherever the error shows."""
    file = HistoryFile(path)
    file.write(ROWS[:2])
    path.unlink()  # so that the file is put in its place again
    with monkeypatch.context() as full:
        full.setattr(*((os, "fsync") if where == "fsync" else (Path, where)), refuse)
        with pytest.warns(ff.FisherWarning, match="history could not be written to") as caught:
            file.write(ROWS[:3])
        file.write(ROWS[:4])  # in silence: warnings are errors here
        assert len(caught) == 1
        assert "No space left on device" in str(caught[0].message)
        assert "all 3 records are kept in memory" in str(caught[0].message)
    file.write(ROWS[:5])
    assert read(path) == cells(ROWS[:5])
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse)
        with pytest.warns(ff.FisherWarning, match="could not be written"):  # a second time: news
            file.write(ROWS)
    file.write(ROWS)
    assert read(path) == cells(ROWS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")
def test_a_disk_without_room(path):
    """The part beside the file leads to a device that is always full: the system's own error."""
    file = HistoryFile(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.symlink_to("/dev/full")
    with pytest.warns(ff.FisherWarning, match="No space left on device"):
        file.write(ROWS[:1])
    assert not path.exists()
    assert not beside.is_symlink()
    file.write(ROWS[:2])
    assert read(path) == cells(ROWS[:2])


def test_a_line_that_was_written_by_half(path):
    """A limit on the size of files cuts the line that is appended. Catches a run that goes on
    behind half a line when there is room again."""
    file = HistoryFile(path)
    file.write(ROWS[:3])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 4, limits[1]))
        with pytest.warns(ff.FisherWarning, match="File too large"):
            file.write(ROWS[:4])
        size = path.stat().st_size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert size == len(as_csv(ROWS[:3], columns_of(ROWS))) + 4  # the test's power: half a line
    file.write(ROWS[:5])
    assert read(path) == cells(ROWS[:5])


def test_a_folder_that_vanished_and_came_back(tmp_path):
    """Catches a training that ends with its folder, and rows lost meanwhile."""
    folder = tmp_path / "runs"
    folder.mkdir()
    path = folder / "history.csv"
    file = HistoryFile(path)
    file.write(ROWS[:1])
    path.unlink()
    folder.rmdir()
    with pytest.warns(ff.FisherWarning, match="No such file or directory"):
        file.write(ROWS[:2])
    folder.write_text("a file where the folder was")
    file.write(ROWS[:3])
    folder.unlink()
    folder.mkdir()
    file.write(ROWS[:4])
    assert read(path) == cells(ROWS[:4])


@pytest.mark.parametrize("name", ["history", "history.txt", "history.csv.gz"])
def test_other_formats_are_refused(tmp_path, name):
    """Catches CSV in a file that says it is something else."""
    with pytest.raises(ValueError, match=rf"path must end in \.csv, got '{name}'"):
        HistoryFile(tmp_path / name)


def test_a_path_that_no_file_can_have_is_refused(tmp_path):
    """Catches a training that ends with Python's own error when the first record is written."""
    with pytest.raises(ValueError, match="path must not contain a null character"):
        HistoryFile(tmp_path / "a\0b.csv")


# --- with a monitor -------------------------------------------------------------------------------


def test_a_training_on_a_full_disk(path, monkeypatch):
    """From the first record to the last: the file holds each number of the history, exactly."""
    data = GaussianShift(torch.ones(4)).finite_difference(0.0, 0.2, 200, seed=1)
    monitor = ff.FisherMonitor(mlp([4, 3, 1], seed=0), data, every=2, max_features=16, path=path)
    monitor.step(train_mse=0.5, val_mse=0.6)
    assert len(read(path)) == 1
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.warns(ff.FisherWarning, match="history could not be written"):
        monitor.step(train_mse=math.pi)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.step(train_mse=0.3)
    monkeypatch.undo()
    monitor.step(train_mse=0.2)
    rows = monitor.rows()
    assert len(rows) == 4
    assert read(path) == cells(rows)
    assert read(path)[1]["train_mse"] == repr(math.pi)
    assert read(path)[1]["J/output"] == ""
    other = path.with_name("other.csv")
    monitor.to_csv(other)
    assert other.read_text() == path.read_text()


def test_rows_are_found_out_once(path, monkeypatch):
    """Catches a file whose n-th record costs n times the first."""
    data = GaussianShift(torch.ones(4)).finite_difference(0.0, 0.2, 200, seed=1)
    monitor = ff.FisherMonitor(mlp([4, 3, 1], seed=0), data, max_features=16, path=path)
    monitor.step()
    monitor.step()
    monkeypatch.setattr(ff.FisherFlow, "fractions", lambda _: pytest.fail("computed again"))
    assert len(monitor.rows()) == 2
