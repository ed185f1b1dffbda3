"""Progress of long work: a bar of tqdm, or one line where tqdm is not installed."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

DELAY = 2.0
"""Seconds of work before a line appears unasked."""

REFRESH = 0.2
"""Seconds between two updates of a line."""


class Progress:
    """The progress of one piece of work, in one pass over the samples or several.

    Args:
        show: True shows it at once, False never; None after `DELAY` seconds if a terminal watches
            (standard error is one, and the variable CI is not set).
        title: of the work.

    Raises:
        TypeError: show is something else.
    """

    def __init__(self, show: bool | None, title: str) -> None:
        if show is not None and not isinstance(show, bool):
            raise TypeError(f"progress must be True, False or None, got {show!r}")
        if show is None:
            show, self._from = _is_watched(), time.monotonic() + DELAY
        else:
            self._from = 0.0
        self._shown, self._title = show, title
        self._passes = 0

    def bar(self, total: int | None) -> Bar:
        """Make the bar of one pass, a context manager.

        Args:
            total: number of samples; None if it is unknown.
        """
        self._passes += 1
        title = self._title if self._passes == 1 else f"{self._title}, pass {self._passes}"
        return Bar(total, title, self._from if self._shown else float("inf"))


class Bar:
    """The bar of one pass. It appears at the first update after a time of the monotonic clock."""

    def __init__(self, total: int | None, title: str, start: float) -> None:
        self._total, self._title, self._from = total, title, start
        self._done = 0
        self._bar: Any = None

    def update(self, samples: int) -> None:
        """Add samples that are done."""
        self._done += samples
        if self._bar is not None:
            self._bar.update(samples)
        elif time.monotonic() >= self._from:
            self._bar = _new_bar(self._total, self._title, self._done)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


class _Line:
    """One line on standard error that is written over itself, and erased at the end."""

    def __init__(self, total: int | None, title: str, done: int) -> None:
        self._total, self._title, self._done = total, title, done
        self._width, self._next = 0, 0.0
        self.update(0)

    def update(self, samples: int) -> None:
        self._done += samples
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REFRESH
        text = f"{self._title}: {self._done} samples"
        if self._total:
            share = self._done / self._total
            text = f"{self._title}: {self._done} of {self._total} samples, {share:.0%}"
        self._write(text)

    def close(self) -> None:
        self._write("")
        self._write("")

    def _write(self, text: str) -> None:
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)


def _new_bar(total: int | None, title: str, done: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _Line(total, title, done)
    return tqdm(
        total=total, desc=title, initial=done, unit=" samples", unit_scale=True, leave=False
    )


def _is_watched() -> bool:
    """Return whether standard error is a terminal in front of a person."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return terminal and not os.environ.get("CI")
