r"""Corrections from kept samples, where Gaussian theory would assume a distribution.

.. math::
    h_i = t_i^T t_i / \nu, \qquad t_i = L^{-1} f_i, \qquad g_i = 1 / (1 - h_i)

The leverage h_i is the influence of sample i on the covariance that whitens it. Leaving the sample
out changes its number u_i = W^T f_i to g_i u_i, without another factorisation. A few hundred kept
samples are enough, because only averages over leverages are used (docs/theory.md, 22).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfast.estimation.fold_moments import SampleFeatures
from fisherfast.estimation.variance import covariance_of_entries, pair_product

MOST_LEVERAGE = 1 - 1e-6
"""Upper limit of leverages: a sample that alone determines a feature has leverage 1, and without it
the covariance is singular (`left_out`)."""

OWN_FEATURE = 0.5
"""Leverage of a sample that makes up half of a feature: without it the other samples would be
scaled up."""

NOTHING = 1e-9
"""Relative variance below which a direction is rounding."""

MOST_PAIRED = 512
"""Most samples of which all pairs are used."""

GAUSSIAN_SPARE = 4
"""The 4 in nu - k - 4, which is (nu - 2) times mean(g) / mean(g^2) for Gaussian features."""


@dataclass(frozen=True)
class Seen:
    """Some samples in B systems: the first k features of a curve for each k, or the positions of a
    map.

    Attributes:
        leverage: h [m, B].
        prediction: u [P, m, B], numbers W^T f of each system.
        score: [m, P], or None.
    """

    leverage: Tensor
    prediction: Tensor
    score: Tensor | None = None


def seen_along_curve(samples: SampleFeatures, readout: Tensor, half: Tensor, dof: float) -> Seen:
    """Compute leverage and prediction by the first k of K features, for every k.

    Args:
        samples: m of them, with K features.
        readout: L^-1 [K, K].
        half: Y [K, P].
        dof: nu.

    Cost: m K (K + P) operations.
    """
    whitened = samples.whitened(readout)
    prediction = torch.stack([(whitened * y).cumsum(1) for y in half.T.to(whitened)])
    return Seen(leverage(whitened.square().cumsum(1), dof), prediction, samples.score)


def pair_correlations(whitened: Tensor, conditions: int) -> Tensor:
    r"""Mean correlation [C, C] of a whitened feature with itself between paired conditions.

    .. math:: \rho_{ab} = \operatorname{tr}(S^{-1} C_{ab}) / k

    does not depend on the basis of the features. The mean over the features themselves does where
    conditions have more in common than their noise, as in sorted files.

    Args:
        whitened: [C m, k], of the same m samples under one condition after the other.
        conditions: C.
    """
    rows = whitened.double().reshape(conditions, -1)
    size = rows.norm(dim=1)
    return (rows @ rows.T / (size[:, None] * size)).nan_to_num(0.0)


def leverage(squares: Tensor, dof: float) -> Tensor:
    """Compute h of samples from t^T t."""
    return (squares / dof).clamp_max(MOST_LEVERAGE)


def left_out(h: Tensor) -> Tensor:
    """Compute g = 1 / (1 - h), by which leaving a sample out multiplies its number; zero for a
    sample that alone makes up a feature, which says nothing about the others."""
    return torch.where(h < MOST_LEVERAGE, 1 / (1 - h), 0.0)


def inverse_excess(seen: Seen, effective: Tensor, dof: float) -> Tensor:
    r"""Compute the factor that multiplies J from both sides, in addition to the Gaussian
    correction.

    The inverse of an estimated covariance is too large by a factor c. From 1 = E[f f^T S^-1] =
    c E[1 - h], with samples weighted by the square of their left-out readout,

    .. math:: 1 / c = \frac{\sum_i g_i u_i^2}{\sum_i g_i^2 u_i^2}

    which is (nu - k - 4) / (nu - 2) for Gaussian features, and smaller if few samples determine the
    covariance: units that fire rarely, a common brightness, heavy tails.

    Args:
        seen: samples in B systems.
        effective: k_eff [B].
        dof: nu.

    Returns:
        G [B, P, P]: J is G J G^T.
    """
    g, u = left_out(seen.leverage), seen.prediction
    once = _weighted_products(g * u, u)
    counted = torch.where(g > 0, g, 1.0) * u  # J of a sample that is alone counts as nothing
    twice = _weighted_products(counted, counted)
    expected = (dof - 2) / (dof - effective - GAUSSIAN_SPARE).clamp_min(1)
    return _root_of_ratio(once, twice) * expected.sqrt()[:, None, None]


def _weighted_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum l r^T over samples, [B, P, P] float64, with l [P, m, B] or [P, m, 1] and r [P, m, B]."""
    rows = [torch.stack([(a * b).sum(0, dtype=torch.float64) for b in right]) for a in left]
    return torch.stack(rows).permute(2, 0, 1)


def _root_of_ratio(above: Tensor, below: Tensor) -> Tensor:
    """Compute (A B^-1)^(1/2) [K, P, P] of positive matrices; for G A G^T and G B G^T the result is
    G (A B^-1)^(1/2) G^-1. It is the identity in directions where B is zero."""
    if above.shape[-1] == 1:
        return torch.where(below > 0, above / below, 1.0).sqrt()
    scale = below.diagonal(dim1=1, dim2=2)
    scale = torch.where(scale > 0, scale, 1.0).rsqrt()
    units = scale[:, :, None] * scale[:, None, :]
    above, below = above * units, below * units
    values, vectors = torch.linalg.eigh(below)
    # zero directions stay unchanged: parameters may be copies of each other
    whitening = vectors * torch.where(values > NOTHING, values, torch.inf).rsqrt()[:, None, :]
    ratios, turned = torch.linalg.eigh(whitening.mT @ above @ whitening)
    turned = whitening @ turned
    change = torch.where(ratios > 0, ratios, 1.0).sqrt() - 1
    G = (below @ turned * change[:, None, :]) @ turned.mT
    G = G + torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    return G * (scale[:, None, :] / scale[:, :, None])


def left_out_score(seen: Seen, naive: Tensor, effective: Tensor, V: Tensor, dof: float) -> Tensor:
    r"""Estimate J [B, P, P] from a score whose residual may depend on the leverage.

    The prediction of sample i by a readout learned without it is s_hat_i - h_i g_i r_i with
    r = s - s_hat, so

    .. math:: J = J_\text{naive} - \frac{1}{n} \sum_i h_i g_i\, s_i r_i^T

    The adjusted R^2 replaces h_i g_i by its mean k / (nu - k), which is right only for residuals of
    equal size. The kept samples correct for the difference. A sample that makes up more than half
    of a feature cannot be predicted without it: its prediction is zero.

    Args:
        seen: samples in B systems, with the score.
        naive: [B, P, P].
        effective: k_eff [B].
        V: [P, P] covariance of the score.
        dof: nu.
    """
    assert seen.score is not None
    h, u = seen.leverage, seen.prediction
    s, mean = seen.score.T.to(u)[..., None], effective / (dof - effective)
    removed = torch.where(h <= OWN_FEATURE, h / (1 - h) * (s - u), u)
    found = _weighted_products(s, removed - mean.to(h) * (s - u)) / len(h)
    return naive - (V - naive) * mean[:, None, None] - (found + found.mT) / 2


def score_covariance(
    whitened: Tensor, prediction: Tensor, score: Tensor, J: Tensor, naive: Tensor, dof: float
) -> Tensor:
    r"""Compute the covariance [P, P, P, P] of the entries of J from a score.

    To first order J is the mean of s s_hat^T + s_hat s^T - s_hat s_hat^T; the noise of the readout
    adds `noise_covariance`.

    Args:
        whitened: t [m, k] of some samples.
        prediction: in-sample s_hat [m, P] of these.
        score: s [m, P].
        J, naive: [P, P] with and without correction.
        dof: nu.
    """
    size = (J.diagonal() / naive.diagonal()).nan_to_num(0.0).clamp(0, 1).sqrt()
    free = prediction * size  # corrected for the noise of the readout
    change = score[:, :, None] * free[:, None, :]
    change = change + change.mT - free[:, :, None] * free[:, None, :]
    return covariance_of_entries(change) / dof + noise_covariance(whitened, score - prediction, dof)


def score_corrections(whitened: Tensor, prediction: Tensor, score: Tensor, dof: float) -> Tensor:
    """Compute the contribution [m, P, P] of each sample to the correction of `left_out_score`, with
    all features."""
    h = leverage(whitened.square().sum(1), dof)
    more = h / (1 - h) - (h / (1 - h)).mean()
    change = more[:, None, None] * score[:, :, None] * (score - prediction)[:, None, :]
    return (change + change.mT) / 2


def noise_covariance(whitened: Tensor, rest: Tensor, dof: float) -> Tensor:
    r"""Compute the covariance [P, P, P, P] of J that fitting features to a noisy score adds.

    .. math:: J = \frac{1}{\nu^2} \sum_{i \ne j} t_i^T t_j \frac{g_i + g_j}{2}\, e_i e_j^T

    Args:
        whitened: t [m, k] of some samples.
        rest: r [m, P] of the same samples, s - s_hat.
        dof: nu.

    Cost: m^2 (k + P^2) operations.
    """
    step = -(-len(rest) // MOST_PAIRED)
    whitened, rest = whitened[::step], rest[::step]
    g = left_out(leverage(whitened.square().sum(1), dof))
    m, P = rest.shape
    kernel = (whitened @ whitened.T) * (g[:, None] + g) / (2 * dof)
    kernel = kernel.square()
    kernel.fill_diagonal_(0.0)
    squares = (rest[:, :, None] * rest[:, None, :] * g[:, None, None]).flatten(1)
    crossed = (squares.T @ kernel @ squares).reshape(P, P, P, P) / (m * (m - 1))
    return (crossed.permute(0, 2, 1, 3) + crossed.permute(0, 2, 3, 1)).double()


def excess_covariance(u: Tensor, moved: Tensor | None, J: Tensor, spare: float) -> Tensor:
    r"""Compute how much the features' fourth moment adds to the covariance [P, P, P, P] of the
    entries of J, compared with Gaussian features: negative for light tails. One standard error of
    the result is added, because most data sets contain fewer extreme samples than expected.

    Args:
        u: [m, P] numbers W^T f of samples, weighted by the root of g.
        moved: [m, P, P] their tangents, parameter first, whose noise is not independent of that of
            the covariance; None for none.
        J: [P, P].
        spare: degrees of freedom that remain, nu - k_eff - 3.
    """
    seen = u.square().mean(0)
    size = torch.where(
        seen > 0, J.diagonal().clamp_min(0) / seen, 0.0
    ).sqrt()  # of W, corrected for noise
    u = u * size
    change = u[:, :, None] * u[:, None, :]
    mean = change.mean(0)
    fourth = covariance_of_entries(change)
    excess = (1 + _own_error(change - mean, mean)) * fourth - pair_product(mean, mean)
    if moved is not None:
        both = moved * size
        both = both + both.mT
        crossed = torch.einsum("mpq,mrs->pqrs", both - both.mean(0), change - mean) / len(u)
        excess = excess - crossed - crossed.permute(2, 3, 0, 1)
    return excess / spare


def _own_error(changes: Tensor, mean: Tensor) -> float:
    """Estimate the relative error of the mean square of changes [m, P, P], which is large if one
    sample dominates it.

    Args:
        changes: about their mean.
        mean: [P, P], whose diagonal sets the unit of each parameter."""
    size = mean.diagonal()
    unit = torch.where(size > 0, size, torch.inf).rsqrt()
    squares = (changes * torch.outer(unit, unit)).square().sum((1, 2))
    total = squares.sum()
    return float(((squares - squares.mean()).square().sum().sqrt() / total).nan_to_num(0.0))
