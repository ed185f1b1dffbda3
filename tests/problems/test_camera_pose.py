"""The camera with three unknowns: its derivatives, its information, its samples as data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fisherfast.data import Pathwise, Score
from fisherfast.problems import (
    Camera,
    CameraPose,
    GaussianScale,
    LogNormal,
    Poisson,
    default_camera,
    published_positions,
)

THETA = [0.3, -0.2, 3.0]
NO_READOUT = {"white_std": 0.0, "row_std": 0.0, "correlated_std": 0.0}


def corner() -> torch.Tensor:
    """A scene without symmetry: place and brightness are not independent of each other."""
    scene = torch.zeros(40, 48, dtype=torch.float64)
    scene[4:36, 6:16] = 1.0
    scene[26:36, 6:44] = 1.0
    scene[4:12, 30:40] = 0.5
    return scene


def small(**changes: float | None) -> Camera:
    return Camera(corner(), shape=(8, 10), **changes)


CAMERAS = {
    "read-out noise": small(),
    "shot noise": small(gain=0.5, **NO_READOUT),
    "both": small(gain=0.5),
}


@pytest.mark.parametrize("name", CAMERAS)
def test_mean_derivative_is_the_slope_of_the_mean(name):
    """Catches rows for columns, a sign, an amplitude left out. Error seen: 4e-9 DN."""
    pose, h = CameraPose(CAMERAS[name]), 1e-5
    theta = torch.tensor(THETA, dtype=torch.float64)
    for p, step in enumerate(h * torch.eye(3, dtype=torch.float64)):
        slope = (pose.mean(theta + step) - pose.mean(theta - step)) / (2 * h)
        torch.testing.assert_close(pose.mean_derivative(theta)[p], slope, rtol=0, atol=1e-7)


def test_along_the_rows_it_is_the_camera():
    """Catches another canvas, another direction, another unit than the camera of one unknown."""
    camera = default_camera()
    pose = CameraPose(camera)
    for place in published_positions()[::4]:
        theta = torch.stack([place, torch.zeros(()).double(), torch.tensor(camera.amplitude)])
        torch.testing.assert_close(pose.mean(theta), camera.mean(place), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            pose.fisher(theta)[:1, :1], camera.fisher(place), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("name", CAMERAS)
def test_information_is_that_of_the_definition(name):
    """Catches an entry of another pair, and a trace term that is off by the gain."""
    pose = CameraPose(CAMERAS[name])
    D = pose.mean_derivative(THETA).flatten(1)
    inverse = torch.linalg.inv(pose.covariance(THETA))
    expected = D @ inverse @ D.T
    if name == "both":
        changes = [torch.diag(row) / CAMERAS[name].gain for row in D]
        for p in range(3):
            for q in range(3):
                product = inverse @ changes[p] @ inverse @ changes[q]
                expected[p, q] += product.trace() / 2
    torch.testing.assert_close(pose.fisher(THETA), expected)
    scale = expected.diagonal().rsqrt()
    assert float((scale[0] * expected[0, 2] * scale[2]).abs()) > 0.02  # the scene has no symmetry


@pytest.mark.parametrize("name", ["read-out noise", "shot noise"])
def test_score_has_the_information_as_covariance(name):
    """Catches a score of another unit: 4 standard errors of 9 entries from 20 000 samples."""
    pose, n = CameraPose(CAMERAS[name]), 20_000
    x = pose.sample(THETA, n, torch.Generator().manual_seed(0))
    score = pose.score(x, THETA)
    truth = pose.fisher(THETA)
    scale = truth.diagonal().sqrt()
    mean = score.mean(0) / scale * n**0.5
    assert float(mean.abs().max()) < 4
    error = ((torch.outer(truth.diagonal(), truth.diagonal()) + truth.square()) / n).sqrt()
    assert float(((torch.cov(score.T) - truth) / error).abs().max()) < 4


def test_noise_is_the_same_at_every_theta():
    """Catches pairs whose noise differs."""
    pose = CameraPose(small())
    minus, plus = pose.conditions(THETA, [0.1, 0.1, 0.2], 3, paired=True)
    for p in range(3):
        change = (plus[p] - minus[p])[1:] - (plus[p] - minus[p])[:1]
        assert float(change.abs().max()) < 1e-4


def test_data_of_a_problem():
    """Catches samples at one theta with the derivative or the score of another, and a seed that is
    not used."""
    pose = CameraPose(small())
    pathwise, score = pose.pathwise(THETA, 5, seed=2), pose.scored(THETA, 5, seed=2)
    assert isinstance(pathwise, Pathwise)
    assert isinstance(score, Score)
    (one,), (two,) = pathwise.read(0, 8), score.read(0, 8)
    assert torch.equal(one.x, two.x)
    torch.testing.assert_close(one.tangents[:, 0], pose.mean_derivative(THETA).float())
    torch.testing.assert_close(two.score, pose.score(two.x, THETA))
    assert not torch.equal(one.x, next(pose.pathwise(THETA, 5, seed=3).read(0, 8)).x)


def test_what_a_problem_has_not():
    """Catches a derivative of counts, and a score without closed form."""
    shot, both = (CameraPose(CAMERAS[name]) for name in ("shot noise", "both"))
    with pytest.raises(NotImplementedError, match="CameraPose with shot noise has no pathwise"):
        shot.pathwise(THETA, 5)
    with pytest.raises(NotImplementedError, match="has no closed-form score"):
        both.scored(THETA, 5)
    light = Poisson(lambda t: t * torch.ones(2), lambda t: torch.ones(1, 2), dim=2)
    with pytest.raises(NotImplementedError, match="Poisson has no pathwise derivative"):
        light.pathwise(1.0, 5)
    assert light.scored(1.0, 5).parameters == 1


@pytest.mark.parametrize("problem", [LogNormal.random(dim=3), GaussianScale(3)])
def test_pathwise_and_scored_are_at_theta(problem):
    """Catches theta that does not reach the samples."""
    (one,), (two,) = problem.pathwise(1.0, 9).read(0, 9), problem.scored(1.0, 9).read(0, 9)
    assert torch.equal(one.x, two.x)
    moved = problem.pathwise(1.0 + 1e-3, 9)
    (other,) = moved.read(0, 9)
    torch.testing.assert_close((other.x - one.x) / 1e-3, one.tangents[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(two.score, problem.score(two.x, 1.0))


def test_bad_places():
    """Catches an object that leaves the canvas and comes back on the other side."""
    pose = CameraPose(small())
    with pytest.raises(ValueError, match=r"theta must lie within \+-2.4 um, got \[0.0, 3.0\]"):
        pose.mean([0.0, 3.0, 1.0])
    with pytest.raises(ValueError, match=r"theta must have shape \(3,\), got \(1,\)"):
        pose.mean([0.0])
    dark = CameraPose(replace(CAMERAS["shot noise"], offset=1.0))
    with pytest.raises(ValueError, match="offset must give every pixel some light"):
        dark.mean([0.0, 0.0, -5.0])
