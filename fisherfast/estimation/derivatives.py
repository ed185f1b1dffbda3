"""Fold-wise derivatives of mean features, from the tangents or the score of the samples.

With two conditions the derivative is a difference of means. With one condition it is the mean of
the tangents of the features, or the covariance of features and score (docs/theory.md, 12 and 13).
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
        """Compute the covariance of the score in the folds in columns; None for tangents."""
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


class ScoreMoments(DerivativeMoments):
    r"""Sums of features times score: :math:`\partial E[f] = \mathrm{Cov}(f, s)` within folds.

    Attributes:
        score_sums: [F, P] float64.
        score_cross: [F, P, P] float64 sums of s s^T.
    """

    def __init__(
        self, parameters: int, size: int, *, folds: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(parameters, size, folds=folds, device=device)
        self.score_sums = torch.zeros(folds, parameters, dtype=torch.float64, device=device)
        self.score_cross = torch.zeros(
            folds, parameters, parameters, dtype=torch.float64, device=device
        )

    def update(
        self, raw: Tensor, carried: Tensor | None, lift: Lift, place: Place, *, known: int = 0
    ) -> None:
        """As `TangentMoments.update`, with the score [n, P]. Cost: n k (d + P) multiply-adds."""
        if carried is None:
            raise ValueError("carried must be the score of each sample, got None")
        dim = raw.shape[1]
        begin = max(known, dim)
        rest = lift.following(begin - dim)
        for start in range(0, len(raw), TILE_ROWS):
            tile = slice(start, start + TILE_ROWS)
            if known < dim:
                self.sums[..., :dim] += fold_products(carried[tile], raw[tile], place, start)
            if len(rest):
                self.sums[..., begin:] += fold_products(
                    carried[tile], rest(raw[tile]), place, start
                )
        self.score_sums += fold_sums(carried[None], place)[:, 0]
        self.score_cross += fold_products(carried, carried, place)

    def derivatives(
        self, columns: slice, counts: Tensor, feature_sums: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `TangentMoments.derivatives`: the covariance with the score within folds, and the
        contributions of the folds, whose mean it is."""
        mean = self.score_sums[columns] / counts[:, None]
        scatter = self.sums[columns] - mean[..., None] * feature_sums[:, None]
        return _covariances(scatter.mT, counts)

    def score(self, columns: slice, counts: Tensor) -> FoldScore:
        """Compute V and the contributions of the folds."""
        sums = self.score_sums[columns]
        between = sums[:, :, None] * sums[:, None, :] / counts[:, None, None]
        return FoldScore(*_covariances(self.score_cross[columns] - between, counts))

    def mean_error(self, counts: Tensor) -> Tensor:
        """Compute the mean of the score in units of its standard error [P]; its expectation is
        zero."""
        samples = counts.sum()
        variance = self.score(slice(None), counts).covariance.diagonal()
        return self.score_sums.sum(0) / samples / (variance / samples).sqrt()

    def shared_sums(self, known: int = 0) -> list[Tensor]:
        """Return views of the sums, with those of the score itself."""
        return [*super().shared_sums(known), self.score_sums, self.score_cross]


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
    products = features.new_zeros(place.folds, weights.shape[1], features.shape[1])
    for fold, rows in place.within(start, start + len(features)):
        torch.mm(weights[rows].T, features[rows], out=products[fold])
    return products
