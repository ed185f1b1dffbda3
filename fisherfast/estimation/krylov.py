"""The Krylov space of a layer too wide for a covariance matrix (docs/theory.md, 15).

    span{D, S D, S^2 D, ..., S^(q-1) D},      D [d, P], S [d, d] of one half of the samples

contains the best approximation of the readout S^-1 D by q products with S. S itself is never
stored: each pass over the samples multiplies the last vectors by it, in two thin matrix products
per batch. The space learned on one half is measured on the other, as a few linear features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast.estimation.pilot import Standardisation

KRYLOV_VECTORS = 16
"""Vectors per parameter, q: for noise with long-range correlations J still gains 1 % from 12 to 16,
and each more takes a pass."""

BREAKDOWN = 1e-5
"""Part of a product that must be new to add a vector: float32 products have noise of 1e-6."""

WARM_PASSES = 2
"""Passes that update the space that the same layer had a few training steps before: D and S D of
the current network, followed by the old vectors. J agrees with that of 16 passes within its
noise."""

OFTEN = 16
"""Effective number of samples in the variance of an activation, (sum z^2)^2 / sum z^4, below which
it is scaled to less than unit variance. The derivative of an activation that is non-zero in a few
samples is known from these few alone: after a ReLU the vectors would consist of such noise."""

TILE_NUMBERS = 2**20
"""Activations standardised at a time, 4 MB of float32."""

TILE_ROWS = 4
"""Fewest samples of a tile, at any width: the vectors are read once per tile."""

SMALLEST_VARIANCE = 1e-30
"""Variance of a standardised activation below which float32 does not resolve its squares."""


class FirstPass:
    """Means, variances and the derivative of the activations of one set of samples.

    The sums are those of z, the activations standardised by the pilot, which float32 represents
    without loss.
    """

    def __init__(
        self,
        standardisation: Standardisation,
        conditions: int,
        parameters: int,
        dtype: torch.dtype,
        scored: bool = False,
    ) -> None:
        self._pilot = standardisation
        self._dtype = dtype
        self._counts = torch.zeros(conditions, dtype=torch.int64)
        d = len(standardisation.mean)
        self._sums = standardisation.mean.new_zeros(conditions, d)
        self._squares = standardisation.mean.new_zeros(d)
        self._fourths = standardisation.mean.new_zeros(d)
        self._derivative_sums = standardisation.mean.new_zeros(parameters, d)
        self._score_sums = standardisation.mean.new_zeros(parameters)
        self._scored = scored

    @property
    def degrees_of_freedom(self) -> int:
        """Samples minus conditions."""
        return max(int(self._counts.sum()) - len(self._counts), 1)

    def add(
        self, condition: int, activations: Tensor, tangents: Tensor | None, score: Tensor | None
    ) -> None:
        """Add activations [n, d] of a condition, with their tangents [P, n, d] or score [n, P]."""
        for tile in tiles(activations):
            z = standardised(tile, self._pilot.mean, self._pilot.scale, self._dtype)
            self._sums[condition] += z.sum(0)
            self._squares += z.square_().sum(0)
            self._fourths += z.square_().sum(0)
        self._counts[condition] += len(activations)
        if tangents is not None:
            for p, tangent in enumerate(tangents):
                for tile in tiles(tangent):
                    self._derivative_sums[p] += tile.to(self._dtype).sum(0) * self._pilot.scale
        if score is not None:
            self._add_score(activations, score)

    def shared_sums(self) -> list[Tensor]:
        """Return the sums to add up over processes."""
        moments = [self._counts, self._sums, self._squares, self._fourths]
        return [*moments, self._derivative_sums, self._score_sums]

    def _add_score(self, activations: Tensor, score: Tensor) -> None:
        weights = score.to(activations.device, self._dtype)
        for tile, weight in zip(tiles(activations), tiles(weights, like=activations), strict=True):
            z = standardised(tile, self._pilot.mean, self._pilot.scale, self._dtype)
            self._derivative_sums += weight.T @ z
        self._score_sums += weights.sum(0, dtype=torch.float64)

    def finite(self, condition: int) -> Tensor:
        """Return whether all values added for a condition are finite, a 0-d tensor."""
        carried = torch.isfinite(self._derivative_sums).all()
        return torch.isfinite(self._sums[condition]).all() & carried

    def results(self, contrast: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return means [C, d] and scales [d] of the activations, 0 where they never vary, and the
        derivative [P, d] of the standardised activations; all float64.

        Args:
            contrast: [C, P] float64 weights of the conditions; zero for tangents and score.
        """
        counts = self._counts.to(self._sums)[:, None].clamp_min(1)
        means = self._sums / counts
        variance = self._squares - (counts * means.square()).sum(0)
        variance /= self.degrees_of_freedom
        rounding = (self._pilot.rounding * self._pilot.mean * self._pilot.scale).square()
        alive = variance > rounding.clamp_min(SMALLEST_VARIANCE)
        own = variance / self._pilot.scale.square()  # in units of the activations
        squares = variance * self.degrees_of_freedom
        often = squares.square() / torch.where(alive, OFTEN * self._fourths, 1.0)
        scale = torch.where(alive, own, torch.inf).rsqrt() * often.clamp_max(1.0).square()
        if self._scored:
            derivative = self._derivative_sums - self._score_sums[:, None] * means
            derivative /= self.degrees_of_freedom
        else:
            derivative = contrast.to(means).T @ means + self._derivative_sums / counts.sum()
        center = self._pilot.mean + means / self._pilot.scale
        return center, scale, derivative * scale / self._pilot.scale


class KrylovSpace:
    """The Krylov space of one set of samples, learned in q passes over them.

    The first pass computes means, variances and the derivative D, each later pass the product of S
    with the newest vectors; `advance` ends a pass. Activations are standardised by these samples;
    those that never vary are left out. Vectors are orthonormal (orthogonalised twice against all
    before them) and ordered by pass, so that the leading ones span the smaller spaces.

    S is the covariance about the means of the conditions. Its noise is not independent of that of
    D, as it would be within folds, but nothing is estimated here: any space gives a valid bound.

    Args:
        standardisation: pilot statistics; the result depends on them by rounding only.
        conditions: C.
        parameters: P.
        steps: q, vectors per parameter.
        dtype: float32 or float64, of products; sums over tiles are float64.
        scored: samples have a score.
        start: [k, d] weights of an earlier space of this layer, from `projection`; None for none.
            With these, `WARM_PASSES` passes are enough.

    Attributes:
        ready: no further pass is needed.
        alive: [d] bool, activations that varied, after the first pass.

    Memory: q P d numbers of dtype, (3 P + 2 C) d of float64. Cost of a pass: 4 n d P operations.
    """

    alive: Tensor
    _products: Tensor

    def __init__(
        self,
        standardisation: Standardisation,
        *,
        conditions: int,
        parameters: int,
        steps: int = KRYLOV_VECTORS,
        dtype: torch.dtype = torch.float32,
        scored: bool = False,
        start: Tensor | None = None,
    ) -> None:
        self.ready = False
        self._dtype = dtype
        self._start = start
        self._steps = steps if start is None else min(steps, WARM_PASSES)
        self._passes = 0
        self._first = FirstPass(standardisation, conditions, parameters, dtype, scored)
        mean = standardisation.mean
        self._basis = torch.zeros(steps * parameters, len(mean), dtype=dtype, device=mean.device)
        # vectors in the basis, and how many of these the next pass multiplies by S
        self._size = self._newest = 0

    def __len__(self) -> int:
        return self._size

    @property
    def basis(self) -> Tensor:
        """Orthonormal vectors [k, d] for activations standardised by these samples."""
        return self._basis[: self._size]

    def observe(
        self,
        condition: int,
        activations: Tensor,
        tangents: Tensor | None = None,
        score: Tensor | None = None,
    ) -> None:
        """Add samples to the pass.

        Args:
            condition: of the samples.
            activations: [n, d], any floating dtype.
            tangents: [P, n, d] of the activations, if known.
            score: [n, P], if known.
        """
        if self._passes == 0:
            self._first.add(condition, activations, tangents, score)
        elif not self.ready:
            self._add_products(condition, activations)

    def shared_sums(self) -> list[Tensor]:
        """Return the sums of this pass to add up over processes."""
        return self._first.shared_sums() if self._passes == 0 else [self._products]

    def finite(self, condition: int) -> Tensor:
        """Return whether all activations of a condition were finite in the first pass, a 0-d
        tensor."""
        if self._passes:
            return torch.ones((), dtype=torch.bool, device=self._basis.device)
        return self._first.finite(condition)

    def advance(self, contrast: Tensor) -> bool:
        """End a pass, and return whether another one over the same samples is needed.

        Args:
            contrast: [C, P] float64 weights of the conditions; zero for tangents and score.
        """
        if self.ready:
            return False
        if self._passes == 0:
            self._center, self._scale, columns = self._first.results(contrast)
            self._dof = self._first.degrees_of_freedom
            self.alive = self._scale > 0
            del self._first
        else:
            columns = self._products / self._dof
        self._passes += 1
        self._newest = self._append(columns)
        self.ready = self._newest == 0 or self._passes == self._steps
        if self.ready and self._start is not None:
            self._append_known(self._start, len(columns))
        self._products = columns.new_zeros(0 if self.ready else self._newest, columns.shape[1])
        return not self.ready

    def projection(self) -> Tensor:
        """Return weights [k, d] that map activations to the features, up to a constant."""
        return self.basis * self._scale.to(self._dtype)

    def _add_products(self, condition: int, activations: Tensor) -> None:
        newest = self.basis[self._size - self._newest :]
        for tile in tiles(activations):
            z = standardised(tile, self._center[condition], self._scale, self._dtype)
            self._products += (z @ newest.T).T @ z

    def _append(self, columns: Tensor) -> int:
        """Add the part of columns [P, d] outside the space as orthonormal vectors, and return their
        number."""
        before = columns.norm(dim=1)
        for _ in range(2):  # the second time removes the rounding error of the first
            self._remove_known(columns)
        added: list[Tensor] = []
        room = min(len(self._basis), int(self.alive.sum())) - self._size
        for column, norm in zip(columns, before, strict=True):
            for _ in range(2):
                for other in added:
                    column -= (other @ column) * other
            if len(added) < room and float(column.norm()) > BREAKDOWN * float(norm):
                added.append(column / column.norm())
        for column in added:
            self._basis[self._size] = column
            self._size += 1
        return len(added)

    def _append_known(self, start: Tensor, together: int) -> None:
        """Add the new part of the weights [k, d] of an earlier space, in its order, up to the
        largest size."""
        self._start = None
        scale = torch.where(self.alive, self._scale, torch.inf)
        for rows in start.split(together):
            if self._size == len(self._basis):
                return
            self._append(rows.to(scale) / scale)

    def _remove_known(self, columns: Tensor) -> None:
        """Subtract from columns [P, d] float64 their projection on the basis, in place."""
        if self._size == 0:
            return
        width = max(TILE_NUMBERS // self._size, 1)
        parts = [slice(start, start + width) for start in range(0, columns.shape[1], width)]
        overlap = columns.new_zeros(len(columns), self._size)
        for part in parts:
            overlap += columns[:, part] @ self.basis[:, part].double().T
        for part in parts:
            columns[:, part] -= overlap @ self.basis[:, part].double()


def standardised(activations: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute (a - mean) scale of activations [n, d], a new tensor [n, d] of the dtype."""
    z = activations.to(dtype, copy=True)
    return z.sub_(mean.to(dtype)).mul_(scale.to(dtype))


def projected(activations: Tensor, projection: Tensor, mean: Tensor | None = None) -> Tensor:
    """Compute features [n, k] of activations [n, d] with weights [k, d], about their mean [d] if it
    is given."""
    pieces = []
    for tile in tiles(activations):
        rows = tile.to(projection.dtype)
        if mean is not None:
            rows = rows - mean.to(projection.dtype)
        pieces.append(rows @ projection.T)
    return torch.cat(pieces)


def tiles(rows: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split rows [n, d] into tiles of about `TILE_NUMBERS`, or at the same rows as `like`."""
    width = max((rows if like is None else like).shape[1], 1)
    return rows.split(max(TILE_NUMBERS // width, TILE_ROWS))
