"""The example of large images at a small size: its derivatives, its numbers, its files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import large_images
import pytest
import torch

import fisherfast as ff

matplotlib = pytest.importorskip("matplotlib", reason="the example draws figures")
pytest.importorskip("PIL", reason="the example reads a photograph")

SIZE = 64
FIGURES = ("samples.png", "maps.png", "bounds.png", "overview.png")


@pytest.fixture(scope="module")
def scene() -> Any:
    return large_images.Scene(large_images.arguments([]).photo, SIZE)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the example returns, and its folder."""
    out = tmp_path_factory.mktemp("large-images")
    given = f"--size {SIZE} --samples 192 --epochs 2 --images 128 --out {out} --json {out}/b.json"
    return large_images.main(given.split()), out


def off_centre(scene: Any) -> torch.Tensor:
    """A theta at which no parameter is at zero."""
    return scene.centre + scene.reach * torch.tensor([0.3, -0.4, 0.5, 0.2])


def test_both_renderers_agree(scene):
    """Catches x for y, another sense of rotation and a shift by half a pixel: the one that trains
    the network is not the one whose derivative is measured. 2e-4 of 8 electrons measured."""
    theta = off_centre(scene)
    torch.testing.assert_close(scene.means(theta[None])[0, 0], scene.mean(theta), rtol=0, atol=1e-3)


def test_tangents_are_those_of_the_mean(scene):
    """Catches radians for degrees and a derivative that misses the blur. 3 % is what a kink of the
    interpolation between two pixels makes; it is 1 % without rotation."""
    theta, step = off_centre(scene), 2e-3
    mean, tangents = scene.tangents(theta)
    torch.testing.assert_close(mean, scene.mean(theta))
    for tangent, move in zip(tangents, step * torch.eye(len(theta)), strict=True):
        slope = (scene.mean(theta + move) - scene.mean(theta - move)) / (2 * step)
        assert float((slope - tangent).norm() / tangent.norm()) < 0.03


def test_samples_are_drawn_from_their_numbers(scene):
    """Catches samples that depend on the order in which they are read: no later pass would fit."""
    pictures = large_images.Pictures(scene, scene.centre, 2, seed=1)
    second, first = pictures[1], pictures[0]
    for i, sample in enumerate((first, second)):
        assert all(map(torch.equal, pictures[i], sample))
    assert not torch.equal(first[0], second[0])


def test_samples_carry_the_derivative_of_a_simulator(scene):
    """Catches a derivative of the mean alone: brighter pixels are noisier too."""
    theta, noise = off_centre(scene), []

    def draw(at: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
        noise.append(torch.randn(n, SIZE, SIZE, generator=generator))
        return large_images.exposed(scene.mean(at), noise[-1])

    batch = next(ff.Simulator(draw, theta, samples=2).read(0, 2))
    pictures = large_images.Pictures(scene, theta, 1, seed=0)
    ours = pictures.moved[:, 0] + pictures.widened[:, 0] * noise[-1][0]
    assert batch.tangents is not None
    torch.testing.assert_close(ours, batch.tangents[:, 0], rtol=1e-3, atol=1e-5)
    assert float((ours - pictures.moved[:, 0]).norm() / ours.norm()) > 0.01  # what this test is for


def test_input_meets_the_closed_form(run):
    """Catches a wrong unit of a tangent (a factor of 3000 for radians) or of the noise: 4 sigma,
    false alarm 3e-4 for four numbers; 2 in J is 7 sigma here."""
    result, _ = run
    exact = torch.tensor(result["closed_form"]["linear"])
    row = result["layers"]["input"]
    J, error = torch.tensor(row["J"]), torch.tensor(row["stderr"])
    assert ((J - exact).diagonal().abs() < 4 * error.diagonal()).all()
    assert (error.diagonal() < 0.2 * exact.diagonal()).all()
    more = torch.tensor(result["closed_form"]["all"]) - exact
    assert (torch.linalg.eigvalsh(more) > 0).all()


def test_no_layer_knows_more_than_the_input(run):
    """Catches layers that are measured on other tangents than the input, and a lower bound above J:
    4 sigma in each of 60 numbers."""
    result, _ = run
    exact = torch.tensor(result["closed_form"]["linear"]).diagonal()
    names = list(result["layers"])
    assert (names[0], names[-1]) == ("input", "output")
    for row in result["layers"].values():
        J, error = (torch.tensor(row[name]).diagonal() for name in ("J", "stderr"))
        lower, lower_error = (torch.tensor(row[n]).diagonal() for n in ("lower", "lower_stderr"))
        assert (exact + 4 * error > J).all()
        assert (lower - 4 * lower_error.hypot(error) < J).all()


def test_files_and_figures(run):
    """Catches a figure that is not drawn, and a result that JSON cannot hold."""
    result, out = run
    for name in FIGURES:
        assert (out / name).stat().st_size > 10_000
    assert ff.FisherFlow.load(out / "flow.npz").names == list(result["layers"])
    written = json.loads((out / "result.json").read_text())
    assert written["names"] == ["x", "y", "rotation", "defocus"]
    assert written == json.loads((out / "b.json").read_text())
    assert all(math.isfinite(v) for v in written["rms_error"])
    assert result["training"]["images"] == 256
    assert 0 < result["images_per_second_monitored"] < result["images_per_second"]
