"""`examples/paper/reproduce.py`: options, exit statuses, failures, Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reproduce
import stopping
import torch
from figure import Options, Outcome
from reproduce import FIGURES, main
from support.recorded_camera import recording
from support.training_histories import flow_of

from fisherfast.demo import imaging_task, training

pytest.importorskip("matplotlib")

TINY = ("--samples", "250", "--epochs", "1")


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Flows are made up, and trainings of another test are not shown again."""
    monkeypatch.setattr(training, "fisher_flow", flow_of)
    stopping._run.cache_clear()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def numbers_of(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig3", "fig7"], "figure must be one of fig3, fig4"),
        (["fig5", "--epochs", "many"], "invalid int value: 'many'"),
        (["--data", "none.npz"], "--data must be a file, got none.npz"),
    ],
)
def test_wrong_options(capsys, tmp_path, monkeypatch, arguments, message):
    """Status 2 and no folder: catches a run that starts and fails in its last figure."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert files(tmp_path) == set()


def test_order_and_repetition(tmp_path, monkeypatch):
    """Catches figures that are run twice, and transmission before the trainings it can reuse."""
    asked = []
    monkeypatch.setattr(reproduce, "_write", lambda name, *_: asked.append(name) or 0)
    out = ["--out", str(tmp_path)]
    assert main(["transmission", "fig10", "fig3", "fig3", *out]) == 0
    assert main(out) == 0
    assert asked == ["fig3", "fig10", "transmission", *FIGURES]
    assert list(FIGURES)[-1] == "transmission"


def test_a_failure_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """One figure has a fault, one asks for more samples: both are named at the end."""

    def fault(options: Options) -> Outcome:
        raise KeyError("lost")

    monkeypatch.setitem(reproduce.FIGURES, "fig3", FIGURES["fig3"]._replace(measure=fault))
    arguments = ["fig3", "fig5", "fig6", "--samples", "100", "--epochs", "1"]
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.out.endswith("failed: fig3, fig6\n")
    assert "KeyError: 'lost'" in output.err
    assert "--samples must be at least 250 per position" in output.err
    assert files(tmp_path) == {"fig5.json", "fig5.png"}


DIVERGED = training.DivergenceError("the error became nan")
BOTH, LATER = [("gaussian", 0), ("lognormal", 0)], [("lognormal", 1)]


@pytest.mark.parametrize(
    ("names", "error", "places", "complete"),
    [
        (["fig4", "fig5"], DIVERGED, BOTH, {}),
        (["fig5"], DIVERGED, LATER, {"fig5": False}),
        (["fig4", "fig5", "fig6"], KeyboardInterrupt(), LATER, {"fig4": True, "fig5": False}),
    ],
)
def test_what_was_measured_is_kept(tmp_path, monkeypatch, capsys, names, error, places, complete):
    """Catches a figure that is lost, or called complete, when its training diverges or Ctrl-C ends
    it; a figure that is begun after Ctrl-C; and, where nothing was measured, a failure that is
    taken for Ctrl-C: the next figure is begun."""
    measure = training._measure

    def broken(task, epoch, *rest):
        if (task.name, epoch) in places:
            raise error
        return measure(task, epoch, *rest)

    monkeypatch.setattr(training, "_measure", broken)
    diverged = error is DIVERGED
    assert main([*names, *TINY, "--out", str(tmp_path)]) == (1 if diverged else 130)
    said = f"failed: {', '.join(names)}\n" if diverged else "interrupted"
    assert said in capsys.readouterr().out
    assert files(tmp_path) == {f"{name}.{kind}" for name in complete for kind in ("json", "png")}
    for name, whole in complete.items():
        numbers = numbers_of(tmp_path, name)
        assert numbers["complete"] is whole
        assert whole or [entry["epoch"] for entry in numbers["epochs"]] == [0]


def test_published_measurements(tmp_path, monkeypatch):
    """Catches a file that the figures do not read, and images that are cut off across positions:
    each must go with its own theta."""
    path = recording(tmp_path / "Data1.npz", edge_frames=400, center_frames=1200)
    out = tmp_path / "out"
    arguments = ["fig6", "--data", str(path), "--epochs", "1", "--samples", "250"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert numbers_of(out, "fig6")["settings"]["source"] == "measurements in Data1.npz"
    whole = imaging_task(data=path)
    monkeypatch.setattr(stopping, "IMAGING_SAMPLES", {False: 260})
    task = stopping._imaging(Options(data=path))
    assert len(task.x) == len(task.theta) == 13 * 260
    assert task.settings["training images per position"] == 260
    for position in whole.theta.unique():
        expected = whole.x[whole.theta == position][:260]
        assert torch.equal(task.x[task.theta == position], expected)
