"""The algebra of the estimators on exact moments; statistics are in tests/montecarlo."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fisherfast.estimation.curve import cross_fitted_bound, fisher_curve, linear_readout
from fisherfast.estimation.estimate import score_theory
from fisherfast.estimation.fold_moments import FoldStatistics

K, P, F = 12, 2, 8


def statistics(dof: float = 500.0, paired: bool = False) -> FoldStatistics:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(K, 2 * K, generator=generator, dtype=torch.float64)
    derivative = torch.randn(K, P, generator=generator, dtype=torch.float64)
    wobble = 0.3 * torch.randn(F, K, P, generator=generator, dtype=torch.float64)
    return FoldStatistics(
        covariance=root @ root.T,
        dof=dof,
        derivative=derivative,
        fold_derivatives=derivative + wobble - wobble.mean(0),
        noise=torch.diag(torch.tensor([0.01, 0.03], dtype=torch.float64)),
        paired=paired,
    )


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_curve_equals_one_solve_per_size(ridge):
    """Catches a curve that is right at k = K only, and k_eff from unscaled rows: each point against
    its own inverse."""
    s = statistics()
    curve = fisher_curve(s, ridge=ridge)
    scale = s.covariance.diagonal().rsqrt()
    for k in range(1, K + 1):
        scaled = (scale[:, None] * s.covariance * scale)[:k, :k]
        inverse = torch.linalg.inv(scaled + ridge * torch.eye(k, dtype=torch.float64))
        D = (scale[:, None] * s.derivative)[:k]
        naive = D.T @ inverse @ D
        k_eff = torch.trace(inverse @ scaled)
        h = (s.dof - k_eff - 1) / s.dof
        torch.testing.assert_close(curve.naive[k - 1], naive)
        torch.testing.assert_close(curve.effective_dim[k - 1], k_eff)
        torch.testing.assert_close(curve.J[k - 1], h * naive - k_eff * s.noise)


def test_fold_statistic_equals_the_double_loop():
    """Catches a U-statistic that keeps its diagonal, or divides by F^2."""
    s = statistics()
    curve = fisher_curve(replace(s, paired=True), ridge=0.0).J
    inverse = torch.linalg.inv(s.covariance)
    pairs = torch.einsum("fkp,kl,glq->fgpq", s.fold_derivatives, inverse, s.fold_derivatives)
    total = pairs.sum((0, 1)) - torch.einsum("ffpq->pq", pairs)
    h = (s.dof - K - 1) / s.dof
    torch.testing.assert_close(curve[-1], h * total / (F * (F - 1)))


def test_paired_error_is_the_jackknife():
    """Catches a jackknife without its factor F - 1, and a covariance part left out."""
    s = statistics(paired=True)
    curve = fisher_curve(s, ridge=0.0)
    inverse = torch.linalg.inv(s.covariance)
    h = (s.dof - K - 1) / s.dof
    without = []
    for left in range(F):
        d = torch.stack([s.fold_derivatives[f] for f in range(F) if f != left])
        sums = d.sum(0)
        own = torch.einsum("fkp,kl,flq->pq", d, inverse, d)
        without.append(h * (sums.T @ inverse @ sums - own) / ((F - 1) * (F - 2)))
    stacked = torch.stack(without)
    jackknife = (stacked - stacked.mean(0)).square().sum(0) * (F - 1) / F
    J = curve.J[-1]
    rest = (J.square() + torch.outer(J.diagonal(), J.diagonal())) / (s.dof - K - 3)
    torch.testing.assert_close(curve.stderr[-1].square(), jackknife + rest)


def test_independent_error_has_the_published_form():
    """Catches a slip in the general P x P variance: its diagonal is 2/(a-3) [J^2 + 2cJ(nu-1) + c^2
    k(nu-1)]."""
    s = statistics()
    curve = fisher_curve(s, ridge=0.0)
    J, c, nu = curve.J[-1].diagonal(), s.noise.diagonal(), s.dof
    a = nu - K
    expected = 2 / (a - 3) * (J.square() + 2 * c * J * (nu - 1) + c.square() * K * (nu - 1))
    torch.testing.assert_close(curve.stderr[-1].diagonal().square(), expected)


def test_covariant_under_the_unit_of_theta():
    """Catches a term with a wrong power of dtheta."""
    s = statistics()
    unit = torch.diag(torch.tensor([1000.0, 0.01], dtype=torch.float64))
    other = replace(
        s,
        derivative=s.derivative @ unit,
        fold_derivatives=s.fold_derivatives @ unit,
        noise=unit @ s.noise @ unit,
    )
    a, b = fisher_curve(s), fisher_curve(other)
    torch.testing.assert_close(b.J[-1], unit @ a.J[-1] @ unit)
    torch.testing.assert_close(b.stderr[-1], unit @ a.stderr[-1] @ unit)


def test_invariant_under_affine_maps_without_ridge():
    """Catches an information that depends on how features are mixed."""
    s = statistics()
    mix = torch.randn(K, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(
        fisher_curve(s.project(mix), 0.0).J[-1], fisher_curve(s, 0.0).J[-1], rtol=1e-8, atol=1e-8
    )


def test_readout_attains_the_linear_information():
    """Catches a readout in the wrong scale: one half used for learning and testing must give
    J_naive."""
    s = statistics(dof=1e9)
    s = replace(s, noise=torch.zeros(P, P, dtype=torch.float64))
    lower, _ = cross_fitted_bound(s, s)
    # the readout is learned with a ridge of 1e-4: its loss is second order
    torch.testing.assert_close(lower, fisher_curve(s, 0.0).naive[-1], rtol=1e-3, atol=1e-3)
    assert linear_readout(s).shape == (K, P)
    # one output, two parameters: both readouts are the same activation, their covariance singular
    for bound in cross_fitted_bound(s.select([0]), s.select([0])):
        assert torch.isfinite(bound).all()


def test_what_cannot_be_estimated_is_an_error():
    """Catches NaN passed on as a result, and a variance that does not exist (nu - k - 3 <= 0)."""
    copied = statistics().select(torch.tensor([0, 1, 2, 2]))
    with pytest.raises(ValueError, match=r"must be positive definite.* feature 4 of 4"):
        fisher_curve(copied, ridge=0.0)
    with pytest.raises(ValueError, match=r"must exceed the 12 features by 4, got 15"):
        fisher_curve(statistics(dof=15.0), ridge=0.0)


def test_a_rare_feature_does_not_spoil_the_bound():
    """Catches a readout that blows a unit up which fired a few times in one half and often in the
    other: 22 % of J were lost so behind the first layer of the log-normal network. Here J = 9; the
    bound is 8.7, and 5.0 without the floor."""

    def half(rare_variance: float, rare_derivative: float) -> FoldStatistics:
        derivative = torch.tensor([[3.0], [0], [0], [rare_derivative]], dtype=torch.float64)
        return FoldStatistics(
            covariance=torch.diag(torch.tensor([1, 1, 1, rare_variance], dtype=torch.float64)),
            dof=1e6,
            derivative=derivative,
            fold_derivatives=derivative.expand(F, 4, 1),
            noise=torch.zeros(1, 1, dtype=torch.float64),
            paired=False,
        )

    lower, _ = cross_fitted_bound(half(1e-6, 1e-3), half(1e-4, 1e-3))
    assert float(lower) > 0.9 * 9


def test_a_readout_without_ridge_of_copies_ends():
    """Catches a ridge of zero that is multiplied for ever."""
    s = statistics()
    copies = torch.cat([torch.arange(K), torch.arange(K)])
    W = linear_readout(s.select(copies), ridge=0.0)
    assert torch.isfinite(W).all()


@pytest.mark.parametrize("R", [0.3, 0.7])
def test_variance_that_the_folds_do_not_know_of_a_score(R):
    """The variance of u = 2 s s_hat - s_hat^2 less that of v = 2 (1 - R) s s_hat + R^2 s^2, which
    the folds give. It is 0.09, and 10^6 samples show it to within 0.0008. Catches R in place of
    R^2, which is off by 0.04 or more."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2, 10**6, generator=generator, dtype=torch.float64)
    known, rest = R**0.5 * normal[0], (1 - R) ** 0.5 * normal[1]
    s = known + rest
    u = 2 * s * known - known**2
    v = 2 * (1 - R) * s * known + R**2 * s**2
    J, V = (torch.full((1, 1), value, dtype=torch.float64) for value in (R, 1.0))
    theory, _ = score_theory(J, V, 1e-9, 1.0)
    assert theory.item() == pytest.approx((u.var() - v.var()).item(), abs=0.005)
