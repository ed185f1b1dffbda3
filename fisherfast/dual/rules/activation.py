"""Rules of activations, fused with the eval-mode batch norm that may precede them into one kernel
that reads and writes the stack once.

At a kink the derivative is that of PyTorch's autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fisherfast import ops
from fisherfast.dual.dispatch import (
    Operator,
    has_dual,
    named_arguments,
    overloads,
    overwrite,
    rule,
)
from fisherfast.dual.tensor import KERNEL_DTYPES, Affine, DualTensor, apply_activation

SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946
"""Constants of SELU, whose fixed point has mean 0 and variance 1 (Klambauer et al. 2017)."""

RELU6_END = 6.0

Kind = tuple[Any, ...]
"""Kind of activation and its parameters, as `ops.dual_activation` takes them."""

KINDS: dict[str, Callable[[dict[str, Any]], Kind]] = {
    "relu": lambda named: ("relu",),
    "relu6": lambda named: ("hardtanh", 0.0, RELU6_END),
    "leaky_relu": lambda named: ("leaky_relu", named["negative_slope"]),
    "hardtanh": lambda named: ("hardtanh", named["min_val"], named["max_val"]),
    "elu": lambda named: ("elu", named["alpha"], named["scale"], named["input_scale"]),
    "selu": lambda named: ("elu", SELU_ALPHA, SELU_SCALE, 1.0),
    "celu": lambda named: ("elu", named["alpha"], 1.0, 1.0 / named["alpha"]),
    "gelu": lambda named: ("gelu_tanh" if named["approximate"] == "tanh" else "gelu",),
    "silu": lambda named: ("silu",),
    "mish": lambda named: ("mish",),
    "softplus": lambda named: ("softplus", named["beta"], named["threshold"]),
    "sigmoid": lambda named: ("sigmoid",),
    "tanh": lambda named: ("tanh",),
    "hardswish": lambda named: ("hardswish",),
    "hardsigmoid": lambda named: ("hardsigmoid",),
}
"""Name in ATen -> kind and parameters, from the arguments after the first by name."""


def _activate(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> DualTensor:
    name = func._schema.name.removeprefix("aten::")
    kind = _numbers(KINDS[name.rstrip("_")](named_arguments(func, args, kwargs)))
    if name.endswith("_"):
        return _activated_in_place(x, kind)
    stack, affine = x.pending()
    return DualTensor(apply_activation(stack, *kind, affine=affine))


def _activated_in_place(x: DualTensor, kind: Kind) -> DualTensor:
    stack, affine = x.pending()
    if affine is not None:  # no other tensor uses these values
        x.settle(apply_activation(stack, *kind, affine=affine))
        return x
    stack = x.before_writing()
    if stack.dtype in KERNEL_DTYPES:
        ops.dual_activation_(stack, *kind)
        return x
    return overwrite(x, DualTensor(apply_activation(stack, *kind)))


def _numbers(kind: Kind) -> Kind:
    return (kind[0], *(float(parameter) for parameter in kind[1:]))


for _name in KINDS:
    rule(*overloads(_name))(_activate)
    if _name != "softplus":  # it has no in-place version
        rule(*overloads(f"{_name}_"))(_activate)


@rule(*overloads("rrelu", "rrelu_with_noise"))
def _random_relu(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    """Apply a leaky ReLU with the mean slope, which is RReLU in eval mode."""
    named = named_arguments(func, args, kwargs)
    if named["training"]:
        return NotImplemented
    slope = (named["lower"] + named["upper"]) / 2
    return DualTensor(apply_activation(x.stack, "leaky_relu", slope))


@rule(*overloads("prelu", "_prelu_kernel"))
def _prelu(func: Operator, x: DualTensor, weight: Tensor) -> Any:
    if isinstance(weight, DualTensor) or not isinstance(x, DualTensor):
        return NotImplemented
    slope = weight.detach().flatten()
    if slope.numel() == 1:
        channels = x.shape[1] if x.dim() > 1 else 1
        slope = slope.expand(channels)
    if x.dim() < 2 or len(slope) != x.shape[1]:
        return NotImplemented
    stack, affine = x.pending()
    return DualTensor(apply_activation(stack, "prelu", slope=slope, affine=affine))


@rule(*overloads("batch_norm"))
def _batch_norm(func: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the scale and shift of eval mode, deferred until the activation that follows."""
    named = named_arguments(func, args, kwargs)
    weight, bias, mean, variance = (
        named[name] for name in ("weight", "bias", "running_mean", "running_var")
    )
    if named["training"] or mean is None or variance is None:
        return NotImplemented
    if has_dual(weight, bias, mean, variance) or x.dim() < 2:
        return NotImplemented
    scale, shift = eval_affine(mean, variance, weight, bias, named["eps"])
    return DualTensor.awaiting(x, scale.to(x.dtype), shift.to(x.dtype))


def eval_affine(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Affine:
    """Compute scale and shift [C] of a batch norm with running statistics."""
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias
