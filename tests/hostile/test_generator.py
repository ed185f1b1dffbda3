"""The generated problems are what their closed form says, and reach the ends of their ranges."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hostile.generator import CONDITIONS, DIMENSIONS, PARAMETERS, SAMPLES, SOURCES, from_seed

import fisherfast as ff

SIGMAS = 4.0


def example(**changes):
    """A problem of seed 0 with two layers, small enough to compute with."""
    layers = next(p.layers for p in map(from_seed, range(100)) if len(p.layers) == 2)
    values = {"dim": 4, "samples": 4000, "condition": 10.0, "dtype": "float64", "offset": 1.0}
    return dataclasses.replace(from_seed(0), layers=layers, **values | changes)


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


def test_a_problem_can_be_built_from_its_representation():
    """Catches a failure that cannot be repeated from what is printed."""
    from hostile.generator import Layer, Problem

    problem = from_seed(3)
    again = eval(repr(problem), {"Problem": Problem, "Layer": Layer})
    assert again == problem
    np.testing.assert_array_equal(again.information, problem.information)


@pytest.mark.parametrize("direction", ["any", "smallest", "largest", "raw"])
def test_information_is_the_closed_form_of_input_and_layers(direction):
    """Catches a wrong V or B: A^T S^-1 A of the model's own weights is V^T V everywhere."""
    problem = example(direction=direction)
    A, S = problem.structure.derivative, problem.structure.factors[0]
    S = S @ S.T
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


def test_scores_and_tangents_are_the_derivatives_of_the_closed_form():
    """Catches a factor in what `Score` or `Pathwise` is given: the truth of 20 000 samples within
    4 stated errors."""
    for source in ("score", "pathwise"):
        problem = example(source=source, samples=20_000)
        found = ff.fisher_information(problem.data(problem.noise()), max_features=4)
        error = (found.linear.numpy() - problem.information) / found.linear_stderr.numpy()
        assert np.abs(error).max() < SIGMAS
