"""Rules of matrix products and convolutions, which are linear in each operand.

With a constant weight one call computes the whole stack; where both operands have tangents, the
product rule takes two products per tangent, accumulated into the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherfast.dual import memory
from fisherfast.dual.dispatch import Operator, aten, rule
from fisherfast.dual.stacks import merged
from fisherfast.dual.tensor import DualTensor

Product = Callable[[Tensor, Tensor], Tensor]


def bilinear(product: Product, a: Any, b: Any) -> DualTensor:
    """Compute a b slice by slice, where one or both operands are dual."""
    if not isinstance(b, DualTensor):
        return DualTensor(_slices(product, a.stack, [b] * len(a.stack)))
    if not isinstance(a, DualTensor):
        return DualTensor(_slices(product, [a] * len(b.stack), b.stack))
    primal = product(a.primal, b.primal)
    result = primal.new_empty((len(a.stack), *primal.shape))
    result[0] = primal
    for out, da, db in zip(result[1:], a.tangents, b.tangents, strict=True):
        out.copy_(product(da, b.primal)).add_(product(a.primal, db))
    return DualTensor(result)


def _slices(product: Product, left: Any, right: Any) -> Tensor:
    return torch.stack([product(a, b) for a, b in zip(left, right, strict=True)])


@rule("dot", "vdot")
def _dot(func: Operator, a: Any, b: Any) -> Any:
    return ((torch.conj_physical(a) if func is aten.vdot.default else a) * b).sum(-1)


@rule("mm", "bmm", "matmul", "mv")
def _matrix_product(func: Operator, a: Any, b: Any) -> Any:
    if isinstance(a, DualTensor) and not isinstance(b, DualTensor) and b.dim() == 2 and a.dim() > 1:
        return DualTensor(torch.matmul(a.stack, b))  # more rows of one product
    if isinstance(a, DualTensor) and isinstance(b, DualTensor) and _batches_match(a, b):
        return DualTensor(batched_product(a.stack, b.stack))
    return bilinear(torch.matmul, a, b)


def _batches_match(a: Tensor, b: Tensor) -> bool:
    """Return whether bmm accepts the batches; matmul repeats a batch of one."""
    return a.dim() == b.dim() == len("Bij") and len(a) == len(b)


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute the stack of a b from the stacks of a [1 + P, B, i, j] and b [1 + P, B, j, k]."""
    result = a.new_empty((*a.shape[:-1], b.shape[-1]))
    torch.bmm(a[0], b[0], out=result[0])
    for out, da, db in zip(result[1:], a[1:], b[1:], strict=True):
        torch.bmm(da, b[0], out=out)
        out.baddbmm_(a[0], db)
    return result


@rule("addmm", "baddbmm", "addmv")
def _add_product(
    func: Operator, x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1
) -> Any:
    product = torch.matmul(a, b)
    if alpha != 1:
        product = alpha * product
    if beta == 0:
        return product
    return product + (x if beta == 1 else beta * x)


@rule("linear")
def _linear(func: Operator, x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(x, DualTensor) or isinstance(weight, DualTensor):
        return NotImplemented
    if isinstance(bias, DualTensor):
        return _linear(func, x, weight) + bias
    stack = torch.nn.functional.linear(x.stack, weight)
    if bias is not None:
        stack[0].add_(bias)
    return DualTensor(stack)


@rule("bilinear")
def _bilinear(func: Operator, a: Any, b: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, DualTensor):
        return NotImplemented
    result = bilinear(lambda u, v: torch.nn.functional.bilinear(u, v, weight), a, b)
    return result if bias is None else result + bias


# --- Convolutions ------------------------------------------------------------------------------


@rule("convolution", "_convolution")
def _convolve(func: Operator, x: Any, weight: Any, bias: Any, *args: Any) -> Any:
    def without_bias(u: Tensor, w: Tensor) -> Tensor:
        return func(u, w, None, *args)

    if isinstance(weight, DualTensor) or not isinstance(x, DualTensor):
        product = bilinear(without_bias, x, weight)
        return product if bias is None else product + _by_channel(bias, product)
    _, _, _, transposed, *_ = args  # after stride, padding and dilation
    stack = x.stack
    samples = merged(stack)
    if not transposed and channels_last_pays(samples):
        samples = as_channels_last(samples)
    growth = weight.shape[0] / max(x.shape[1], 1)  # of a convolution that keeps the positions
    if transposed or growth * stack.nbytes < memory.LARGE_BYTES or stack.is_cuda:
        result = without_bias(samples, weight).unflatten(0, stack.shape[:2])
    else:
        samples = samples.unflatten(0, stack.shape[:2])
        result = _slice_by_slice(lambda part: without_bias(part, weight), samples)
    dual: Any = DualTensor(result)
    if isinstance(bias, DualTensor):
        return dual + _by_channel(bias, dual)
    if bias is not None:
        dual.primal.add_(_by_channel(bias, dual))
    return dual


def _slice_by_slice(convolve: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """Convolve slice by slice and copy the results into reused memory, which is faster than fresh
    pages for all of them."""
    first = convolve(stack[0])
    strides = (first.numel(), *first.stride())
    result = memory.empty((len(stack), *first.shape), strides, first.dtype, first.device)
    result[0] = first
    for index in range(1, len(stack)):
        result[index] = convolve(stack[index])
    return result


def channels_last_pays(samples: Tensor) -> bool:
    """Return whether PyTorch convolves [n, C, H, W] faster channels-last: 1.1 to 1.9 times on the
    CPU, whose library otherwise reorders input and output at every call."""
    return (
        samples.dim() == len("nCHW")
        and samples.device.type == "cpu"
        and samples.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )


def as_channels_last(samples: Tensor) -> Tensor:
    """Store samples [n, C, H, W] in the order n, H, W, C, with channels-last strides also for
    C = 1."""
    _, channels, height, width = samples.shape
    laid = samples.contiguous(memory_format=torch.channels_last)
    strides = (height * width * channels, 1, width * channels, channels)
    return laid.as_strided(laid.shape, strides)


def _by_channel(bias: Any, like: Tensor) -> Any:
    """Reshape a bias [C] to broadcast against [n, C, ...]."""
    return bias.reshape(-1, *[1] * (like.dim() - 2))
