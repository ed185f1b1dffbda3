"""`make check-gpu`: what it says without a GPU, that it goes on after failures, what it reports."""

from __future__ import annotations

import json
import sys
from functools import partial

import torch

from benchmarks.gpu import check, speed


def test_says_that_there_is_none(tmp_path, monkeypatch, capsys):
    """Catches a check that passes, or writes a report, where nothing was checked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["check.py", "--output", str(tmp_path / "gpu.json")])
    assert check.main() == 1
    assert "needs torch with a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_goes_on_after_failures(monkeypatch, tmp_path, capsys):
    """Catches a failure that hides later steps, and a report that is written at the end only."""
    output = tmp_path / "gpu.json"

    def last(limit: float) -> dict:
        assert json.loads(output.read_text())["steps"].keys() == {"raises", "hangs"}
        return python("print('fine')")(limit)

    def python(code: str) -> partial:
        return partial(check.run_command, [sys.executable, "-c", code])

    hanging = python("import time; time.sleep(60)")
    steps = {"raises": (60, python("1 / 0")), "hangs": (0.5, hanging), "last": (60, last)}
    monkeypatch.setattr(check, "STEPS", steps)
    monkeypatch.setattr(check, "card", lambda: {"card": "Made Up 1"})
    monkeypatch.setattr(sys, "argv", ["check.py", "--output", str(output), "--commit", "abc"])
    assert check.main() == 1
    report = json.loads(output.read_text())
    statuses = {name: step["status"] for name, step in report["steps"].items()}
    assert statuses == {"raises": "failed", "hangs": "timed out", "last": "passed"}
    assert "ZeroDivisionError" in report["steps"]["raises"]["output"]
    assert report["steps"]["hangs"]["seconds"] < 30
    assert report["machine"]["commit"] == "abc"
    assert "hangs: timed out" in capsys.readouterr().out

    monkeypatch.setattr(check, "STEPS", {"later": steps["raises"]})
    check.main()  # the same sources and card: earlier steps stay
    assert set(json.loads(output.read_text())["steps"]) == {"raises", "hangs", "last", "later"}
    monkeypatch.setattr(check, "sources", lambda commit: {"sources sha256": "other"})
    check.main()
    assert set(json.loads(output.read_text())["steps"]) == {"later"}


def test_counts_tests_and_knows_the_parts():
    """Catches failures that are not reported, errors or skips counted as passed, and a part of the
    benchmarks that is never run, or asked for by a name that does not exist."""
    assert set(check.BENCHMARK_PARTS) == set(speed.PARTS)
    found = check.junit(
        "<testsuites><testsuite><testcase classname='a' name='right'/>"
        "<testcase classname='a' name='wrong'><failure message='no'>at line 3</failure></testcase>"
        "<testcase classname='a' name='broken'><error message='oh'/></testcase>"
        "<testcase classname='a' name='left'><skipped message='why'/></testcase>"
        "</testsuite></testsuites>"
    )
    assert (found["tests"], found["passed"], found["failed"]) == (4, 1, 2)
    assert found["skipped"] == {"why": 1}
    assert [failure["test"] for failure in found["failures"]] == ["a::wrong", "a::broken"]
    assert "at line 3" in found["failures"][0]["message"]
