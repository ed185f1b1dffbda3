"""Regression on labels within folds, against least squares with a constant for each fold."""

from __future__ import annotations

import math

import pytest
import torch

import fisherfast as ff
from fisherfast.data.dealing import Place
from fisherfast.estimation.derivatives import LabelsError
from fisherfast.estimation.features import Lift
from fisherfast.estimation.fold_moments import FoldMoments

N, K, F = 203, 5, 4


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def case(P: int, *, grid: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that bend with labels of unequal scale, which are not symmetric."""
    theta = numbers(N, P, seed=1).exp()
    if grid:
        theta = (theta > 1).double()
    bend = theta.square().sum(1, keepdim=True)
    x = theta @ numbers(P, K, seed=2) + bend * numbers(1, K, seed=3) + numbers(N, K)
    return x, theta * 10.0 ** torch.arange(P)


def accumulate(x: torch.Tensor, theta: torch.Tensor) -> FoldMoments:
    """In two batches."""
    moments = FoldMoments(K, 1, folds=F, labels=theta.shape[1])
    for start, stop in ((0, 80), (80, N)):
        place, order = Place.in_turn(start, stop - start, F)
        rows = slice(start, stop)
        moments.update(0, x[rows][order], Lift.none(x), theta[rows][order], place)
    return moments


@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize("half", [None, 1])
def test_regression(P, half):
    """Slope on theta alone for one parameter, from all terms for several; covariance of what theta
    and its products leave, degrees of freedom and noise. Catches the other slope, a covariance that
    contains the slope or the bend, and a forgotten degree of freedom."""
    x, theta = case(P)
    fold = torch.arange(N) % F
    rows = torch.ones(N, dtype=torch.bool) if half is None else fold % 2 == half
    constants = torch.nn.functional.one_hot(fold[rows]).double()
    constants = constants[:, constants.any(0)]
    t, y = theta[rows], x[rows]
    pairs = torch.combinations(torch.arange(P), with_replacement=True)
    products = t[:, pairs[:, 0]] * t[:, pairs[:, 1]]
    every = torch.cat([constants, t, products], 1)
    used = torch.cat([constants, t], 1) if P == 1 else every
    inverse = torch.linalg.inv(used.T @ used)
    folds = constants.shape[1]
    slope = (inverse @ used.T @ y)[folds : folds + P]
    unit = every / every.norm(dim=0)
    rest = y - unit @ torch.linalg.lstsq(unit, y).solution
    dof = int(rows.sum()) - every.shape[1]

    got = accumulate(x, theta).statistics(torch.zeros(1, P, dtype=torch.float64), half)
    assert got.dof == dof
    assert not got.paired
    torch.testing.assert_close(got.derivative, slope.T)
    torch.testing.assert_close(got.fold_derivatives.mean(0), slope.T)
    torch.testing.assert_close(got.covariance, rest.T @ rest / dof)
    noise = inverse[folds : folds + P, folds : folds + P]
    torch.testing.assert_close(got.noise, noise)


def test_bins_of_any_shape_do_not_take_bending_for_slope():
    """A bump whose place and height change, in eight cells of both: J of the height within 12 % of
    its mean (5.32; cells average over places, which takes 8 %). Catches slopes on theta alone: in a
    cell the square of the place goes with the height, and J of the height is 24 % too large."""
    g = torch.Generator().manual_seed(0)
    theta = torch.rand(16_000, 2, generator=g) * torch.tensor([12.0, 2.0]) + torch.tensor(
        [-6.0, 4.0]
    )
    away = (torch.arange(48) - 23.5 - theta[:, :1]) / 3
    x = theta[:, 1:] * torch.exp(-away.square() / 2) + torch.randn(16_000, 48, generator=g)
    found = ff.fisher_information(ff.Labelled(x, theta), max_features=64)
    assert float(found.J[1, 1]) == pytest.approx(3 * math.pi**0.5, rel=0.12)
    assert float(found.stderr[1, 1]) < 0.05 * float(found.J[1, 1])


def test_fold_derivatives_vary_like_the_slope():
    """The jackknife of the folds is the variance of the slope, c S, over 300 draws: 1 +- 0.03.
    Catches contributions that are too large by the number of folds."""
    ratios = []
    for seed in range(300):
        theta = numbers(N, 1, seed=seed)
        moments = accumulate(numbers(N, K, seed=1000 + seed) + theta, theta)
        got = moments.statistics(torch.zeros(1, 1, dtype=torch.float64))
        variance = got.fold_derivatives[..., 0].var(0) / F
        ratios.append(variance / got.covariance.diagonal() / got.noise[0, 0])
    assert abs(float(torch.stack(ratios).mean()) - 1) < 0.1


def test_two_values_have_no_square():
    """Catches a division by the scatter of a square that is linear in theta."""
    x, theta = case(1, grid=True)
    moments = accumulate(x, theta)
    assert moments.statistics(torch.zeros(1, 1, dtype=torch.float64)).dof == N - F - 1
    with pytest.raises(LabelsError, match="theta must vary in all of its 2 directions among the"):
        accumulate(x, theta.repeat(1, 2)).statistics(torch.zeros(1, 2, dtype=torch.float64))


def test_samples_about_the_regression():
    """Their mean square is the covariance. Catches residuals that still contain the slope."""
    x, theta = case(1)
    moments = accumulate(x, theta)
    fold = torch.arange(N) % F
    features = moments.samples_of([x], [fold], theta).features
    covariance = moments.statistics(torch.zeros(1, 1, dtype=torch.float64)).covariance
    mean = features.T @ features / N
    torch.testing.assert_close(mean, covariance, rtol=0.1, atol=0.1)
