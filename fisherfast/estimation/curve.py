r"""The curve J(k) of the Fisher information of the first k features, with its error bars; and the
honest lower bound, from a readout learned on one half of the samples and measured on the other.

Every formula is derived in docs/theory.md. Notation: S [k, k] is the covariance of the features
scaled to unit diagonal, R = S + ridge, L L^T = R, D [k, P] the derivative of the mean, Y = L^-1 D.
Because the leading block of L factors the leading block of R, the running sums of y_i y_i^T are the
linear Fisher information of the first k features, for every k at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherfast.estimation.estimate import Estimate, estimate, score_theory
from fisherfast.estimation.fold_moments import FoldStatistics, SampleFeatures, pair_inflation
from fisherfast.estimation.leverage import (
    pair_correlations,
    seen_along_curve,
)
from fisherfast.estimation.ridge import (
    FACTOR_ROUNDING,
    LIFT_RIDGE,
    MOSTLY_RIDGE,
    as_vector,
    with_ridge,
)
from fisherfast.estimation.variance import (
    independent_covariance,
    jackknife_covariance,
    pair_product,
)

SMALL_TRIANGLE = 128
"""Size up to which a triangle is inverted by a plain solve."""

SPARE_DOF = 4
"""Degrees of freedom required beyond k_eff, so that the variance of an inverse covariance exists
(nu - k - 3 > 0)."""

VARIANCE_FLOOR = 0.1
"""Variance below which a feature counts as rare, relative to the median feature of a half."""

BOUND_RIDGE = 1e-8
"""Ridge of the P readouts, needed only if readouts are copies of each other (one output, two
parameters)."""


@dataclass(frozen=True)
class FisherCurve(Estimate):
    """Linear Fisher information J of the first k features, k = 1..K. Float64, in 1/theta^2.

    Attributes:
        naive: [K, P, P] Y^T Y, uncorrected.
        effective_dim: [K] k_eff, the effective number of features after the ridge.
        ridge_share: [K] q_i, the part of whitened feature i that is ridge.
        hidden: [K, P] information that the ridge may hide, to first order in q.
        readout: [K, K] L^-1 in the scale of the features: whitened features are readout @ f.
        half: [K, P] Y, the derivative of the whitened features.
        statistics: the statistics it was computed from.
    """

    naive: Tensor
    effective_dim: Tensor
    ridge_share: Tensor
    hidden: Tensor
    readout: Tensor
    half: Tensor
    statistics: FoldStatistics

    def __len__(self) -> int:
        return len(self.J)

    @property
    def stderr(self) -> Tensor:
        """Standard errors [K, P, P] of J."""
        return self.variance.sqrt()

    def readout_of(self, k: int) -> Tensor:
        """Compute W = R^-1 D [k, P] of the first k features, in their scale."""
        leading = self.readout[:k, :k]
        return leading.T @ self.half[:k]

    def rounding(self, k: int, relative: float) -> float:
        """Estimate the fraction of the information that may come from rounding of the derivative,
        the largest over parameters.

        Args:
            k: number of features.
            relative: rounding of an entry of the derivative.
        """
        columns = self.readout[:k, :k].square().sum(0)
        error = relative**2 * (columns @ self.statistics.derivative[:k].square())
        J = self.naive[k - 1].diagonal()
        return float(torch.where(J > 0, error / J, 0.0).max())

    def error_covariance(self, k: int) -> Tensor:
        """Compute the covariance [P, P, P, P] of the errors of the entries of J(k); its diagonal is
        the square of stderr."""
        J, effective = self.J[k - 1], float(self.effective_dim[k - 1])
        dof, noise = self.statistics.dof, self.statistics.noise
        empirical = jackknife_covariance(self.replicates[k - 1])
        if self.statistics.score is not None:
            theory, least = score_theory(J, self.statistics.score.covariance, effective, dof)
            return at_least(empirical + theory, least)
        empirical = torch.einsum("pq,rs->pqrs", self.doubt[k - 1], self.doubt[k - 1]) + (
            empirical if self.statistics.paired else 0.0
        )
        if self.statistics.paired:
            # J may be slightly negative in one direction, where the variance would be negative too
            errors = empirical + pair_product(J, J) / (dof - effective - 3)
            return at_least(errors, torch.zeros_like(errors))
        return empirical + independent_covariance(J, dof, noise, effective)


class SingularCovarianceError(ValueError):
    """A feature is linear in the features before it, and no ridge separates them.

    Attributes:
        feature: its number, counted from 1.
    """

    def __init__(self, feature: int, size: int, ridge: float) -> None:
        super().__init__(
            f"covariance must be positive definite, got a singular one at feature {feature} of"
            f" {size}: add a ridge (now {ridge}), or drop features that are linear in others"
        )
        self.feature = feature


def fisher_curve(statistics: FoldStatistics, ridge: float | Tensor = LIFT_RIDGE) -> FisherCurve:
    r"""Compute the whole curve J(k) from one Cholesky factorisation.

    .. math::
        k_\text{eff}(k) = k - \sum_{i \le k} q_i, \qquad h = (\nu - k_\text{eff} - 1) / \nu

        \text{independent:}\quad J = h \, J_\text{naive} - k_\text{eff} \, c \qquad
        \text{paired, pathwise:}\quad J = h \, \frac{\sum_{f \ne g} y_f y_g^T}{F (F - 1)} \qquad
        \text{score:}\quad J = V - (V - J_\text{naive}) \, \nu / (\nu - k_\text{eff})

    Args:
        statistics: of K features, each with positive variance.
        ridge: Lambda, relative to the variance of each feature; one number or [K].

    Raises:
        SingularCovarianceError: a feature is linear in those before it.
        ValueError: too few samples were seen for K features.

    Cost: K^3 operations. Derived in docs/theory.md, sections 4 to 6, 12 and 13.
    """
    solved = whitened(statistics.covariance, statistics.columns, ridge)
    half, fold_half = statistics.split(solved.columns)
    naive = _fold_products(half, half)
    effective = (1 - solved.ridge_share).cumsum(0)
    if statistics.samples is not None and statistics.samples.conditions > 1:
        statistics = _with_pairs(statistics, statistics.samples, solved.inverse)
    if float(statistics.dof - effective[-1]) < SPARE_DOF:
        raise ValueError(
            f"degrees of freedom must exceed the {len(half)} features by {SPARE_DOF},"
            f" got {statistics.dof:.0f}: use more samples or fewer features"
        )
    seen = None
    if statistics.samples is not None:
        seen = seen_along_curve(statistics.samples, solved.inverse, half, statistics.dof)
    found = estimate(half, fold_half, naive, effective, _fold_products, statistics, seen)
    return FisherCurve(
        **vars(found),
        naive=naive,
        effective_dim=effective,
        ridge_share=solved.ridge_share,
        hidden=_hidden(statistics, solved).cumsum(0),
        readout=solved.inverse,
        half=half,
        statistics=statistics,
    )


def _with_pairs(
    statistics: FoldStatistics, samples: SampleFeatures, readout: Tensor
) -> FoldStatistics:
    """The same with nu from the correlations of whitened features, readout L^-1 [k, k]."""
    rho = pair_correlations(samples.whitened(readout), samples.conditions)
    inflation = pair_inflation(rho)
    dof = statistics.dof * statistics.pair_inflation / inflation
    return replace(statistics, dof=dof, pair_inflation=inflation)


def cross_fitted_bound(
    half_a: FoldStatistics,
    half_b: FoldStatistics,
    ridge: float | Tensor = LIFT_RIDGE,
    more: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Compute the honest lower bound: learn the readout on one half, measure it on the other, swap
    the halves, and average.

    For any readout W = R_A^-1 D_A [k, P], the linear Fisher information of the P numbers W^T f is a
    lower bound. It is measured on samples that W was not learned on, so only k = P features need a
    correction, and without the ridge that W was learned with.

    Args:
        half_a, half_b: statistics of the same features.
        ridge: of the readout, see `linear_readout`.
        more: readouts [k, m] that are read beside those of each half, learned without the samples
            of the other one; empty for none.

    Returns:
        lower [P, P] and its standard error [P, P], in 1/theta^2.
    """
    measured = []
    for number, (learn, test) in enumerate(((half_a, half_b), (half_b, half_a))):
        readout = linear_readout(learn, ridge)
        seen = test.project(torch.cat([readout, more[number]], 1) if more else readout)
        varied = (seen.covariance.diagonal() > 0).nonzero()[:, 0]
        measured.append(_last_or_zero(seen.select(varied)))
    (J_a, variance_a), (J_b, variance_b) = measured
    return (J_a + J_b) / 2, ((variance_a + variance_b) / 4).sqrt()


def _last_or_zero(statistics: FoldStatistics) -> tuple[Tensor, Tensor]:
    """Return J and its variance [P, P] of all features of the statistics; zero without features."""
    if len(statistics.derivative) == 0:
        zero = torch.zeros_like(statistics.noise)
        return zero, zero
    ridge = BOUND_RIDGE
    while True:
        try:
            curve = fisher_curve(statistics, ridge)
        except SingularCovarianceError:  # readouts that are the same except for rounding
            ridge *= 10
        else:
            return curve.J[-1], curve.stderr[-1].square()


def linear_readout(statistics: FoldStatistics, ridge: float | Tensor = LIFT_RIDGE) -> Tensor:
    """Compute W = R^-1 D [k, P] in the scale of the features: the readout that attains the linear
    information.

    Any readout gives a valid bound, so this one is cautious. A feature that hardly varies in these
    samples is not scaled up to unit variance, and gets a larger ridge: it may vary strongly in
    other samples, where a large weight on it would add much noise. If rounding makes R indefinite,
    the ridge grows until R is positive definite.

    Args:
        statistics: of k features.
        ridge: one number or [k], relative to the variance of each feature.
    """
    variance = statistics.covariance.diagonal()
    live = variance > 0
    floor = VARIANCE_FLOOR * (variance[live].median() if bool(live.any()) else 1.0)
    ridge = as_vector(ridge, variance)
    ridge = torch.where(variance < floor, ridge.clamp_min(LIFT_RIDGE), ridge)
    scale = torch.where(live, variance.clamp_min(floor), torch.inf).rsqrt()
    scaled = (scale[:, None] * statistics.covariance * scale).clamp(-1, 1)
    factor, failed = torch.linalg.cholesky_ex(with_ridge(scaled, ridge))
    while int(failed):
        ridge = (10 * ridge).clamp_min(FACTOR_ROUNDING * len(variance))
        factor, failed = torch.linalg.cholesky_ex(with_ridge(scaled, ridge))
    return scale[:, None] * torch.cholesky_solve(scale[:, None] * statistics.derivative, factor)


@dataclass(frozen=True)
class Whitened:
    """A factored covariance, R = s S s + Lambda = L L^T with s the inverse standard deviations.

    Attributes:
        columns: [k, m] L^-1 s times the given columns.
        inverse: [k, k] L^-1 s.
        ridge_share: [k] q.
    """

    columns: Tensor
    inverse: Tensor
    ridge_share: Tensor


def whitened(covariance: Tensor, columns: Tensor, ridge: float | Tensor) -> Whitened:
    """Whiten columns [k, m] by a covariance [k, k] with a ridge relative to its diagonal.

    Raises:
        SingularCovarianceError: a pivot is zero within rounding.

    Cost: k^3 multiply-adds.
    """
    ridge = as_vector(ridge, covariance.diagonal())
    scale = covariance.diagonal().rsqrt()
    R = with_ridge(scale[:, None] * covariance * scale, ridge)
    factor, failed = torch.linalg.cholesky_ex(R)
    pivots = factor.diagonal().square()
    size = len(pivots)
    # comparisons with NaN are false, so pivots after a failure count as failed
    sound = pivots > size * torch.finfo(torch.float64).eps
    if int(failed) or not bool(sound.all()):
        first = int(failed) or size + 1
        bad = (~sound).nonzero()[:1, 0].tolist()
        raise SingularCovarianceError(min([first, *(i + 1 for i in bad)]), size, float(ridge.max()))
    inverse = inverse_of_lower(factor)
    share = inverse.square() @ ridge
    inverse = inverse * scale
    return Whitened(inverse @ columns, inverse, share)


def inverse_of_lower(factor: Tensor) -> Tensor:
    """Invert a lower triangle L [k, k] by halves, in a third of the operations of a solve with the
    unit matrix."""
    size = len(factor)
    if size <= SMALL_TRIANGLE:
        unit = torch.eye(size, dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, unit, upper=False)
    half = size // 2
    inverse = torch.zeros_like(factor)
    inverse[:half, :half] = inverse_of_lower(factor[:half, :half])
    inverse[half:, half:] = inverse_of_lower(factor[half:, half:])
    below = inverse[half:, half:] @ factor[half:, :half]
    inverse[half:, :half] = -below @ inverse[:half, :half]
    return inverse


def independent_features(statistics: FoldStatistics, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """Find the features that are not linear in those before them, apart from their ridge.

    Args:
        statistics: of k features.
        ridge: [k], their rounding.

    Returns:
        Their indices int64 [m], and the information [P] that the other features may have: zero if
        they are copies.

    Cost: k^3 multiply-adds.
    """
    size, parameters = statistics.derivative.shape
    index = torch.arange(size, device=statistics.covariance.device)
    lost = statistics.derivative.new_zeros(parameters)
    while True:
        left = statistics.select(index)
        solved = whitened(left.covariance, left.columns, ridge[index])
        rounding = solved.ridge_share > MOSTLY_RIDGE
        if not bool(rounding.any()):
            return index, lost
        lost = lost + _hidden(left, solved)[rounding].sum(0)
        index = index[~rounding]


def _hidden(statistics: FoldStatistics, solved: Whitened) -> Tensor:
    """Estimate the information [k, P] that the ridge of each whitened feature may hide.

    Without the ridge a single whitened feature has J = y^2 / (1 - q): y^2 q / (1 - q) is missing.
    The folds give y^2 without bias; if the feature is mostly ridge, y^2 itself is missing.
    """
    half, fold_half = statistics.split(solved.columns)
    if statistics.score is None:
        folds = fold_half.shape[1]
        total = fold_half.sum(1)
        square = (total.square() - fold_half.square().sum(1)) / (folds * (folds - 1))
    else:
        square = half.square()
    q = solved.ridge_share
    return square * torch.where(q <= MOSTLY_RIDGE, q / (1 - q), 1.0)[:, None]


def at_least(covariance: Tensor, least: Tensor) -> Tensor:
    """Raise a covariance [P, P, P, P] to at least another one in every direction."""
    entries = len(covariance) ** 2
    least, covariance = (full.reshape(entries, entries) for full in (least, covariance))
    size = covariance.diagonal().abs().maximum(least.diagonal()).sqrt()
    unit = torch.where(size > 0, size, 1.0)
    unit = unit[:, None] * unit  # eigenvectors depend on units, the result must not
    excess = (covariance - least) / unit
    values, vectors = torch.linalg.eigh((excess + excess.T) / 2)
    raised = least + (vectors * values.clamp_min(0)) @ vectors.T * unit
    parameters = math.isqrt(entries)
    return raised.reshape((parameters,) * 4)


def _fold_products(left: Tensor, right: Tensor) -> Tensor:
    return (left[..., :, None] * right[..., None, :]).cumsum(0)
