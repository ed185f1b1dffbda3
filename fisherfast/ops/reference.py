"""Every op in plain PyTorch: documentation, oracle of the tests, and fallback.

The functions take checked input (`fisherfast.ops` checks), run on any device and state what the
kernels compute. Their float64 results are what a kernel is measured against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GRADIENT_NUMBERS = 1 << 22
"""Numbers of patches and gradients that `gradient_squares` holds at a time."""


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
        [..., d] and solution [..., d, P] (these two [0] when not wanted).
    """
    dim = cov.shape[-1]
    scale, correlation = _scaled(cov, ridge)
    factor, first_negative = torch.linalg.cholesky_ex(correlation)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    info = _first_failed_pivot(diagonal, first_negative)

    half = torch.linalg.solve_triangular(factor, scale.unsqueeze(-1) * deriv, upper=False)
    # Not a matrix product, which may run in reduced precision (TF32, bfloat16).
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
    # Sums of products, not matrix products, which may run in reduced precision.
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
    return count, sums, (cross + cross.mT) / 2  # equal but for rounding


def spatial_moments(x: Tensor, pilot: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums and cross-products over samples at every position of a feature map, about a pilot m.

        sums_hw = sum_n (x[n, :, h, w] - m[:, h, w]),
        cross_hw = sum_n (x[n, :, h, w] - m[:, h, w])(x[n, :, h, w] - m[:, h, w])^T

    See `fisherfast.ops.spatial_moments` for arguments and results. Every sum is float64; the
    difference x - m alone is taken in the dtype of x.
    """
    centred = (x if pilot is None else x - pilot).double().permute(2, 3, 1, 0)
    cross = centred @ centred.mT
    return centred.sum(-1), (cross + cross.mT) / 2  # equal but for rounding


def patch_moments(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Sums and cross-products of the patches of a convolution, by group.

        sums_g = sum of patches over samples and positions,   cross_g = sum of patch patch^T

    See `fisherfast.ops.patch_moments` for arguments and results. Here every sum is float64, and
    all patches are in memory.
    """
    patches = torch.nn.functional.unfold(
        x.double(), tuple(kernel), tuple(dilation), tuple(padding), tuple(stride)
    )
    by_group = patches.unflatten(1, (groups, -1)).transpose(0, 1).movedim(2, -1).flatten(1, 2)
    cross = by_group.mT @ by_group
    return by_group.sum(1), (cross + cross.mT) / 2  # equal but for rounding


def gradient_gram(
    a: Tensor, b: Tensor, other_a: Tensor | None = None, other_b: Tensor | None = None
) -> Tensor:
    """Inner products <G_ic, G'_je> of gradients G_ic = sum_t b_ict a_it^T.

    See `fisherfast.ops.gradient_gram` for arguments and results. Here every sum is float64, and
    all G are in memory.
    """
    others = (a, b) if other_a is None or other_b is None else (other_a, other_b)
    left, right = (
        (columns.double().mT @ rows.double().unsqueeze(1)).flatten(2)
        for rows, columns in ((a, b), others)
    )
    products = left.flatten(0, 1) @ right.flatten(0, 1).T
    return products.reshape(*left.shape[:2], *right.shape[:2])


def gradient_squares(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Sums over samples of the squared gradients of a convolution's weights.

        squares[m, c, a, b] = sum_i ( sum_t g[i, m, t] patch[i, c, a, b, t] )^2

    See `fisherfast.ops.gradient_squares` for arguments and results. Every sum is float64; the
    samples are taken a few at a time, so that their patches and gradients stay within 32 MB.
    """
    outputs, inputs = g.shape[1] // groups, x.shape[1] // groups
    columns = inputs * kernel[0] * kernel[1]
    squares = x.new_zeros((groups, outputs, columns), dtype=torch.float64)
    settings = (tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    numbers = groups * columns * (outputs + g.shape[2] * g.shape[3])  # of a sample
    few = max(1, GRADIENT_NUMBERS // max(1, numbers))
    for first in range(0, len(x) if squares.numel() and g.numel() else 0, few):
        image, gradient = (rows[first : first + few].double() for rows in (x, g))
        patches = torch.nn.functional.unfold(image, *settings)
        patches = patches.unflatten(1, (groups, columns))
        rows = gradient.flatten(2).unflatten(1, (groups, outputs)) @ patches.mT
        squares += rows.square().sum(0)
    return squares.reshape(g.shape[1], inputs, *kernel)


def lift_moments_(
    sums: Tensor,
    cross: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    pilot: Tensor,
    offsets: Tensor,
    slope: float = 0.7,
    start: int = 0,
) -> None:
    """Adds the moments of the features f = [z | leaky_relu(weight z + bias) - pilot] of a batch.

        sums_g += sum of f over the rows of fold g,          features from start on
        cross_h += sum of f f^T over the rows of half h,     rows from start on, lower triangle

    See `fisherfast.ops.lift_moments_` for arguments. Here every sum is float64, and the projection
    is computed in float64.
    """
    folds, halves = len(sums), len(cross)
    projected = (z.double() @ weight.double().T).to(z.dtype)
    lifted = torch.nn.functional.leaky_relu(projected + bias, slope) - pilot
    features = torch.cat([z, lifted], 1).double()
    in_order = [*range(0, folds, 2), *range(1, folds, 2)]
    fold = torch.tensor(in_order, device=z.device).repeat_interleave(offsets.diff())
    size = features.shape[1]
    sums[:, start:size].index_add_(0, fold, features[:, start:])
    for half in range(halves):
        rows = features[fold % halves == half]
        cross[half, start:size, :size] += (rows.mT @ rows).tril()[start:]
