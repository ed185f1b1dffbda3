"""`python -m fisherfast reproduce`: options, exit statuses, failures, Ctrl-C."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.recorded_camera import recording

from fisherfast.__main__ import main
from fisherfast.demos import imaging_task, training
from fisherfast.reproduce import FIGURES, Options, command, lift, runner, stopping

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

TINY = ("--samples", "250", "--epochs", "1")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def numbers_of(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: figure"),
        (["fig7"], "invalid choice: 'fig7'"),
        (["fig5", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["fig5", "--epochs", "many"], "invalid int value: 'many'"),
        (["fig3", "--epochs", "2"], "--epochs must be given with a figure that trains, got fig3"),
        (["fig5", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["fig3", "--seed", "4294967296"], "--seed must be below 4294967296, got 4294967296"),
        (["fig5", "--samples", "10"], "--samples must be at least 100 for fig5, got 10"),
        (["fig4", "fig6", "--samples", "100"], "--samples must be at least 250 for fig6, got 100"),
        (["all", "--samples", "250"], "--samples must be at least 1000 for fig3, got 250"),
        (["fig4", "--data", "a.npz"], "--data must be given with a figure of the camera, got fig4"),
        (["fig6", "--data", "none.npz"], "none.npz"),
    ],
)
def test_wrong_options(capsys, tmp_path, monkeypatch, arguments, message):
    """One line, status 2 and no folder: catches a run that starts and fails in its last figure."""
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["reproduce", *arguments])
    except SystemExit as stop:  # argparse's own way out
        status = stop.code
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert message in output.err
    assert files(tmp_path) == set()


def test_foreign_measurements(capsys, tmp_path):
    """Catches a file that is found to be wrong only after the trainings before it."""
    np.savez(tmp_path / "other.npz", values=np.zeros(3))
    arguments = ["all", "--data", str(tmp_path / "other.npz"), "--out", str(tmp_path / "out")]
    assert main(["reproduce", *arguments]) == 2
    assert "position_center" in capsys.readouterr().err
    assert files(tmp_path) == {"other.npz"}


def test_folder_that_is_a_file(capsys, tmp_path):
    """Catches a run whose work is lost at its end."""
    taken = tmp_path / "taken"
    taken.write_text("")
    assert main(["reproduce", "fig5", *TINY, "--out", str(taken)]) == 2
    assert "taken" in capsys.readouterr().err


def test_help_says_how_long_each_takes(capsys):
    """Catches a figure that the help leaves out, or shows without its times."""
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, figure in FIGURES.items():
        assert name in text
        assert figure.title in text
        assert f"{figure.reduced}; --full: {figure.full}" in text


def test_order_and_repetition(tmp_path, monkeypatch, capsys):
    """Catches figures that are run twice, and transmission before the trainings it can reuse."""
    asked = []
    monkeypatch.setattr(command, "run_figures", lambda names, *_: asked.append(list(names)) or 0)
    out = ["--out", str(tmp_path)]
    assert main(["reproduce", "transmission", "fig10", "fig3", "fig3", *out]) == 0
    assert main(["reproduce", "fig3", "all", *out]) == 0
    assert asked == [["fig3", "fig10", "transmission"], list(FIGURES)]
    assert list(FIGURES)[-1] == "transmission"


def test_a_failure_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """One figure diverges, one has a fault: the rest is there, and both are named at the end."""

    def diverge(context):
        raise ArithmeticError("the error became inf in epoch 1")

    def fault(context):
        raise KeyError("lost")

    for name, measure in (("fig3", diverge), ("fig4", fault)):
        monkeypatch.setitem(runner.FIGURES, name, replace(FIGURES[name], measure=measure))
    arguments = ["fig3", "fig4", "fig5", "--samples", "1000", "--epochs", "1"]
    assert main(["reproduce", *arguments, "--out", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert "fig3 failed: the error became inf in epoch 1" in output.out
    assert output.out.endswith("failed: fig3, fig4\n")
    assert "KeyError: 'lost'" in output.err
    assert files(tmp_path) == {"fig5.json", "fig5.png"}


def test_divergence_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    """Catches a figure that is lost, or called complete, when its training blows up."""
    measure = training._measure

    def diverging(task, epoch, *rest):
        if epoch == 1:
            raise training.DivergenceError("the error became nan in epoch 1")
        return measure(task, epoch, *rest)

    monkeypatch.setattr(training, "_measure", diverging)
    assert main(["reproduce", "fig5", *TINY, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.endswith("failed: fig5\n")
    numbers = numbers_of(tmp_path, "fig5")
    assert numbers["complete"] is False
    assert [entry["epoch"] for entry in numbers["epochs"]] == [0]


def test_interrupt_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    """Ctrl-C in the second training: the first figure is whole, the second shows its first epoch,
    no third is begun."""
    measure = training._measure

    def interrupted(task, epoch, *rest):
        if task.name == "gaussian" and epoch == 1:
            raise KeyboardInterrupt
        return measure(task, epoch, *rest)

    monkeypatch.setattr(training, "_measure", interrupted)
    arguments = ["fig3", "fig4", "fig5", "--samples", "1000", "--epochs", "1"]
    assert main(["reproduce", *arguments, "--out", str(tmp_path)]) == 130
    assert files(tmp_path) == {"fig3.json", "fig3.png", "fig4.json", "fig4.png"}
    assert numbers_of(tmp_path, "fig3")["complete"] is True
    numbers = numbers_of(tmp_path, "fig4")
    assert numbers["complete"] is False
    assert len(numbers["epochs"]) == 1
    assert "interrupted" in capsys.readouterr().out


def test_interrupt_between_points_and_before_the_first(tmp_path, monkeypatch, capsys):
    """Catches files without a point, and finished points that Ctrl-C throws away."""
    measure, calls = lift.fisher_information, []

    def interrupted(*arguments, **settings):
        calls.append(arguments)
        if len(calls) > limit:
            raise KeyboardInterrupt
        return measure(*arguments, **settings)

    monkeypatch.setattr(lift, "fisher_information", interrupted)
    arguments = ["reproduce", "fig3", "--samples", "1000", "--out", str(tmp_path)]
    limit = 0
    assert main(arguments) == 130
    assert "interrupted" in capsys.readouterr().out
    assert files(tmp_path) == set()
    limit = 4  # one measurement of the samples, then three for each number of features
    calls.clear()
    assert main(arguments) == 130
    numbers = numbers_of(tmp_path, "fig3")
    assert numbers["complete"] is False
    assert [point["lifted"] for point in numbers["points"]] == [0, 100]


def test_global_state_is_left_alone(tmp_path, capsys):
    """Catches a figure that seeds or uses the global random numbers."""
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert (
        main(["reproduce", "fig10", "--samples", "100", "--epochs", "1", "--out", str(tmp_path)])
        == 0
    )
    assert torch.equal(torch.rand(3), expected)


def test_interrupt_before_the_second_training_is_measured(tmp_path, monkeypatch, capsys):
    """Catches a transmission that loses the training that is finished."""
    measure = training._measure

    def interrupted(task, epoch, *rest):
        if task.name == "imaging":
            raise KeyboardInterrupt
        return measure(task, epoch, *rest)

    monkeypatch.setattr(training, "_measure", interrupted)
    assert main(["reproduce", "transmission", *TINY, "--out", str(tmp_path)]) == 130
    numbers = numbers_of(tmp_path, "transmission")
    assert numbers["complete"] is False
    assert [run["task"] for run in numbers["runs"]] == ["gaussian"]


def test_divergence_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    """Catches a failure that passes for Ctrl-C and keeps the others from being begun."""

    def diverging(*_):
        raise training.DivergenceError("the error became nan in epoch 0")

    monkeypatch.setattr(training, "_measure", diverging)
    assert main(["reproduce", "fig4", "fig5", *TINY, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.endswith("failed: fig4, fig5\n")
    assert files(tmp_path) == set()


def test_published_measurements(tmp_path, capsys):
    """Catches a file that only one of the figures reads, and one with fewer images than wanted."""
    path = recording(tmp_path / "Data1.npz", edge_frames=300, center_frames=1050)
    arguments = ["fig6", "fig11", "--data", str(path), "--epochs", "1"]
    out = tmp_path / "out"
    assert main(["reproduce", *arguments, "--samples", "250", "--out", str(out)]) == 0
    for name in ("fig6", "fig11"):
        assert numbers_of(out, name)["settings"]["source"] == "measurements in Data1.npz"
    task = stopping._imaging(Options(data=path))
    assert len(task.x) == len(task.theta) == 13 * 250
    assert task.settings["training images per position"] == 250


def test_few_images_of_a_file(tmp_path, monkeypatch):
    """Catches images that are cut off across positions: each must go with its own theta."""
    path = recording(tmp_path / "Data1.npz", edge_frames=400, center_frames=1200)
    whole = imaging_task(data=path)
    monkeypatch.setattr(stopping, "IMAGING_SAMPLES", {False: 260})
    task = stopping._imaging(Options(data=path))
    assert len(task.x) == len(task.theta) == 13 * 260
    for position in whole.theta.unique():
        expected = whole.x[whole.theta == position][:260]
        assert torch.equal(task.x[task.theta == position], expected)
