"""Choose the number k of features on the corrected curve."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fisherfast.estimation.curve import FisherCurve

PLATEAU = 0.75
"""A plateau counts as reached if the chosen k leaves the last quarter of the lifted features
unused."""

GAIN_ERRORS = 2.0
"""Standard errors by which more features must raise J to be used: 1 would fit noise, 3 would lose
1 % of J."""

LEAST_GAIN = 0.01
"""Gains below this fraction of the standard error of J are treated as zero."""

ENTRY_ERRORS = 3.5
"""The same for using a lift at all: the best of `GAIN_POINTS` sizes, with an error from 16 folds,
exceeds it by chance in 3 of 1000 layers (tests/montecarlo/test_choice.py)."""

SELECTED = 1.0
"""Standard errors by which the clearest of many gains is overestimated."""

GAIN_POINTS = 32
"""Sizes k that are compared, in equal ratios of the number of lifted features: if the first few
carry the information, the noise of all others would hide it in a comparison of equal steps."""

WORTH = 0.1
"""Part of J that would have to be noticed if more features added it ..."""

MORE_FEATURES = 8
"""... where more means twice as many lifted features, or at least so many more."""


class Choice(NamedTuple):
    """The number of features to use, from `choose_features`.

    Attributes:
        features: k.
        plateau: whether J(k) is flat from well before the last lifted feature on.
        doubt: [F, P, P] error of J from the choice itself, as deviations of a jackknife.
        sensitive: a gain of a tenth of J by twice as many lifted features would have been noticed.
    """

    features: int
    plateau: bool
    doubt: Tensor
    sensitive: bool


def choose_features(curve: FisherCurve, first: int) -> Choice:
    r"""Choose the smallest k >= first that no larger k' exceeds significantly for any parameter;
    no lift (k = first) unless a larger k' exceeds it clearly.

    A gain is significant above `GAIN_ERRORS` standard errors *of the gain* J(k') - J(k), not of J:
    both share the noise of their common features, and a gain of 1 % can be certain where J itself
    is known to 3 %. The variance of a gain is its variance over folds (jackknife), plus that of dk
    more features in the covariance, 2 M^2 dk / nu^2 with M = h J_naive (included in the folds for a
    score).

    If the clearest gain is z errors and the threshold is t errors, other samples would have led to
    the larger size with probability p = Phi(z - t). The choice then adds an error of
    sqrt(p (1 - p)) times the gain, in proportion to the gain of each fold: the doubt. It covers the
    choice between no lift and a lift, and that between k and the next size.

    Args:
        curve: of K features.
        first: smallest k allowed, 1 <= first <= K (all raw activations are always used).
    """
    grid, gain, error = _gains(curve, first)
    beaten = gain > GAIN_ERRORS * error
    lift = _smallest(grid, beaten)
    clear = (gain / error).nan_to_num(0.0)
    doubt = _doubt(curve, first, lift, clear[0].amax(0), ENTRY_ERRORS)
    beaten[0] &= bool((gain[0] > ENTRY_ERRORS * error[0]).any())
    chosen = _smallest(grid, beaten)
    own = int((grid == chosen - 1).nonzero()[0])
    if chosen > first and own + 1 < len(grid):
        following = clear[own, own + 1 :].amax(1)  # [m]
        larger = int(grid[own + 1 + int(following.argmax())]) + 1
        clearest = clear[own, own + 1 + int(following.argmax())]
        doubt = doubt + _doubt(curve, chosen, larger, clearest, GAIN_ERRORS)
    lifted = len(curve) - first
    plateau = lifted > 0 and chosen - first <= PLATEAU * lifted
    return Choice(chosen, plateau, doubt, _sensitive(curve, grid, error[own], chosen, first))


def _sensitive(curve: FisherCurve, grid: Tensor, error: Tensor, chosen: int, first: int) -> bool:
    """Return whether more features that add a tenth of J would have been noticed.

    error [m, P] is that of the gains over the chosen size."""
    more = max(MORE_FEATURES, chosen - first)
    following = (grid >= min(chosen + more, len(curve)) - 1).nonzero()[0, 0]
    J = curve.J[chosen - 1].diagonal().clamp_min(0)
    least = ENTRY_ERRORS if chosen == first else GAIN_ERRORS
    return chosen == len(curve) or not bool((least * error[following] > WORTH * J).any())


def _doubt(curve: FisherCurve, smaller: int, larger: int, clearest: Tensor, least: float) -> Tensor:
    """Compute the deviations [F, P, P] from one choice; clearest [P] is z, least is t."""
    change = curve.replicates[larger - 1] - curve.replicates[smaller - 1]
    change = change - change.mean(0)
    p = torch.special.ndtr(clearest.max() - SELECTED - least)
    folds = torch.diagonal(change, dim1=1, dim2=2)  # [F, P]
    own = (folds.square().sum(0) * (len(change) - 1) / len(change)).sqrt()
    gain = (curve.J[larger - 1] - curve.J[smaller - 1]).diagonal().abs()
    scale = ((p * (1 - p)).sqrt() * gain / own).nan_to_num(0.0, posinf=0.0).sqrt()
    return change * scale[:, None] * scale  # each parameter by its own gain


def _gains(curve: FisherCurve, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sizes that are compared, [m] counted from 0, and for each pair of them the gain
    J(k') - J(k) [m, m, P] and its standard error."""
    lifted = math.log(max(len(curve) - first, 1))
    steps = torch.linspace(0.0, lifted, GAIN_POINTS, dtype=torch.float64).exp().round().long()
    grid = torch.cat([steps.new_tensor([first]), (first + steps).clamp_max(len(curve))]).unique()
    grid = grid.to(curve.J.device) - 1
    J = torch.diagonal(curve.J, dim1=1, dim2=2)[grid]
    size = curve.useless[grid]
    left_out = curve.left_out[grid]
    folds = left_out.shape[1]
    gain = J[None] - J[:, None]
    spread = left_out[None] - left_out[:, None]
    jackknife = spread.var(2, correction=0) * (folds - 1)
    added = (curve.effective_dim[grid][None] - curve.effective_dim[grid][:, None]).clamp_min(0)
    statistics = curve.statistics
    if not statistics.paired and statistics.score is None:  # at least the noise of useless features
        noise = statistics.noise.diagonal().square()
        jackknife = jackknife.maximum(2 * noise * added[..., None])
    covariance = 2 * size[None].square() * added[..., None] / statistics.dof**2
    own = torch.diagonal(curve.stderr, dim1=1, dim2=2)[grid]
    return grid, gain, (jackknife + covariance).sqrt().maximum(LEAST_GAIN * own[:, None])


def _smallest(grid: Tensor, beaten: Tensor) -> int:
    """Return the smallest size that no larger one exceeds, given beaten [m, m, P]."""
    later = torch.ones_like(beaten[..., 0]).triu(1)
    enough = ~(beaten.any(-1) & later).any(1)
    return int(grid[enough][0]) + 1
