"""Fisher information that can be differentiated, and a loss that raises it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisherfast import ops
from fisherfast.data.finite_difference import check_dtheta
from fisherfast.estimators import SingularCovarianceError

__all__ = ["InformationLoss", "linear_fisher"]

FOLDS = 16
"""Folds of the U-statistic, as in a measurement; fewer where there are fewer samples."""

SPARE_DOF = 2
"""Degrees of freedom beyond k that the mean of an inverse covariance needs to exist."""

LEAST_SHARE = 0.1
"""Share of the measured J above its noise, below which a logarithm is continued as a line."""

LEAST_EIGENVALUE = 1e-12
"""Of J in units of its own diagonal, below which a logarithm is continued as a line: rounding of
float64 leaves 1e-15 of a J that is singular."""

REGULARIZATION = 0.1
"""Default weight of the term that pins the outputs to unit covariance."""

Outputs = Tensor | Sequence[Tensor]


def linear_fisher(
    z_minus: Outputs,
    z_plus: Outputs | None = None,
    dtheta: float | Sequence[float] | None = None,
    *,
    tangents: Tensor | None = None,
    score: Tensor | None = None,
    paired: bool = False,
    corrected: bool = False,
    ridge: float = 0.0,
) -> Tensor:
    r"""Linear Fisher information of k numbers a sample, differentiable in them.

    .. math:: J = D^T S^{-1} D, \qquad D = \partial_\theta E[z], \quad S = \mathrm{Cov}(z)

    For what is trained to carry information: ``-linear_fisher(...).logdet()`` is a loss. To measure
    what a network carries, with an error bar, use `fisher_flow`. One function serves the sources of
    a measurement, told apart by the arguments that hold what each has:

        linear_fisher(z_minus, z_plus, dtheta)        D = (mean z_plus - mean z_minus) / dtheta
        linear_fisher(z, tangents=dz)                 D = mean dz
        linear_fisher(z, score=s)                     D = Cov(z, s)

    Args:
        z_minus: [n, k] at theta - dtheta/2, any floating dtype; with tangents or score, at theta.
            For P parameters and two conditions a list of P of these, or [P, n, k]. Leading
            dimensions [..., P, n, k], or [..., n, k] in a list and with tangents or score, are
            systems of their own.
        z_plus: the same at theta + dtheta/2; n may differ unless paired.
        dtheta: FULL separation of the two conditions in the unit of theta, one number or P.
        tangents: dz/dtheta [..., P, n, k] per sample, per unit of theta.
        score: d log p(x given theta) / d theta [..., n, P] of each sample, per unit of theta; [n]
            for one parameter. A target: no gradient passes.
        paired: sample i has the same noise in z_minus and z_plus. Of use when corrected only.
        corrected: remove the finite-sample bias, as a measurement does. J may then be negative,
            and its logdet NaN: `InformationLoss` has one that is not. Without it J is positive
            semi-definite and too large, by c k for independent conditions, c = (1/n_minus +
            1/n_plus) / dtheta^2, and by a factor nu / (nu - k - 1), nu = degrees of freedom of S.
        ridge: added to the variance of each output, relative to it.

    Returns:
        J [..., P, P], float64, per unit of theta squared.

    Raises:
        ValueError: a wrong shape; too few samples for k; an output that is constant, not finite or
            linear in others.
        TypeError: an input that is no floating tensor, or arguments of two sources.

    Computed outside of autocast, in float64. Cost: n k^2 operations, and k^3; tells the CPU whether
    S is singular, so a GPU is waited for. With a ReLU in the network, tangents give J without error
    but not its gradient: they do not see that weights move the kink. Two conditions do.

    Reference: Charnock, Lavaux, Wandelt, Phys. Rev. D 97, 083004 (2018), for two conditions.

    Example:
        >>> import torch, fisherfast as ff
        >>> z = torch.randn(2, 5000, 3, requires_grad=True)
        >>> J = ff.linear_fisher(z[0] - 0.1, z[1] + 0.1, dtheta=0.2)
        >>> (-J.logdet()).backward()
        >>> abs(J.item() - 3) < 0.8, z.grad.shape
        (True, torch.Size([2, 5000, 3]))
    """
    with _exact(z_minus):
        moments = _moments(z_minus, z_plus, dtheta, tangents, score, paired, corrected)
        naive, estimate = _information(moments, _check_ridge(ridge), corrected)
    return estimate if corrected else naive


class InformationLoss(nn.Module):
    r"""Negative log determinant of the information that P or more outputs carry, to be minimised.

    .. math::
        L = -\log \det J + w \, [\mathrm{tr}\, C + |m|^2 - k - \log \det C] / 2

    J as `linear_fisher` has it, m and C the mean and covariance of the outputs. J <= I, and J = I
    when the outputs are the score or a linear map of it: what minimises L is a sufficient statistic
    near theta, as few numbers as there are parameters (information-maximising compression). J does
    not change under affine maps of the outputs; the second term is the divergence of N(m, C) from
    N(0, 1), which chooses one map among them: it costs no information whatever w is, and keeps the
    outputs from growing, vanishing or becoming copies of each other.

    J is free of finite-sample bias (corrected), so that -L can be read as log det J. The bias c k
    of independent conditions is the same for all parameters: left in, it hides the gradient of
    those that are measured worst. An unbiased J may be negative. With G = A^-1 J A^-T, A A^T = the
    uncorrected J, the logarithm of an eigenvalue of G below 0.1 is continued as a line: L is
    finite, and its gradient raises the uncorrected J then.

    Args:
        dtheta: FULL separation of two conditions in the unit of theta, one number or P; None for
            tangents or score.
        paired: sample i has the same noise at both conditions. For a simulator the best choice.
        corrected: remove the finite-sample bias.
        ridge: as in `linear_fisher`.
        regularization: w, at least 0.

    Called with ``(z_minus, z_plus)``, ``(z, tangents=dz)`` or ``(z, score=s)``; arguments, errors
    and cost as for `linear_fisher`. Returns a number, float64; leading dimensions are averaged.

    Raises:
        ValueError: fewer outputs than parameters; a setting out of its range; see `linear_fisher`.

    Reference: Charnock, Lavaux, Wandelt, Phys. Rev. D 97, 083004 (2018), eq. 17, with another term
    for the covariance and without its coupling function.

    Example:
        >>> import torch, fisherfast as ff
        >>> network = torch.nn.Linear(3, 1)
        >>> x = torch.randn(2, 1000, 3)
        >>> loss = ff.InformationLoss(dtheta=0.2)
        >>> loss(network(x[0] - 0.1), network(x[1] + 0.1)).backward()
    """

    def __init__(
        self,
        dtheta: float | Sequence[float] | None = None,
        *,
        paired: bool = False,
        corrected: bool = False,
        ridge: float = 0.0,
        regularization: float = REGULARIZATION,
    ) -> None:
        super().__init__()
        if not isinstance(regularization, numbers.Real):
            raise TypeError(f"regularization must be a number, got {regularization!r}")
        if not 0 <= regularization < math.inf:
            raise ValueError(f"regularization must be finite and at least 0, got {regularization}")
        self.dtheta: tuple[float, ...] | None = None if dtheta is None else _steps(dtheta)
        self.paired: bool = bool(paired)
        self.corrected: bool = bool(corrected)
        self.ridge: float = _check_ridge(ridge)
        self.regularization: float = float(regularization)

    def forward(
        self,
        z_minus: Outputs,
        z_plus: Outputs | None = None,
        *,
        tangents: Tensor | None = None,
        score: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch, a number."""
        with _exact(z_minus):
            moments = _moments(
                z_minus, z_plus, self.dtheta, tangents, score, self.paired, self.corrected
            )
            outputs, parameters = moments.folds.shape[-2:]
            if outputs < parameters:
                raise ValueError(
                    f"z must have at least as many outputs as parameters ({parameters}),"
                    f" got {outputs}"
                )
            naive, estimate = _information(moments, self.ridge, self.corrected)
            value = -(_log_det_above_noise(naive, estimate) if self.corrected else _log_det(naive))
            if self.regularization:
                value = value + self.regularization * _divergence(moments, self.ridge)
            return value.mean()

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"dtheta={self.dtheta}, paired={self.paired}, corrected={self.corrected},"
            f" ridge={self.ridge}, regularization={self.regularization}"
        )


@dataclass(frozen=True)
class _Moments:
    """Of a batch of outputs, float64.

    Attributes:
        mean: [..., k].
        covariance: [..., k, k] within conditions and folds.
        folds: [..., F, k, P] derivative of the mean in each fold; one fold where none are needed.
        dof: nu [...], degrees of freedom of the covariance.
        noise: [P] c of independent conditions; None for the other sources.
        score: [..., P, P] covariance of the score; None for the other sources.
    """

    mean: Tensor
    covariance: Tensor
    folds: Tensor
    dof: Tensor
    noise: Tensor | None = None
    score: Tensor | None = None


def _moments(
    z: Outputs,
    z_plus: Outputs | None,
    dtheta: float | Sequence[float] | None,
    tangents: Tensor | None,
    score: Tensor | None,
    paired: bool,
    corrected: bool,
) -> _Moments:
    """The moments of the source that the arguments tell."""
    given = {"z_plus": z_plus, "tangents": tangents, "score": score}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise TypeError(
            f"one of z_plus, tangents and score must be given, got {' and '.join(names) or 'none'}"
        )
    if z_plus is not None:
        if dtheta is None:
            raise TypeError("dtheta must be given beside z_plus, got None")
        return _of_conditions(
            _conditions(z, "z_minus"),
            _conditions(z_plus, "z_plus"),
            dtheta,
            folds=paired and corrected,
            paired=paired,
        )
    if dtheta is not None:
        raise TypeError(f"dtheta must be left out beside {names[0]}, got {dtheta}")
    if score is not None:
        return _of_score(_samples(z, "z"), score)
    return _of_tangents(_samples(z, "z"), tangents, folds=corrected)


def _of_conditions(
    minus: list[Tensor],
    plus: list[Tensor],
    dtheta: float | Sequence[float],
    *,
    folds: bool,
    paired: bool,
) -> _Moments:
    """Of P pairs of conditions [..., n, k]."""
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
    steps = conditions[0].new_tensor(_steps(dtheta, len(minus)))
    number = min(FOLDS, *counts) if folds else 1
    parts = [_fold_means(z, number) for z in conditions]
    means = torch.stack([fold_means for _, fold_means, _ in parts], -1)
    derivative = (means[..., len(minus) :] - means[..., : len(minus)]) / steps
    dof = sum(counts) - number * len(conditions)
    covariance = torch.stack([scatter for _, _, scatter in parts]).sum(0) / max(dof, 1)
    overall = torch.stack([mean for mean, _, _ in parts]).mean(0)
    nu = covariance.new_full(covariance.shape[:-2], dof)
    if folds:
        nu = nu / _pair_inflation(conditions)
    c = [1 / a + 1 / b for a, b in zip(counts[: len(minus)], counts[len(minus) :], strict=True)]
    return _Moments(overall, covariance, derivative, nu, noise=steps.new_tensor(c) / steps.square())


def _of_tangents(z: Tensor, tangents: Tensor | None, *, folds: bool) -> _Moments:
    """Of samples [..., n, k] with tangents [..., P, n, k]."""
    dz = _floating(tangents, "tangents")
    *systems, n, k = z.shape
    expected = [*systems, "P", n, k]
    if dz.ndim != z.ndim + 1 or [*dz.shape[:-3], "P", *dz.shape[-2:]] != expected:
        raise ValueError(
            f"tangents must have shape [..., P, n, k] with [..., n, k] = {list(z.shape)},"
            f" got {list(dz.shape)}"
        )
    number = min(FOLDS, n) if folds else 1
    mean, _, scatter = _fold_means(z, number)
    derivative = (_averaging(n, number, z) @ dz).movedim(-3, -1)
    dof = n - number
    covariance = scatter / max(dof, 1)
    return _Moments(mean, covariance, derivative, z.new_full(tuple(systems), dof))


def _of_score(z: Tensor, score: Tensor) -> _Moments:
    """Of samples [..., n, k] with score [..., n, P]."""
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
    return _Moments(mean, scatter / dof, derivative, nu, score=centred.mT @ centred / dof)


def _averaging(n: int, folds: int, like: Tensor) -> Tensor:
    """[F, n] that averages samples dealt to folds in turn."""
    fold = torch.arange(n, device=like.device) % folds
    member = (fold == torch.arange(folds, device=like.device)[:, None]).to(like.dtype)
    return member / member.sum(1, keepdim=True)


def _fold_means(z: Tensor, folds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [..., k], means in folds [..., F, k], and scatter [..., k, k] about the latter."""
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
    """1 + sum over pairs of conditions of rho^2 / C [...]: what shared noise takes from the degrees
    of freedom, rho the mean over outputs of the correlation of an output with itself."""
    units = []
    for z in conditions:
        centred = (z - z.mean(-2, keepdim=True)).detach()
        norm = centred.norm(dim=-2, keepdim=True)
        units.append((centred / torch.where(norm > 0, norm, 1)).flatten(-2))
    unit = torch.stack(units, -2)
    rho = unit @ unit.mT / conditions[0].shape[-1]
    rho = rho - rho.diagonal(dim1=-2, dim2=-1).diag_embed()
    return 1 + rho.square().sum((-2, -1)) / len(conditions)


def _information(moments: _Moments, ridge: float, corrected: bool) -> tuple[Tensor, Tensor]:
    """J [..., P, P] without and with correction (without, twice, if none is asked for)."""
    *systems, folds, size, parameters = moments.folds.shape
    nu = moments.dof
    if bool((nu < size + SPARE_DOF).any()):
        raise ValueError(
            f"degrees of freedom must exceed the {size} outputs by {SPARE_DOF} or more, got"
            f" {float(nu.min()):.0f}: use more samples or fewer outputs"
        )
    columns = moments.folds.movedim(-3, -2).reshape(*systems, size, folds * parameters)
    wanted = corrected and ridge > 0
    solved = ops.fisher_solve_details(moments.covariance, columns, ridge=ridge, inverse_rows=wanted)
    if bool(solved.info.any()):
        raise _failure(moments, solved.info, ridge)
    products = solved.fisher.reshape(*systems, folds, parameters, folds, parameters)
    total = products.sum((-4, -2))
    naive = total / folds**2
    if not corrected:
        return naive, naive
    effective = size - ridge * solved.inverse_rows.sum(-1) if wanted else nu.new_tensor(size)
    shrink = ((nu - effective - 1) / nu)[..., None, None]
    if moments.score is not None:
        residual = moments.score - naive
        return naive, moments.score - residual * (nu / (nu - effective))[..., None, None]
    if folds > 1:
        own = products.diagonal(dim1=-4, dim2=-2).sum(-1)
        return naive, shrink * (total - own) / (folds * (folds - 1))
    if moments.noise is None:
        raise ValueError("samples must be at least 2 to be corrected, got 1")
    return naive, shrink * naive - effective[..., None, None] * moments.noise.diag()


def _failure(moments: _Moments, info: Tensor, ridge: float) -> ValueError:
    """Why the first system that failed did."""
    size = moments.covariance.shape[-1]
    covariance, info = moments.covariance.reshape(-1, size, size), info.flatten()
    failed = int(info.nonzero()[0])
    variance = covariance[failed].diagonal()
    finite = torch.isfinite(covariance[failed]).all(1)
    if not bool(finite.all()):
        return ValueError("z must be finite, got NaN or infinity")
    constant = (variance <= 0).nonzero().flatten().tolist()
    if constant:
        return ValueError(f"outputs of z must vary, got a constant one: {constant[0]} of {size}")
    return SingularCovarianceError(int(info[failed]), size, ridge)


def _log_det(J: Tensor) -> Tensor:
    """log det of a J that is positive semi-definite [...], finite if it is singular."""
    factor, scale = _factor(J)
    return 2 * (factor.diagonal(dim1=-2, dim2=-1).log() + scale.log()).sum(-1)


def _log_det_above_noise(naive: Tensor, estimate: Tensor) -> Tensor:
    """log det of the estimate [...] while it is well above its noise, finite everywhere."""
    factor, scale = _factor(naive)
    scaled = estimate / (scale[..., :, None] * scale[..., None, :])
    half = torch.linalg.solve_triangular(factor, scaled, upper=False)
    share = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    values = torch.linalg.eigvalsh((share + share.mT) / 2)
    line = math.log(LEAST_SHARE) + values / LEAST_SHARE - 1
    logs = torch.where(values > LEAST_SHARE, values.clamp_min(LEAST_SHARE).log(), line)
    return _log_det(naive) + logs.sum(-1)


def _factor(J: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of J in units of its diagonal, and these units [..., P], which are constants
    to autograd: they cancel."""
    scale = J.detach().diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    scaled = J / (scale[..., :, None] * scale[..., None, :])
    tiny = LEAST_EIGENVALUE * torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
    return torch.linalg.cholesky((scaled + scaled.mT) / 2 + tiny), scale


def _divergence(moments: _Moments, ridge: float) -> Tensor:
    """Of N(m, C + ridge) from N(0, 1) [...]; 0 where the outputs have mean 0 and covariance 1."""
    variance = moments.covariance.diagonal(dim1=-2, dim2=-1)
    covariance = moments.covariance + ridge * variance.diag_embed()
    factor = torch.linalg.cholesky(covariance)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (variance.sum(-1) + moments.mean.square().sum(-1) - variance.shape[-1] - log_det) / 2


def _conditions(z: Outputs, name: str) -> list[Tensor]:
    """P tensors [..., n, k] of a tensor [n, k] or [..., P, n, k], or a list."""
    if isinstance(z, list | tuple):
        if not z:
            raise ValueError(f"{name} must hold at least one condition, got an empty list")
        return [_samples(part, f"{name}[{p}]") for p, part in enumerate(z)]
    samples = _samples(z, name)
    return [samples] if samples.ndim == 2 else list(samples.unbind(-3))


def _samples(z: object, name: str) -> Tensor:
    """z [..., n, k] in float64."""
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


def _steps(dtheta: float | Sequence[float], parameters: int | None = None) -> tuple[float, ...]:
    """dtheta as positive numbers, one a parameter if their number is known."""
    if parameters is None:
        parameters = max(1, len(dtheta)) if isinstance(dtheta, Sequence) else 1
    return check_dtheta(dtheta, parameters)


def _check_ridge(ridge: float) -> float:
    if not isinstance(ridge, numbers.Real):
        raise TypeError(f"ridge must be a number, got {ridge!r}")
    if not 0 <= ridge < 1:
        raise ValueError(f"ridge must be in [0, 1), got {ridge}")
    return float(ridge)


def _exact(z: Outputs) -> torch.autocast:
    """Turns autocast off where z lives."""
    first = z[0] if isinstance(z, list | tuple) and z else z
    device = first.device.type if isinstance(first, Tensor) else "cpu"
    return torch.autocast(device, enabled=False)
