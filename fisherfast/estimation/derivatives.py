"""Fold-wise derivatives of mean features, from tangents, score or labels of the samples.

With two conditions the derivative is a difference of means. With one condition it is the mean of
the tangents of the features, the covariance of features and score, or the slope of a regression on
the labels (docs/theory.md, 12, 13 and 23).
One float64 number is stored per fold, parameter and feature; lifted features are computed for at
most about a thousand samples at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfast.data.dealing import Place
from fisherfast.estimation.features import Lift

TILE_ROWS = 1024
"""Rows of features or tangents in memory at a time: 4 MB of float64 for 512 features."""

FEW_ROWS = 64
"""Rows per fold up to which all folds are summed in one product."""

LINEAR_TERMS = 1e-5
"""Standard deviation of a term of the labels, relative to its own, below which it is linear in
those before it: squares on a grid of two values."""

MOST_TERMS = 0.1
"""Terms of the labels per sample above which only theta itself is fitted."""


class LabelsError(ValueError):
    """The labels do not vary enough for a slope."""


@dataclass(frozen=True)
class FoldScore:
    """Within-fold covariance of the score.

    Attributes:
        covariance: V [P, P] float64, an estimate of the information of the input.
        folds: [F, P, P] contributions of the folds, whose mean is V.
    """

    covariance: Tensor
    folds: Tensor


class DerivativeMoments:
    """Sums over the samples of each fold, from which the derivative of the mean features follows.

    Args:
        parameters: P.
        size: number of features k.
        folds: F.

    Attributes:
        sums: [F, P, k] float64 of tangents, or of features times score.
    """

    def __init__(
        self, parameters: int, size: int, *, folds: int, device: torch.device | str = "cpu"
    ) -> None:
        self.sums = torch.zeros(folds, parameters, size, dtype=torch.float64, device=device)

    def score(self, columns: slice, counts: Tensor) -> FoldScore | None:
        """Compute the covariance of the score in the folds in columns; None for other sources."""
        return None

    def shared_sums(self, known: int = 0) -> list[Tensor]:
        """Return views of the sums to add up over processes, without features before `known`."""
        return [self.sums[..., known:]]


class TangentMoments(DerivativeMoments):
    r"""Sums of the features' tangents: :math:`\partial E[f] = E[df]`.

    A lifted feature leaky_relu(u), u = w z + b, has the tangent g(u) w dz with g = 1 for u > 0 and
    the slope elsewhere: PyTorch's derivative at the kink.
    """

    def update(
        self, raw: Tensor, carried: Tensor | None, lift: Lift, place: Place, *, known: int = 0
    ) -> None:
        """Add a batch.

        Args:
            raw: [n, d] raw features.
            carried: tangents [P, n, d] of the raw features; None for zero.
            lift: computes the other k - d features.
            place: folds of the rows, which are sorted by them.
            known: leading features whose sums are complete: only the others are computed.

        Cost: n (1 + P) d (k - d) multiply-adds for the lifted features.
        """
        if carried is None:
            return
        dim = raw.shape[1]
        if known < dim:
            self.sums[..., :dim] += fold_sums(carried, place)
        begin = max(known, dim)
        rest = lift.following(begin - dim)
        if len(rest) == 0:
            return
        folds, parameters, _ = self.sums.shape
        rows = max(TILE_ROWS // parameters, folds)
        for start in range(0, len(raw), rows):
            tile = slice(start, start + rows)
            moved = carried[:, tile].to(raw.dtype) @ rest.weight.T
            moved *= rest.slopes(raw[tile])
            self.sums[..., begin:] += fold_sums(moved, place, start)

    def derivatives(
        self, columns: slice, counts: Tensor, feature_sums: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute D [k, P] of the folds in columns, and that of each fold alone [F, k, P]: means of
        the tangents.

        Args:
            columns: folds to use.
            counts: [F] samples of these folds.
            feature_sums: [F, k] sums of the features in these folds, used with a score.
        """
        sums = self.sums[columns].mT
        return sums.sum(0) / counts.sum(), sums / counts[:, None, None]


class ProductMoments(DerivativeMoments):
    """Sums of features times columns that the samples carry, of which T are numbers: the score, or
    terms of the labels.

    Attributes:
        column_sums: [F, T] float64.
        column_cross: [F, T, T] float64 sums of products of the columns.
    """

    def __init__(
        self, columns: int, size: int, *, folds: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(columns, size, folds=folds, device=device)
        self.column_sums = torch.zeros(folds, columns, dtype=torch.float64, device=device)
        self.column_cross = torch.zeros(folds, columns, columns, dtype=torch.float64, device=device)

    def columns_of(self, carried: Tensor) -> Tensor:
        """Return the columns [m, T] of what samples carry [m, P]."""
        return carried

    def update(
        self, raw: Tensor, carried: Tensor | None, lift: Lift, place: Place, *, known: int = 0
    ) -> None:
        """As `TangentMoments.update`, with score or labels [n, P]. Cost: n k (d + T)
        multiply-adds."""
        if carried is None:
            raise ValueError("carried must be the score or labels of each sample, got None")
        columns = self.columns_of(carried)
        dim = raw.shape[1]
        begin = max(known, dim)
        rest = lift.following(begin - dim)
        for start in range(0, len(raw), TILE_ROWS):
            tile = slice(start, start + TILE_ROWS)
            if known < dim:
                self.sums[..., :dim] += fold_products(columns[tile], raw[tile], place, start)
            if len(rest):
                self.sums[..., begin:] += fold_products(
                    columns[tile], rest(raw[tile]), place, start
                )
        self.column_sums += fold_sums(columns[None], place)[:, 0]
        self.column_cross += fold_products(columns, columns, place)

    def scatter(self, columns: slice, counts: Tensor) -> Tensor:
        """Compute the scatter of the T columns [F, T, T] about the means of the folds in
        columns."""
        sums = self.column_sums[columns]
        return self.column_cross[columns] - _outer(sums, sums / counts.clamp_min(1)[:, None])

    def products(self, columns: slice, counts: Tensor, feature_sums: Tensor) -> Tensor:
        """Compute the products of the T columns with the features [F, T, k], as `scatter`."""
        mean = self.column_sums[columns] / counts.clamp_min(1)[:, None]
        return self.sums[columns] - _outer(mean, feature_sums)

    def shared_sums(self, known: int = 0) -> list[Tensor]:
        """Return views of the sums, with those of the columns themselves."""
        return [*super().shared_sums(known), self.column_sums, self.column_cross]


class ScoreMoments(ProductMoments):
    r"""Sums of features times score: :math:`\partial E[f] = \mathrm{Cov}(f, s)` within folds."""

    def derivatives(
        self, columns: slice, counts: Tensor, feature_sums: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `TangentMoments.derivatives`: the covariance with the score within folds, and the
        contributions of the folds, whose mean it is."""
        return _covariances(self.products(columns, counts, feature_sums).mT, counts)

    def score(self, columns: slice, counts: Tensor) -> FoldScore:
        """Compute V and the contributions of the folds."""
        return FoldScore(*_covariances(self.scatter(columns, counts), counts))

    def mean_error(self, counts: Tensor) -> Tensor:
        """Compute the mean of the score in units of its standard error [P]; its expectation is
        zero."""
        samples = counts.sum()
        variance = self.score(slice(None), counts).covariance.diagonal()
        return self.column_sums.sum(0) / samples / (variance / samples).sqrt()


class LabelMoments(ProductMoments):
    r"""Sums of features times terms of the labels theta, for a regression within folds.

    The terms are theta and, against curvature, the products of two of its entries. The derivative
    is the slope on theta, :math:`B = A^{-1} G` with the scatter A of the terms and their products G
    with the features: for one parameter of theta alone, A [1, 1] and G [1, k], for several the rows
    of theta in the regression on all terms. The covariance of the features is what all terms leave
    (docs/theory.md, 23).

    Args:
        parameters: P.
        size: number of features k.
        folds: F.
    """

    def __init__(
        self, parameters: int, size: int, *, folds: int, device: torch.device | str = "cpu"
    ) -> None:
        pairs = torch.combinations(torch.arange(parameters), with_replacement=True)
        self._first, self._second = pairs.to(device).T
        self._bases: dict[tuple[int | None, int | None], Tensor] = {}
        super().__init__(parameters + len(pairs), size, folds=folds, device=device)
        self.parameters = parameters

    def columns_of(self, carried: Tensor) -> Tensor:
        """Return theta [m, P] and its products, side by side."""
        return torch.cat([carried, carried[:, self._first] * carried[:, self._second]], 1)

    def update(
        self, raw: Tensor, carried: Tensor | None, lift: Lift, place: Place, *, known: int = 0
    ) -> None:
        """As `ProductMoments.update`, with labels."""
        super().update(raw, carried, lift, place, known=known)
        self._bases.clear()

    def shared_sums(self, known: int = 0) -> list[Tensor]:
        """Return views of the sums, which other processes will change."""
        self._bases.clear()
        return super().shared_sums(known)

    def basis(self, columns: slice, counts: Tensor) -> Tensor:
        """Return orthonormal combinations U [T, r] of the terms, those of theta alone first:
        U^T A U = 1 with the scatter A of the folds in columns. Products that are linear in the
        terms before, as on a grid of two values, are left out; all are if there are few samples.

        Raises:
            LabelsError: theta does not vary in all directions.
        """
        key = columns.start, columns.step
        if key not in self._bases:
            self._bases[key] = self._basis(columns, counts)
        return self._bases[key]

    def _basis(self, columns: slice, counts: Tensor) -> Tensor:
        A, P = self.scatter(columns, counts).sum(0), self.parameters
        unit = torch.where(A.diagonal() > 0, A.diagonal(), 1.0).rsqrt()
        A = unit[:, None] * A * unit
        factor, failed = torch.linalg.cholesky_ex(A[:P, :P])
        if int(failed) or float(factor.diagonal().min()) < LINEAR_TERMS:
            raise LabelsError(
                f"theta must vary in all of its {P} directions among the {int(counts.sum())}"
                " samples of a bin"
            )
        linear = torch.linalg.solve_triangular(factor, A[:P], upper=False)  # [P, T]
        rest = A[P:, P:] - linear[:, P:].T @ linear[:, P:]
        values, vectors = torch.linalg.eigh(rest)
        curved = values > LINEAR_TERMS**2
        if len(A) > MOST_TERMS * float(counts.sum() - len(counts)):
            curved = torch.zeros_like(curved)
        vectors = vectors[:, curved] / values[curved].sqrt()
        triangle = torch.linalg.solve_triangular(factor.T, torch.eye(P).to(A), upper=True)
        U = A.new_zeros(len(A), P + vectors.shape[1])
        U[:P, :P] = triangle
        U[:P, P:] = -triangle @ linear[:, P:] @ vectors
        U[P:, P:] = vectors
        return unit[:, None] * U

    def explained(
        self, columns: slice, counts: Tensor, feature_sums: Tensor, basis: Tensor | None = None
    ) -> Tensor:
        """Compute E [r, k], the features along the basis of the terms: E^T E is the scatter that
        the terms explain."""
        basis = self.basis(columns, counts) if basis is None else basis
        return basis.T @ self.products(columns, counts, feature_sums).sum(0)

    def derivatives(
        self, columns: slice, counts: Tensor, feature_sums: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `TangentMoments.derivatives`: the slope, and what each fold alone makes of it, its
        residuals about the regression of all, so that the mean of the folds is the slope."""
        basis = self.basis(columns, counts)
        products = self.products(columns, counts, feature_sums)
        fitted = basis @ (basis.T @ products.sum(0))
        residual = products - self.scatter(columns, counts) @ fitted
        inverse = self._inverse(columns, counts)
        slope = inverse @ products.sum(0)
        return slope.T, (slope + len(counts) * (inverse @ residual)).mT

    def theta_sums(self) -> Tensor:
        """Return the sum of theta over all samples [P]."""
        return self.column_sums[:, : self.parameters].sum(0)

    def noise(self, columns: slice, counts: Tensor) -> Tensor:
        """Compute c [P, P]: the covariance of the slope is c S."""
        return self._inverse(columns, counts)[:, : self.parameters]

    def _inverse(self, columns: slice, counts: Tensor) -> Tensor:
        """Compute the matrix [P, T] that makes slopes of products with the terms. With several
        parameters it is that of the regression on all terms: bins are then of any shape, in which
        the products of theta are correlated with theta, and what bends would count as slope. With
        one it is that on theta alone, the mean slope of the bin, which has less noise."""
        basis, P = self.basis(columns, counts), self.parameters
        used = basis if P > 1 else basis[:, :P]
        return used[:P] @ used.T


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Compute l r^T [F, m, k] of l [F, m] and r [F, k]."""
    return left[:, :, None] * right[:, None, :]


def _covariances(scatter: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a covariance from its scatter [F, ...] within the folds, and their contributions,
    whose mean it is."""
    dof = counts.sum() - len(counts)
    return scatter.sum(0) / dof, scatter * (len(counts) / dof)


def fold_sums(values: Tensor, place: Place, start: int = 0) -> Tensor:
    """Sum values [P, n, k] over the rows of each fold, [F, P, k] float64. The values are the rows
    of the place from `start` on."""
    shape = place.folds, values.shape[0], values.shape[2]
    sums = torch.zeros(shape, dtype=torch.float64, device=values.device)
    for fold, rows in place.within(start, start + values.shape[1]):
        torch.sum(values[:, rows], 1, dtype=torch.float64, out=sums[fold])
    return sums


def fold_products(weights: Tensor, features: Tensor, place: Place, start: int = 0) -> Tensor:
    """Sum weights [n, P] times features [n, k] over the rows of each fold, [F, P, k]. They are the
    rows of the place from `start` on. Products are in float64, which excludes TF32 and limits
    cancellation."""
    features, weights = features.double(), weights.double()
    shape = place.folds, weights.shape[1], features.shape[1]
    if len(features) <= FEW_ROWS * place.folds:  # one product costs less than one for each fold
        folds = place.fold[start : start + len(features)].to(features.device)
        own = weights.new_zeros(len(features), place.folds, weights.shape[1])
        own[torch.arange(len(features), device=features.device), folds] = weights
        return (own.flatten(1).T @ features).reshape(shape)
    products = features.new_zeros(shape)
    for fold, rows in place.within(start, start + len(features)):
        torch.mm(weights[rows].T, features[rows], out=products[fold])
    return products
