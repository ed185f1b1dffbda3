"""The ops: what the library computes with its own kernels, usable on their own.

Each op is a public function over an op of ``torch.library`` (``torch.ops.fisherfast.*``) with an
implementation for CPU and CUDA and a fake one, so that ``torch.compile`` and fake tensors work.
The checks of an input are shared by all of them and run once a call. `fisher_solve` has a backward;
for the others an input that requires grad is an error, never a wrong gradient.

A kernel serves the sizes at which it beats torch; larger ones go to ``torch.linalg`` or
``torch.matmul``, with the same semantics. So does everything when
``FISHERFAST_DISABLE_NATIVE=1`` is set, or for CUDA tensors when the build has no CUDA kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfast import _native, reference

__all__ = [
    "FisherSolve",
    "fisher_solve",
    "fisher_solve_backward",
    "fisher_solve_details",
    "lift",
    "moments",
]

# Largest d that the kernel of moments serves; above it the blocked routines of BLAS win. Measured
# against MKL (AVX2): equal at d = 64 to 80, for 1 and for 16 groups. On CUDA: not measured yet.
MOMENTS_LIMIT = {torch.float32: 64, torch.float64: 64}

_LIBRARY = torch.library.Library("fisherfast", "DEF")


# --- fisher_solve --------------------------------------------------------------------------------


class FisherSolve(NamedTuple):
    """What `fisher_solve_details` returns; shapes and units there."""

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
    """Linear Fisher information J = D^T C^-1 D, with what one factorisation gives besides.

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
            and finite, row i holds a NaN, or L_ii^2 <= d eps (below it a pivot cannot be told from
            0). The other results of that system are then NaN; other systems are untouched.
        condition: [...] (max L_ii / min L_ii)^2, a lower bound on the 2-norm condition number of R.
        inverse_rows: [..., d] squared norms of the rows of L^-1, for the effective dimension
            k - ridge * cumsum(inverse_rows); shape [0] unless asked for.
        solution: X [..., d, P], the readout that attains J; shape [0] unless asked for.
        For d = 0: fisher 0, info 0, condition 1. For P = 0: empty fisher and half.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or ridge.

    Cost: d^3 / 6 + d^2 P / 2 multiply-adds a system; memory: the results, and on the CPU one factor
    a thread (a group of 4 to 16 of them up to d = 192). The bits do not depend on the number of
    threads.
    """
    _check_tensors(cov=cov, deriv=deriv)
    tracked = torch.is_grad_enabled() and (cov.requires_grad or deriv.requires_grad)
    op = torch.ops.fisherfast.fisher_solve.default
    return FisherSolve(*op(cov, deriv, ridge, inverse_rows, solution or tracked))


def _fisher_solve(
    cov: Tensor, deriv: Tensor, ridge: float, inverse_rows: bool, solution: bool
) -> tuple[Tensor, ...]:
    results = _fisher_solve_fake(cov, deriv, ridge, inverse_rows, solution)
    dim, params = deriv.shape[-2:]
    native = _native.serves(cov) and _native.fisher_solve_fits(cov, dim, params, inverse_rows)
    if not native:
        solved = reference.fisher_solve(cov, deriv, ridge, inverse_rows, solution)
        return tuple(result.contiguous() for result in solved)
    batch = math.prod(cov.shape[:-2])
    cov, deriv = cov.reshape(batch, dim, dim), deriv.reshape(batch, dim, params)
    # The address of an empty tensor is 0: what nobody asked for arrives as null.
    _native.call(
        "fisher_solve",
        cov,
        cov.data_ptr(),
        cov.stride(),
        deriv.data_ptr(),
        deriv.stride(),
        *(result.data_ptr() for result in results),
        batch,
        dim,
        params,
        ridge,
    )
    return results


def _fisher_solve_fake(
    cov: Tensor, deriv: Tensor, ridge: float, inverse_rows: bool, solution: bool
) -> tuple[Tensor, ...]:
    _check_fisher_solve(cov, deriv, ridge)
    batch, (dim, params) = cov.shape[:-2], deriv.shape[-2:]
    return (
        cov.new_empty((*batch, params, params)),
        cov.new_empty((*batch, dim, params)),
        cov.new_empty(batch, dtype=torch.int32),
        cov.new_empty(batch),
        cov.new_empty((*batch, dim) if inverse_rows else (0,)),
        cov.new_empty((*batch, dim, params) if solution else (0,)),
    )


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
    grad_cov, grad_deriv = fisher_solve_backward(grad_fisher, *kept, ctx.ridge)
    return grad_cov, grad_deriv, None, None, None


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
    _check_no_grad("fisher_solve_backward", grad_fisher=grad_fisher, solution=solution)
    return torch.ops.fisherfast.fisher_solve_backward.default(grad_fisher, solution, ridge)


def _fisher_solve_backward(
    grad_fisher: Tensor, solution: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    grad_cov, grad_deriv = results = _fisher_solve_backward_fake(grad_fisher, solution, ridge)
    if not _native.serves(solution):
        return reference.fisher_solve_backward(grad_fisher, solution, ridge)
    dim, params = solution.shape[-2:]
    grad_fisher, solution = grad_fisher.contiguous(), solution.contiguous()
    _native.call(
        "fisher_solve_backward",
        solution,
        grad_fisher.data_ptr(),
        solution.data_ptr(),
        grad_cov.data_ptr(),
        grad_deriv.data_ptr(),
        math.prod(solution.shape[:-2]),
        dim,
        params,
        ridge,
    )
    return results


def _fisher_solve_backward_fake(
    grad_fisher: Tensor, solution: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    _check_real("grad_fisher", grad_fisher)
    _check_like("solution", solution, "grad_fisher", grad_fisher)
    if solution.dim() < 2:
        raise ValueError(f"solution must have shape [..., d, P], got {list(solution.shape)}")
    *batch, dim, params = solution.shape
    _check_shape("grad_fisher", grad_fisher, "[..., P, P]", [*batch, params, params])
    _check_ridge(ridge)
    return solution.new_empty((*batch, dim, dim)), solution.new_empty(solution.shape)


def _check_fisher_solve(cov: Tensor, deriv: Tensor, ridge: float) -> None:
    _check_real("cov", cov)
    _check_like("deriv", deriv, "cov", cov)
    if cov.dim() < 2 or cov.shape[-1] != cov.shape[-2]:
        raise ValueError(f"cov must have shape [..., d, d], got {list(cov.shape)}")
    if deriv.dim() != cov.dim() or deriv.shape[:-1] != cov.shape[:-1]:
        raise ValueError(
            f"deriv must have shape [..., d, P] with [..., d] = {list(cov.shape[:-1])}, "
            f"got {list(deriv.shape)}"
        )
    _check_ridge(ridge)


def _check_ridge(ridge: float) -> None:
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be finite and at least 0, got {ridge}")


# --- moments -------------------------------------------------------------------------------------


def moments(
    x: Tensor, group: Tensor | None = None, num_groups: int = 1, *, pilot: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, sum and cross-products of the rows of every group, about a pilot m.

        count_g = #{n : group_n = g},   sums_g = sum_n (x_n - m),
        cross_g = sum_n (x_n - m)(x_n - m)^T      (both over group_n = g)

    Sums over batches are sums of the results. A pilot near the mean avoids cancellation.

    Args:
        x: [N, d] float32 or float64; rows may be strided.
        group: [N] int64 in [0, num_groups), or None for a single group.
        num_groups: G >= 1.
        pilot: m [d], dtype and device of ``x``; None for zero.

    Returns:
        count: [G] int64.
        sums: [G, d] float64, unit of x.
        cross: [G, d, d] float64, symmetric, unit of x squared.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device, or a group out of range.
        RuntimeError: an input requires grad.

    Cost: N d (d + 1) / 2 multiply-adds. Float32 products are summed in float32 over at most
    1024 rows, then in float64: off by at most 6e-5 of sum |x_i x_j|, 1e-6 typically.
    Up to d = 64 the bits do not depend on the number of threads.
    On CUDA the check of ``group`` waits for the device.

    Example:
        >>> count, sums, cross = moments(torch.tensor([[1.0], [2.0], [4.0]]),
        ...                              torch.tensor([0, 1, 1]), 2)
        >>> count.tolist(), sums.flatten().tolist(), cross.flatten().tolist()
        ([1, 2], [1.0, 6.0], [1.0, 20.0])
    """
    _check_no_grad("moments", x=x, pilot=pilot)
    return torch.ops.fisherfast.moments.default(x, group, num_groups, pilot)


def _moments(
    x: Tensor, group: Tensor | None, num_groups: int, pilot: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    count, sums, cross = results = _moments_fake(x, group, num_groups, pilot)
    if group is not None:
        _check_group_range(group, num_groups)
    rows, dim = x.shape
    if not _native.serves(x) or dim > MOMENTS_LIMIT[x.dtype]:
        return reference.moments_by_matmul(x, group, num_groups, pilot)
    x = _with_unit_column_stride(x)
    group = None if group is None else group.contiguous()
    pilot = None if pilot is None else pilot.contiguous()
    workspace = _native.moments_workspace(x, rows, dim, num_groups)
    _native.call(
        "moments",
        x,
        x.data_ptr(),
        x.stride(0),
        _address(group),
        _address(pilot),
        count.data_ptr(),
        sums.data_ptr(),
        cross.data_ptr(),
        _address(workspace),
        rows,
        dim,
        num_groups,
    )
    return results


def _moments_fake(
    x: Tensor, group: Tensor | None, num_groups: int, pilot: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_moments(x, group, num_groups, pilot)
    dim = x.shape[1]
    return (
        x.new_empty((num_groups,), dtype=torch.int64),
        x.new_empty((num_groups, dim), dtype=torch.float64),
        x.new_empty((num_groups, dim, dim), dtype=torch.float64),
    )


def _check_moments(x: Tensor, group: Tensor | None, num_groups: int, pilot: Tensor | None) -> None:
    _check_real("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [N, d], got {list(x.shape)}")
    _check_at_least("num_groups", num_groups, 1)
    if group is None:
        if num_groups != 1:
            raise ValueError(f"num_groups must be 1 when group is None, got {num_groups}")
    else:
        if group.dtype != torch.int64:
            raise TypeError(f"group must be int64, got {_name(group.dtype)}")
        _check_device("group", group, "x", x)
        _check_shape("group", group, "[N]", [x.shape[0]])
    if pilot is not None:
        _check_like("pilot", pilot, "x", x)
        _check_shape("pilot", pilot, "[d]", [x.shape[1]])


def _check_group_range(group: Tensor, num_groups: int) -> None:
    if group.numel() == 0:
        return
    for bound in torch.stack(group.aminmax()).tolist():
        if not 0 <= bound < num_groups:
            raise ValueError(f"group must lie in [0, {num_groups}), got {bound}")


# --- lift ----------------------------------------------------------------------------------------


def lift(
    projected: Tensor,
    bias: Tensor,
    pilot: Tensor,
    *,
    slope: float = 0.7,
    num_groups: int = 1,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Random features from their projections, and their sums by fold, in one pass.

        features_ij = leaky_relu(projected_ij + bias_j) - pilot_j
        sums_gj = sum of features_ij over rows i with (first + i) mod num_groups = g

    Args:
        projected: [n, k] float32 or float64, the product of samples and random weights; rows may
            be strided.
        bias: [k], dtype and device of ``projected``.
        pilot: [k], dtype and device of ``projected``: roughly the mean feature.
        slope: factor of the leaky ReLU below zero.
        num_groups: G >= 1, the number of folds.
        first: number of samples dealt to folds before these, >= 0.

    Returns:
        features: [n, k], dtype of ``projected``.
        sums: [G, k] float64.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device, slope, num_groups or first.
        RuntimeError: an input requires grad.

    Cost: reads and writes n k numbers. The bits do not depend on the number of threads.

    Example:
        >>> zero = torch.zeros(1)
        >>> features, sums = lift(torch.tensor([[-1.0], [2.0], [3.0]]), zero, zero, slope=0.5,
        ...                       num_groups=2)
        >>> features.flatten().tolist(), sums.flatten().tolist()
        ([-0.5, 2.0, 3.0], [2.5, 2.0])
    """
    _check_no_grad("lift", projected=projected, bias=bias, pilot=pilot)
    op = torch.ops.fisherfast.lift.default
    return op(projected, bias, pilot, slope, num_groups, first)


def _lift(
    projected: Tensor, bias: Tensor, pilot: Tensor, slope: float, num_groups: int, first: int
) -> tuple[Tensor, Tensor]:
    features, sums = results = _lift_fake(projected, bias, pilot, slope, num_groups, first)
    if not _native.serves(projected):
        return reference.lift(projected, bias, pilot, slope, num_groups, first)
    projected = _with_unit_column_stride(projected)
    bias, pilot = bias.contiguous(), pilot.contiguous()
    _native.call(
        "lift",
        projected,
        projected.data_ptr(),
        projected.stride(0),
        bias.data_ptr(),
        pilot.data_ptr(),
        features.data_ptr(),
        sums.data_ptr(),
        *projected.shape,
        num_groups,
        first,
        slope,
    )
    return results


def _lift_fake(
    projected: Tensor, bias: Tensor, pilot: Tensor, slope: float, num_groups: int, first: int
) -> tuple[Tensor, Tensor]:
    _check_lift(projected, bias, pilot, slope, num_groups, first)
    features = projected.new_empty(projected.shape)
    return features, projected.new_empty((num_groups, bias.shape[0]), dtype=torch.float64)


def _check_lift(
    projected: Tensor, bias: Tensor, pilot: Tensor, slope: float, num_groups: int, first: int
) -> None:
    _check_real("projected", projected)
    if projected.dim() != 2:
        raise ValueError(f"projected must have shape [n, k], got {list(projected.shape)}")
    for name, tensor in (("bias", bias), ("pilot", pilot)):
        _check_like(name, tensor, "projected", projected)
        _check_shape(name, tensor, "[k]", [projected.shape[1]])
    if not math.isfinite(slope):
        raise ValueError(f"slope must be finite, got {slope}")
    _check_at_least("num_groups", num_groups, 1)
    _check_at_least("first", first, 0)


# --- shared --------------------------------------------------------------------------------------


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _with_unit_column_stride(x: Tensor) -> Tensor:
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _check_tensors(**inputs: Tensor | None) -> None:
    for name, tensor in inputs.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


def _check_no_grad(op: str, **inputs: Tensor | None) -> None:
    _check_tensors(**inputs)
    for name, tensor in inputs.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} must not require grad, got requires_grad=True: {op} has no backward; "
                f"pass {name}.detach() or call it under torch.no_grad()"
            )


def _check_real(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _native.DTYPE_NAMES:
        raise TypeError(f"{name} must be float32 or float64, got {_name(tensor.dtype)}")


def _check_device(name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    if tensor.device != model.device:
        raise ValueError(
            f"{name} must be on the device of {model_name} ({model.device}), got {tensor.device}"
        )


def _check_like(name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    if tensor.dtype != model.dtype:
        raise TypeError(
            f"{name} must have the dtype of {model_name} ({_name(model.dtype)}), "
            f"got {_name(tensor.dtype)}"
        )
    _check_device(name, tensor, model_name, model)


def _check_shape(name: str, tensor: Tensor, symbol: str, shape: list[int]) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {symbol} = {shape}, got {list(tensor.shape)}")


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines one op with its implementation for CPU and CUDA and its fake implementation."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, device)
    torch.library.register_fake(f"fisherfast::{name}", fake, lib=_LIBRARY)


_register(
    "fisher_solve(Tensor cov, Tensor deriv, float ridge, bool inverse_rows, bool solution)"
    " -> (Tensor fisher, Tensor half, Tensor info, Tensor condition, Tensor inverse_rows,"
    " Tensor solution)",
    _fisher_solve,
    _fisher_solve_fake,
)
torch.library.register_autograd(
    "fisherfast::fisher_solve",
    _fisher_solve_autograd,
    setup_context=_fisher_solve_setup,
    lib=_LIBRARY,
)
_register(
    "fisher_solve_backward(Tensor grad_fisher, Tensor solution, float ridge)"
    " -> (Tensor grad_cov, Tensor grad_deriv)",
    _fisher_solve_backward,
    _fisher_solve_backward_fake,
)
_register(
    "moments(Tensor x, Tensor? group, SymInt num_groups, Tensor? pilot)"
    " -> (Tensor count, Tensor sums, Tensor cross)",
    _moments,
    _moments_fake,
)
_register(
    "lift(Tensor projected, Tensor bias, Tensor pilot, float slope, SymInt num_groups,"
    " SymInt first) -> (Tensor features, Tensor sums)",
    _lift,
    _lift_fake,
)
