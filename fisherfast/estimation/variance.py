r"""Variances of the estimates of J (docs/theory.md, sections 6, 12 and 13).

Each formula has two forms: entry by entry [..., P, P] for a whole curve or map, and as the full
covariance [P, P, P, P] of the entries at the chosen k, from which the error of any function of J
follows (marginal information). The diagonal of the second is the first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entry_product(A: Tensor, B: Tensor) -> Tensor:
    """Compute (A_pp B_qq + B_pp A_qq) / 2 + A_pq B_pq for symmetric A, B [..., P, P]: the entries
    p = r and q = s of `pair_product`."""
    A_p, A_q = _outer_diagonals(A)
    B_p, B_q = _outer_diagonals(B)
    return (A_p * B_q + B_p * A_q) / 2 + A * B


def pair_product(A: Tensor, B: Tensor) -> Tensor:
    """Compute (A_pr B_qs + A_ps B_qr + B_pr A_qs + B_ps A_qr) / 2 [P, P, P, P].

    For A = B this is the covariance of a_p a_q and a_r a_s for Gaussian a of covariance A; for
    A != B half that of a_p b_q + b_p a_q and a_r b_s + b_r a_s for independent a and b.
    """
    one = torch.einsum("pr,qs->pqrs", A, B)
    both = one + torch.einsum("pr,qs->pqrs", B, A)
    return (both + both.transpose(2, 3)) / 2


def jackknife_covariance(replicates: Tensor) -> Tensor:
    """Compute the covariance [P, P, P, P] of an estimate from its values without each fold
    [F, P, P]."""
    return covariance_of_entries(replicates) * (len(replicates) - 1)


def covariance_of_entries(matrices: Tensor) -> Tensor:
    """Compute the covariance [P, P, P, P] of the entries of matrices [m, P, P]."""
    centred = matrices - matrices.mean(0)
    return torch.einsum("mpq,mrs->pqrs", centred, centred) / len(centred)


def standard_errors(covariance: Tensor) -> Tensor:
    """Compute the standard errors [P, P] of the entries of a matrix from their covariance
    [P, P, P, P]."""
    return torch.einsum("pqpq->pq", covariance).sqrt()


def independent_covariance(J: Tensor, dof: float, noise: Tensor, effective: float) -> Tensor:
    r"""Compute the covariance [P, P, P, P] of the entries of J [P, P], whose diagonal is
    `independent_variance`.

    .. math::
        \mathrm{Cov}(J_{pq}, J_{rs}) = \frac{2 E[M_{pq} M_{rs}] + (a - 1) (E[M_{pr} M_{qs}]
        + E[M_{ps} M_{qr}])}{a (a - 3)} + \mathrm{Cov}(M_{pq}, M_{rs})
    """
    a = dof - effective
    J = _positive_part(J[None], noise)[0]
    mean = J + effective * noise
    of_mean = 2 * pair_product(noise, J) + effective * pair_product(noise, noise)
    second = torch.einsum("pq,rs->pqrs", mean, mean) + of_mean
    crossed = second.transpose(1, 2) + second.permute(0, 3, 2, 1)
    return (2 * second + (a - 1) * crossed) / (a * (a - 3)) + of_mean


def covariance_variance(J: Tensor, dof: float, effective: Tensor) -> Tensor:
    r"""Compute the variance of J from the error of the estimated covariance alone:
    (J_pp J_qq + J_pq^2) / (nu - k_eff - 3)."""
    diagonal = torch.diagonal(J, dim1=1, dim2=2).clamp_min(0)
    spread = J.square() + diagonal[:, :, None] * diagonal[:, None, :]
    return spread / (dof - effective - 3)[:, None, None]


def independent_variance(J: Tensor, dof: float, noise: Tensor, effective: Tensor) -> Tensor:
    r"""Compute the variance [K, P, P] of corrected J [K, P, P] for Gaussian features and
    independent conditions, with nu = dof degrees of freedom, noise c [P, P] and k_eff = effective
    [K].

    With a = nu - k_eff, M = D^T S^-1 D a non-central Wishart matrix and D^T S_hat^-1 D inverse
    Wishart given M:

    .. math::
        \mathrm{Var}(J_{pq}) = \frac{(a + 1) E[M_{pq}^2] + (a - 1) E[M_{pp} M_{qq}]}{a (a - 3)}
                              + \mathrm{Var}(M_{pq})

    which for p = q is 2 / (a - 3) [J^2 + 2 c J (nu - 1) + c^2 k_eff (nu - 1)].
    """
    k = effective[:, None, None]
    a = dof - k
    noise = noise.expand_as(J)
    J = _positive_part(J, noise)
    mean = J + k * noise
    J_p, J_q = _outer_diagonals(J)
    c_p, c_q = _outer_diagonals(noise)
    mean_p, mean_q = _outer_diagonals(mean)
    var_mean = c_p * J_q + c_q * J_p + 2 * noise * J + k * (c_p * c_q + noise.square())
    mean_square = mean.square() + var_mean
    mean_product = mean_p * mean_q + 4 * noise * J + 2 * k * noise.square()
    wishart = ((a + 1) * mean_square + (a - 1) * mean_product) / (a * (a - 3))
    return wishart + var_mean


def _outer_diagonals(matrix: Tensor) -> tuple[Tensor, Tensor]:
    diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1)
    return diagonal[..., :, None], diagonal[..., None, :]


def _positive_part(J: Tensor, noise: Tensor) -> Tensor:
    """Remove the negative part of J [K, P, P], in units of its noise c [K, P, P]: a variance from
    an indefinite J would be negative in some direction."""
    if J.shape[-1] == 1:
        return J.clamp_min(0)
    noise = noise.expand_as(J)
    scale = torch.diagonal(noise, dim1=1, dim2=2).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    units = scale[:, :, None] * scale[:, None, :]
    values, vectors = torch.linalg.eigh((J + J.mT) / 2 / units)
    return (vectors * values.clamp_min(0)[:, None, :]) @ vectors.mT * units
