"""The simulated camera: its optics, its noise and the information in its images."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from fisherfast.data import FiniteDifference
from fisherfast.problems import (
    Camera,
    GaussianFamily,
    default_camera,
    glyph_scene,
    published_positions,
    scene_from_file,
    shift_image,
)

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
    values = torch.stack([camera.fisher(place) for place in camera.positions()])
    assert values.min() > 1.599
    assert values.max() < 1.602


def test_finite_step_of_the_experiment():
    """0.6 um is a coarse step: 1.51 instead of 1.60 per um^2. Catches dtheta taken as half."""
    camera = experiment()
    change = (camera.mean(0.3) - camera.mean(-0.3)).flatten()
    expected = change @ torch.linalg.solve(camera.covariance(0.0), change) / 0.6**2
    assert camera.finite_step_fisher(0.0, 0.6).item() == pytest.approx(expected.item())
    assert expected.item() == pytest.approx(1.508, abs=0.005)


@pytest.mark.parametrize("theta", [-1.8, -0.37, 0.9])
def test_theta_is_the_displacement_in_micrometres(theta):
    """Catches the opposite direction, pixels for um, or a shift along the columns."""
    camera = experiment()
    light = camera.mean(theta) - camera.offset
    columns = (torch.arange(24, dtype=torch.float64) - 11.5) * camera.pixel_size
    rows = torch.arange(18, dtype=torch.float64) - 8.5
    assert (light.sum(0) @ columns / light.sum()).item() == pytest.approx(theta, abs=1e-3)
    assert (light.sum(1) @ rows / light.sum()).item() == pytest.approx(0.0, abs=1e-9)


def test_whole_pixel_shift_rolls_the_image():
    """Catches a shift of N - 1 for N samples. Error seen: 1.4e-14 DN."""
    camera = experiment()
    still, moved = camera.mean(0.0), camera.mean(camera.pixel_size)
    torch.testing.assert_close(moved[:, 1:], still[:, :-1], rtol=0, atol=1e-12)


def test_sub_pixel_shift_equals_a_moved_scene():
    """A quarter pixel is one scene sample: the scene itself can be rolled by that."""
    scene = torch.zeros(40, 60, dtype=torch.float64)
    scene[5:35, 10:50] = noise(30, 40)
    rolled = Camera(scene.roll(3, dims=1))
    camera = Camera(scene)
    torch.testing.assert_close(camera.mean(3 * camera.spacing), rolled.mean(0.0), rtol=0, atol=1e-8)


def test_two_half_shifts_are_one():
    """Catches linear interpolation, which blurs at every shift."""
    picture = noise(5, 31)
    once = shift_image(picture, 0.74)
    torch.testing.assert_close(shift_image(shift_image(picture, 0.37), 0.37), once)
    torch.testing.assert_close(shift_image(once, -0.74), picture)
    torch.testing.assert_close(shift_image(picture, 2.0), picture.roll(2, dims=1))
    assert (shift_image(picture, 0.5) - picture).abs().max() > 0.1


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


def test_scene_larger_than_the_view():
    """Catches a canvas cut to the view, which would wrap the picture."""
    scene = noise(200, 300)
    camera = Camera(scene)
    torch.testing.assert_close(
        camera.mean(2.25), Camera(scene.roll(15, dims=1)).mean(0.0), rtol=0, atol=1e-6
    )


def test_covariance_entry_by_entry():
    """Catches columns for rows, and a correlation length off by sqrt(2)."""
    camera = Camera(
        glyph_scene((8, 8), stroke=2), shape=(3, 4), white_std=2.0, row_std=3.0, correlated_std=5.0
    )
    covariance = camera.covariance(0.0)
    for i in range(12):
        for j in range(12):
            (row, column), (row2, column2) = divmod(i, 4), divmod(j, 4)
            distance2 = (row - row2) ** 2 + (column - column2) ** 2
            expected = 4.0 * (i == j) + 9.0 * (row == row2)
            expected += 25.0 * math.exp(-distance2 / (2 * 1.5**2))
            assert covariance[i, j].item() == pytest.approx(expected)


def test_shot_noise_grows_with_the_light():
    """Catches gain for 1 / gain: variance m / gain in DN^2, 5 standard errors, 40 000 samples."""
    camera = Camera(glyph_scene((12, 10), stroke=2), amplitude=40.0, shape=(4, 5), gain=0.25)
    x = camera.sample(0.1, 40_000, torch.Generator().manual_seed(0)).double()
    light = camera.mean(0.1)
    variance = camera.readout_std**2 + light / 0.25
    torch.testing.assert_close(camera.covariance(0.1).diagonal(), variance.flatten())
    square = (x - light) ** 2
    error = square.std(0) / math.sqrt(len(x))
    assert ((square.mean(0) - variance).abs() < 5 * error).all()
    counts = Camera(glyph_scene(), gain=0.25, **NO_READOUT).sample(0.0, 3, torch.Generator()) * 0.25
    assert torch.equal(counts, counts.round())


def test_pure_photon_counting():
    """sum r'^2 / r with r' taken numerically. Catches DN for electrons, a factor `gain`."""
    camera = Camera(glyph_scene(), amplitude=30.0, offset=20.0, gain=3.0, **NO_READOUT)
    step = 1e-4
    slope = 3.0 * (camera.mean(0.2 + step) - camera.mean(0.2 - step)) / (2 * step)
    expected = (slope**2 / (3.0 * camera.mean(0.2))).sum().item()
    assert camera.fisher(0.2).item() == pytest.approx(expected, rel=1e-6)
    assert camera.linear_fisher(0.2).item() == pytest.approx(expected, rel=1e-6)


def test_mixed_noise_is_the_gaussian_family():
    """Catches a lost trace term: here 69 % of the FI. The derivative of C is numerical."""
    camera = Camera(
        glyph_scene((12, 10), stroke=2), amplitude=40.0, offset=0.5, shape=(4, 5), gain=0.02
    )
    step = 1e-4
    change = (camera.covariance(0.1 + step) - camera.covariance(0.1 - step)) / (2 * step)
    family = GaussianFamily(
        lambda theta: camera.mean(theta).flatten(),
        camera.covariance,
        lambda theta: camera.mean_derivative(theta).reshape(1, 20),
        lambda theta: change[None],
        dim=20,
    )
    assert camera.fisher(0.1).item() == pytest.approx(family.fisher(0.1).item(), rel=1e-6)
    assert camera.fisher(0.1).item() > 3 * camera.linear_fisher(0.1).item()


@pytest.mark.parametrize("options", [{}, {"gain": 2.0}, {"gain": 2.0, **NO_READOUT}])
def test_with_input_fisher_hits_its_target(options):
    """Catches an amplitude scaled as if the FI were always quadratic in it."""
    camera = Camera(glyph_scene(), **options).with_input_fisher(7.0, theta=0.25)
    assert camera.fisher(0.25).item() == pytest.approx(7.0, rel=1e-11)


def test_a_photograph_as_scene():
    """A real picture: information everywhere, and a mean that moves with it."""
    matplotlib = pytest.importorskip("matplotlib")
    picture = scene_from_file(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg")
    camera = default_camera(picture)
    assert camera.fisher(0.0).item() == pytest.approx(1.6, rel=1e-11)
    values = torch.stack([camera.fisher(place) for place in camera.positions()])
    assert ((values > 1.599) & (values < 1.605)).all()
    step = 1e-4
    slope = (camera.mean(0.7 + step) - camera.mean(0.7 - step)) / (2 * step)
    torch.testing.assert_close(camera.mean_derivative(0.7)[0], slope, rtol=1e-6, atol=1e-7)


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


ERRORS = {
    "scene": (lambda: Camera(torch.ones(3)), r"scene must have shape \[h, w\], got \(3,\)"),
    "scene nan": (
        lambda: Camera(torch.full((3, 3), float("nan"))),
        "scene must be finite, got nan or inf",
    ),
    "theta": (
        lambda: experiment().mean(2.5),
        r"theta must lie within \+-2.4 um, got 2.5",
    ),
    "psf": (
        lambda: Camera(glyph_scene(), psf_sigma=0.1),
        r"psf_sigma must be at least one scene sample \(0.15 um\), got 0.1",
    ),
    "pixel": (
        lambda: Camera(glyph_scene(), pixel_size=0.0),
        "pixel_size must be positive and finite, got 0.0",
    ),
    "row": (lambda: Camera(glyph_scene(), row_std=-1.0), "row_std must be at least 0, got -1.0"),
    "white": (
        lambda: Camera(glyph_scene(), white_std=0.0),
        "white_std must be positive unless shot noise is the only noise, got 0",
    ),
    "white beside shot": (
        lambda: Camera(glyph_scene(), white_std=0.0, gain=1.0),
        "white_std must be positive unless shot noise is the only noise, got 0",
    ),
    "gain": (
        lambda: Camera(glyph_scene(), gain=-1.0),
        "gain must be positive and finite, got -1.0",
    ),
    "padding": (
        lambda: Camera(glyph_scene(), padding="wrap"),
        "padding must be 'zero' or 'edge', got 'wrap'",
    ),
    "dark": (
        lambda: Camera(-glyph_scene(), gain=1.0, offset=1.0, amplitude=10.0).mean(0.0),
        "offset must give every pixel some light for shot noise, got a pixel of -",
    ),
    "target": (
        lambda: experiment().with_input_fisher(0.0),
        "target must be positive and finite, got 0.0",
    ),
    "still": (
        lambda: default_camera(torch.zeros(3, 3)),
        "scene must change when it moves, got a FI of 0",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_shot_noise_has_no_tangent_and_mixed_noise_no_score():
    camera = Camera(glyph_scene(), gain=1.0)
    with pytest.raises(NotImplementedError, match="Camera with shot noise has no pathwise"):
        camera.sample_with_tangent(0.0, 1, torch.Generator())
    with pytest.raises(NotImplementedError, match="Camera with shot and read-out noise has no"):
        camera.score(torch.zeros(1, 18, 24), 0.0)
