"""The published figures at a tiny size: the files are whole, and agree with what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import flows
import lift
import published
import pytest
import stopping
import tasks
import torch
from figure import Options
from reproduce import FIGURES, main
from support.scripts import ROOT
from support.training_histories import flow, flow_of, number
from trained import TrainedRun, train_and_measure

import fisherfast as ff
from fisherfast.demo import training
from fisherfast.problems import GaussianScale
from fisherfast.training import EpochRecord
from fisherfast.training.record import input_of

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

COMMON = {"figure", "title", "complete", "full", "source", "versions", "seconds", "settings"}
POINTS = {"fig3": 6, "fig4": 20, "fig5": 15, "fig6": 10, "fig10": 2, "fig11": 2}
FLOWS = {
    "fig4": published.GAUSSIAN_FLOW,
    "fig5": published.LOGNORMAL_FLOW,
    "fig6": published.IMAGING_FLOW,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All figures, of tiny trainings; flows are made up but for figure 3."""
    stopping._run.cache_clear()
    out = tmp_path_factory.mktemp("figures")
    names = ["fig4", "fig5", "fig6", "fig10", "fig11", "transmission"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fisher_flow", flow_of)
        assert main([*names, "--samples", "250", "--epochs", "1", "--out", str(out)]) == 0
    assert main(["fig3", "--samples", "20000", "--out", str(out)]) == 0
    return out


def numbers_of(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FIGURES))
def test_files_are_whole(folder, name):
    """Catches numbers without seed, version or source, and an empty picture."""
    numbers = numbers_of(folder, name)
    assert set(numbers) >= COMMON
    assert (numbers["figure"], numbers["complete"], numbers["full"]) == (name, True, False)
    assert numbers["settings"]["seed"] == 0
    assert numbers["versions"]["fisherfast"] == ff.__version__
    assert "031072" in numbers["source"]
    with Image.open(folder / f"{name}.png") as image:
        image.load()
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(2**24)) > 20  # not blank


@pytest.mark.slow
@pytest.mark.parametrize("name", list(POINTS))
def test_every_published_value_has_a_measured_one(folder, name):
    """Catches a published value without a measured one, one without its error, and a layer or an
    epoch that is compared with another one's published value."""
    numbers = numbers_of(folder, name)
    points = numbers["points"]
    assert len(points) == POINTS[name]
    for point in points:  # of figure 11 nothing is published in numbers
        assert any(key.startswith("published") for key in point) == (name != "fig11")
        value = next(point[key] for key in ("fraction", "J", "value") if key in point)
        assert value is None or math.isfinite(value)
        assert all(point.get(f"{key}_error", 1) > 0 for key in ("fraction", "J"))
    if name in FLOWS:
        epochs = {entry["epoch"]: entry for entry in numbers["epochs"]}
        rows = FLOWS[name].values()
        layers = ["relu1", "relu2", "relu3", "relu4", "output"]
        assert [point["published"] for point in points] == [value for row in rows for value in row]
        assert [point["layer"] for point in points] == layers * len(rows)
        for point in points:
            assert point["fraction"] == epochs[point["epoch"]]["fractions"][point["layer"]]
        assert {point["epoch"] for point in points[:5]} == {0}  # before training


def test_published_values_are_those_of_the_stored_figures():
    """Catches a published value that was changed since, or slipped into another layer or epoch."""
    values = {name: [v for row in rows.values() for v in row] for name, rows in FLOWS.items()}
    values |= {"fig3": [*published.LIFT_CURVE.values()]}
    for name, expected in values.items():
        points = numbers_of(ROOT / "docs" / "figures" / "reproduce", name)["points"]
        assert [point["published"] for point in points] == expected


def fake_history(outputs, levels, *, val=None) -> list[EpochRecord]:
    """A run whose output transmits `outputs`, with training errors `levels` / J_input."""
    J_input = 2.0
    history = []
    for epoch, (share, level) in enumerate(zip(outputs, levels, strict=True)):
        measured = flow(number(J_input), number(J_input * share))
        val_mse = val[epoch] if val else 1.0
        errors = (level / J_input,), (val_mse,)
        history.append(EpochRecord(epoch, measured, *errors, input_of(measured)))
    return history


def test_reduced_runs_are_compared_at_equal_output():
    """Catches a comparison by epoch, of full runs by output, and one that trains to be epoch 0."""
    values = {0: (0.9,), 1: (0.5,), 2: (0.6,), published.LAST: (0.8,)}
    run = TrainedRun(fake_history([0.95, 0.79, 0.52, 0.61], [9.0] * 4), status=0)
    chosen = flows.compared_epochs(run, values, full=False)
    assert {key: record.epoch for key, record in chosen.items()} == {0: 0, 1: 2, 2: 3, -1: 1}
    chosen = flows.compared_epochs(run, values, full=True)
    assert {key: record.epoch for key, record in chosen.items()} == {0: 0, 1: 1, 2: 2, -1: 1}


def test_facts_of_a_stop():
    """Catches the last crossing, errors relative to the last epoch, and an invented stop."""
    levels = [5.0, 1.2, 0.9, 1.1, 0.4]
    facts = stopping.stopping_facts(fake_history([0.1] * 5, levels, val=[4.0, 2.2, 2.1, 2.0, 3.0]))
    assert facts["stop_epoch"] == 2
    assert facts["least_validation_epoch"] == 3
    assert facts["excess_at_stop"] == pytest.approx(0.05)
    assert facts["rise_at_end"] == pytest.approx(0.5)
    facts = stopping.stopping_facts(fake_history([0.1] * 2, [5.0, 1.2], val=[4.0, 2.0]))
    assert facts["stop_epoch"] is None
    assert facts["excess_at_stop"] is None


@pytest.mark.slow
def test_transmission_shows_the_trainings_of_the_other_figures(folder):
    """Catches a second training where one is finished, and runs of other tasks."""
    runs = numbers_of(folder, "transmission")["runs"]
    for run, name in zip(runs, ("fig10", "fig11"), strict=True):
        other = numbers_of(folder, name)
        assert run["epochs"] == other["epochs"]  # wall times too
        shares = [entry["fractions"]["output"] for entry in run["epochs"]]
        assert run["transmission"]["best"] == max(shares)
        assert run["transmission"]["last"] == shares[-1]


def test_training_meter_measures_training_samples():
    """J_output on training samples of an untrained linear network, against the closed form.

    Catches held-out samples, a wrong step, and values of theta that are not next to zero (the
    samples below belong to theta = +-0.5; those at +-1 are shifted by nothing at all). 4 standard
    errors: false-alarm rate 6e-5; half or twice the step is 30 standard errors off.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    theta = values.repeat_interleave(4000)
    shift = torch.where(theta.abs() < 0.9, theta, torch.zeros(()))
    x = shift[:, None] + torch.randn(len(theta), 4, generator=generator)
    model = torch.nn.Linear(4, 1)
    torch.nn.init.ones_(model.weight)
    flow = {"input": SimpleNamespace(value=4.0)}
    meter = stopping._training_meter(SimpleNamespace(x=x, theta=theta, model=model))
    share, error = meter(SimpleNamespace(flow=flow))
    assert error < 0.05
    assert abs(share - 1) < 4 * error


def test_sizes():
    """Catches a learning rate, a network, a grid or epochs of the reduced run in the full one, and
    a reduced epoch that goes less far: learning rate times steps is that of a published epoch."""
    options = Options(full=True, samples=100)
    task = tasks.gaussian_task(options)
    assert (task.learning_rate, task.epochs, task.batch_size) == (1e-6, 15, 128)
    assert task.settings["paired conditions"] is False
    task = tasks.lognormal_task(options)
    assert (task.learning_rate, len(task.theta.unique())) == (1e-4, 21)
    task = stopping._gaussian(options)
    assert (task.learning_rate, len(task.theta.unique())) == (1e-7, 101)
    widths = [layer.in_features for layer in task.model if isinstance(layer, torch.nn.Linear)]
    assert [*widths, 1] == list(published.STOPPING_WIDTHS)
    assert float(task.theta.max()) == 1.5
    assert stopping.GAUSSIAN_SIZES[True].samples == 7000
    assert lift.SAMPLES[True] == 150_000
    truth = GaussianScale(published.LIFT_DIM).fisher(published.LIFT_THETA).item()
    assert truth == published.LIFT_FISHER
    for samples in (100, 250):
        task = tasks.gaussian_task(Options(samples=samples))
        assert task.learning_rate * samples == pytest.approx(1e-6 * 20_000)


def test_same_seed_same_numbers(monkeypatch):
    """Catches weights, samples or order from the global random numbers, and a seed that is not
    used."""
    monkeypatch.setattr(training, "fisher_flow", flow_of)
    options, errors = Options(seed=3, epochs=1, samples=100), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        task = stopping._gaussian(options)
        errors.append([record.val_mse for record in train_and_measure(task, options).history])
    assert errors[0] == errors[1]
    other = stopping._gaussian(Options(seed=4, samples=100))
    assert not torch.equal(task.x, other.x)


@pytest.mark.slow
def test_figure_3_against_the_published_values(folder):
    """J of both lifts against the published J at equal number of features, 20 000 samples each.

    The published lift with the samples must give the published J within 4 standard errors (seen:
    1.1 at most; the error of the published values is not known). Ours lies 8 and 6 standard errors
    above them for 100 and 200 features, 2.8, 1.4 and 0.5 from 400 on, where it may be 3 below;
    it may exceed I by 3. Chance to fail for another seed: 1e-3. Catches the lift without the
    samples (52 at 100 features: 7 standard errors), J without its correction (109 at 1300: 3.9
    above I, 5 above the published), and a dictionary no better than the published one.
    """
    for point in numbers_of(folder, "fig3")["points"][1:]:
        theirs = point["J_published_lift"]
        assert abs(theirs - point["published"]) < 4 * point["J_published_lift_error"]
        margin = 4 if point["lifted"] <= 200 else -3
        assert point["J"] > point["published"] + margin * point["J_error"]
        assert point["J"] < published.LIFT_FISHER + 3 * point["J_error"]
