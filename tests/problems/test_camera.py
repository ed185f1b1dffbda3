"""The simulated camera with one unknown and with three: its optics, its noise and the information
in its images."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from fisherfast.data import FiniteDifference
from fisherfast.problems import Camera, CameraPose, default_camera, glyph_scene, published_positions

NO_READOUT = {"white_std": 0.0, "row_std": 0.0, "correlated_std": 0.0}

experiment = functools.cache(default_camera)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_default_is_the_published_experiment():
    """18 x 24 pixels, 15 DN, 2 DN, 13 %, 1.6 per um^2, and an FI that hardly varies."""
    camera = experiment()
    assert camera.shape == (18, 24)
    assert camera.readout_std == pytest.approx(15.0)
    assert camera.covariance(0.0).diagonal().sqrt().unique().item() == pytest.approx(15.0)
    assert (camera.mean(0.0) - camera.offset).max().item() == pytest.approx(2.03, abs=0.01)
    assert camera.snr() == pytest.approx(0.1356, abs=0.001)
    assert camera.fisher(0.0).item() == pytest.approx(1.6, rel=1e-11)
    for place in camera.positions():
        assert 1.599 < camera.fisher(place).item() < 1.602
    # 0.6 um is a coarse step
    assert camera.finite_step_fisher(0.0, 0.6).item() == pytest.approx(1.508, abs=0.005)


@pytest.mark.parametrize("theta", [-1.8, -0.37, 0.9])
def test_theta_is_the_displacement_in_micrometres(theta):
    """Catches the opposite direction, pixels for um, or a shift along the columns."""
    camera = experiment()
    light = camera.mean(theta) - camera.offset
    columns = (torch.arange(24, dtype=torch.float64) - 11.5) * camera.pixel_size
    rows = torch.arange(18, dtype=torch.float64) - 8.5
    assert (light.sum(0) @ columns / light.sum()).item() == pytest.approx(theta, abs=1e-3)
    assert (light.sum(1) @ rows / light.sum()).item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("canvas", "drawn", "samples", "error"),
    [((40, 60), (30, 40), 3, 1e-8), ((200, 300), (200, 300), 15, 1e-6)],
)
def test_sub_pixel_shift_equals_a_moved_scene(canvas, drawn, samples, error):
    """A quarter pixel is one scene sample: the scene itself can be rolled by that. Catches a shift
    of N - 1 for N samples, and a canvas cut to the view, which would wrap a larger scene."""
    scene = torch.zeros(canvas, dtype=torch.float64)
    top, left = ((whole - part) // 2 for whole, part in zip(canvas, drawn, strict=True))
    scene[top : top + drawn[0], left : left + drawn[1]] = noise(*drawn)
    camera, rolled = Camera(scene), Camera(scene.roll(samples, dims=1))
    image = camera.mean(samples * camera.spacing)
    torch.testing.assert_close(image, rolled.mean(0.0), rtol=0, atol=error)


def test_nothing_wraps_into_the_field_of_view():
    """A white plate as wide as the view, moved by the full travel, leaves a dark margin behind."""
    plate = Camera(torch.ones(72, 96))
    light = plate.mean(plate.travel) - plate.offset
    assert light[9, -1].item() == pytest.approx(plate.amplitude, rel=1e-6)
    assert light[9, 0].abs().item() < 1e-6
    # 2.4 um are 4 pixels: the blurred edge is symmetric about the border of the 4th and the 5th.
    assert light[9, 3:5].sum().item() == pytest.approx(plate.amplitude, rel=1e-6)


def test_edge_padding_continues_the_scene():
    """Catches zero padding in its place: a uniform plate then has no edge to move."""
    plate = Camera(torch.ones(8, 8), padding="edge")
    torch.testing.assert_close(plate.mean(2.0), torch.full((18, 24), 102.0).double())
    assert plate.mean_derivative(1.0).abs().max() < 1e-9


def test_covariance_entry_by_entry():
    """Catches columns for rows, and a correlation length off by sqrt(2)."""
    camera = Camera(
        glyph_scene((8, 8), stroke=2), shape=(3, 4), white_std=2.0, row_std=3.0, correlated_std=5.0
    )
    pixels = torch.cartesian_prod(torch.arange(3), torch.arange(4)).double()
    same_row = pixels[:, :1] == pixels[:, 0]
    blurred = torch.exp(-torch.cdist(pixels, pixels).square() / (2 * 1.5**2))
    expected = 4.0 * torch.eye(12) + 9.0 * same_row + 25.0 * blurred
    torch.testing.assert_close(camera.covariance(0.0), expected)


def test_three_unknowns_contain_the_one():
    """Catches another canvas, another direction, another unit than the camera of one unknown."""
    camera = experiment()
    pose = CameraPose(camera)
    for place in published_positions()[::4]:
        theta = torch.stack([place, torch.zeros(()).double(), torch.tensor(camera.amplitude)])
        torch.testing.assert_close(pose.mean(theta), camera.mean(place), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            pose.fisher(theta)[:1, :1], camera.fisher(place), rtol=1e-6, atol=0
        )


def test_information_in_mixed_noise_is_that_of_the_definition():
    """Catches an entry of another pair, and a trace term that is lost or off by the gain: it is two
    thirds of the information about the place. The scene has no symmetry."""
    scene = torch.zeros(40, 48, dtype=torch.float64)
    scene[4:36, 6:16] = scene[26:36, 6:44] = 1.0
    scene[4:12, 30:40] = 0.5
    camera = Camera(scene, amplitude=40.0, offset=0.5, shape=(8, 10), gain=0.02)
    pose, theta = CameraPose(camera), [0.3, -0.2, 40.0]
    D = pose.mean_derivative(theta).flatten(1)
    inverse = torch.linalg.inv(pose.covariance(theta))
    relative = [inverse @ torch.diag(row) / 0.02 for row in D]
    traces = torch.stack([torch.stack([(a @ b).trace() for b in relative]) for a in relative])
    information = pose.fisher(theta)
    torch.testing.assert_close(information, D @ inverse @ D.T + traces / 2)
    scale = information.diagonal().rsqrt()
    assert float((scale[0] * information[0, 2] * scale[2]).abs()) > 0.02
    assert float(information[0, 0]) > 2 * float(pose.linear_fisher(theta)[0, 0])


@pytest.mark.parametrize("options", [{}, {"gain": 2.0}, {"gain": 2.0, **NO_READOUT}])
def test_with_input_fisher_hits_its_target(options):
    """Catches an amplitude scaled as if the FI were always quadratic in it."""
    camera = Camera(glyph_scene(), **options).with_input_fisher(7.0, theta=0.25)
    assert camera.fisher(0.25).item() == pytest.approx(7.0, rel=1e-11)


def test_training_set():
    """Catches images beside the wrong position, and noise shared with the evaluation data."""
    camera = experiment().with_input_fisher(1e6)
    x, theta = camera.training_set(2, seed=3)
    assert x.shape == (26, 18, 24)
    assert x.dtype == theta.dtype == torch.float32
    torch.testing.assert_close(theta[::2], published_positions().float())
    signal = torch.stack([camera.mean(place) for place in theta[::2].double()])
    nearest = torch.cdist(x.double().flatten(1), signal.flatten(1)).argmin(1)
    assert torch.equal(nearest, torch.arange(13).repeat_interleave(2))
    minus, _ = camera.conditions(-1.8 + 0.3, 0.6, 2, seed=3)
    residual = x[:2] - minus[0]
    assert residual.std() > camera.readout_std  # two independent draws: 15 sqrt(2)
    assert isinstance(camera.finite_difference(0.0, 0.6, 2), FiniteDifference)


ERRORS = [
    (lambda: Camera(torch.ones(3)), r"scene must have shape \[h, w\], got \(3,\)"),
    (lambda: Camera(torch.full((3, 3), math.nan)), "scene must be finite, got nan or inf"),
    (lambda: experiment().mean(2.5), r"theta must lie within \+-2.4 um, got 2.5"),
    (lambda: CameraPose(experiment()).mean([0.0, 3.0, 1.0]), r"2.4 um, got \[0.0, 3.0\]"),
    (lambda: Camera(glyph_scene(), psf_sigma=0.1), r"one scene sample \(0.15 um\), got 0.1"),
    (lambda: Camera(glyph_scene(), pixel_size=0.0), "pixel_size must be positive .*, got 0.0"),
    (lambda: Camera(glyph_scene(), row_std=-1.0), "row_std must be at least 0, got -1.0"),
    (lambda: Camera(glyph_scene(), white_std=0.0), "white_std must be positive .*, got 0"),
    (lambda: Camera(glyph_scene(), white_std=0.0, gain=1.0), "unless shot noise is the only"),
    (lambda: Camera(glyph_scene(), gain=-1.0), "gain must be positive and finite, got -1.0"),
    (lambda: Camera(glyph_scene(), padding="wrap"), "must be 'zero' or 'edge', got 'wrap'"),
    (lambda: Camera(-glyph_scene(), gain=1.0, offset=1.0).mean(0.0), "some light for shot noise"),
    (lambda: experiment().with_input_fisher(0.0), "target must be positive and finite, got 0.0"),
    (lambda: default_camera(torch.zeros(3, 3)), "scene must change when it moves, got a FI of 0"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_shot_noise_has_no_tangent_and_mixed_noise_no_score():
    camera = Camera(glyph_scene(), gain=1.0)
    for images in (camera, CameraPose(camera)):
        theta, name = [0.0] * images.parameters, type(images).__name__
        for way, noise in ((images.pathwise, "shot noise"), (images.scored, "shot and read-out")):
            with pytest.raises(NotImplementedError, match=f"{name} with {noise}.* has no"):
                way(theta, 1)
