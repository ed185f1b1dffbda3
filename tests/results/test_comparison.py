"""Ratio and difference of two layers: values, directions, and errors from the same samples."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from support.training_histories import layer, number

import fisherfast as ff
from fisherfast.estimation.variance import jackknife_covariance
from fisherfast.results.comparison import compare, covariance_of, divides, ratio, weakest_direction
from fisherfast.results.marginal import pack_covariance

FOLDS = 16


def with_replicates(name: str, J: torch.Tensor, deviations: torch.Tensor) -> ff.LayerFisher:
    """A layer whose J without each fold is off by these [F, P, P], of mean zero."""
    deviations = deviations - deviations.mean(0)
    replicates = J + deviations
    covariance = jackknife_covariance(replicates)
    variance = torch.einsum("pqpq->pq", covariance)
    return dataclasses.replace(
        layer(name, J, stderr=1.0),
        stderr=variance.sqrt(),
        error_covariance=pack_covariance(covariance),
        replicates=replicates,
    )


def symmetric(generator: torch.Generator, P: int, size: float) -> torch.Tensor:
    """Deviations [F, P, P] of about this size."""
    noise = torch.randn(FOLDS, P, P, generator=generator, dtype=torch.float64)
    return size * (noise + noise.mT) / 2


def positive(generator: torch.Generator, P: int) -> torch.Tensor:
    """A matrix [P, P] far from singular, in three different units."""
    root = torch.randn(P, P, generator=generator, dtype=torch.float64)
    units = torch.tensor([1.0, 1e3, 1e-2], dtype=torch.float64)[:P]
    return (root @ root.T + torch.eye(P)) * torch.outer(units, units)


@pytest.fixture
def generator() -> torch.Generator:
    """The same random numbers in every test."""
    return torch.Generator().manual_seed(0)


def test_one_parameter_against_numpy(generator):
    """The jackknife of the ratio itself, not of its parts. Catches errors added in square, folds
    that are not paired, and (F - 1) / F left out."""
    shared, own = symmetric(generator, 1, 0.2), symmetric(generator, 1, 0.02)
    a = with_replicates("a", number(8.0), 2 * shared + own)
    b = with_replicates("b", number(4.0), shared)
    found = compare(a, b)
    A, B = a.replicates.flatten().numpy(), b.replicates.flatten().numpy()
    quotient, difference = A / B, A - B
    for stated, values in (
        (found.ratio_stderr, quotient),
        (float(found.difference_stderr), difference),
    ):
        expected = np.sqrt((FOLDS - 1) / FOLDS * ((values - values.mean()) ** 2).sum())
        assert stated == pytest.approx(expected, rel=1e-9)
    assert found.ratio == 2.0
    assert float(found.difference) == 4.0
    assert found.names == ("a", "b")
    assert found.ratios.tolist() == pytest.approx([2.0])
    assert found.ratios_stderr.tolist() == pytest.approx([found.ratio_stderr])
    assert found.notes == ()
    assert "'a' / 'b' = 2.000 +- " in repr(found)
    in_square = math.hypot(float(a.stderr) / 4, 2 * float(b.stderr) / 4)
    assert found.ratio_stderr < in_square / 5  # most of the noise is shared


def test_errors_without_common_replicates_are_added_in_square(generator):
    """Catches an error of zero where nothing is known of the folds, and 16 folds beside 8 that are
    paired by their number."""
    a, b = (layer(name, number(J), stderr=0.04) for name, J in (("a", 2.0), ("b", 4.0)))
    found = compare(a, b)
    assert float(found.difference_stderr) == pytest.approx(0.04 * math.sqrt(2))
    # of the quotient beyond first order: (0.04 / 4)^2
    assert found.ratio_stderr == pytest.approx(math.hypot(0.04 / 4, 0.5 * 0.04 / 4), rel=1e-3)
    a = with_replicates("a", number(2.0), symmetric(generator, 1, 0.01))
    b = with_replicates("b", number(4.0), symmetric(generator, 1, 0.01)[:8])
    expected = math.hypot(float(a.stderr), float(b.stderr))
    assert float(compare(a, b).difference_stderr) == pytest.approx(expected)


@pytest.mark.parametrize("replicated", [True, False])
def test_a_layer_beside_itself(generator, replicated):
    """Ratio 1 and difference 0 are exact. Catches two errors for the same numbers."""
    J = positive(generator, 3)
    same = with_replicates("a", J, 0.01 * J * symmetric(generator, 3, 1.0))
    if not replicated:
        same = dataclasses.replace(same, replicates=torch.empty(0, 3, 3, dtype=torch.float64))
    found = compare(same, same)
    assert found.ratio == pytest.approx(1, abs=1e-9)
    assert found.ratio_stderr == pytest.approx(0, abs=1e-9)
    assert found.ratios.tolist() == pytest.approx([1] * 3, abs=1e-9)
    assert not found.difference.any()
    assert not found.difference_stderr.any()


def test_several_parameters(generator):
    """Eigenvalues of J_b^-1/2 J_a J_b^-1/2, their mean, and their directions in theta. Catches
    Cholesky factors from the wrong side, the trace without P, entrywise ratios."""
    J_a, J_b = positive(generator, 3), positive(generator, 3)
    a = with_replicates("a", J_a, 1e-3 * J_a * symmetric(generator, 3, 1.0))
    b = with_replicates("b", J_b, 1e-3 * J_b * symmetric(generator, 3, 1.0))
    found = compare(a, b)
    expected = np.sort(np.linalg.eigvals(np.linalg.solve(J_b.numpy(), J_a.numpy())).real)
    assert found.ratios.tolist() == pytest.approx(expected.tolist(), rel=1e-8)
    assert found.ratio == pytest.approx(expected.mean(), rel=1e-8)
    w = found.directions
    torch.testing.assert_close(w.T @ J_b @ w, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(w.T @ J_a @ w, found.ratios.diag(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.difference, J_a - J_b)
    leaving_out = [
        np.sort(np.linalg.eigvals(np.linalg.solve(B, A)).real)
        for A, B in zip(a.replicates.numpy(), b.replicates.numpy(), strict=True)
    ]
    spread = np.sqrt((FOLDS - 1) * np.var(leaving_out, axis=0))
    np.testing.assert_allclose(found.ratios_stderr.numpy(), spread, rtol=0.02)  # second order
    mean_spread = np.sqrt((FOLDS - 1) * np.var(np.mean(leaving_out, axis=1)))
    assert found.ratio_stderr == pytest.approx(mean_spread, rel=1e-6)


@pytest.mark.parametrize(("J", "known"), [(0.02, False), (-1.0, False), (0.0, False), (0.13, True)])
def test_denominator_within_three_errors_of_zero(J, known):
    """NaN with a note, not a number like -545. The difference is known all the same."""
    a = layer("conv", number(6.35), stderr=0.3)
    b = layer("input", number(J), stderr=0.04)
    found = compare(a, b)
    assert divides(b) is known
    for numbers in (found.ratio, found.ratio_stderr, found.ratios, found.ratios_stderr):
        assert bool(torch.as_tensor(numbers).isnan().any()) is not known
    assert float(found.difference) == pytest.approx(6.35 - J)
    assert float(found.difference_stderr) == pytest.approx(math.hypot(0.3, 0.04))
    note = "J of input is within 3 errors of zero: no ratio to it"
    assert found.notes == (() if known else (note,))


def test_one_direction_near_zero_is_enough():
    """Two parameters that are nearly one: each entry of J_b is known to 1 %, their difference is
    not known at all. Catches a rule that looks at the diagonal."""
    J = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64)
    b = layer("b", J, stderr=0.01)
    direction, known = weakest_direction(b.J, covariance_of(b))
    assert known < 3
    assert direction[0] == pytest.approx(-direction[1])
    assert math.isnan(ratio(b, b)[0])
    both_move = torch.randn(FOLDS, 1, 1, dtype=torch.float64, generator=torch.manual_seed(0)) * J
    known_together = with_replicates("b", J, 0.002 * both_move)
    assert divides(known_together)


def test_layers_that_are_not_finite():
    """Catches an error of the eigenvalue solver."""
    good = layer("a", number(1.0), stderr=0.01)
    bad = layer("b", number(math.nan), stderr=math.nan)
    assert math.isnan(compare(good, bad).ratio)
    assert math.isnan(compare(bad, good).ratio)
    assert compare(bad, good).notes == ()


def test_covariance_from_the_best_that_is_known(generator):
    """Catches another order than error_covariance, replicates, stderr: of 16 folds the covariance
    of six parameters' 21 entries has directions without any error."""
    full = with_replicates("a", positive(generator, 2), symmetric(generator, 2, 0.1))
    expected = jackknife_covariance(full.replicates)
    more = dataclasses.replace(full, error_covariance=2 * full.error_covariance)
    torch.testing.assert_close(covariance_of(more), 2 * expected)
    folds = dataclasses.replace(full, error_covariance=None)
    torch.testing.assert_close(covariance_of(folds), expected)
    only_errors = dataclasses.replace(folds, replicates=torch.empty(0, 2, 2, dtype=torch.float64))
    variance = torch.einsum("pqpq->pq", covariance_of(only_errors))
    torch.testing.assert_close(variance, full.stderr.square())


def test_compare_by_name():
    """Catches J_b / J_a, and aliases that are not known."""
    inputs = layer("input", number(4.0), stderr=0.01)
    outputs = dataclasses.replace(layer("output", number(3.0), stderr=0.01), aliases=("fc",))
    flow = ff.FisherFlow((inputs, outputs), {})
    found = flow.compare("fc", "input")
    assert isinstance(found, ff.LayerComparison)
    assert found.ratio == pytest.approx(0.75)
    assert found.ratio == pytest.approx(flow.fractions()["output"])
    assert found.ratio_stderr == pytest.approx(flow.fraction_errors()["output"])
    assert flow.compare("fc", "output").ratio_stderr == pytest.approx(0, abs=1e-12)
    with pytest.raises(KeyError, match="layer must be one of"):
        flow.compare("fc", "fc9")
