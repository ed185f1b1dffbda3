"""Ratio and difference of the information in two layers, with their errors (docs/theory.md, 18).

Layers are measured on the same samples, so their errors are correlated. The error of any function
of two layers is its jackknife: the function of both layers without the same fold of the samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fisherfast.estimation.variance import jackknife_covariance
from fisherfast.results.layer import LayerFisher
from fisherfast.results.marginal import SINGULAR, pack_covariance, unpack_covariance
from fisherfast.results.text import with_error

DIVIDES = 3.0
"""Standard errors that J must be above zero, in every direction, to be the divisor of a ratio."""

BY_CHANCE = 0.02
"""Probability that a layer is replaced although the later layers have no more information."""

ROUNDING = 1e-12
"""Added to a correlation matrix of errors, which may be singular."""


@dataclass(frozen=True, eq=False, repr=False)
class LayerComparison:
    """Compare the information in layers a and b of the same flow.

    Tensors are float64 on the CPU. The ratios are NaN if J_b is within three errors of zero in some
    direction; there is a note then.

    Attributes:
        names: of a and b.
        ratio: J_a / J_b; for P parameters tr(J_b^-1 J_a) / P, the mean of `ratios`. Dimensionless.
        ratio_stderr: its standard error.
        difference: [P, P] J_a - J_b, in 1/theta^2.
        difference_stderr: [P, P] standard errors.
        ratios: [P] J_a / J_b by direction, ascending: the eigenvalues of J_b^-1/2 J_a J_b^-1/2.
        ratios_stderr: [P] standard errors, of the ratios along these directions.
        directions: [P, P], in the unit of theta; the columns w are the directions of `ratios`,
            w^T J_b w = 1.
        notes: remarks for the reader.
        parameter_names: [P] names of the parameters; empty if they have none.
    """

    names: tuple[str, str]
    ratio: float
    ratio_stderr: float
    difference: torch.Tensor
    difference_stderr: torch.Tensor
    ratios: torch.Tensor
    ratios_stderr: torch.Tensor
    directions: torch.Tensor
    notes: tuple[str, ...] = ()
    parameter_names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        by = zip(self.difference.diagonal(), self.difference_stderr.diagonal(), strict=True)
        texts = [with_error(float(value), float(error)) for value, error in by]
        if self.parameter_names:
            named = zip(self.parameter_names, texts, strict=True)
            texts = [f"{name}: {text}" for name, text in named]
        differences = ", ".join(texts)
        a, b = self.names
        return (
            f"LayerComparison({a!r} / {b!r} = {with_error(self.ratio, self.ratio_stderr)},"
            f" {a!r} - {b!r} = {differences})"
        )


def compare(a: LayerFisher, b: LayerFisher) -> LayerComparison:
    """Compute ratio J_a / J_b and difference J_a - J_b of two layers with the same samples."""
    of_a, of_b = _joint_replicates(a, b)
    difference_stderr = _jackknife(of_a - of_b)
    value, error = ratio(a, b)
    if math.isnan(value):
        directions = torch.full_like(a.J, math.nan)
        ratios, errors = directions[0], directions[0]
    else:
        ratios, directions = relative(a.J, b.J)
        along = [torch.einsum("pi,fpq,qi->fi", directions, J, directions) for J in (of_a, of_b)]
        errors = _jackknife(along[0] / along[1])
    return LayerComparison(
        names=(a.name, b.name),
        ratio=value,
        ratio_stderr=error,
        difference=a.J - b.J,
        difference_stderr=difference_stderr,
        ratios=ratios,
        ratios_stderr=errors,
        directions=directions,
        notes=() if divides(b) else (unresolved_note(b),),
        parameter_names=a.parameter_names,
    )


def exceeds(a: LayerFisher, b: LayerFisher, of: int = 1) -> bool:
    """Return whether J_a is larger than J_b in every direction, and significantly so for at least
    one parameter.

    Args:
        a, b: two layers.
        of: number of layers of which a is the largest. The largest of many noisy numbers is too
            large, so the required significance grows with it.
    """
    difference = a.J - b.J
    if not bool(torch.isfinite(difference).all()):
        return False
    if float(torch.linalg.eigvalsh((difference + difference.T) / 2).min()) <= 0:
        return False
    chance = torch.tensor(BY_CHANCE / of, dtype=torch.float64)
    of_a, of_b = _joint_replicates(a, b)
    errors = -torch.special.ndtri(chance) * _jackknife(of_a - of_b).diagonal()
    return bool((difference.diagonal() > errors).any())


def ratio(a: LayerFisher, b: LayerFisher) -> tuple[float, float]:
    """Compute tr(J_b^-1 J_a) / P and its standard error; NaN unless `divides(b)`."""
    if not divides(b):
        return math.nan, math.nan
    scale = b.J.diagonal().sqrt()
    unit = scale[:, None] * scale

    def mean_ratio(J_a: torch.Tensor, J_b: torch.Tensor) -> torch.Tensor:
        whitened = torch.linalg.solve(J_b / unit, J_a / unit)
        return whitened.diagonal(dim1=-2, dim2=-1).mean(-1)

    return float(mean_ratio(a.J, b.J)), float(_jackknife(mean_ratio(*_joint_replicates(a, b))))


def relative(J_a: torch.Tensor, J_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the eigenvalues of J_b^-1/2 J_a J_b^-1/2, ascending [..., P], and their directions w
    in theta [..., P, P], w^T J_b w = 1. J_a [..., P, P], J_b [P, P] positive definite."""
    scale = J_b.diagonal().sqrt()
    unit = scale[:, None] * scale
    factor = torch.linalg.cholesky(J_b / unit)
    half = torch.linalg.solve_triangular(factor, J_a / unit, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    values, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
    directions = torch.linalg.solve_triangular(factor.mT, vectors, upper=True)
    return values, directions / scale[:, None]


def divides(layer: LayerFisher) -> bool:
    """Return whether J is at least `DIVIDES` errors above zero in every direction, so that a ratio
    to it makes sense."""
    return weakest_direction(layer.J, covariance_of(layer))[1] >= DIVIDES


def unresolved_note(layer: LayerFisher) -> str:
    """Explain why there is no ratio to this layer."""
    if bool(layer.J.isnan().any()):
        return f"J of {layer.name} is not known: no ratio to it"
    return f"J of {layer.name} is within {DIVIDES:g} errors of zero: no ratio to it"


def weakest_direction(J: torch.Tensor, covariance: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Find the direction in theta [P] in which J is known worst, and J there in units of its error.

    It is an eigenvector of J scaled to unit diagonal. The result is 0 errors for J = 0 without an
    error, and NaN for numbers that are not finite.

    Args:
        J: [P, P].
        covariance: [P, P, P, P] of the errors of its entries.
    """
    scale = J.diagonal().abs().sqrt()
    scale = torch.where(scale > 0, scale, 1)
    unit = J / scale[:, None] / scale
    if not bool(torch.isfinite(unit).all() and torch.isfinite(covariance).all()):
        return torch.full_like(scale, math.nan), math.nan
    values, vectors = torch.linalg.eigh((unit + unit.T) / 2)
    values = torch.where(values.abs() > SINGULAR, values, 0.0)  # rounding has a small error as well
    directions = vectors / scale[:, None]
    errors = variance_along(directions, covariance).sqrt()
    known = (values / errors).nan_to_num(0.0, posinf=math.inf, neginf=-math.inf)
    worst = int(known.argmin())
    return directions[:, worst], float(known[worst])


def variance_along(directions: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Compute the variance [n] of w^T J w for the columns w of [P, n], from the covariance
    [P, P, P, P]."""
    squares = directions[:, None] * directions
    return torch.einsum("pqi,pqrs,rsi->i", squares, covariance, squares).clamp_min(0)


def covariance_of(layer: LayerFisher) -> torch.Tensor:
    """Compute the covariance [P, P, P, P] of the errors of the entries of J, uncorrelated if only
    their standard errors are known."""
    if layer.error_covariance is not None:
        return unpack_covariance(layer.error_covariance, len(layer.J))
    if len(layer.replicates):  # for many parameters there are more entries than folds
        return jackknife_covariance(layer.replicates)
    return uncorrelated(layer.stderr)


def uncorrelated(stderr: torch.Tensor) -> torch.Tensor:
    """Make the covariance [P, P, P, P] of entries with independent errors [P, P]."""
    row, column = torch.tril_indices(*stderr.shape, device="cpu")
    return unpack_covariance(stderr[row, column].square().diag(), len(stderr))


def _joint_replicates(a: LayerFisher, b: LayerFisher) -> tuple[torch.Tensor, torch.Tensor]:
    """Return J of both layers [R, P, P] without each fold, the same for both; if a layer has no
    replicates, the errors are independent and add in quadrature."""
    of_a, of_b = _deviations(a), _deviations(b)
    if a is not b and not len(a.replicates) == len(b.replicates) > 0:
        of_a, of_b = (
            torch.cat([of_a, torch.zeros_like(of_b)]),
            torch.cat([torch.zeros_like(of_a), of_b]),
        )
    widen = math.sqrt(len(of_a) / (len(of_a) - 1))
    return a.J + widen * of_a, b.J + widen * of_b


def _deviations(layer: LayerFisher) -> torch.Tensor:
    """Compute deviations [n, P, P] of J with mean zero, whose products sum to the covariance of its
    error."""
    folds = len(layer.replicates)
    if folds:
        return (layer.replicates - layer.replicates.mean(0)) * math.sqrt((folds - 1) / folds)
    covariance = pack_covariance(covariance_of(layer))
    if not bool(torch.isfinite(covariance).all()):
        return torch.full((2, *layer.J.shape), math.nan, dtype=torch.float64, device="cpu")
    scale = covariance.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1)
    correlation = covariance / scale[:, None] / scale
    correlation.diagonal().add_(ROUNDING)
    roots = (scale[:, None] * torch.linalg.cholesky_ex(correlation).L).T / math.sqrt(2)
    row, column = torch.tril_indices(*layer.J.shape, device="cpu")
    deviations = layer.J.new_zeros(len(roots), *layer.J.shape)
    deviations[:, row, column] = deviations[:, column, row] = roots
    return torch.cat([deviations, -deviations])


def _jackknife(values: torch.Tensor) -> torch.Tensor:
    """Compute the standard error of a function from its values without each fold [F, ...]."""
    return (values.var(0, correction=0) * (len(values) - 1)).sqrt()
