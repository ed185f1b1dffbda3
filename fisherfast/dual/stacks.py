"""Helpers that treat a stack [1 + P, n, ...] like its primal [n, ...]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherfast.dual.tensor import DualTensor, is_differentiable


def shifted(dim: int, ndim: int) -> int:
    """Convert a dimension of the primal to that of the stack."""
    return dim % max(ndim, 1) + 1


def aligned(dual: DualTensor, ndim: int, *, laid_out: bool = False) -> Tensor:
    """Return the stack of a dual tensor with dimensions of size 1 inserted after its first, so that
    the primal has ndim dimensions. Set laid_out if a view of it is made, see
    `DualTensor.laid_out`."""
    stack = dual.laid_out() if laid_out else dual.stack
    missing = ndim - dual.dim()
    if missing <= 0:
        return stack
    return stack.reshape(stack.shape[:1] + (1,) * missing + stack.shape[1:])


def in_one_dtype(a: Any, b: Any) -> tuple[Any, Any]:
    """Convert two operands to the dtype of their result. PyTorch's promotion ignores the precision
    of tensors without dimensions, and a stack has one dimension more than its primal."""
    if not (is_differentiable(a) and is_differentiable(b)) or a.dtype == b.dtype:
        return a, b
    plain = [item.primal if isinstance(item, DualTensor) else item for item in (a, b)]
    dtype = torch.result_type(*plain)
    first, second = (t.to(dtype if t.is_complex() else dtype.to_real()) for t in (a, b))
    return first, second


def lifted(tensor: Any, directions: int) -> Tensor:
    """Return the stack of a dual tensor, or a stack with zero tangents for a plain tensor."""
    if isinstance(tensor, DualTensor):
        return tensor.stack
    return DualTensor.constant(tensor, directions).stack


def merged(stack: Tensor) -> Tensor:
    """Reshape [1 + P, n, ...] to [(1 + P) n, ...]."""
    return stack.flatten(0, 1)


def view_of(dual: DualTensor, stack: Tensor) -> DualTensor:
    """Make a dual tensor that shares memory with another."""
    return DualTensor(stack, dual.memory)
