"""The demonstrations at a tiny size: everything is written, and all of it agrees."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from support.recorded_camera import recording
from support.training_histories import layer, number

import fisherfast as ff
from fisherfast.__main__ import main
from fisherfast.demos import imaging_task, lognormal_task, training
from fisherfast.demos.report import write_report
from fisherfast.demos.table import epoch_cells

Image = pytest.importorskip("PIL.Image")
matplotlib = pytest.importorskip("matplotlib")

FIGURES = {"flow.png", "training.png", "overview.png"}
TINY = ("--samples", "250", "--epochs", "2")


class Page(HTMLParser):
    """Collects what a browser would load, and whether every tag is closed."""

    VOID = frozenset({"meta", "img", "link", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [v for k, v in attributes if k in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_report(out: Path, figures: set[str], epochs: int) -> dict:
    """All files are there and valid; returns the numbers."""
    assert {path.name for path in out.iterdir()} == {*figures, "index.html", "results.json"}
    for name in figures:
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(2**24)) > 20  # not blank
    text = (out / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.sources) == len(figures - {"overview.png"})
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)
    assert "$" not in text
    numbers = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [entry["epoch"] for entry in numbers["epochs"]] == list(range(epochs + 1))
    for entry in numbers["epochs"]:
        flow = ff.FisherFlow.from_dict(entry["flow"])
        assert flow.fractions() == entry["fractions"]
        expected = entry["train_mse"] * flow["input"].value
        assert entry["train_mse_times_J_input"] == pytest.approx(expected)
    return numbers


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of one tiny run of the imaging demo."""
    out = tmp_path_factory.mktemp("report")
    assert main(["demo", "imaging", *TINY, "--out", str(out)]) == 0
    return out


def test_imaging_writes_everything(run):
    numbers = check_report(run, FIGURES | {"samples.png"}, epochs=2)
    assert numbers["complete"] is True
    layers = ["input", "relu1", "relu2", "relu3", "relu4", "output"]
    assert list(numbers["epochs"][0]["fractions"]) == layers


def test_table_shows_the_numbers_of_the_file(tmp_path, capsys):
    """Catches a table of other epochs, other layers or unscaled errors; and a missing page row."""
    arguments = ["demo", "lognormal", "--samples", "200", "--epochs", "2", "--out", str(tmp_path)]
    assert main(arguments) == 0
    output = capsys.readouterr()
    header, *rows = output.out.split("\n\n")[0].splitlines()
    assert header.split()[:4] == ["epoch", "train", "x", "J"]
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert len(rows) == len(numbers["epochs"]) == 3
    page = (tmp_path / "index.html").read_text()
    for row, entry in zip(rows, numbers["epochs"], strict=True):
        shares, error = entry["fractions"], entry["fraction_errors"]["output"]
        expected = [
            str(entry["epoch"]),
            *(f"{entry[f'{part}_mse_times_J_input']:.3f}" for part in ("train", "val")),
            *(f"{shares[name]:.3f}" for name in list(shares)[1:-1]),
            f"{shares['output']:.3f} +- {error:.3f}",
            f"{entry['seconds']:.1f}",
        ]
        assert re.split(r"\s{2,}", row.strip()) == expected
        cells = [cell.replace("+-", "&plusmn;") for cell in expected]
        assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert "\r" not in output.err  # no bar where nobody watches
    check_report(tmp_path, FIGURES, epochs=2)
    assert "Beside the published numbers" in page
    assert "0.987" in page


def test_gaussian_demo_and_its_published_points(tmp_path):
    assert (
        main(["demo", "gaussian", *("--samples", "100", "--epochs", "1"), "--out", str(tmp_path)])
        == 0
    )
    check_report(tmp_path, FIGURES, epochs=1)
    assert "published, epoch 15" in (tmp_path / "index.html").read_text()


def test_photograph_as_scene(tmp_path):
    picture = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    arguments = ["--samples", "600", "--epochs", "1", "--scene", str(picture)]
    assert main(["demo", "imaging", *arguments, "--out", str(tmp_path)]) == 0
    numbers = check_report(tmp_path, FIGURES | {"samples.png"}, epochs=1)
    assert numbers["settings"]["scene"] == "grace_hopper.jpg"
    assert numbers["settings"]["FI of one image, per um^2"] == pytest.approx(1.6)


def test_input_that_cannot_be_told_from_zero(tmp_path):
    """Catches shares of a J_input that is noise, NaN in JSON, and a report that is not written."""
    task = lognormal_task(samples=100)
    names = ["input", *task.layers, "output"]
    layers = [layer(name, number(0.02), stderr=0.04, lifted=0.0) for name in names]
    flow = ff.FisherFlow(tuple(layers), {})
    history = [training.DemoEpoch(epoch, flow, 0.5, 0.5, 1.0) for epoch in range(2)]
    assert "nan" not in " ".join(epoch_cells(history[0], task.layers))
    write_report(tmp_path, task, history, complete=True)
    numbers = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    for entry in numbers["epochs"]:
        assert set(entry["fractions"].values()) == {None}
        assert entry["train_mse_times_J_input"] is None
    assert numbers["summary"]["stop_epoch"] is None
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "within 3 errors of zero: no ratio to it: use more samples" in page


def test_recorded_measurements(tmp_path, capsys):
    """Catches validation images that are trained on, and files too small for the first layer."""
    path = recording(tmp_path / "Data1.npz", edge_frames=300, center_frames=1050)
    task = imaging_task(data=path)
    assert len(task.x) == 13 * 250
    assert len(task.val_x) == 13 * 50
    trained = {tuple(row) for row in task.x[:, 0].tolist()}
    assert not trained & {tuple(row) for row in task.val_x[:, 0].tolist()}
    torch.testing.assert_close(task.x.mean(0), torch.zeros(18, 24), atol=1e-5, rtol=0)
    assert task.theta.unique().tolist() == task.val_theta.unique().tolist()
    out = tmp_path / "out"
    arguments = ["demo", "imaging", "--data", str(path), "--epochs", "1", "--out", str(out)]
    assert main(arguments) == 0
    check_report(out, FIGURES | {"samples.png"}, epochs=1)
    capsys.readouterr()
    assert main([*arguments, "--samples", "260"]) == 2
    assert "--data must hold at least 260 training images" in capsys.readouterr().err
    small = recording(tmp_path / "small.npz", edge_frames=300, center_frames=400)
    assert main(["demo", "imaging", "--data", str(small), "--out", str(out)]) == 2
    assert "at least 750 held-out images" in capsys.readouterr().err


def test_interrupt_leaves_a_valid_report(tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second epoch keeps the measurement before training and the first epoch."""
    measure = training._measure

    def interrupted(task, epoch, *rest):
        if epoch == 2:
            raise KeyboardInterrupt
        return measure(task, epoch, *rest)

    monkeypatch.setattr(training, "_measure", interrupted)
    assert main(["demo", "lognormal", *TINY, "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().out
    numbers = check_report(tmp_path, FIGURES, epochs=1)
    assert numbers["complete"] is False
    assert "interrupted early" in (tmp_path / "index.html").read_text()


def test_interrupt_before_anything_is_known(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_measure", interrupted)
    assert main(["demo", "lognormal", *TINY, "--out", str(tmp_path)]) == 130
    assert "no report" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_divergence_keeps_what_was_measured(tmp_path, capsys):
    arguments = ["--samples", "250", "--epochs", "3", "--learning-rate", "1e30"]
    assert main(["demo", "lognormal", *arguments, "--out", str(tmp_path)]) == 1
    assert "try a smaller --learning-rate" in capsys.readouterr().out
    assert check_report(tmp_path, FIGURES, epochs=0)["complete"] is False


def test_same_seed_same_training():
    """Catches shuffling or weights from the global random numbers."""
    task = replace(lognormal_task(samples=100, seed=3), epochs=1, max_features=32)
    again = replace(lognormal_task(samples=100, seed=3), epochs=1, max_features=32)
    torch.manual_seed(1)
    first = list(training.train(task, seed=3))
    torch.manual_seed(2)
    second = list(training.train(again, seed=3))
    assert [r.val_mse for r in first] == [r.val_mse for r in second]
    assert not torch.equal(task.x, lognormal_task(samples=100, seed=4).x)
