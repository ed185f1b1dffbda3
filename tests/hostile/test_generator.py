"""The generated problems reach the ends of their ranges. That they have their closed form shows
where they are measured: a wrong one is a violation of every estimate."""

from __future__ import annotations

import numpy as np
import pytest
from hostile import distributions
from hostile.distributions import FIRINGS, KINDS, rectified
from hostile.generator import (
    CONDITIONS,
    COPIES,
    DIMENSIONS,
    GROUPED,
    ORDERS,
    PARAMETERS,
    SAMPLES,
    SOURCES,
    Problem,
    from_seed,
)
from scipy import stats

from fisherfast.problems import RectifiedGaussian


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
