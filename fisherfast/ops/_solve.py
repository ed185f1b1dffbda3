"""Linear Fisher information of many systems, and its backward pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference
from fisherfast.ops._common import (
    LIBRARY,
    Op,
    check_like,
    check_no_grad,
    check_real,
    check_tensors,
    register,
)


class FisherSolve(NamedTuple):
    """Results of `fisher_solve_details`; shapes and units there."""

    fisher: Tensor
    half: Tensor
    info: Tensor
    condition: Tensor
    inverse_rows: Tensor
    solution: Tensor


def fisher_solve(
    cov: Tensor, deriv: Tensor, *, ridge: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Linear Fisher information J = D^T C^-1 D of many systems at once.

    The first three results of `fisher_solve_details`, which describes everything.

    Returns:
        fisher [..., P, P], half [..., d, P], info [...].

    Example:
        >>> cov, deriv = torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0], [3.0]])
        >>> fisher, half, info = fisher_solve(cov, deriv)
        >>> fisher.item(), half.flatten().tolist(), info.item()
        (10.0, [1.0, 3.0], 0)
    """
    details = fisher_solve_details(cov, deriv, ridge=ridge)
    return details.fisher, details.half, details.info


def fisher_solve_details(
    cov: Tensor,
    deriv: Tensor,
    *,
    ridge: float = 0.0,
    inverse_rows: bool = False,
    solution: bool = False,
) -> FisherSolve:
    """Linear Fisher information J = D^T C^-1 D, with the other results of one factorisation.

        s_i = 1 / sqrt(C_ii),   R = diag(s) C diag(s) + ridge I = L L^T,
        Y = L^-1 diag(s) D,     J = Y^T Y,     X = diag(s) L^-T Y = (C + ridge diag(C))^-1 D

    With ridge 0 the scaling cancels: Y and J equal those of C itself in exact arithmetic. It makes
    the ridge relative (the noise added to feature i has variance ridge C_ii) and keeps features of
    any unit in range. The J of the first k features is the sum of y_i y_i^T over the first k rows
    y_i of Y, for every k.

    J is differentiable with respect to C (as a symmetric matrix) and D, once; see
    `fisher_solve_backward`. The other results carry no gradient.

    Args:
        cov: covariance C [..., d, d] of the features, float32 or float64; only the lower triangle
            is read. Any strides.
        deriv: derivative D [..., d, P] of the mean feature with respect to theta, per unit of
            theta; dtype, device and leading dimensions of ``cov``. Any strides.
        ridge: added to the unit diagonal of R, without unit, >= 0.
        inverse_rows: whether to return ``inverse_rows``; doubles the cost.
        solution: whether to return ``solution``.

    Returns:
        fisher: J [..., P, P], per unit of theta squared.
        half: Y [..., d, P], per unit of theta.
        info: [...] int32: 0, or i when pivot i (1-based) is the first to fail: C_ii is not positive
            and finite, row i holds a NaN, or L_ii^2 <= d eps (below it a pivot cannot be
            distinguished from 0). The other results of that system are then NaN, other systems are
            not affected.
        condition: [...] (max L_ii / min L_ii)^2, a lower bound on the 2-norm condition number of R.
        inverse_rows: [..., d] squared norms of the rows of L^-1, for the effective dimension
            k - ridge * cumsum(inverse_rows); shape [0] unless wanted.
        solution: X [..., d, P], the readout that attains J; shape [0] unless wanted.
        For d = 0: fisher 0, info 0, condition 1. For P = 0: empty fisher and half.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or ridge.

    Cost: d^3 / 6 + d^2 P / 2 multiply-adds a system, and about 30 us a call (three calls of torch
    take 12 us: for a single system of d < 64 they are faster). Memory: the results, and on the CPU
    one factor a thread (a group of 4 to 16 of them up to d = 192). The bits do not depend on the
    number of threads.

    Example:
        >>> cov, deriv = torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0], [3.0]])
        >>> details = fisher_solve_details(cov, deriv, solution=True)
        >>> details.solution.flatten().tolist(), details.condition.item()
        ([0.5, 3.0], 1.0)
    """
    check_tensors(cov=cov, deriv=deriv)
    tracked = torch.is_grad_enabled() and (cov.requires_grad or deriv.requires_grad)
    op = torch.ops.fisherfast.fisher_solve.default
    return FisherSolve(*op(cov, deriv, ridge, inverse_rows, solution or tracked))


@register(
    "fisher_solve(Tensor cov, Tensor deriv, float ridge, bool inverse_rows, bool solution)"
    " -> (Tensor fisher, Tensor half, Tensor info, Tensor condition, Tensor inverse_rows,"
    " Tensor solution)"
)
def _fisher_solve(
    cov: Tensor, deriv: Tensor, ridge: float, inverse_rows: bool, solution: bool
) -> Op:
    check_real("cov", cov)
    check_like("deriv", deriv, "cov", cov)
    if cov.dim() < 2 or cov.shape[-1] != cov.shape[-2]:
        raise ValueError(f"cov must have shape [..., d, d], got {list(cov.shape)}")
    if deriv.dim() != cov.dim() or deriv.shape[:-1] != cov.shape[:-1]:
        raise ValueError(
            f"deriv must have shape [..., d, P] with [..., d] = {list(cov.shape[:-1])}, "
            f"got {list(deriv.shape)}"
        )
    _check_ridge(ridge)
    *batch, dim, params = deriv.shape
    results = FisherSolve(
        fisher=cov.new_empty((*batch, params, params)),
        half=cov.new_empty((*batch, dim, params)),
        info=cov.new_empty(batch, dtype=torch.int32),
        condition=cov.new_empty(batch),
        inverse_rows=cov.new_empty((*batch, dim) if inverse_rows else (0,)),
        solution=cov.new_empty((*batch, dim, params) if solution else (0,)),
    )

    def run() -> tuple[Tensor, ...]:
        fits = _native.serves(cov) and _native.fisher_solve_fits(cov, dim, params, inverse_rows)
        if not fits:
            solved = reference.fisher_solve(cov, deriv, ridge, inverse_rows, solution)
            return tuple(result.contiguous() for result in solved)
        systems = math.prod(batch)
        covs, derivs = cov.reshape(systems, dim, dim), deriv.reshape(systems, dim, params)
        # The address of an empty tensor is 0: results that are not wanted arrive as null.
        _native.call(
            "fisher_solve",
            cov,
            cov=covs,
            cov_strides=covs.stride(),
            deriv=derivs,
            deriv_strides=derivs.stride(),
            **results._asdict(),
            batch=systems,
            dim=dim,
            params=params,
            ridge=ridge,
        )
        return tuple(results)

    return tuple(results), run


def _fisher_solve_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, half, info, condition, inverse_rows, solution = output
    ctx.mark_non_differentiable(half, info, condition, inverse_rows, solution)
    ctx.set_materialize_grads(False)
    cov, deriv, ctx.ridge, _, kept = inputs
    ctx.save_for_backward(*((solution,) if kept else (cov, deriv)))


def _fisher_solve_autograd(ctx: Any, grad_fisher: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # create_graph=True: a gradient without graph would be dropped
        raise RuntimeError(
            "fisher_solve must be differentiated once only, got create_graph=True: its backward "
            "has no second derivative; use torch.linalg.solve for that"
        )
    if grad_fisher is None:
        return None, None, None, None, None
    kept = ctx.saved_tensors
    if len(kept) == 2:  # the op was called by its name, without solution
        kept = torch.ops.fisherfast.fisher_solve.default(*kept, ctx.ridge, False, True)[-1:]
    grad_cov, grad_deriv = fisher_solve_backward(grad_fisher, kept[0], ctx.ridge)
    return grad_cov, grad_deriv, None, None, None


torch.library.register_autograd(
    "fisherfast::fisher_solve",
    _fisher_solve_autograd,
    setup_context=_fisher_solve_setup,
    lib=LIBRARY,
)


def fisher_solve_backward(
    grad_fisher: Tensor, solution: Tensor, ridge: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gradients of a number through the J of `fisher_solve`, from the solution X kept of it.

        Z = X (G + G^T),   grad_deriv = Z,   grad_cov = -(Z X^T) / 2, its diagonal times 1 + ridge

    No factorisation is repeated: X = (C + ridge diag(C))^-1 D is all that the gradients need.

    Args:
        grad_fisher: G [..., P, P], derivative of the number with respect to J.
        solution: X [..., d, P] of `fisher_solve_details`, dtype and device of ``grad_fisher``.
        ridge: that of the forward pass.

    Returns:
        grad_cov: [..., d, d], symmetric: the derivative with respect to a symmetric C, each of two
            equal entries getting half.
        grad_deriv: [..., d, P].
        NaN for systems that failed.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or ridge.
        RuntimeError: an input requires grad: there is no second derivative.

    Cost: d^2 P multiply-adds and d^2 numbers written a system.

    Example:
        >>> cov, deriv = torch.tensor([[4.0]]), torch.tensor([[2.0]])        # J = D^2 / C
        >>> solution = fisher_solve_details(cov, deriv, solution=True).solution
        >>> [grad.item() for grad in fisher_solve_backward(torch.ones(1, 1), solution)]
        [-0.25, 1.0]
    """
    check_no_grad("fisher_solve_backward", grad_fisher=grad_fisher, solution=solution)
    return torch.ops.fisherfast.fisher_solve_backward.default(grad_fisher, solution, ridge)


@register(
    "fisher_solve_backward(Tensor grad_fisher, Tensor solution, float ridge)"
    " -> (Tensor grad_cov, Tensor grad_deriv)"
)
def _fisher_solve_backward(grad_fisher: Tensor, solution: Tensor, ridge: float) -> Op:
    check_real("grad_fisher", grad_fisher)
    check_like("solution", solution, "grad_fisher", grad_fisher)
    if solution.dim() < 2:
        raise ValueError(f"solution must have shape [..., d, P], got {list(solution.shape)}")
    *batch, dim, params = solution.shape
    shape = [*batch, params, params]
    check_like("grad_fisher", grad_fisher, "solution", solution, "[..., P, P]", shape)
    _check_ridge(ridge)
    grad_cov = solution.new_empty((*batch, dim, dim))
    grad_deriv = solution.new_empty(solution.shape)

    def run() -> tuple[Tensor, Tensor]:
        if not _native.serves(solution):
            return reference.fisher_solve_backward(grad_fisher, solution, ridge)
        _native.call(
            "fisher_solve_backward",
            solution,
            grad_fisher=grad_fisher.contiguous(),
            solution=solution.contiguous(),
            grad_cov=grad_cov,
            grad_deriv=grad_deriv,
            batch=math.prod(batch),
            dim=dim,
            params=params,
            ridge=ridge,
        )
        return grad_cov, grad_deriv

    return (grad_cov, grad_deriv), run


def _check_ridge(ridge: float) -> None:
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be finite and at least 0, got {ridge}")
