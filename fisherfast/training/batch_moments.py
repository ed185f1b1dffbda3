"""Moments of a batch of outputs, and J from them, differentiable in the outputs.

A measurement streams over batches (`estimation/`); a training step has one batch and needs its
gradient. The formulas are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherfast import ops
from fisherfast.data.finite_difference import check_dtheta
from fisherfast.estimation.curve import SingularCovarianceError
from fisherfast.estimation.ridge import AUTO, RidgeSetting, raw_ridge, relative_rounding

FOLDS = 16
"""Folds of the U-statistic, as in a measurement; fewer if one would hold less than 2 samples."""

SPARE_DOF = 2
"""Degrees of freedom required beyond k, so that the mean of an inverse covariance exists."""

ROUNDING = 1e-13
"""Spread relative to its mean below which an output is constant: the mean of equal numbers has a
relative error of up to 1e-15, which would look like a spread."""

Outputs = Tensor | list[Tensor]


@dataclass(frozen=True)
class BatchMoments:
    """Moments of a batch of outputs, float64.

    Attributes:
        mean: [..., k].
        covariance: [..., k, k] within conditions and folds.
        folds: [..., F, k, P] derivative of the mean in each fold; one fold if none are needed.
        dof: nu [...], degrees of freedom of the covariance.
        noise: [P] c = (1/n_minus + 1/n_plus) / dtheta^2 of independent conditions, whose J without
            correction is too large by c k; None for other sources.
        score: [..., P, P] covariance of the score; None for other sources.
        rounding: spread relative to its size that rounding may have added to an output.
    """

    mean: Tensor
    covariance: Tensor
    folds: Tensor
    dof: Tensor
    noise: Tensor | None = None
    score: Tensor | None = None
    rounding: float = 0.0

    def ridge(self, setting: RidgeSetting) -> Tensor:
        """Compute the ridge of each output [..., k], relative to its variance, without gradient."""
        variance = self.covariance.diagonal(dim1=-2, dim2=-1).detach()
        if setting != AUTO:
            return torch.full_like(variance, setting)
        return raw_ridge(variance, self.rounding**2 * (self.mean.detach().square() + variance))

    def ridged(self, setting: RidgeSetting) -> Tensor:
        """Return the covariance [..., k, k] with its ridge."""
        variance = self.covariance.diagonal(dim1=-2, dim2=-1)
        return self.covariance + (self.ridge(setting) * variance).diag_embed()


def batch_moments(
    z: Outputs,
    z_plus: Outputs | None,
    dtheta: float | Sequence[float] | None,
    tangents: Tensor | None,
    score: Tensor | None,
    paired: bool,
    corrected: bool,
) -> BatchMoments:
    """Compute the moments of the source that the arguments determine."""
    given = {"z_plus": z_plus, "tangents": tangents, "score": score}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise TypeError(
            f"one of z_plus, tangents and score must be given, got {' and '.join(names) or 'none'}"
        )
    if z_plus is not None:
        if dtheta is None:
            raise TypeError("dtheta must be given with z_plus, got None")
        moments = _of_conditions(
            _conditions(z, "z_minus"),
            _conditions(z_plus, "z_plus"),
            dtheta,
            folds=paired and corrected,
            paired=paired,
        )
    elif dtheta is not None:
        raise TypeError(f"dtheta must be left out with {names[0]}, got {dtheta}")
    elif score is not None:
        moments = _of_score(_samples(z, "z"), score)
    else:
        moments = _of_tangents(_samples(z, "z"), tangents, folds=corrected)
    first = z if isinstance(z, Tensor) else z[0]  # the others are of the same network
    return replace(moments, rounding=relative_rounding(first.dtype))


def _of_conditions(
    minus: list[Tensor],
    plus: list[Tensor],
    dtheta: float | Sequence[float],
    *,
    folds: bool,
    paired: bool,
) -> BatchMoments:
    """Compute the moments of P pairs of conditions [..., n, k]."""
    if len(minus) != len(plus):
        raise ValueError(
            f"z_plus must hold as many conditions as z_minus, got {len(minus)} and {len(plus)}"
        )
    conditions = [*minus, *plus]
    systems = {(tuple(z.shape[:-2]), z.shape[-1]) for z in conditions}
    counts = [z.shape[-2] for z in conditions]
    if len(systems) > 1 or (paired and len(set(counts)) > 1):
        equal = "[..., n, k]" if paired else "[..., k]"
        raise ValueError(
            f"z_minus and z_plus must have the same {equal} in all conditions,"
            f" got {[list(z.shape) for z in conditions]}"
        )
    steps = conditions[0].new_tensor(check_dtheta(dtheta, len(minus)))
    number = _fold_number(min(counts)) if folds else 1
    parts = [_fold_means(z, number) for z in conditions]
    means = torch.stack([fold_means for _, fold_means, _ in parts], -1)
    derivative = (means[..., len(minus) :] - means[..., : len(minus)]) / steps
    dof = sum(counts) - number * len(conditions)
    covariance = torch.stack([scatter for _, _, scatter in parts]).sum(0) / max(dof, 1)
    overall = torch.stack([mean for mean, _, _ in parts]).mean(0)
    nu = covariance.new_full(covariance.shape[:-2], dof)
    if folds:
        nu = nu / _pair_inflation(conditions)
    if paired:
        return BatchMoments(overall, covariance, derivative, nu)
    c = [1 / a + 1 / b for a, b in zip(counts[: len(minus)], counts[len(minus) :], strict=True)]
    noise = steps.new_tensor(c) / steps.square()
    return BatchMoments(overall, covariance, derivative, nu, noise)


def _of_tangents(z: Tensor, tangents: Tensor | None, *, folds: bool) -> BatchMoments:
    """Compute the moments of samples [..., n, k] with tangents [..., P, n, k]."""
    dz = _floating(tangents, "tangents")
    *systems, n, k = z.shape
    expected = [*systems, "P", n, k]
    if dz.ndim != z.ndim + 1 or [*dz.shape[:-3], "P", *dz.shape[-2:]] != expected:
        raise ValueError(
            f"tangents must have shape [..., P, n, k] with [..., n, k] = {list(z.shape)},"
            f" got {list(dz.shape)}"
        )
    number = _fold_number(n) if folds else 1
    mean, _, scatter = _fold_means(z, number)
    derivative = (_averaging(n, number, z) @ dz).movedim(-3, -1)
    dof = n - number
    covariance = scatter / max(dof, 1)
    return BatchMoments(mean, covariance, derivative, z.new_full(tuple(systems), dof))


def _of_score(z: Tensor, score: Tensor) -> BatchMoments:
    """Compute the moments of samples [..., n, k] with score [..., n, P]."""
    s = _floating(score, "score").detach()
    *systems, n, _ = z.shape
    s = s[:, None] if s.ndim == 1 else s
    if s.ndim != z.ndim or list(s.shape[:-1]) != [*systems, n]:
        raise ValueError(
            f"score must have shape [..., n, P] with [..., n] = {[*systems, n]},"
            f" got {list(s.shape)}"
        )
    mean, _, scatter = _fold_means(z, 1)
    centred = s - s.mean(-2, keepdim=True)
    dof = max(n - 1, 1)
    derivative = ((z - mean[..., None, :]).mT @ centred / dof)[..., None, :, :]
    nu = z.new_full(tuple(systems), n - 1)
    return BatchMoments(mean, scatter / dof, derivative, nu, score=centred.mT @ centred / dof)


def _fold_number(n: int) -> int:
    return min(n, FOLDS, max(2, n // 2))


def _averaging(n: int, folds: int, like: Tensor) -> Tensor:
    """Make a matrix [F, n] that averages samples dealt to folds in turn."""
    fold = torch.arange(n, device=like.device) % folds
    member = (fold == torch.arange(folds, device=like.device)[:, None]).to(like.dtype)
    return member / member.sum(1, keepdim=True)


def _fold_means(z: Tensor, folds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mean [..., k], the means in folds [..., F, k], and the scatter [..., k, k] about
    the latter."""
    mean = z.mean(-2)
    centred = z - mean[..., None, :]
    if folds == 1:
        return mean, mean[..., None, :], centred.mT @ centred
    average = _averaging(z.shape[-2], folds, z)
    offsets = average @ centred
    counts = 1 / average.amax(1)
    between = (offsets * counts[:, None]).mT @ offsets
    return mean, mean[..., None, :] + offsets, centred.mT @ centred - between


def _pair_inflation(conditions: list[Tensor]) -> Tensor:
    """Compute 1 + sum over pairs of conditions of rho^2 / C [...], the factor by which shared noise
    reduces the degrees of freedom; rho is the mean over outputs of the correlation of an output
    with itself."""
    units = []
    for z in conditions:
        centred = z - z.mean(-2, keepdim=True)
        norm = centred.norm(dim=-2, keepdim=True)
        units.append((centred / torch.where(norm > 0, norm, 1)).flatten(-2))
    unit = torch.stack(units, -2)
    rho = unit @ unit.mT / conditions[0].shape[-1]
    rho = rho - rho.diagonal(dim1=-2, dim2=-1).diag_embed()
    return 1 + rho.square().sum((-2, -1)) / len(conditions)


def batch_information(
    moments: BatchMoments, ridge: RidgeSetting, corrected: bool
) -> tuple[Tensor, Tensor]:
    """Compute J [..., P, P] without and with correction (twice without if none is wanted).

    The corrections are those of `estimation.curve.fisher_curve`, for all k features.

    Raises:
        ValueError: there are too few samples for k; an output is constant, not finite or linear in
            others.
    """
    *systems, folds, size, parameters = moments.folds.shape
    nu = moments.dof
    if bool((nu < size + SPARE_DOF).any()):
        raise ValueError(
            f"degrees of freedom must exceed the {size} outputs by at least {SPARE_DOF}, got"
            f" {float(nu.min()):.3g}: use more samples or fewer outputs"
        )
    columns = moments.folds.movedim(-3, -2).reshape(*systems, size, folds * parameters)
    wanted = corrected and ridge != 0
    solved = ops.fisher_solve_details(moments.ridged(ridge), columns, inverse_rows=wanted)
    if bool((solved.info.bool() | _constant(moments).any(-1)).any()):
        raise _failure(moments, solved.info, ridge)
    products = solved.fisher.reshape(*systems, folds, parameters, folds, parameters)
    total = products.sum((-4, -2))
    naive = total / folds**2
    if not corrected:
        return naive, naive
    effective = nu.new_tensor(size)
    if wanted:  # with the largest ridge for all outputs: where these differ, all of them are tiny
        added = moments.ridge(ridge).amax(-1, keepdim=True)
        effective = size - (added / (1 + added) * solved.inverse_rows).clamp(0, 1).sum(-1)
    shrink = ((nu - effective - 1) / nu)[..., None, None]
    if moments.score is not None:
        residual = moments.score - naive
        return naive, moments.score - residual * (nu / (nu - effective))[..., None, None]
    if moments.noise is not None:
        return naive, shrink * naive - effective[..., None, None] * moments.noise.diag()
    own = products.diagonal(dim1=-4, dim2=-2).sum(-1)
    return naive, shrink * (total - own) / (folds * (folds - 1))


def _constant(moments: BatchMoments) -> Tensor:
    """Return which outputs do not vary [..., k]."""
    variance = moments.covariance.diagonal(dim1=-2, dim2=-1)
    return variance <= (ROUNDING * moments.mean).square()


def _failure(moments: BatchMoments, info: Tensor, ridge: RidgeSetting) -> ValueError:
    """Make the error that explains why the first system failed."""
    size = moments.covariance.shape[-1]
    if not bool(torch.isfinite(moments.covariance).all()):
        return ValueError("z must be finite, got NaN or infinity")
    constant = _constant(moments).reshape(-1, size).nonzero()[:, 1].tolist()
    if constant:
        return ValueError(f"outputs of z must vary, got a constant one: {constant[0]} of {size}")
    return SingularCovarianceError(
        int(info[info > 0][0]), size, 0.0 if ridge == AUTO else float(ridge)
    )


def _conditions(z: Outputs, name: str) -> list[Tensor]:
    """Split a tensor [n, k] or [..., P, n, k], or a list, into P tensors [..., n, k]."""
    if isinstance(z, tuple):
        raise TypeError(
            f"{name} must be a tensor or a list of P of them, got a tuple: join several outputs of"
            " a model with torch.cat(z, 1), or give one of them"
        )
    if isinstance(z, list):
        if not z:
            raise ValueError(f"{name} must hold at least one condition, got an empty list")
        return [_samples(part, f"{name}[{p}]") for p, part in enumerate(z)]
    samples = _samples(z, name)
    return [samples] if samples.ndim == 2 else list(samples.unbind(-3))


def _samples(z: object, name: str) -> Tensor:
    """Check z and return it as [..., n, k] in float64."""
    samples = _floating(z, name)
    if samples.ndim < 2 or 0 in samples.shape:
        raise ValueError(
            f"{name} must have shape [n, k] with at least one of each, got {list(samples.shape)}"
        )
    return samples


def _floating(z: object, name: str) -> Tensor:
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(z).__name__}")
    if not z.is_floating_point():
        raise TypeError(f"{name} must be of floating dtype, got {z.dtype}")
    return z.double()
