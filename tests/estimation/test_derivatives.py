"""Fold-wise derivatives from tangents and scores, and the algebra of the estimates from them.
Statistics are in tests/montecarlo."""

from __future__ import annotations

import pytest
import torch

from fisherfast.data.dealing import Place
from fisherfast.estimation.curve import fisher_curve
from fisherfast.estimation.derivatives import ScoreMoments, fold_products, fold_sums
from fisherfast.estimation.features import FeatureDictionary, Lift
from fisherfast.estimation.fold_moments import FoldMoments, FoldStatistics
from fisherfast.estimation.pilot import PilotMoments

N, D, K, P, FOLDS = 203, 3, 24, 2, 4
NO_STEP = torch.zeros(1, P, dtype=torch.float64)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def lift() -> Lift:
    return Lift(numbers(K - D, D, seed=1), numbers(K - D, seed=2), numbers(K - D, seed=3), -0.5)


def carried(kind: str) -> torch.Tensor:
    """Tangents [P, n, d], or a score [n, P] that the features explain in part."""
    if kind == "tangents":
        return 1 + numbers(P, N, D, seed=4)
    return numbers(N, D) @ numbers(D, P, seed=5) + numbers(N, P, seed=6)


def accumulate(kind: str, lift: Lift, batch: int = N, folds: int = FOLDS) -> FoldMoments:
    moments = FoldMoments(K, 1, folds=folds, **{kind: P})
    what = carried(kind)
    for start in range(0, N, batch):
        rows = slice(start, start + batch)
        piece = what[:, rows] if kind == "tangents" else what[rows]
        moments.update(0, numbers(N, D)[rows], lift, piece)
    return moments


def lifted(lift: Lift) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, K] and their tangents [P, n, K] by autograd."""
    z, dz = numbers(N, D), carried("tangents")

    def features(row: torch.Tensor) -> torch.Tensor:
        u = lift.weight @ row + lift.bias
        return torch.cat([row, torch.nn.functional.leaky_relu(u, lift.slope) - lift.pilot])

    jacobian = torch.func.vmap(torch.func.jacrev(features))(z)
    return torch.func.vmap(features)(z), torch.einsum("nkd,pnd->pnk", jacobian, dz)


def test_fold_sums_equal_a_loop():
    """Catches rows of the wrong fold, of another tile, and folds without rows."""
    x, w = numbers(P, 40, 5), numbers(40, P, seed=1)
    cells = (torch.arange(40) * 7 % 13) % 5  # fold 1 of 4 has cell 1 alone, fold 0 has cells 0, 4
    for n in (0, 1, 3, 11, 40):
        place, order = Place.sort(torch.arange(n), cells[:n], FOLDS)
        sorted_x, sorted_w = x[:, order], w[order]
        for start, stop in ((0, n), (n // 3, n), (n // 3, n // 2)):
            rows = slice(start, stop)
            sums = fold_sums(sorted_x[:, rows], place, start)
            products = fold_products(sorted_w[rows], sorted_x[0, rows], place, start)
            for f in range(FOLDS):
                mine = cells[order][rows] % FOLDS == f
                loop = sorted_x[:, rows][:, mine].sum(1)
                torch.testing.assert_close(sums[f], loop, rtol=0, atol=1e-12)
                loop = sorted_w[rows][mine].T @ sorted_x[0, rows][mine]
                torch.testing.assert_close(products[f], loop, rtol=0, atol=1e-12)


def test_tangents_of_lifted_features_are_those_of_autograd(lift):
    """Catches the slope of the other side, a bias in the tangent, folds of another batch."""
    _, df = lifted(lift)
    statistics = accumulate("tangents", lift).statistics(NO_STEP)
    torch.testing.assert_close(statistics.derivative, df.mean(1).T)
    for f in range(FOLDS):
        torch.testing.assert_close(statistics.fold_derivatives[f], df[:, f::FOLDS].mean(1).T)


def test_the_kink_has_the_derivative_of_pytorch():
    """Catches the mean of both slopes at u = 0: PyTorch takes the slope below."""
    one, zero = torch.ones(1, 1), torch.zeros(1)
    moments = FoldMoments(2, 1, folds=FOLDS, tangents=1)
    moments.update(0, torch.zeros(8, 1), Lift(one, zero, zero, -0.5), torch.ones(1, 8, 1))
    assert moments.carried.sums[:, 0].sum(0).tolist() == [8.0, -4.0]


def test_score_covariance_is_within_folds(lift):
    """Catches a covariance about the total mean, a fold's share of wrong weight, a wrong nu."""
    f, _ = lifted(lift)
    s = carried("score")
    statistics = accumulate("score", lift).statistics(NO_STEP)
    shares, V = [], []
    for fold in range(FOLDS):
        df, ds = (x[fold::FOLDS] - x[fold::FOLDS].mean(0) for x in (f, s))
        shares.append(df.T @ ds)
        V.append(ds.T @ ds)
    nu = N - FOLDS
    assert statistics.dof == nu
    torch.testing.assert_close(statistics.derivative, sum(shares) / nu)
    torch.testing.assert_close(statistics.fold_derivatives, torch.stack(shares) * FOLDS / nu)
    torch.testing.assert_close(statistics.score.covariance, sum(V) / nu)
    torch.testing.assert_close(statistics.score.folds, torch.stack(V) * FOLDS / nu)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("kind", ["tangents", "score"])
def test_halves_are_the_even_and_the_odd_samples(kind, half, lift):
    """Catches a bound whose readout has seen the samples it is measured on."""
    statistics = accumulate(kind, lift).statistics(NO_STEP, half)
    what = carried(kind)
    rows = torch.arange(N)[half::2]
    sums = []
    f, df = lifted(lift)
    for fold in range(half, FOLDS, 2):
        mine = rows[rows % FOLDS == fold]
        if kind == "tangents":
            sums.append(df[:, mine].sum(1).T)
        else:
            sums.append((f[mine] - f[mine].mean(0)).T @ (what[mine] - what[mine].mean(0)))
    weight = len(rows) if kind == "tangents" else len(rows) - FOLDS // 2
    torch.testing.assert_close(statistics.derivative, sum(sums) / weight)
    assert len(statistics.fold_derivatives) == FOLDS // 2


@pytest.mark.parametrize("kind", ["tangents", "score"])
def test_batches_do_not_matter(kind, lift):
    """Catches folds dealt within a batch, or a tile whose rows start at fold 0."""
    whole = accumulate(kind, lift).statistics(NO_STEP)
    cut = accumulate(kind, lift, 3).statistics(NO_STEP)
    torch.testing.assert_close(cut.derivative, whole.derivative)
    torch.testing.assert_close(cut.fold_derivatives, whole.fold_derivatives)
    if kind == "score":
        torch.testing.assert_close(cut.score.folds, whole.score.folds)


@pytest.mark.parametrize("kind", ["tangents", "score"])
def test_growing_gives_the_same(kind, lift):
    """Catches sums of known features that are added twice, or a score counted twice."""
    small = FoldMoments(D + 5, 1, folds=FOLDS, **{kind: P})
    small.update(0, numbers(N, D), lift.leading(5), carried(kind))
    grown = small.grown(K, small.sums.shape[-1])
    grown.update(0, numbers(N, D), lift, carried(kind))
    whole = accumulate(kind, lift)
    got, expected = grown.statistics(NO_STEP), whole.statistics(NO_STEP)
    torch.testing.assert_close(got.derivative, expected.derivative, rtol=1e-12, atol=1e-12)
    assert got.dof == expected.dof
    if kind == "score":
        assert torch.equal(got.score.folds, expected.score.folds)


def test_no_tangents_are_zero_tangents(lift):
    """Catches counts that leave out batches whose activations do not depend on theta."""
    moments = accumulate("tangents", lift)
    moments.update(0, numbers(N, D), lift, None)
    once = accumulate("tangents", lift).statistics(NO_STEP).derivative
    torch.testing.assert_close(moments.statistics(NO_STEP).derivative, once / 2)


def test_score_is_needed(lift):
    """Catches a score of zero in the place of none."""
    place, _ = Place.in_turn(0, N, FOLDS)
    with pytest.raises(
        ValueError, match="carried must be the score or labels of each sample, got None"
    ):
        ScoreMoments(P, K, folds=FOLDS).update(numbers(N, D), None, lift, place)


def test_sketch_groups_tangents_as_activations():
    """Catches tangents of other groups, or without the sign: a shift by the tangent shows it."""
    d, step = 5000, 1e-3
    x, dx = numbers(40, d), numbers(1, 40, d, seed=1)
    pilot = PilotMoments()
    pilot.update(x)
    dictionary = FeatureDictionary(pilot.standardisation(), 16, dtype=torch.float64, groups=16)
    assert dictionary.kind == "sketch"
    moved = dictionary.raw_features(x + step * dx[0]) - dictionary.raw_features(x)
    torch.testing.assert_close(dictionary.raw_tangents(dx)[0], moved / step, rtol=0, atol=1e-8)


# estimates --------------------------------------------------------------------------------------


def test_j_of_the_score_is_the_adjusted_r_squared(lift):
    """Catches nu, k or the residual: V - RSS / (nu - k) of a least-squares fit, for every k."""
    f, _ = lifted(lift)
    s = carried("score")
    for fold in range(FOLDS):
        f[fold::FOLDS] -= f[fold::FOLDS].mean(0)
        s[fold::FOLDS] -= s[fold::FOLDS].mean(0)
    nu = N - FOLDS
    curve = fisher_curve(accumulate("score", lift).statistics(NO_STEP), ridge=0.0)
    for k in (1, D, 10, K):
        readout = torch.linalg.lstsq(f[:, :k], s).solution
        residual = s - f[:, :k] @ readout
        J = s.T @ s / nu - residual.T @ residual / (nu - k)
        torch.testing.assert_close(curve.J[k - 1], J)


def statistics_of(kind: str, lift: Lift) -> FoldStatistics:
    if kind != "independent":
        return accumulate(kind, lift).statistics(NO_STEP)
    moments = FoldMoments(K, 2 * P, folds=FOLDS)
    shifts = torch.tensor([[-1.0, 0, 0], [1, 0, 0], [0, -1, -1], [0, 1, 1]]).double()
    for condition in range(2 * P):
        moments.update(condition, numbers(N, D, seed=condition) + shifts[condition], lift)
    contrast = torch.zeros(2 * P, P, dtype=torch.float64)
    contrast[:2, 0] = contrast[2:, 1] = torch.tensor([-2.0, 2.0])
    return moments.statistics(contrast)


@pytest.mark.parametrize("kind", ["independent", "tangents", "score"])
def test_error_covariance_has_the_standard_errors_on_its_diagonal(kind, lift):
    """Catches a formula that differs between the curve and the marginal information."""
    curve = fisher_curve(statistics_of(kind, lift))
    for k in (D, K):
        full = curve.error_covariance(k)
        entries = torch.einsum("pqpq->pq", full)
        torch.testing.assert_close(entries, curve.stderr[k - 1].square())
        torch.testing.assert_close(full, full.transpose(0, 1))
        torch.testing.assert_close(full, full.permute(2, 3, 0, 1))


@pytest.mark.parametrize("kind", ["independent", "tangents", "score"])
def test_errors_turn_with_theta(kind, lift):
    """Catches a formula that is right in one basis of theta only: D T has the errors of T^T J T,
    where the share R that steers the score's formula is the same (T is a rotation of a round V)."""
    statistics = statistics_of(kind, lift)
    angle = torch.tensor(0.7)
    T = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]]).double()
    turned = FoldStatistics(
        **{
            **statistics.__dict__,
            "derivative": statistics.derivative @ T,
            "fold_derivatives": statistics.fold_derivatives @ T,
            "noise": T.T @ statistics.noise @ T,
            "score": None
            if statistics.score is None
            else type(statistics.score)(
                T.T @ statistics.score.covariance @ T, T.T @ statistics.score.folds @ T
            ),
        }
    )
    before, after = (fisher_curve(s).error_covariance(K) for s in (statistics, turned))
    expected = torch.einsum("pi,qj,pqrs,rk,sl->ijkl", T, T, before, T, T)
    torch.testing.assert_close(after, expected)


def test_score_that_is_a_feature_is_explained_whole(lift):
    """Catches an error bar that misses the variance of V: J = V, known as well as V is."""
    moments = FoldMoments(D, 1, folds=FOLDS, score=1)
    moments.update(0, numbers(N, D), None, numbers(N, D)[:, :1])
    zero = torch.zeros(1, 1, dtype=torch.float64)
    statistics = moments.statistics(zero)
    curve = fisher_curve(statistics, ridge=0.0)
    V = statistics.score
    torch.testing.assert_close(curve.J[-1], V.covariance)
    torch.testing.assert_close(curve.stderr[-1].square(), V.folds.var(0, correction=1) / FOLDS)
