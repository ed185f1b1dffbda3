r"""From fold moments to Fisher information: the curve, its error bars, the honest bound, the choice
of k.

Every formula is derived in docs/theory.md. Notation: S [k, k] the covariance of
the features scaled to unit diagonal, R = S + ridge, L L^T = R, D [k, P] the derivative of the mean,
Y = L^-1 D. Because the leading block of L factors the leading block of R, the running sums of y_i
y_i^T are the linear Fisher information of the first k features, for every k at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fisherfast import ops
from fisherfast.moments import FoldStatistics

__all__ = [
    "FisherCurve",
    "average_curves",
    "choose_features",
    "cross_fitted_bound",
    "fisher_curve",
]

RIDGE = 1e-4
"""Relative to the variance of each feature: as if noise of 1 % of its spread were added to it."""

VARIANCE_FLOOR = 0.1
"""Variance below which a feature counts as rare, relative to the median feature of a half."""

BOUND_RIDGE = 1e-8
"""Ridge of the P readouts: only there for readouts that are copies of each other (one output, two
parameters)."""

PLATEAU = 0.75
"""A plateau counts as reached when the chosen k leaves the last quarter of the lifted features
unused."""

GAIN_ERRORS = 2.0
"""Standard errors by which more features must raise J to be used: 1 would chase noise, 3 leave 1 %
behind."""

GAIN_POINTS = 64
"""Sizes k that are compared with each other."""

SPARE_DOF = 4
"""Degrees of freedom beyond k_eff that the variance of an inverse covariance needs to exist (nu - k
- 3 > 0)."""


@dataclass(frozen=True)
class FisherCurve:
    """Linear Fisher information J of the first k features, k = 1..K. Float64, in 1/theta^2.

    Attributes:
        J: [K, P, P] without bias; may be negative, is never clipped.
        stderr: [K, P, P] its standard errors.
        naive: [K, P, P] Y^T Y, uncorrected.
        effective_dim: [K] k_eff, the features that count after the ridge.
        shrink: [K] h, what an inverse covariance of nu degrees of freedom overstates.
        left_out: [K, F, P] diagonal of the fold statistic without each fold: the jackknife.
        dof: nu.
        condition: lower bound on the condition number of the scaled covariance plus ridge.
    """

    J: torch.Tensor
    stderr: torch.Tensor
    naive: torch.Tensor
    effective_dim: torch.Tensor
    shrink: torch.Tensor
    left_out: torch.Tensor
    dof: float
    condition: float

    def __len__(self) -> int:
        return len(self.J)


class SingularCovarianceError(ValueError):
    """A feature is linear in the features before it, and there is no ridge to part them.

    Attributes:
        feature: its number, counted from 1.
    """

    def __init__(self, feature: int, size: int, ridge: float) -> None:
        super().__init__(
            f"covariance must be positive definite, got a singular one at feature {feature} of"
            f" {size}: add a ridge (now {ridge}), or drop features that are linear in others"
        )
        self.feature = feature


def fisher_curve(statistics: FoldStatistics, ridge: float = RIDGE) -> FisherCurve:
    r"""The whole curve J(k) from one Cholesky factorisation.

    .. math::
        k_\text{eff}(k) = k - \lambda \sum_{i \le k} \lVert \text{row}_i L^{-1} \rVert^2, \qquad h =
        (\nu - k_\text{eff} - 1) / \nu

        \text{independent:}\quad J = h \, J_\text{naive} - k_\text{eff} \, c \qquad
        \text{paired:}\quad J = h \, \frac{\sum_{f \ne g} y_f y_g^T}{F (F - 1)}

    Args:
        statistics: of K features, each with positive variance.
        ridge: lambda, relative to the variance of each feature.

    Raises:
        SingularCovarianceError: a feature is linear in those before it.
        ValueError: too few samples were seen for K features.

    Cost: K^3 operations. Derived in docs/theory.md, sections 4 to 6.
    """
    size, parameters = statistics.derivative.shape
    folds = len(statistics.fold_derivatives)
    columns = statistics.fold_derivatives.permute(1, 0, 2).reshape(size, folds * parameters)
    solved = ops.fisher_solve_details(
        statistics.covariance,
        torch.cat([statistics.derivative, columns], 1),
        ridge=ridge,
        inverse_rows=True,
    )
    if int(solved.info):
        raise SingularCovarianceError(int(solved.info), size, ridge)
    half = solved.half[:, :parameters]
    fold_half = solved.half[:, parameters:].reshape(size, folds, parameters)
    naive = _running_products(half)
    index = torch.arange(1, size + 1, device=half.device, dtype=torch.float64)
    effective = index - ridge * solved.inverse_rows.cumsum(0)
    if float(statistics.dof - effective[-1]) < SPARE_DOF:
        raise ValueError(
            f"degrees of freedom must exceed the {size} features by {SPARE_DOF},"
            f" got {statistics.dof:.0f}: use more samples or fewer features"
        )
    shrink = (statistics.dof - effective - 1) / statistics.dof
    across_folds, left_out = _fold_statistic(fold_half, shrink)
    if statistics.paired:
        J = across_folds
        jackknife = left_out.var(1, correction=0) * (folds - 1)
        variance = jackknife + covariance_variance(J, statistics.dof, effective)
    else:
        J = shrink[:, None, None] * naive - effective[:, None, None] * statistics.noise
        variance = independent_variance(J, statistics.dof, statistics.noise, effective)
    return FisherCurve(
        J=J,
        stderr=variance.sqrt(),
        naive=naive,
        effective_dim=effective,
        shrink=shrink,
        left_out=torch.diagonal(left_out, dim1=2, dim2=3),
        dof=statistics.dof,
        condition=float(solved.condition),
    )


def fold_statistic_curve(statistics: FoldStatistics, ridge: float = RIDGE) -> torch.Tensor:
    """J(k) [K, P, P] by the fold U-statistic, whatever the source: agrees with `fisher_curve` in
    the mean."""
    paired = FoldStatistics(**{**statistics.__dict__, "paired": True})
    return fisher_curve(paired, ridge).J


def cross_fitted_bound(
    half_a: FoldStatistics, half_b: FoldStatistics
) -> tuple[torch.Tensor, torch.Tensor]:
    """The honest lower bound: learn the readout on one half, measure it on the other, swap,
    average.

    Whatever the readout W = R_A^-1 D_A [k, P] is, the linear Fisher information of the P numbers
    W^T f is a lower bound, and it is measured on samples that W has not seen, with only k = P to
    correct for.

    Returns:
        lower [P, P] and its standard error [P, P], in 1/theta^2.
    """
    measured = []
    for learn, test in ((half_a, half_b), (half_b, half_a)):
        seen = test.project(linear_readout(learn))
        varied = (seen.covariance.diagonal() > 0).nonzero()[:, 0]
        measured.append(_last_or_zero(seen.select(varied)))
    (J_a, variance_a), (J_b, variance_b) = measured
    return (J_a + J_b) / 2, ((variance_a + variance_b) / 4).sqrt()


def _last_or_zero(statistics: FoldStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """J and its variance [P, P] of all features of a statistics; zero when there are none."""
    if len(statistics.derivative) == 0:
        zero = torch.zeros_like(statistics.noise)
        return zero, zero
    curve = fisher_curve(statistics, BOUND_RIDGE)
    return curve.J[-1], curve.stderr[-1].square()


def linear_readout(statistics: FoldStatistics, ridge: float = RIDGE) -> torch.Tensor:
    """W = R^-1 D [k, P] in the scale of the features: the readout that attains the linear
    information.

    Any readout gives a valid bound, so it may be cautious. A feature that hardly varied in these
    samples is not scaled up to unit variance: it may vary much in others, and a large weight on it
    would drown the rest there. Where rounding leaves R indefinite the ridge grows until it is not.
    """
    variance = statistics.covariance.diagonal()
    live = variance > 0
    floor = VARIANCE_FLOOR * (variance[live].median() if bool(live.any()) else 1.0)
    scale = torch.where(live, variance.clamp_min(floor), torch.inf).rsqrt()
    scaled = (scale[:, None] * statistics.covariance * scale).clamp(-1, 1)
    factor, failed = torch.linalg.cholesky_ex(_with_ridge(scaled, ridge))
    while int(failed):
        ridge *= 10
        factor, failed = torch.linalg.cholesky_ex(_with_ridge(scaled, ridge))
    return scale[:, None] * torch.cholesky_solve(scale[:, None] * statistics.derivative, factor)


def _with_ridge(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    return matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def choose_features(curve: FisherCurve, first: int) -> tuple[int, bool]:
    r"""The smallest k >= first that no larger k' beats significantly, for any parameter.

    Significantly means by more than `GAIN_ERRORS` standard errors *of the gain* J(k') - J(k), not
    of J: both share the noise of their common features, and a gain of 1 % can be certain where J
    itself is known to 3 %. The variance of a gain is that over folds (jackknife), and that of dk
    more features in the covariance, 2 M^2 dk / nu^2 with M = h J_naive.

    Args:
        curve: of K features.
        first: smallest k allowed, 1 <= first <= K (all raw activations are always used).

    Returns:
        k, and whether a plateau was reached before the last lifted features.
    """
    steps = torch.linspace(first, len(curve), GAIN_POINTS, dtype=torch.float64)
    grid = steps.round().long().unique().to(curve.J.device) - 1
    J = torch.diagonal(curve.J, dim1=1, dim2=2)[grid]
    size = curve.shrink[grid, None] * torch.diagonal(curve.naive, dim1=1, dim2=2)[grid]
    left_out = curve.left_out[grid]
    folds = left_out.shape[1]
    gain = J[None] - J[:, None]
    spread = left_out[None] - left_out[:, None]
    jackknife = spread.var(2, correction=0) * (folds - 1)
    added = (curve.effective_dim[grid][None] - curve.effective_dim[grid][:, None]).clamp_min(0)
    covariance = 2 * size[None].square() * added[..., None] / curve.dof**2
    beaten = gain > GAIN_ERRORS * (jackknife + covariance).sqrt()
    later = torch.ones_like(gain[..., 0], dtype=torch.bool).triu(1)
    enough = ~(beaten.any(-1) & later).any(1)
    chosen = int(grid[enough][0]) + 1
    lifted = len(curve) - first
    return chosen, lifted > 0 and chosen - first <= PLATEAU * lifted


def average_curves(first: FisherCurve, second: FisherCurve) -> FisherCurve:
    r"""The mean of two independent curves of the same parameters.

    A curve that ends before the other stays at its last value: its features are used up. The folds
    of both make one jackknife, whose deviations are scaled so that the variance of the mean,
    (V_1 + V_2) / 4, follows from all F_1 + F_2 of them.
    """
    size = max(len(first), len(second))
    folds = first.left_out.shape[1] + second.left_out.shape[1]
    curves = [_extended(curve, size) for curve in (first, second)]
    J = (curves[0].J + curves[1].J) / 2
    deviations = []
    for curve in curves:
        own = curve.left_out.shape[1]
        weight = math.sqrt(folds * (own - 1) / (4 * own * (folds - 1)))
        deviations.append(weight * (curve.left_out - curve.left_out.mean(1, keepdim=True)))
    return FisherCurve(
        J=J,
        stderr=(curves[0].stderr.square() + curves[1].stderr.square()).sqrt() / 2,
        naive=(curves[0].naive + curves[1].naive) / 2,
        effective_dim=(curves[0].effective_dim + curves[1].effective_dim) / 2,
        shrink=(curves[0].shrink + curves[1].shrink) / 2,
        left_out=torch.diagonal(J, dim1=1, dim2=2)[:, None] + torch.cat(deviations, 1),
        dof=2 / math.hypot(1 / first.dof, 1 / second.dof),  # the gains' variance is 2 M^2 dk / nu^2
        condition=max(first.condition, second.condition),
    )


def _extended(curve: FisherCurve, size: int) -> FisherCurve:
    """The same curve up to more features, which add nothing."""
    index = torch.arange(size, device=curve.J.device).clamp_max(len(curve) - 1)
    names = ("J", "stderr", "naive", "effective_dim", "shrink", "left_out")
    return replace(curve, **{name: getattr(curve, name)[index] for name in names})


def _running_products(half: torch.Tensor) -> torch.Tensor:
    """Running sums over i of y_i y_i^T: [k, P] -> [k, P, P]."""
    return (half[:, :, None] * half[:, None, :]).cumsum(0)


def _fold_statistic(
    fold_half: torch.Tensor, shrink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """U-statistic over pairs of different folds [k, P, P], and the same without each fold [k, F, P,
    P]."""
    folds = fold_half.shape[1]
    total = fold_half.sum(1)
    own = _fold_products(fold_half, fold_half)
    cross = _running_products(total) - own.sum(1)
    value = shrink[:, None, None] * cross / (folds * (folds - 1))
    rest = total[:, None, :] - fold_half
    without = _fold_products(rest, rest) - (own.sum(1, keepdim=True) - own)
    left_out = shrink[:, None, None, None] * without / ((folds - 1) * (folds - 2))
    return value, left_out


def _fold_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left[..., :, None] * right[..., None, :]).cumsum(0)


def covariance_variance(J: torch.Tensor, dof: float, effective: torch.Tensor) -> torch.Tensor:
    r"""Variance of J from the estimated covariance alone: (J_pp J_qq + J_pq^2) / (nu - k_eff -
    3)."""
    diagonal = torch.diagonal(J, dim1=1, dim2=2).clamp_min(0)
    spread = J.square() + diagonal[:, :, None] * diagonal[:, None, :]
    return spread / (dof - effective - 3)[:, None, None]


def independent_variance(
    J: torch.Tensor, dof: float, noise: torch.Tensor, effective: torch.Tensor
) -> torch.Tensor:
    r"""Variance [K, P, P] of corrected J [K, P, P] for Gaussian features and independent
    conditions, of nu = dof degrees of freedom, noise c [P, P] and k_eff = effective [K].

    With a = nu - k_eff, M = D^T S^-1 D a non-central Wishart matrix and D^T S_hat^-1 D inverse
    Wishart given M:

    .. math::
        \mathrm{Var}(J_{pq}) = \frac{(a + 1) E[M_{pq}^2] + (a - 1) E[M_{pp} M_{qq}]}{a (a - 3)}
                              + \mathrm{Var}(M_{pq})

    which for p = q is 2 / (a - 3) [J^2 + 2 c J (nu - 1) + c^2 k_eff (nu - 1)].
    """
    k = effective[:, None, None]
    a = dof - k
    noise = noise.expand_as(J)
    J = _with_diagonal(J, torch.diagonal(J, dim1=1, dim2=2).clamp_min(0))
    mean = J + k * noise
    J_p, J_q = _outer_diagonals(J)
    c_p, c_q = _outer_diagonals(noise)
    mean_p, mean_q = _outer_diagonals(mean)
    var_mean = c_p * J_q + c_q * J_p + 2 * noise * J + k * (c_p * c_q + noise.square())
    mean_square = mean.square() + var_mean
    mean_product = mean_p * mean_q + 4 * noise * J + 2 * k * noise.square()
    wishart = ((a + 1) * mean_square + (a - 1) * mean_product) / (a * (a - 3))
    return wishart + var_mean


def _outer_diagonals(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1)
    return diagonal[..., :, None], diagonal[..., None, :]


def _with_diagonal(matrix: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    return torch.diagonal_scatter(matrix, diagonal, dim1=1, dim2=2)
