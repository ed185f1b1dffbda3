"""The spectrum against its formulas, from eigenvalues of a dense matrix."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.parameters_oracle import brute_force
from support.parameters_small import CATEGORICAL, OUTPUTS, difference, inputs, network
from torch import Tensor, nn

import fisherfast as ff

ROUNDING = 1e-10
"""In float64, relative to the largest eigenvalue; measured: below 1e-14."""

SAMPLES = 7
RANK = SAMPLES * (OUTPUTS - 1)
"""Of F where, as here, no direction is there twice: one column less than there are classes."""


@pytest.fixture(scope="module")
def truth() -> Tensor:
    return brute_force(network(), "categorical", inputs(SAMPLES))


@pytest.fixture(scope="module")
def values(truth: Tensor) -> Tensor:
    """Descending, those that are not zero."""
    return torch.linalg.eigvalsh(truth).flip(0)[:RANK]


def complete() -> ff.parameters.Spectrum:
    return ff.parameters.spectrum(network(), CATEGORICAL, inputs(SAMPLES))


def partial(count: int) -> ff.parameters.Spectrum:
    return ff.parameters.spectrum(network(), CATEGORICAL, inputs(SAMPLES), count=count)


def test_all_eigenvalues(truth: Tensor, values: Tensor) -> None:
    """Eigenvalues of another matrix or scale, zeros among them, counts that do not add up."""
    found = complete()
    assert found.complete
    assert found.eigenvalues.dtype == torch.float64
    assert len(found.eigenvalues) == RANK == found.rank == found.most
    assert difference(found.eigenvalues, values) < ROUNDING
    assert bool((found.eigenvalues.diff() <= 0).all())
    assert (found.parameters, found.samples) == (len(truth), SAMPLES)
    assert found.zeros == len(truth) - RANK
    assert found.trace == pytest.approx(float(truth.trace()), rel=ROUNDING)
    assert float(found.residuals.abs().max()) < ROUNDING * float(values[0])
    assert found.rest_at_most <= ROUNDING * float(values[0])


def test_effective_numbers(values: Tensor) -> None:
    """exp(-sum p ln p) and (sum l)^2 / sum l^2: another logarithm, shares of another total."""
    found = complete()
    p = values / values.sum()
    assert found.effective_rank == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-9)
    ratio = float(values.sum() ** 2 / values.square().sum())
    assert found.participation_ratio == pytest.approx(ratio, rel=1e-9)
    assert 1 <= found.participation_ratio <= found.effective_rank <= RANK
    for bounds, value in (
        (found.effective_rank_bounds, found.effective_rank),
        (found.participation_bounds, found.participation_ratio),
    ):
        assert bounds == pytest.approx((value, value), rel=1e-6)


def test_effective_numbers_have_no_unit() -> None:
    """A change of the variance changes the eigenvalues and neither of the two."""
    one, other = (
        ff.parameters.spectrum(network(), ff.parameters.Gaussian(variance), inputs(SAMPLES))
        for variance in (1.0, 1e-3)
    )
    assert difference(other.eigenvalues, 1000 * one.eigenvalues) < ROUNDING
    assert other.effective_rank == pytest.approx(one.effective_rank, rel=1e-9)
    assert other.participation_ratio == pytest.approx(one.participation_ratio, rel=1e-9)


def test_equal_eigenvalues_count_each() -> None:
    """Four directions of the same information: both numbers are 4."""
    model = nn.Linear(4, 1, bias=False).double()
    x = torch.eye(4, dtype=torch.float64)
    found = ff.parameters.spectrum(model, ff.parameters.Gaussian(), x)
    assert found.effective_rank == pytest.approx(4.0)
    assert found.participation_ratio == pytest.approx(4.0)
    assert found.zeros == 0


@pytest.mark.parametrize("structure", ["diag", "block", "kfac", "full", "gram", "lowrank"])
def test_of_a_matrix(structure: Any) -> None:
    """The spectrum of a matrix that is there is that of its dense form."""
    settings = {"rank": 4} if structure == "lowrank" else {}
    matrix = ff.parameters.fisher(network(), CATEGORICAL, inputs(SAMPLES), structure, **settings)
    found = ff.parameters.spectrum(matrix)
    expected = torch.linalg.eigvalsh(matrix.to_dense()).flip(0)
    assert difference(found.eigenvalues, expected[: len(found.eigenvalues)]) < ROUNDING
    left = float(expected[len(found.eigenvalues) :].abs().sum())
    assert left < 1e-9 * float(expected[0])
    assert float(found.eigenvalues[-1]) > 0


@pytest.mark.parametrize("count", [1, 3, 6])
def test_some_by_lanczos(values: Tensor, count: int) -> None:
    """Ritz values that are not eigenvalues, residuals or bounds that promise too much."""
    found = partial(count)
    assert not found.complete
    assert len(found.eigenvalues) == count
    scale = float(values[0])
    near = (found.eigenvalues - values[:count]).abs()
    assert bool((near <= found.residuals + ROUNDING * scale).all())
    assert float(near.max()) < 1e-6 * scale
    assert found.trace == pytest.approx(float(values.sum()), rel=ROUNDING)
    assert found.rest_at_most >= float(values[count]) * (1 - 1e-6)
    assert math.isnan(found.effective_rank)
    assert math.isnan(found.participation_ratio)
    assert found.rank == count
    assert found.most == RANK
    whole = complete()
    for (low, high), value in (
        (found.effective_rank_bounds, whole.effective_rank),
        (found.participation_bounds, whole.participation_ratio),
    ):
        assert low * (1 - 1e-6) <= value <= high * (1 + 1e-6)


def test_how_many_hold_a_share(values: Tensor) -> None:
    """A share of the squares, one direction too many or too few, a share of those known alone."""
    found = complete()
    cumulative = values.cumsum(0) / values.sum()
    for share in (0.1, 0.5, 0.9, 0.999):
        assert found.count(share) == 1 + int((cumulative < share).sum())
    few = partial(2)
    assert few.count(0.9 * float(cumulative[0])) == 1
    assert few.count(1.0001 * float(cumulative[1])) is None


@pytest.mark.parametrize("make", [complete, lambda: partial(4)])
def test_directions(truth: Tensor, make: Any) -> None:
    """Directions of other eigenvalues, of another length, names mixed up."""
    found = make()
    stiff = found.stiff(3)
    assert stiff.shape == (len(truth), 3)
    assert difference(stiff.T @ stiff, torch.eye(3)) < 1e-6
    assert difference(truth @ stiff, stiff * found.eigenvalues[:3]) < 1e-5
    by_name = found.direction(0)
    for name, w in network().named_parameters():
        assert by_name[name].shape == w.shape
    first = found.layout.flatten(by_name)
    assert float((first @ stiff[:, 0]).abs()) == pytest.approx(1.0, abs=1e-6)
    if found.complete:
        sloppy = found.sloppy(2)
        last = found.eigenvalues.flip(0)[:2]
        assert sloppy.shape == (len(truth), 2)
        products = ((truth @ sloppy) * sloppy).sum(0)
        assert difference(products, last) < 1e-6
        end = found.layout.flatten(found.direction(-1))
        assert float((end @ sloppy[:, 0]).abs()) == pytest.approx(1.0, abs=1e-6)


def test_spectrum_asks_for_what_it_needs() -> None:
    model, x = network(), inputs(SAMPLES)
    with pytest.raises(TypeError, match="likelihood"):
        ff.parameters.spectrum(model)
    with pytest.raises(TypeError, match="data"):
        ff.parameters.spectrum(model, CATEGORICAL, iter([x]), count=2)
    for count in (0, -1):
        with pytest.raises(ValueError, match=r"count must .*got"):
            ff.parameters.spectrum(model, CATEGORICAL, x, count=count)
    with pytest.raises(MemoryError, match="memory_budget"):
        ff.parameters.spectrum(model, CATEGORICAL, x, memory_budget=100)
