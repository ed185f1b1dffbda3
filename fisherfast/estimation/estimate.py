r"""J of B sets of features and its error: from the derivatives of the folds, or from the score.

With s the score and s_hat = D^T R^-1 f its best linear prediction from the features, J = Cov(s_hat)
= V - E[e e^T], e = s - s_hat. The residual of a fit is too small by nu / (nu - k_eff): the adjusted
R^2. Derived in docs/theory.md, section 13.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfast.estimation.derivatives import FoldScore
from fisherfast.estimation.fold_moments import FoldStatistics
from fisherfast.estimation.leverage import Seen, inverse_excess, left_out_score
from fisherfast.estimation.variance import (
    covariance_variance,
    entry_product,
    independent_variance,
    pair_product,
)

Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Estimate:
    """J of B sets of features: the first k of K for each k, or those of each position of a map.
    Float64, in 1/theta^2.

    Attributes:
        J: [B, P, P] bias-corrected; may be negative, is never clipped.
        variance: [B, P, P] of its entries.
        replicates: [B, F, P, P] the estimate without each fold (from a score, its part that is
            known by fold, up to a constant); their jackknife is in the variance.
        doubt: [B, P, P] half of the change of J by the kept samples, which is part of its error.
        left_out: [B, F, P] diagonal of the fold statistic without each fold: the jackknife of a
            gain.
        useless: [B, P] the size M in 2 M^2 dk / nu^2, the variance that dk features without
            information add to J; zero where the jackknife includes it.
    """

    J: Tensor
    variance: Tensor
    replicates: Tensor
    doubt: Tensor
    left_out: Tensor
    useless: Tensor


def estimate(
    half: Tensor,
    fold_half: Tensor,
    naive: Tensor,
    effective: Tensor,
    product: Product,
    statistics: FoldStatistics,
    seen: Seen | None,
) -> Estimate:
    """Estimate J and its variance, as in `fisher_curve`.

    Args:
        half: y [k, P] or [B, k, P], the whitened derivative.
        fold_half: y_f [k, F, P] or [B, k, F, P], that of each fold.
        naive: [B, P, P] D^T R^-1 D.
        effective: [B] k_eff.
        product: sums l r^T over features, [B, F, P, P].
        statistics: of the features.
        seen: kept samples in the B systems, which correct J; or None.
    """
    if statistics.score is None:
        return _from_folds(fold_half, naive, effective, product, statistics, seen)
    products = product(half[..., None, :], fold_half)
    return _from_score(products, naive, effective, statistics.score, statistics.dof, seen)


def _from_folds(
    fold_half: Tensor,
    naive: Tensor,
    effective: Tensor,
    product: Product,
    statistics: FoldStatistics,
    seen: Seen | None,
) -> Estimate:
    """Estimate J for every source but the score."""
    dof, noise = statistics.dof, statistics.noise
    shrink = ((dof - effective - 1) / dof)[:, None, None]
    folds = fold_half.shape[-2]
    total = fold_half.sum(-2, keepdim=True)
    own = product(fold_half, fold_half)
    rest = total - fold_half
    without = product(rest, rest) - (own.sum(1, keepdim=True) - own)
    replicates = shrink[:, None] * without / ((folds - 1) * (folds - 2))
    if statistics.paired:
        pairs = product(total, total)[:, 0] - own.sum(1)
        J = shrink * pairs / (folds * (folds - 1))
    else:
        J = shrink * naive - effective[:, None, None] * noise
    doubt = torch.zeros_like(J)
    useless = shrink[..., 0] * torch.diagonal(naive, dim1=1, dim2=2)
    if seen is not None:
        excess = inverse_excess(seen, effective, dof)
        before, J = J, excess @ J @ excess.mT
        doubt = (J - before) / 2
        replicates = excess[:, None] @ replicates @ excess.mT[:, None]
        useless = useless * torch.diagonal(excess, dim1=1, dim2=2).square()
    if statistics.paired:
        variance = replicates.var(1, correction=0) * (folds - 1)
        variance = variance + covariance_variance(J, dof, effective)
    else:
        variance = independent_variance(J, dof, noise, effective)
    left_out = torch.diagonal(replicates, dim1=2, dim2=3)
    return Estimate(J, variance + doubt.square(), replicates, doubt, left_out, useless)


def _from_score(
    fold_products: Tensor,
    naive: Tensor,
    effective: Tensor,
    score: FoldScore,
    dof: float,
    seen: Seen | None,
) -> Estimate:
    r"""Estimate J from fold_products [B, F, P, P] = y^T y_f, whose mean is naive.

    .. math::
        J = V - (V - J_\text{naive}) \frac{\nu}{\nu - k_\text{eff}}

    The error of J is that of the mean of u = s s_hat^T + s_hat s^T - s_hat s_hat^T: a small error
    of the readout changes the residual only to second order. The means of s s_hat^T and s s^T are
    known by fold, but not that of s_hat s_hat^T, which would take one matrix per fold. Its part
    that follows from the other two for Gaussian s_hat and e,

    .. math:: \hat s \hat s^T \approx 2 R\, s \hat s^T - R^2 s s^T, \qquad R = J / V,

    is taken from the folds, and the rest from Gaussian theory: the rest is zero for R = 0 and 1,
    and at most 9 % of the variance in between.
    """
    V = score.covariance
    residual = (V - naive) * (dof / (dof - effective))[:, None, None]
    J = V - residual
    share = _explained(J, V)
    by_fold = (1 - share)[:, None, None, None] * (fold_products + fold_products.mT)
    by_fold = by_fold + share.square()[:, None, None, None] * score.folds
    folds = by_fold.shape[1]
    replicates = -by_fold / (folds - 1)
    jackknife = replicates.var(1, correction=0) * (folds - 1)
    k, R = effective[:, None, None], share[:, None, None]
    E = _not_negative(residual)
    theory = _theory(_not_negative(J), E, R, k, dof, entry_product)
    least = _of_useless(E, k, dof, entry_product)
    if seen is not None:
        J = left_out_score(seen, naive, effective, V, dof)
    variance = (theory + jackknife).maximum(least)
    left_out = _gains_of_score(fold_products, share[-1])
    zero = torch.zeros_like(J)
    return Estimate(J, variance, replicates, zero, left_out, zero.diagonal(dim1=1, dim2=2))


def _gains_of_score(products: Tensor, share: Tensor) -> Tensor:
    """Compute replicates [K, F, P] whose jackknife is the variance of a gain J(k') - J(k).

    A gain is the mean of 2 e d, with d the change of the prediction by the new features and e the
    residual before; the folds give 2 s d, whose variance is larger by V / E = 1 / (1 - R). R at the
    largest k is used for all.
    """
    folds = products.shape[1]
    scale = -2 * (1 - share).sqrt() / (folds - 1)
    return scale * torch.diagonal(products, dim1=2, dim2=3)


def score_theory(J: Tensor, V: Tensor, effective: float, dof: float) -> tuple[Tensor, Tensor]:
    """Compute the part of the covariance [P, P, P, P] of the entries of one J [P, P] that is not in
    the jackknife of its replicates, and a lower limit of their sum."""
    share = float(_explained(J[None], V))
    J, E = _not_negative(J), _not_negative(V - J)
    theory = _theory(J, E, share, effective, dof, pair_product)
    return theory, _of_useless(E, effective, dof, pair_product)


def _explained(J: Tensor, V: Tensor) -> Tensor:
    """Compute tr(V^-1 J) / P [B], between 0 and 1; 0 for a score without variance."""
    scale = V.diagonal().clamp_min(0).sqrt()
    units = torch.where(scale > 0, scale, 1).reciprocal()
    units = units[:, None] * units  # pinv drops small eigenvalues, which must not depend on units
    ratio = torch.linalg.pinv(V * units, hermitian=True) @ (J * units)
    return ratio.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(0, 1)


def _theory(
    J: Tensor, E: Tensor, share: Tensor | float, k: Tensor | float, nu: float, product: Product
) -> Tensor:
    """Compute the Gaussian variance of J minus that of the part known by fold.

    With s = s_hat + e, u is s_hat s_hat^T plus the cross terms s_hat e^T + e s_hat^T; the folds
    give a s_hat s_hat^T + b cross terms + c e e^T with a = 1 + (1 - R)^2, b = 1 - R + R^2, c = R^2,
    including the noise of the readout.
    """
    a, b, c = 1 + (1 - share) ** 2, 1 - share + share**2, share**2
    first = (1 - a**2) * product(J, J) + 2 * (1 - b**2) * product(J, E) - c**2 * product(E, E)
    readout = 2 * (1 - share) ** 2 * product(E, J + E) * (k / nu)
    return (first - readout) / nu + _of_useless(E, k, nu, product)


def _of_useless(E: Tensor, k: Tensor | float, nu: float, product: Product) -> Tensor:
    """Compute the variance from fitting k features to noise."""
    return product(E, E) * (k / (nu * (nu - k)))


def _not_negative(matrix: Tensor) -> Tensor:
    diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1).clamp_min(0)
    return torch.diagonal_scatter(matrix, diagonal, dim1=-2, dim2=-1)
