"""The generated problems are what their closed form says, with their noise, order and copies, and
reach the ends of their ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hostile import distributions
from hostile.distributions import FIRINGS, KINDS, Noise, rectified
from hostile.generator import (
    CONDITIONS,
    COPIES,
    DIMENSIONS,
    GROUPED,
    ORDERS,
    PARAMETERS,
    SAMPLES,
    SOURCES,
    Layer,
    Problem,
    from_seed,
)
from scipy import stats

from fisherfast.problems import RectifiedGaussian

SIGMAS = 4.0  # 6e-5 by chance for a Gaussian mean
DRAWS = 200_000
V = np.array([[1.0, 0.5], [-0.5, 2.0]])


def example(**changes):
    """A problem with two layers, small enough to compute with."""
    layers = Layer("squeezing", 30.0, 1.0, True), Layer("whitening", 1.0, 1.0, False)
    values = {"dim": 4, "parameters": 2, "condition": 10.0, "correlation": 0.5, "rotated": True}
    return Problem(layers=layers, **values | changes)


def mean_is(values, truth):
    error = values.std(0) / len(values) ** 0.5
    assert np.all(np.abs(values.mean(0) - truth) < SIGMAS * error + 1e-9)


def test_ranges_are_reached():
    """Catches a range that is written down and not drawn from."""
    drawn = [from_seed(seed) for seed in range(600)]
    assert {p.dim for p in drawn} == set(range(DIMENSIONS[0], DIMENSIONS[1] + 1))
    assert {p.parameters for p in drawn} == set(range(PARAMETERS[0], PARAMETERS[1] + 1))
    assert {p.source for p in drawn} == set(SOURCES)
    assert {p.dtype for p in drawn} == {"float32", "float64"}
    assert {len(p.layers) for p in drawn} == {0, 1, 2}
    assert min(p.samples for p in drawn) < 1.1 * SAMPLES[0]
    assert max(p.samples for p in drawn) > 0.9 * SAMPLES[1]
    assert max(p.condition for p in drawn) > 0.5 * CONDITIONS[1]
    assert {p.distribution for p in drawn} == set(KINDS)
    assert {p.order for p in drawn} == set(ORDERS)
    assert {(p.copies, p.grouped) for p in drawn if p.copies != "none"} == {
        (copies, grouped) for copies in set(COPIES) - {"none"} for grouped in GROUPED
    }
    assert 0.2 < np.mean([p.usual for p in drawn]) < 0.5


def test_a_problem_can_be_built_from_its_representation():
    """Catches a failure that cannot be repeated from what is printed."""
    problem = from_seed(3)
    again = eval(repr(problem), {"Problem": Problem, "Layer": Layer})
    assert again == problem
    np.testing.assert_array_equal(again.information, problem.information)


@pytest.mark.parametrize("direction", ["any", "smallest", "largest", "raw"])
def test_information_is_the_closed_form_of_input_and_layers(direction):
    """Catches a wrong V or B: A^T S^-1 A of the model's own weights is V^T V everywhere."""
    problem = example(direction=direction)
    B = problem.structure.factors[0]
    A, S = B @ problem.structure.signal, B @ B.T
    for module in [None, *problem.model()]:
        if module is not None:
            W = module.weight.detach().double().numpy()
            A, S = W @ A, W @ S @ W.T
        scale = np.sqrt(np.diag(S))
        whitened = np.linalg.solve(S / np.outer(scale, scale), A / scale[:, None])
        information = (A / scale[:, None]).T @ whitened
        size = np.abs(problem.information).max()
        assert np.abs(information - problem.information).max() < 1e-3 * size


@pytest.mark.parametrize("source", SOURCES)
def test_samples_have_the_mean_and_covariance_of_the_closed_form(source):
    """Catches samples that do not follow the closed form; 4 sigma on every whitened moment, about
    1e-3 false alarms for all."""
    problem = example(source=source)
    xs = problem.samples_of(problem.noise())
    n, V = problem.samples, problem.structure.signal
    B, m = problem.structure.factors[0], problem.structure.means[0]
    whitened = [np.linalg.solve(B, (x.numpy() - m).T).T for x in xs]
    if source in ("paired", "independent"):
        for p, step in enumerate(problem.dtheta):
            difference = whitened[2 * p + 1].mean(0) - whitened[2 * p].mean(0)
            error = 1e-6 if source == "paired" else (2 / n) ** 0.5
            assert np.abs(difference - V[:, p] * step).max() < SIGMAS * error
    z = whitened[0] - whitened[0].mean(0)
    assert np.abs(z.T @ z / n - np.eye(problem.dim)).max() < SIGMAS * (2 / n) ** 0.5


def noise_of(kind: str, source: str):
    rng = np.random.default_rng(5)
    # units that fire often enough to be averaged
    found = distributions.of(kind, rng, 2, 200, source)
    return found, Noise.draw(rng, DRAWS, found, 2)


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
    error = np.broadcast_to(slopes, y.shape).std(0) / DRAWS**0.5
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
    rounded = Problem(distribution="lattice", lattice=0.5, condition=4.0)
    x = rounded.samples_of(rounded.noise())[0].numpy() / (0.5 * rounded.deviations)
    np.testing.assert_allclose(x, x.round(), atol=1e-6)
    assert 0.5 < float((rounded.least / rounded.linear)[0, 0]) < 0.97
    np.testing.assert_array_equal(rounded.information, rounded.linear)


def test_files_are_sorted():
    """Catches an order that is not the one said."""
    x = Problem(order="value").samples_of(Problem(order="value").noise())[0][:, 0]
    assert bool((x.diff() >= 0).all())
    blocks = Problem(order="blocks").samples_of(Problem(order="blocks").noise())[0][:, 0]
    assert not bool((blocks.diff() >= 0).all())
    assert float(blocks[:125].max()) < float(blocks[-125:].min())
    scored = Problem(order="score", source="score")
    scores = scored.noises.scores(scored.noise()[0], scored.structure.signal)[:, 0]
    assert (np.diff(scores) >= 0).all()


@pytest.mark.parametrize("grouped", GROUPED)
@pytest.mark.parametrize("copies", ["twice", "antithetic"])
def test_copies_share_their_group(copies, grouped):
    """Catches labels of other samples than those that depend on each other."""
    copied = Problem(copies=copies, grouped=grouped, offset=1.0)
    z = (copied.samples_of(copied.noise())[0] - torch.from_numpy(copied.structure.means[0])).numpy()
    said = Problem(copies=copies, grouped=grouped.replace("unsaid", "neighbours"))
    labels = said.groups(len(z))
    assert (copied.groups(len(z)) is None) == (grouped == "unsaid")
    order = np.argsort(labels, kind="stable")
    first, second = z[order][::2], z[order][1::2]
    np.testing.assert_allclose(first, second * (1 if copies == "twice" else -1), atol=1e-6)
