"""Progress of measurements: after two seconds, on a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys
from typing import Any
from unittest import mock

import pytest
import torch

import fisherfast as ff
from fisherfast import _progress

BATCHES = 10


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that goes on by a step each time that it is read."""

    def __init__(self, step: float) -> None:
        self.now, self._step = 100.0, step

    def monotonic(self) -> float:
        self.now += self._step
        return self.now


def terminals(monkeypatch: pytest.MonkeyPatch) -> tuple[Terminal, Terminal]:
    """Standard error and output, terminals both, without tqdm, outside of CI."""
    streams = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", streams[0])
    monkeypatch.setattr(sys, "stdout", streams[1])
    monkeypatch.delenv("CI", raising=False)
    for name in ("tqdm", "tqdm.auto", "tqdm.std"):
        monkeypatch.setitem(sys.modules, name, None)
    return streams


def measured(**options: Any) -> ff.LayerFisher:
    x = torch.randn(BATCHES * 40, 2, generator=torch.Generator().manual_seed(0))
    settings = ff.Settings(batch_size=40)
    return ff.fisher_information(
        ff.Pathwise(x, torch.ones_like(x)), max_features=4, settings=settings, **options
    )


def shown(stream: io.StringIO) -> list[str]:
    return [text.rstrip() for text in stream.getvalue().split("\r") if text.strip()]


def test_a_line_after_two_seconds(monkeypatch):
    """Catches a line that comes at once, that stays at the end, that grows over several lines, or
    that goes to standard output; the numbers are those of a measurement that shows nothing."""
    written = terminals(monkeypatch)
    quiet = measured()
    assert written[0].getvalue() == ""
    monkeypatch.setattr(_progress, "time", Clock(0.5))
    J = measured().J
    lines = shown(written[0])
    assert lines[0] == "Fisher flow: 160 of 400 samples, 40%"  # the fourth update
    assert lines[-1] == "Fisher flow: 400 of 400 samples, 100%"
    text = written[0].getvalue()
    assert "\n" not in text
    assert text.endswith("\r" + " " * len(lines[-1]) + "\r")
    assert written[1].getvalue() == ""
    assert torch.equal(J, quiet.J)


@pytest.mark.parametrize("why", ["pipe", "CI", "False", "no stream"])
def test_nothing_where_no_person_watches(monkeypatch, why):
    """Catches lines in log files and in the jobs of a CI service, and a program without a console,
    whose standard error is None."""
    written = terminals(monkeypatch)
    monkeypatch.setattr(_progress, "time", Clock(5.0))
    if why in ("pipe", "no stream"):
        monkeypatch.setattr(sys, "stderr", io.StringIO() if why == "pipe" else None)
    if why == "CI":
        monkeypatch.setenv("CI", "true")
    measured(progress=False if why == "False" else None)
    assert written[0].getvalue() == written[1].getvalue() == ""
    assert sys.stderr is None or sys.stderr.getvalue() == ""


def test_asked_for_it_comes_at_once_and_anywhere(monkeypatch):
    """Catches an ImportError without tqdm, and a bar that needs a terminal or a length."""
    terminals(monkeypatch)
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    measured(progress=True)
    assert shown(pipe)[0] == "Fisher flow: 40 of 400 samples, 10%"
    with _progress.Progress(True, "work").bar(None) as bar:
        bar.update(3)
    assert shown(pipe)[-1] == "work: 3 samples"
    with pytest.raises(TypeError, match=r"^progress must be True, False or None, got 'auto'$"):
        measured(progress="auto")


def test_seconds_count_from_the_start_of_all_passes(monkeypatch):
    """Catches a measurement of many short passes that shows nothing for minutes."""
    written = terminals(monkeypatch)
    monkeypatch.setattr(_progress, "time", Clock(0.5))
    work = _progress.Progress(None, "work")
    for _ in range(6):
        with work.bar(10) as bar:
            bar.update(10)
    assert shown(written[0]) == [f"work, pass {n}: 10 of 10 samples, 100%" for n in (4, 5, 6)]


def test_tqdm_is_used_where_it_is(monkeypatch):
    """Catches a bar that starts at zero after two seconds, or that is not closed."""
    written = terminals(monkeypatch)
    tqdm = mock.Mock()
    monkeypatch.setitem(sys.modules, "tqdm.auto", mock.Mock(tqdm=tqdm))
    monkeypatch.setattr(_progress, "time", Clock(0.5))
    with _progress.Progress(None, "work").bar(90) as bar:
        for _ in range(5):
            bar.update(10)
    assert (tqdm.call_args.kwargs["total"], tqdm.call_args.kwargs["initial"]) == (90, 40)
    assert [call.args for call in tqdm().update.call_args_list] == [(10,)]
    tqdm().close.assert_called_once()
    assert written[0].getvalue() == ""
