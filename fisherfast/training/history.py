"""The history of a run as a CSV file that is updated after every epoch.

A file that cannot be written (a full disk, a missing folder) does not stop the training: the rows
stay in memory, and the whole file is written at the next record for which this works.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fisherfast._errors import FisherWarning
from fisherfast._files import replacing, synchronise


class HistoryFile:
    """A CSV file with one line per record.

    Args:
        path: of the file.

    Raises:
        ValueError: the path does not end in .csv.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        if self._path.suffix != ".csv":
            raise ValueError(f"path must end in .csv, got {self._path.name!r}")
        if "\0" in str(path):
            raise ValueError(f"path must not contain a null character, got {str(path)!r}")
        self._columns: list[str] | None = None
        self._written = 0
        self._size = 0  # bytes after the last write
        self._warned = False

    def restart(self) -> None:
        """Start a new history: the next rows replace the file."""
        self._columns = None

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Update the file to hold all rows of the run.

        A new row is appended. The file is rewritten as a whole if there are new columns, after a
        failure, and at first (a continued run, or a file of that name from another run).

        Warns:
            FisherWarning: the file could not be written; once until it works again.
        """
        columns = self._columns or []
        follows = self._written == len(rows) - 1 and set(rows[-1]) <= set(columns)
        try:
            if follows and self._whole():
                with self._path.open("ab") as file:
                    file.write(as_csv(rows[-1:], columns, header=False).encode())
                    synchronise(file)
            else:
                columns = columns_of(rows)
                self._rewrite(as_csv(rows, columns))
            self._size = self._path.stat().st_size
        except OSError as error:
            self._columns = None
            if not self._warned:
                warnings.warn(
                    f"history could not be written to {self._path}: {error.strerror or error};"
                    f" training continues, all {len(rows)} records are kept in memory and written"
                    " with the next record for which this works",
                    FisherWarning,
                    stacklevel=4,
                )
            self._warned = True
            return
        self._columns, self._written, self._warned = columns, len(rows), False

    def _whole(self) -> bool:
        """Return whether the file still has the size of the last write."""
        return self._path.exists() and self._path.stat().st_size == self._size

    def _rewrite(self, text: str) -> None:
        """Replace the file, so that readers never see half of one."""
        with replacing(self._path) as file:
            file.write(text.encode())


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Collect all columns, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def as_csv(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, header: bool = True
) -> str:
    """Format rows as CSV; missing values and NaN are empty cells, numbers keep every digit."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow({name: value for name, value in row.items() if value == value})
    return text.getvalue()
