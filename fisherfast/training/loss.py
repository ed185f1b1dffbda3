"""Differentiable Fisher information, and a loss that maximises it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fisherfast.data.finite_difference import check_dtheta
from fisherfast.estimation.ridge import AUTO, RidgeSetting, check_ridge
from fisherfast.training.batch_moments import (
    BatchMoments,
    Outputs,
    batch_information,
    batch_moments,
)

LEAST_SHARE = 0.1
"""Fraction of the uncorrected J below which the logarithm of J is continued as a line."""

LEAST_EIGENVALUE = 1e-12
"""Added to J in units of its own diagonal before its logarithm: if J is singular, float64 rounding
leaves an eigenvalue of up to 1e-15 of either sign."""

REGULARIZATION = 1.0
"""Default weight of the term that draws the outputs to unit covariance: with 0.1 the variance of an
output was still 0.15 after 120 steps, when most of the information was found."""


def linear_fisher(
    z_minus: Outputs,
    z_plus: Outputs | None = None,
    dtheta: float | Sequence[float] | None = None,
    *,
    tangents: Tensor | None = None,
    score: Tensor | None = None,
    paired: bool = False,
    corrected: bool = False,
    ridge: RidgeSetting = AUTO,
) -> Tensor:
    r"""Compute the linear Fisher information of k outputs, differentiable in them.

    .. math:: J = D^T S^{-1} D, \qquad D = \partial_\theta E[z], \quad S = \mathrm{Cov}(z)

    It is meant for training outputs that carry information: ``-linear_fisher(...).logdet()`` is a
    loss. To measure the information in a network, with an error bar, use `fisher_flow`. The
    arguments determine the source:

        linear_fisher(z_minus, z_plus, dtheta)        D = (mean z_plus - mean z_minus) / dtheta
        linear_fisher(z, tangents=dz)                 D = mean dz
        linear_fisher(z, score=s)                     D = Cov(z, s)

    Args:
        z_minus: [n, k] at theta - dtheta/2, any floating dtype; with tangents or score, at theta.
            For P parameters and two conditions a list of P of these, or [P, n, k]. Leading
            dimensions [..., P, n, k], or [..., n, k] in a list and with tangents or score, are
            separate systems. A tuple, as a model with several outputs returns, is refused.
        z_plus: the same at theta + dtheta/2; n may differ unless paired.
        dtheta: FULL separation of the two conditions in the unit of theta, one number or P.
        tangents: dz/dtheta [..., P, n, k] per sample, per unit of theta.
        score: d log p(x given theta) / d theta [..., n, P] of each sample, per unit of theta; [n]
            for one parameter. It gets no gradient.
        paired: sample i has the same noise in z_minus and z_plus. Only used if corrected.
        corrected: remove the finite-sample bias, as in a measurement. J may then be negative and
            its logdet NaN, which `InformationLoss` avoids. Without it J is positive semi-definite
            and too large, by c k for independent conditions, c = (1/n_minus + 1/n_plus) / dtheta^2,
            and by a factor nu / (nu - k - 1), nu = degrees of freedom of S.
        ridge: added to the variance of each output, relative to it; "auto" for the rounding of its
            dtype, which costs no information in the outputs.

    Returns:
        J [..., P, P], float64, per unit of theta squared.

    Raises:
        ValueError: a wrong shape; too few samples for k; an output that is constant, not finite or,
            with ridge=0, linear in others.
        TypeError: an input that is not a floating tensor, or arguments of two sources.

    Computed outside of autocast, in float64. Cost: n k^2 and k^3 operations; the CPU checks whether
    S is singular, so it waits for a GPU. After a ReLU, tangents give J but not its gradient: they
    ignore that weights move the kink, and training fails (docs/training.md). Use two conditions
    there.

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
        moments = batch_moments(z_minus, z_plus, dtheta, tangents, score, paired, corrected)
        return batch_information(moments, check_ridge(ridge), corrected)[1]


class InformationLoss(nn.Module):
    r"""The negative log determinant of the information in P or more outputs, to be minimised.

    .. math::
        L = -\log \det J + w \, [\mathrm{tr}\, C + |m|^2 - k - \log \det C] / 2

    J is that of `linear_fisher`, m and C are mean and covariance of the outputs. J <= I, and J = I
    if the outputs are the score or a linear map of it: the minimum of L is a sufficient statistic
    near theta, with as few numbers as parameters (information-maximising compression). J does not
    change under affine maps of the outputs; the second term is the divergence of N(m, C) from
    N(0, 1), which selects one of these maps: it costs no information for any w, and keeps the
    outputs from growing, vanishing or becoming copies of each other.

    J keeps its finite-sample bias unless corrected. J = I is the maximum of every increasing
    function of J, and the bias c k of independent conditions is the same for every network; but it
    prevents batches whose J is mostly noise from dominating the gradient of the logarithm. Without
    the bias such training fails (docs/training.md). To measure the information in a batch, use
    `linear_fisher` with corrected=True.

    L is finite for every J. A corrected J may be negative: with G = A^-1 J A^-T, A A^T = the
    uncorrected J, the logarithm of an eigenvalue of G below 0.1 is continued as a line.

    Args:
        dtheta: FULL separation of two conditions in the unit of theta, one number or P; None for
            tangents or score.
        paired: sample i has the same noise in both conditions; only used if corrected.
        corrected: subtract the finite-sample bias before the logarithm.
        ridge: as in `linear_fisher`.
        regularization: w, at least 0.

    Call it with ``(z_minus, z_plus)``, ``(z, tangents=dz)`` or ``(z, score=s)``; arguments, errors
    and cost are those of `linear_fisher`. It returns a float64 number, averaged over leading
    dimensions.

    Raises:
        ValueError: fewer outputs than parameters; a setting out of its range; see `linear_fisher`.

    Reference: Charnock, Lavaux, Wandelt, Phys. Rev. D 97, 083004 (2018), with another term for the
    covariance: theirs is |C - 1|^2 + |C^-1 - 1|^2 with a strength that depends on it.

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
        ridge: RidgeSetting = AUTO,
        regularization: float = REGULARIZATION,
    ) -> None:
        super().__init__()
        if not isinstance(regularization, numbers.Real):
            raise TypeError(f"regularization must be a number, got {regularization!r}")
        if not 0 <= regularization < math.inf:
            raise ValueError(f"regularization must be finite and at least 0, got {regularization}")
        self.dtheta: tuple[float, ...] | None = None
        if dtheta is not None:
            self.dtheta = check_dtheta(dtheta, max(1, np.size(np.asarray(dtheta))))
        self.paired: bool = bool(paired)
        self.corrected: bool = bool(corrected)
        self.ridge: RidgeSetting = check_ridge(ridge)
        self.regularization: float = float(regularization)

    def forward(
        self,
        z_minus: Outputs,
        z_plus: Outputs | None = None,
        *,
        tangents: Tensor | None = None,
        score: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of one batch, a number."""
        with _exact(z_minus):
            moments = batch_moments(
                z_minus, z_plus, self.dtheta, tangents, score, self.paired, self.corrected
            )
            outputs, parameters = moments.folds.shape[-2:]
            if outputs < parameters:
                raise ValueError(
                    f"z must have at least as many outputs as parameters ({parameters}),"
                    f" got {outputs}"
                )
            naive, estimate = batch_information(moments, self.ridge, self.corrected)
            value = -(_log_det_above_noise(naive, estimate) if self.corrected else _log_det(naive))
            if self.regularization:
                value = value + self.regularization * _divergence(moments, self.ridge)
            return value.mean()

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        return (
            f"dtheta={self.dtheta}, paired={self.paired}, corrected={self.corrected},"
            f" ridge={self.ridge!r}, regularization={self.regularization}"
        )


def _log_det(J: Tensor) -> Tensor:
    """Compute log det [...] of a positive semi-definite J, finite if it is singular."""
    factor, scale = _factor(J)
    return 2 * (factor.diagonal(dim1=-2, dim2=-1).log() + scale.log()).sum(-1)


def _log_det_above_noise(naive: Tensor, estimate: Tensor) -> Tensor:
    """Compute log det [...] of the estimate if it is well above its noise, and a finite
    continuation elsewhere."""
    factor, scale = _factor(naive)
    scaled = estimate / (scale[..., :, None] * scale[..., None, :])
    half = torch.linalg.solve_triangular(factor, scaled, upper=False)
    share = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    values = torch.linalg.eigvalsh((share + share.mT) / 2)
    line = math.log(LEAST_SHARE) + values / LEAST_SHARE - 1
    logs = torch.where(values > LEAST_SHARE, values.clamp_min(LEAST_SHARE).log(), line)
    return _log_det(naive) + logs.sum(-1)


def _factor(J: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the Cholesky factor of J in units of its diagonal, and these units [..., P]. They
    have no gradient, because they cancel."""
    scale = J.detach().diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    scaled = J / (scale[..., :, None] * scale[..., None, :])
    tiny = LEAST_EIGENVALUE * torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
    return torch.linalg.cholesky((scaled + scaled.mT) / 2 + tiny), scale


def _divergence(moments: BatchMoments, ridge: RidgeSetting) -> Tensor:
    """Compute the divergence [...] of N(m, C + ridge) from N(0, 1); 0 for mean 0 and covariance
    1."""
    variance = moments.covariance.diagonal(dim1=-2, dim2=-1)
    factor = torch.linalg.cholesky(moments.ridged(ridge))
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (variance.sum(-1) + moments.mean.square().sum(-1) - variance.shape[-1] - log_det) / 2


def _exact(z: Outputs) -> torch.autocast:
    """Disable autocast on the device of z."""
    first = z[0] if isinstance(z, list) and z else z
    device = first.device.type if isinstance(first, Tensor) else "cpu"
    return torch.autocast(device, enabled=False)
