"""Fold moments: they equal what a loop over samples gives, merge, and do not depend on batches."""

from __future__ import annotations

import pytest
import torch

from fisherfast.estimation.fold_moments import FoldMoments

FOLDS = 4


def accumulate(samples: list[torch.Tensor], batch: int, paired: bool = False) -> FoldMoments:
    moments = FoldMoments(samples[0].shape[1], len(samples), folds=FOLDS, paired=paired)
    for start in range(0, max(map(len, samples)), batch):
        rows = [x[start : start + batch] for x in samples]
        for condition, x in enumerate(rows):
            moments.update(condition, x)
        if paired:
            moments.update_products(rows)
    return moments


@pytest.fixture
def samples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, generator=generator, dtype=torch.float64) + 2 for n in (37, 41)]


CONTRAST = torch.tensor([[-2.0], [2.0]], dtype=torch.float64)


@pytest.mark.parametrize("half", [None, 0, 1])
def test_statistics_equal_a_loop_over_cells(samples, half):
    """Catches a fold dealt wrongly, a mean of means, a covariance about the wrong mean, a wrong nu,
    and halves that share samples: the lower bound would not be honest."""
    statistics = accumulate(samples, 100).statistics(CONTRAST, half)
    folds = range(FOLDS) if half is None else range(half, FOLDS, 2)
    cells = [[x[f::FOLDS] for f in folds] for x in samples]
    scatter = sum((c - c.mean(0)).T @ (c - c.mean(0)) for c in cells[0] + cells[1])
    seen = [torch.cat(own) for own in cells]
    dof = sum(map(len, seen)) - 2 * len(folds)
    assert statistics.dof == dof
    torch.testing.assert_close(statistics.covariance, scatter / dof)
    means = [x.mean(0)[:, None] for x in seen]
    torch.testing.assert_close(statistics.derivative, 2 * (means[1] - means[0]))
    for f, minus, plus in zip(range(len(folds)), *cells, strict=True):
        change = 2 * (plus.mean(0) - minus.mean(0))[:, None]
        torch.testing.assert_close(statistics.fold_derivatives[f], change)
    noise = 4 * sum(1 / len(x) for x in seen)
    assert float(statistics.noise) == pytest.approx(noise)


def test_batches_and_the_pilot_do_not_matter(samples):
    """Catches folds dealt within a batch instead of over the whole stream, and a covariance that
    keeps the offset of the pilot."""
    whole = accumulate(samples, 100).statistics(CONTRAST)
    cut = accumulate([x - 5 for x in samples], 3).statistics(CONTRAST)
    torch.testing.assert_close(cut.covariance, whole.covariance)
    torch.testing.assert_close(cut.derivative, whole.derivative)
    torch.testing.assert_close(cut.fold_derivatives, whole.fold_derivatives)


def test_pairs_with_the_same_noise_count_once(samples):
    """Catches nu = 2 (T - F) for pairs: identical noise has rho = 1 and half the degrees of
    freedom."""
    x = samples[0]
    paired = accumulate([x, x + 1], 100, paired=True).statistics(CONTRAST)
    assert paired.dof == pytest.approx(len(x) - FOLDS)


def test_pairs_with_own_noise_count_twice():
    """Catches an inflation that is always on: rho is about 0.01 here."""
    generator = torch.Generator().manual_seed(2)
    x = [torch.randn(10_000, 4, generator=generator) for _ in range(2)]
    paired = accumulate(x, 10_000, paired=True).statistics(CONTRAST)
    assert paired.dof == pytest.approx(2 * (10_000 - FOLDS), rel=1e-3)


def test_empty_fold_is_an_error():
    """Catches a division by zero that would end as NaN."""
    with pytest.raises(ValueError, match=r"at least 4 samples \(one per fold\), got 3"):
        accumulate([torch.ones(3, 2), torch.ones(3, 2)], 8).statistics(CONTRAST)


@pytest.mark.parametrize("folds", [2, 5])
def test_folds_must_make_two_halves(folds):
    """Catches halves of different size."""
    with pytest.raises(ValueError, match=f"folds must be even and at least 4, got {folds}"):
        FoldMoments(3, 2, folds=folds)
