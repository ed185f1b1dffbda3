"""The demo at a tiny size: everything is written, and all of it agrees."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from support.recorded_camera import recording
from support.training_histories import flow_of

import fisherfast as ff
from fisherfast.__main__ import main
from fisherfast.demo import ImagingTask, imaging_task, training
from fisherfast.demo.report import epoch_cells, write_report
from fisherfast.results.text import number, with_error
from fisherfast.training import EpochRecord
from fisherfast.training.record import input_of

Image = pytest.importorskip("PIL.Image")
matplotlib = pytest.importorskip("matplotlib")

FIGURES = {"flow.png", "training.png", "overview.png", "samples.png"}
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


def check_report(out: Path, epochs: int) -> dict:
    """All files are there and valid; returns the numbers."""
    assert {path.name for path in out.iterdir()} == {*FIGURES, "index.html", "results.json"}
    for name in FIGURES:
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(2**24)) > 20  # not blank
    text = (out / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.sources) == len(FIGURES - {"overview.png"})
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)
    assert not re.search(r"\{[{%#]", text)
    numbers = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [entry["epoch"] for entry in numbers["epochs"]] == list(range(epochs + 1))
    for entry in numbers["epochs"]:
        flow = ff.FisherFlow.from_dict(entry["flow"])
        assert flow.fractions() == entry["fractions"]
        expected = entry["train_mse"] * flow["input"].value
        assert entry["train_mse_times_J_input"] == pytest.approx(expected)
    return numbers


def cells(row: list[str], tag: str = "td") -> str:
    """A row of a table of the page."""
    return "".join(f"<{tag}>{cell.replace('+-', '±')}</{tag}>" for cell in row)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """The folder of one tiny run, and its table."""
    out = tmp_path_factory.mktemp("report")
    with contextlib.redirect_stdout(io.StringIO()) as table:
        assert main(["demo", *TINY, "--out", str(out)]) == 0
    return out, table.getvalue()


@pytest.fixture(scope="module")
def task() -> ImagingTask:
    return imaging_task(samples=250)


@pytest.fixture
def unmeasured(monkeypatch) -> None:
    """Flows are made up: what is tested is what happens around them."""
    monkeypatch.setattr(training, "fisher_flow", flow_of)


def test_everything_is_written(run):
    """Catches a table of layers of another epoch, and a setting that is left out."""
    out, _ = run
    numbers = check_report(out, epochs=2)
    assert numbers["complete"] is True
    layers = ["input", "relu1", "relu2", "relu3", "relu4", "output"]
    assert list(numbers["epochs"][0]["fractions"]) == layers
    page = (out / "index.html").read_text(encoding="utf-8")
    best = numbers["epochs"][numbers["summary"]["best_output_epoch"]]
    header, *rows = ff.FisherFlow.from_dict(best["flow"]).table()
    assert cells(header, "th") in page
    for row in rows:
        assert cells(row) in page
    for name, value in numbers["settings"].items():
        assert cells([name, str(value)]) in page


def test_table_shows_the_numbers_of_the_file(run):
    """Catches a table of other epochs, other layers or unscaled errors; and a missing page row."""
    out, table = run
    header, *rows = table.split("\n\n")[0].splitlines()
    assert header.split()[:4] == ["epoch", "train", "x", "J"]
    numbers = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert len(rows) == len(numbers["epochs"]) == 3
    page = (out / "index.html").read_text(encoding="utf-8")
    for row, entry in zip(rows, numbers["epochs"], strict=True):
        shares, error = entry["fractions"], entry["fraction_errors"]["output"]
        expected = [
            str(entry["epoch"]),
            *(number(entry[f"{part}_mse_times_J_input"]) for part in ("train", "val")),
            *(number(shares[name]) for name in list(shares)[1:-1]),
            with_error(shares["output"], error),
            f"{entry['seconds']:.1f}",
        ]
        assert re.split(r"\s{2,}", row.strip()) == expected
        assert cells(expected) in page


def test_photograph_as_scene():
    """Catches a photograph whose contrast sets another information than the letter's."""
    picture = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    settings = imaging_task(samples=250, scene=picture).settings
    assert settings["scene"] == "grace_hopper.jpg"
    assert settings["FI of one image, per um^2"] == pytest.approx(1.6)


def test_hostile_numbers_and_names(tmp_path, task):
    """Catches shares of a J_input that is noise, NaN in JSON, a report that is not written, and a
    template that trusts a file name."""
    flow = flow_of(None, None, layers=task.layers, J=0.02, stderr=0.04)
    errors, J = (0.5,), input_of(flow)
    history = [EpochRecord(epoch, flow, errors, errors, J, seconds=1.0) for epoch in range(2)]
    assert "nan" not in " ".join(epoch_cells(history[0], task.layers))
    settings = {"scene": "<script>alert(1)</script>", '"&': "'"}
    write_report(tmp_path, replace(task, settings=settings), history, complete=True)
    numbers = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    for entry in numbers["epochs"]:
        assert set(entry["fractions"].values()) == {None}
        assert entry["train_mse_times_J_input"] is None
    assert numbers["summary"]["stop_epoch"] is None
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "within 3 errors of zero: no ratio to it: use more samples" in page
    assert "<script" not in page
    assert "<td>&lt;script&gt;alert(1)&lt;/script&gt;</td>" in page
    assert "<td>&#34;&amp;</td><td>&#39;</td>" in page


def test_recorded_measurements(unmeasured, tmp_path, capsys):
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
    arguments = ["demo", "--data", str(path), "--epochs", "1", "--out", str(out)]
    assert main(arguments) == 0
    check_report(out, epochs=1)
    capsys.readouterr()
    assert main([*arguments, "--samples", "260"]) == 2
    assert "--data must hold at least 260 training images" in capsys.readouterr().err
    small = recording(tmp_path / "small.npz", edge_frames=300, center_frames=400)
    assert main(["demo", "--data", str(small), "--out", str(out)]) == 2
    assert "at least 750 held-out images" in capsys.readouterr().err


def test_interrupt_leaves_a_valid_report(unmeasured, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second epoch keeps the measurement before training and the first epoch."""
    measure = training._measure

    def interrupted(task, epoch, *rest):
        if epoch == 2:
            raise KeyboardInterrupt
        return measure(task, epoch, *rest)

    monkeypatch.setattr(training, "_measure", interrupted)
    assert main(["demo", *TINY, "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().out
    numbers = check_report(tmp_path, epochs=1)
    assert numbers["complete"] is False
    assert "interrupted early" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_interrupt_before_anything_is_known(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_measure", interrupted)
    assert main(["demo", *TINY, "--out", str(tmp_path)]) == 130
    assert "no report" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_divergence_keeps_what_was_measured(unmeasured, tmp_path, capsys):
    arguments = ["--samples", "250", "--epochs", "3", "--learning-rate", "1e30"]
    assert main(["demo", *arguments, "--out", str(tmp_path)]) == 1
    assert "try a smaller --learning-rate" in capsys.readouterr().out
    assert check_report(tmp_path, epochs=0)["complete"] is False


def test_same_seed_same_training(task):
    """Catches shuffling or weights from the global random numbers, a global seed, and a number of
    threads that is changed."""
    threads, errors = torch.get_num_threads(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        short = replace(imaging_task(samples=250, seed=3), epochs=1, layers=(), max_features=1)
        errors.append([record.val_mse for record in training.train(short, seed=3)])
        assert torch.equal(torch.rand(3), expected)
    assert errors[0] == errors[1]
    assert not torch.equal(task.x, short.x)
    assert torch.get_num_threads() == threads
