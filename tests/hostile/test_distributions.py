"""Noise, order and copies of generated problems are what their closed forms say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hostile import distributions
from hostile.distributions import FIRINGS, KINDS, Noise, rectified
from hostile.generator import COPIES, GROUPED, ORDERS, from_seed
from scipy import stats

from fisherfast.problems import RectifiedGaussian

SIGMAS = 4.0  # 6e-5 by chance for a Gaussian mean
SAMPLES = 200_000
V = np.array([[1.0, 0.5], [-0.5, 2.0]])


def problem(**changes):
    """A small problem with some values changed."""
    values = {"dim": 2, "parameters": 1, "samples": 1000, "dtype": "float64", "layers": ()}
    return dataclasses.replace(from_seed(0), **values | changes)


def noise_of(kind: str, source: str):
    rng = np.random.default_rng(5)
    # units that fire often enough to be averaged
    found = distributions.of(kind, rng, 2, 200, source)
    return found, Noise.draw(rng, SAMPLES, found, 2)


def mean_is(values, truth):
    error = values.std(0) / len(values) ** 0.5
    assert np.all(np.abs(values.mean(0) - truth) < SIGMAS * error + 1e-9)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"lattice"}))
def test_noise_is_standard_and_its_information_that_of_its_derivative(kind):
    """Catches a scale, a slope or a ratio of information that is not that of the samples."""
    found, noise = noise_of(kind, "pathwise")
    still = np.zeros(2)
    y, slopes = found.values(noise, still), found.slopes(noise)
    mean_is(y, 0)
    if found.fourth:
        mean_is(y**2, 1)
    step = 1e-6
    moved = (found.values(noise, still + step) - found.values(noise, still - step)) / (2 * step)
    assert np.median(np.abs(moved - slopes)) < 1e-6
    error = np.broadcast_to(slopes, y.shape).std(0) / SAMPLES**0.5
    assert np.all(np.abs(slopes.mean(0) - np.sqrt(found.linear)) < SIGMAS * error + 1e-9)
    assert np.all(found.linear <= found.full * (1 + 1e-12))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"lattice", "uniform", "log-normal factor"}))
def test_scores_are_derivatives(kind):
    """Catches a score of another scale: Cov(y, s) is the linear information's D, Cov(s) is V."""
    found, noise = noise_of(kind, "score")
    y, scores = found.values(noise, np.zeros(2)), found.scores(noise, V)
    mean_is(scores, 0)
    mean_is(scores[:, :, None] * scores[:, None, :], found.score_covariance(V))
    if found.fourth:
        mean_is(y[:, :, None] * scores[:, None, :], np.sqrt(found.linear)[:, None] * V)
    if kind in distributions.LOCATIONS:
        np.testing.assert_allclose(found.full, found.scored)


def test_rectified_units_are_those_of_the_library():
    """Catches a wrong closed form, by another one."""
    t = np.array([-3.0, -1.0, 0.5])
    mean, variance, information = rectified(t)
    for index, value in enumerate(t):
        unit = RectifiedGaussian(1)
        assert float(unit.fisher(value)) == pytest.approx(information[index], rel=1e-6)
        assert float(unit.mean(value)) == pytest.approx(mean[index], rel=1e-6)
        assert float(unit.covariance(value)) == pytest.approx(variance[index], rel=1e-6)


def test_some_units_are_rare():
    """Catches rare units that are not, or that are all there is."""
    t = distributions.of("rare", np.random.default_rng(0), 40, 10_000, "pathwise").firing
    counts = 10_000 * stats.norm.cdf(t)
    assert 10 < (counts < FIRINGS[1] * 1.001).sum() < 30
    assert counts.min() > FIRINGS[0] * 0.999


def test_a_lattice_has_its_step_and_no_more_information():
    """Catches values that are not rounded, and a bound that forgets the rounding."""
    rounded = problem(source="pathwise", distribution="lattice", lattice=0.5, condition=4.0)
    x = rounded.samples_of(rounded.noise())[0].numpy() / (0.5 * rounded.deviations)
    np.testing.assert_allclose(x, x.round(), atol=1e-6)
    assert 0.5 < float((rounded.least / rounded.linear)[0, 0]) < 0.97
    np.testing.assert_array_equal(rounded.information, rounded.linear)


def test_files_are_sorted():
    """Catches an order that is not the one said."""
    x = problem(order="value").samples_of(problem(order="value").noise())[0][:, 0]
    assert bool((x.diff() >= 0).all())
    blocks = problem(order="blocks").samples_of(problem(order="blocks").noise())[0][:, 0]
    assert not bool((blocks.diff() >= 0).all())
    assert float(blocks[:125].max()) < float(blocks[-125:].min())
    scored = problem(order="score", source="score")
    scores = scored.noises.scores(scored.noise()[0], scored.structure.signal)[:, 0]
    assert (np.diff(scores) >= 0).all()


@pytest.mark.parametrize("grouped", GROUPED)
@pytest.mark.parametrize("copies", ["twice", "antithetic"])
def test_copies_share_their_group(copies, grouped):
    """Catches labels of other samples than those that depend on each other."""
    copied = problem(source="pathwise", copies=copies, grouped=grouped, offset=1.0)
    z = (copied.samples_of(copied.noise())[0] - torch.from_numpy(copied.structure.means[0])).numpy()
    labels = dataclasses.replace(copied, grouped=grouped.replace("unsaid", "neighbours")).groups(
        len(z)
    )
    assert (copied.groups(len(z)) is None) == (grouped == "unsaid")
    order = np.argsort(labels, kind="stable")
    first, second = z[order][::2], z[order][1::2]
    np.testing.assert_allclose(first, second * (1 if copies == "twice" else -1), atol=1e-6)


def test_kinds_are_drawn():
    """Catches a kind that is written down and never drawn."""
    drawn = [from_seed(seed) for seed in range(600)]
    assert {p.distribution for p in drawn} == set(KINDS)
    assert {p.order for p in drawn} == set(ORDERS)
    assert {(p.copies, p.grouped) for p in drawn if p.copies != "none"} == {
        (copies, grouped) for copies in set(COPIES) - {"none"} for grouped in GROUPED
    }
    assert 0.2 < np.mean([p.usual for p in drawn]) < 0.5
