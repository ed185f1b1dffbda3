"""Every op in plain PyTorch: the documentation, the oracle of the tests and the fall-back.

The functions take checked input (`fisherfast.ops` checks), run on any device and say what the
kernels compute, line by line. Feed them float64 to get the truth a kernel is measured against.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of one float32 product in the large `moments`. A float32 sum of m products is off by at most
# m 2^-24 of the sum of their magnitudes: 6e-5 here, and about 1e-6 for terms of random sign.
MATMUL_TILE_ROWS = 1024


def fisher_solve(
    cov: Tensor,
    deriv: Tensor,
    ridge: float = 0.0,
    inverse_rows: bool = False,
    solution: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Linear Fisher information of a batch of systems, by one Cholesky factorisation each.

        s_i = 1 / sqrt(C_ii),   R = diag(s) C diag(s) + ridge I = L L^T,
        Y = L^-1 diag(s) D,     J = Y^T Y = D^T C^-1 D   (ridge 0),     X = diag(s) L^-T Y

    See `fisherfast.ops.fisher_solve_details` for arguments, results and failures.

    Returns:
        fisher [..., P, P], half [..., d, P], info [...] int32, condition [...], inverse_rows
        [..., d] and solution [..., d, P] (these two [0] when not asked for).
    """
    dim = cov.shape[-1]
    scale, correlation = _scaled(cov, ridge)
    factor, first_negative = torch.linalg.cholesky_ex(correlation)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    info = _first_failed_pivot(diagonal, first_negative)

    half = torch.linalg.solve_triangular(factor, scale.unsqueeze(-1) * deriv, upper=False)
    # Not a matrix product: reduced precision (TF32, bfloat16) must not touch it.
    fisher = (half.unsqueeze(-1) * half.unsqueeze(-2)).sum(-3)
    condition = cov.new_ones(info.shape)
    if dim > 0:
        condition = (diagonal.amax(-1) / diagonal.amin(-1)).square()
    rows = cov.new_empty(0)
    if inverse_rows:
        identity = torch.eye(dim, dtype=cov.dtype, device=cov.device).expand_as(cov)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        rows = _nan_where_failed(inverse.square().sum(-1), info)
    readout = cov.new_empty(0)
    if solution:
        readout = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        readout = _nan_where_failed(scale.unsqueeze(-1) * readout, info)
    return (
        _nan_where_failed(fisher, info),
        _nan_where_failed(half, info),
        info,
        _nan_where_failed(condition, info),
        rows,
        readout,
    )


def fisher_solve_backward(
    grad_fisher: Tensor, solution: Tensor, ridge: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gradients of a number through J = D^T R'^-1 D, R' = C + ridge diag(C), X = R'^-1 D.

    From dJ = dD^T X + X^T dD - X^T dR' X, with G the gradient with respect to J:

        Z = X (G + G^T),   grad_deriv = Z,   grad_cov = -(Z X^T) / 2, its diagonal times 1 + ridge

    See `fisherfast.ops.fisher_solve_backward` for arguments and results.
    """
    # Sums of products, not matrix products: reduced precision must not touch them.
    symmetric = grad_fisher + grad_fisher.mT
    grad_deriv = (solution.unsqueeze(-1) * symmetric.unsqueeze(-3)).sum(-2)
    grad_cov = -(grad_deriv.unsqueeze(-2) * solution.unsqueeze(-3)).sum(-1) / 2
    grad_cov = (grad_cov + grad_cov.mT) / 2  # equal but for rounding
    grad_cov.diagonal(dim1=-2, dim2=-1).mul_(1 + ridge)
    return grad_cov, grad_deriv


def _scaled(cov: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The scale s [..., d] and the lower triangle of R [..., d, d].

    A row that holds a NaN, an infinity or a variance that is not positive becomes -1 on the
    diagonal and 0 elsewhere, so that the factorisation stops exactly there.
    """
    variance = cov.diagonal(dim1=-2, dim2=-1)
    usable = (variance > 0) & variance.isfinite()
    scale = torch.where(usable, variance.rsqrt(), torch.nan)
    correlation = (scale.unsqueeze(-1) * cov * scale.unsqueeze(-2)).tril()
    usable = correlation.isfinite().all(-1)
    correlation = torch.where(usable.unsqueeze(-1), correlation, 0.0)
    unit = torch.full_like(variance, 1.0) + ridge
    correlation.diagonal(dim1=-2, dim2=-1).copy_(torch.where(usable, unit, -1.0))
    return scale, correlation


def _first_failed_pivot(diagonal: Tensor, first_negative: Tensor) -> Tensor:
    """Index [...] of the first pivot L_ii^2 <= d eps, 1-based; 0 when there is none.

    The rounding error of a pivot is at most about d eps (L L^T)_ii, and (L L^T)_ii = 1 here
    (Higham 2002, Accuracy and Stability of Numerical Algorithms, theorem 10.3).

    Args:
        diagonal: L_ii [..., d]; meaningless from the first negative pivot on.
        first_negative: what LAPACK reports [...], 0 for none.
    """
    dim = diagonal.shape[-1]
    if dim == 0:
        return first_negative.to(torch.int32)
    tolerance = dim * torch.finfo(diagonal.dtype).eps
    index = torch.arange(1, dim + 1, dtype=torch.int32, device=diagonal.device)
    none = dim + 1
    first_small = torch.where(diagonal.square() > tolerance, none, index).amin(-1)
    first = torch.where(first_negative == 0, none, first_negative).minimum(first_small)
    return torch.where(first == none, 0, first).to(torch.int32)


def _nan_where_failed(result: Tensor, info: Tensor) -> Tensor:
    """Replaces the results of failed systems by NaN."""
    failed = (info != 0).reshape(info.shape + (1,) * (result.dim() - info.dim()))
    return torch.where(failed, torch.nan, result)


def moments(
    x: Tensor, group: Tensor | None = None, num_groups: int = 1, pilot: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, sum and cross-products of the rows of every group, about a pilot m.

        count_g = #{n : group_n = g},   sums_g = sum_n (x_n - m),
        cross_g = sum_n (x_n - m)(x_n - m)^T      (both over group_n = g)

    See `fisherfast.ops.moments` for arguments and results. Here every sum is float64; the
    difference x - m alone is taken in the dtype of x.
    """
    centred = (x if pilot is None else x - pilot).double()
    if group is None:
        group = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    by_group = [centred[group == g] for g in range(num_groups)]
    count = torch.tensor([len(rows) for rows in by_group], dtype=torch.int64, device=x.device)
    sums = torch.stack([rows.sum(0) for rows in by_group])
    cross = torch.stack([rows.mT @ rows for rows in by_group])
    return count, sums, cross


def moments_by_matmul(
    x: Tensor, group: Tensor | None, num_groups: int, pilot: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`moments` by matrix products of row tiles, the rows of one group after another."""
    rows, dim = x.shape
    order = None
    counts = [rows]
    if group is not None:
        order = group.argsort(stable=True)
        counts = torch.bincount(group, minlength=num_groups).tolist()
    sums = x.new_zeros((num_groups, dim), dtype=torch.float64)
    cross = x.new_zeros((num_groups, dim, dim), dtype=torch.float64)
    dtype = torch.float32 if x.dtype == torch.float32 and _float32_matmul_is_exact(x) else None
    start = 0
    for g, count in enumerate(counts):
        for begin in range(start, start + count, MATMUL_TILE_ROWS):
            end = min(begin + MATMUL_TILE_ROWS, start + count)
            tile = x[begin:end] if order is None else x[order[begin:end]]
            centred = tile if pilot is None else tile - pilot
            centred = centred.to(dtype or torch.float64)
            sums[g] += centred.sum(0, dtype=torch.float64)
            cross[g] += centred.mT @ centred
        start += count
    return torch.tensor(counts, device=x.device), sums, (cross + cross.mT) / 2


def _float32_matmul_is_exact(x: Tensor) -> bool:
    """Whether a float32 product really is one: TF32 or bfloat16 must not touch a covariance."""
    if x.is_cuda:
        return False  # the settings there are many; float64 is the safe choice
    if hasattr(torch.backends.mkldnn, "matmul"):
        return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"


def lift(
    projected: Tensor,
    bias: Tensor,
    pilot: Tensor,
    slope: float = 0.7,
    num_groups: int = 1,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Random features from their projections, and their sums by fold.

        features_ij = leaky_relu(projected_ij + bias_j) - pilot_j
        sums_gj = sum of features_ij over rows i with (first + i) mod num_groups = g

    See `fisherfast.ops.lift` for arguments and results.
    """
    features = torch.nn.functional.leaky_relu(projected + bias, slope) - pilot
    fold = (first + torch.arange(projected.shape[0], device=projected.device)) % num_groups
    sums = torch.zeros(num_groups, bias.shape[0], dtype=torch.float64, device=projected.device)
    return features, sums.index_add(0, fold, features.double())
