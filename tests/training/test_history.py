"""The CSV file of a run: always whole, never in the way of the training."""

from __future__ import annotations

import csv
import errno
import math
import os
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
    full = [{name: row.get(name) for name in columns} for row in rows]
    return [
        {
            n: "" if v is None or v != v else v if isinstance(v, str) else repr(v)
            for n, v in row.items()
        }
        for row in full
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.csv"


# --- what stands in it ----------------------------------------------------------------------------


def test_each_record_adds_its_line(path, monkeypatch):
    """Catches lines written twice, a second header, rows of another run before them, and a file
    that is rewritten at every record: the cost of a run would be quadratic."""
    path.write_text("epoch,other\n0,1\n1,2\n")
    file = HistoryFile(path)
    file.write(ROWS[:1])
    monkeypatch.setattr(HistoryFile, "_rewrite", lambda *_: pytest.fail("the file is rewritten"))
    monkeypatch.setattr(history, "columns_of", lambda *_: pytest.fail("all rows are looked at"))
    for count in range(2, 7):
        file.write(ROWS[:count])
        assert [row["epoch"] for row in read(path)] == [str(row["epoch"]) for row in ROWS[:count]]
    monkeypatch.undo()
    assert read(path) == cells(ROWS)
    assert path.read_text().count("epoch") == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing is left beside it


def test_numbers_and_names_come_back(path):
    """Catches numbers that are rounded on their way into the file, names that break a row, "nan",
    which a spreadsheet takes for text, and columns out of step."""
    values = [1 / 3, 1e-320, -0.0, 123456789.123456789, math.pi * 1e300, math.inf, -math.inf]
    name = 'J/a,b"c\nd µ'
    HistoryFile(path).write([{name: value} for value in values])
    assert [float(row[name]) for row in read(path)] == values
    assert math.copysign(1, float(read(path)[2][name])) == -1
    rows = [{"a": 1, "b": math.nan}, {"b": None, "c": 2.5}, {"a": 3}]
    assert as_csv(rows, columns_of(rows)) == "a,b,c\n1,,\n,,2.5\n3,,\n"


def test_new_columns_rewrite_the_file(path):
    """Catches a row under the wrong header."""
    file = HistoryFile(path)
    rows = [{"epoch": 0}, {"epoch": 1, "J": 2.0}, {"epoch": 2}, {"live": 0.5, "epoch": 3}]
    for count in range(1, 5):
        file.write(rows[:count])
        assert read(path) == cells(rows[:count])


# --- other hands ----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda text: text[:-5], lambda text: text + "by hand", None])
def test_a_file_that_was_changed_is_written_anew(path, change):
    """Catches an append to half a line, or to nothing: a file without a header."""
    file = HistoryFile(path)
    file.write(ROWS[:2])
    path.write_text(change(path.read_text())) if change else path.unlink()
    file.write(ROWS[:3])
    assert read(path) == cells(ROWS[:3])


# --- a disk that is full, a folder that is gone ---------------------------------------------------


def refuse(*_given: object, **_more: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["fsync", "open", "replace", "stat"])
def test_a_full_disk_warns_once_and_nothing_is_lost(path, monkeypatch, where):
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


def test_paths_that_are_refused(tmp_path):
    """Catches CSV in a file that says it is something else, and a training that ends with Python's
    own error when the first record is written."""
    for name, message in (
        ("history.csv.gz", r"path must end in \.csv, got 'history\.csv\.gz'"),
        ("a\0b.csv", "path must not contain a null character"),
    ):
        with pytest.raises(ValueError, match=message):
            HistoryFile(tmp_path / name)


# --- with a monitor -------------------------------------------------------------------------------


def test_the_file_of_a_monitor(path, monkeypatch):
    """The file holds each number of the history, exactly. Catches a file whose n-th record costs n
    times the first."""
    data = GaussianShift(torch.ones(4)).finite_difference(0.0, 0.2, 200, seed=1)
    monitor = ff.FisherMonitor(mlp([4, 3, 1], seed=0), data, every=2, max_features=16, path=path)
    monitor.step(train_mse=0.5, val_mse=0.6)
    monitor.step(train_mse=math.pi)
    monkeypatch.setattr(ff.FisherFlow, "fractions", lambda _: pytest.fail("computed again"))
    rows = monitor.rows()
    assert read(path) == cells(rows)
    assert read(path)[1]["train_mse"] == repr(math.pi)
    assert read(path)[1]["J/output"] == ""
    other = path.with_name("other.csv")
    monitor.to_csv(other)
    assert other.read_text() == path.read_text()
