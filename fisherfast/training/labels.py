r"""The least error on unseen samples over the range of theta, from labelled samples alone.

The published rule needs the mean over theta of 1 / J of the input. Two errors of a measured profile
would move it:

- J of a bin has noise, and the mean of 1 / J is above 1 / J of the truth: by 4 % at an error of a
  fifth. The J of the bins are therefore moved towards their mean until their spread is that of the
  truth, the seen spread less that of the errors. Bins that agree count by their mean.
- J of a bin is that of the mean slope in it, too small where the mean of x bends within a bin. Many
  bins have less of this and more noise: the rule of `choose`.

An estimate that knows the range of the labels can be better than 1 / J, see `attainable`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from fisherfast.data import Data, Labelled
from fisherfast.data.inputs import joined
from fisherfast.results.comparison import DIVIDES, uncorrelated, weakest_direction
from fisherfast.results.profile import Profile
from fisherfast.training.attainable import (
    LEAST_DOF,
    attainable_error,
    attainable_error_of_samples,
)

Bound = tuple[torch.Tensor, tuple[float, ...] | None]
"""J [P, P] whose inverse is the mean bound, and the attainable errors of labelled samples."""

NUMBERS_OF_BINS = (2, 4, 8, 16, 32, 64)

NOISY = 0.1
"""Error of J relative to J above which a number of bins is too large, as for a "noisy" layer."""

FEW_ERRORS = 10.0
"""Width of a range of theta in standard errors up to which distant theta may look alike, so that
samples decide: the polynomial of `attainable_error_of_samples` is enough for such ranges."""

MOST_NUMBERS = 2**25  # of the samples that decide: 256 MB in float64
BATCH = 4096


def bounding_J(profile: Profile) -> torch.Tensor:
    r"""Compute the J whose inverse is the mean over samples of :math:`J(\theta)^{-1}`.

    Args:
        profile: J [Q, P, P] and its errors, in 1/theta^2.

    Returns:
        [P, P] float64; NaN while J of the mean, or of a bin that differs, is within three errors of
        zero: its 1 / J is unknown, and without its bin the error would be that of other samples.

    Example:
        >>> import torch
        >>> from fisherfast.results.profile import Profile
        >>> from fisherfast.training.labels import bounding_J
        >>> J = torch.tensor([1.0, 3.0], dtype=torch.float64)[:, None, None]
        >>> theta, samples = torch.zeros(2, 1), torch.tensor([100, 100])
        >>> round(float(bounding_J(Profile(theta, J, 1e-3 * J, samples))), 3)
        1.5
    """
    mean, stderr, weights = _mean_of(profile)
    unknown = torch.full_like(mean, math.nan)
    if not _resolved(mean, stderr):
        return unknown
    scale = (mean.diagonal()[:, None] * mean.diagonal()).sqrt()
    seen = weights @ ((profile.J - mean) / scale).square().sum((1, 2))
    noise = weights @ (profile.stderr / scale).square().sum((1, 2))
    spread = seen / (1 - weights.square().sum()) if len(weights) > 1 else seen
    kept = float((1 - noise / spread).clamp_min(0).sqrt()) if spread > 0 else 0.0
    J = mean + kept * (profile.J - mean)
    if not all(_resolved(*bin_) for bin_ in zip(J, kept * profile.stderr, strict=True)):
        return unknown
    return torch.linalg.inv((weights[:, None, None] * torch.linalg.inv(J)).sum(0))


def choose(profiles: Sequence[Profile], parameter: int = 0) -> Profile:
    """Choose the profile with the fewest bins whose J_pp no finer one exceeds by more than the
    error of the difference.

    Noise has mean zero and fewer bins have less of it; bending within a bin only lowers J.
    Under the hypothesis that nothing bends, the variance of the difference is the difference of the
    variances (Hausman 1978). Profiles whose J has an error above a tenth do not count.

    Args:
        profiles: of the same samples, in ascending order of their number of bins.
        parameter: p; another one may bend elsewhere, and be noisier.
    """
    J, errors = torch.tensor([_entry(profile, parameter) for profile in profiles]).T
    relative = torch.where(J > 0, errors / J, math.inf).tolist()
    known = [n for n in range(len(profiles)) if relative[n] <= NOISY]
    for place, n in enumerate(known):
        finer = known[place + 1 :]
        gain = J[finer] - J[n]
        noise = (errors[finer].square() - errors[n].square()).clamp_min(0).sqrt()
        if not bool((gain > noise).any()):
            return profiles[n]
    return profiles[relative.index(min(relative))]


def bound_along_theta(
    profile: Profile, data: Data, measure: Callable[[Data], Profile | None]
) -> Bound:
    """Compute J of the mean bound, and the attainable error if theta of each sample is known.

    Labelled samples whose bins follow from their labels are measured in several numbers of bins, of
    which one is chosen.

    Args:
        profile: of the input.
        data: its samples.
        measure: the profile of the input of other bins.

    Returns:
        J [P, P] as `bounding_J`, and the errors of `attainable` or None.

    Cost: up to six measurements of the input.
    """
    if not isinstance(data, Labelled):
        return bounding_J(profile), None
    profiles = _in_bins(data, measure) if data.chosen_bins else []
    J = _bounding_J_of(profiles or [profile])
    return J, None if bool(torch.isnan(J).any()) else attainable(data, J)


def _bounding_J_of(profiles: Sequence[Profile]) -> torch.Tensor:
    """Compute the J of the mean bound, with the bound of each parameter from the number of bins
    that is chosen for it, and correlations from the first of these."""
    bounds = [(profile, bounding_J(profile)) for profile in profiles]
    known = [(profile, J) for profile, J in bounds if not bool(torch.isnan(J).any())]
    if not known:
        return bounds[0][1]
    usable = [profile for profile, _ in known]
    numbers = [usable.index(choose(usable, p)) for p in range(len(known[0][1]))]
    inverses = [torch.linalg.inv(known[number][1]) for number in numbers]
    diagonal = torch.stack([inverse[p, p] for p, inverse in enumerate(inverses)])
    scale = (diagonal / inverses[0].diagonal()).sqrt()
    return torch.linalg.inv(scale[:, None] * inverses[0] * scale)


def _in_bins(data: Labelled, measure: Callable[[Data], Profile | None]) -> list[Profile]:
    """Measure in ever more bins, until twice the error, that of narrower bins, would be too large
    for all parameters, or they hold too few samples or values of theta."""
    found: list[Profile] = []
    for bins in NUMBERS_OF_BINS:
        try:
            profile = measure(data.with_bins(bins))
        except ValueError:
            break
        if profile is None or (found and len(profile) <= len(found[-1])):
            break
        found.append(profile)
        if 2 * _relative_error(profile) > NOISY:
            break
    return found


def attainable(data: Data, J: torch.Tensor) -> tuple[float, ...]:
    """Compute the least mean square error of each parameter on unseen samples, in theta^2.

    It is that of the posterior mean, with the labels as prior: `attainable_error`. In a range of a
    few standard errors distant theta may look alike, and J at each of them does not say so:
    there, for one parameter, the samples decide, `attainable_error_of_samples`.

    Args:
        data: labelled.
        J: [P, P], whose inverse is the mean bound.
    """
    theta = torch.cat([labels for _, labels in _read(data)])
    bounds = torch.linalg.inv(J).diagonal().tolist()
    if len(bounds) == 1:
        width = float(theta.max() - theta.min()) / math.sqrt(bounds[0])
        if width <= FEW_ERRORS and (error := _of_samples(data, len(theta))) is not None:
            return (min(error, bounds[0]),)
    return tuple(
        attainable_error(1 / bound, labels) for bound, labels in zip(bounds, theta.T, strict=True)
    )


def _of_samples(data: Data, n: int) -> float | None:
    """Compute the error from samples, evenly taken if they are many; None if they are too wide."""
    step, xs, thetas = 1, [], []
    for number, (x, labels) in enumerate(_read(data)):
        if number == 0:
            step = math.ceil(n * x[0].numel() / MOST_NUMBERS)
            if n // step < 2 * LEAST_DOF * x[0].numel():
                return None
        xs.append(x[::step].flatten(1).cpu())
        thetas.append(labels[::step, 0])
    return attainable_error_of_samples(torch.cat(xs), torch.cat(thetas))


def _read(data: Data) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for batch in data.read(0, BATCH):
        assert batch.score is not None
        yield joined(batch.x), batch.score.cpu()


def _mean_of(profile: Profile) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return J [P, P] averaged over samples, its error, and the weights [Q] of the bins."""
    weights = profile.samples / profile.samples.sum()
    weights = weights.to(profile.J)
    mean = (weights[:, None, None] * profile.J).sum(0)
    stderr = (weights[:, None, None] * profile.stderr).square().sum(0).sqrt()
    return mean, stderr, weights


def _entry(profile: Profile, parameter: int) -> tuple[float, float]:
    """Return the mean J of a parameter and its error."""
    mean, stderr, _ = _mean_of(profile)
    return float(mean[parameter, parameter]), float(stderr[parameter, parameter])


def _relative_error(profile: Profile) -> float:
    """Return the least relative error of the mean of a diagonal entry; infinite if none is
    positive."""
    mean, stderr, _ = _mean_of(profile)
    J, errors = mean.diagonal(), stderr.diagonal()
    return float(torch.where(J > 0, errors / J, math.inf).amin())


def _resolved(J: torch.Tensor, stderr: torch.Tensor) -> bool:
    return weakest_direction(J, uncorrelated(stderr))[1] >= DIVIDES
