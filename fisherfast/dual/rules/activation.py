"""Rules of activations, fused with the eval-mode batch norm that may precede them into one kernel
that reads and writes the stack once.

At a kink the derivative is that of PyTorch's autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fisherfast import ops
from fisherfast.dual.dispatch import Operator, has_dual, named_arguments, overwrite, rule
from fisherfast.dual.tensor import KERNEL_DTYPES, DualTensor, apply_activation

Kind = tuple[Any, ...]
"""Kind of activation and its parameters, as `ops.dual_activation` takes them."""

KINDS: dict[str, Callable[[dict[str, Any]], Kind]] = {
    "relu": lambda named: ("relu",),
    "leaky_relu": lambda named: ("leaky_relu", named["negative_slope"]),
    "hardtanh": lambda named: ("hardtanh", named["min_val"], named["max_val"]),
    "elu": lambda named: ("elu", named["alpha"], named["scale"], named["input_scale"]),
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


@rule(*KINDS, *(f"{name}_" for name in KINDS if name != "softplus"))
def _activate(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    if x.is_complex():
        return NotImplemented
    name = func._schema.name.removeprefix("aten::")
    kind, *parameters = KINDS[name.rstrip("_")](named_arguments(func, args, kwargs))
    kind = (kind, *map(float, parameters))
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
        ops.dual_activation(stack, *kind, out=stack)
        return x
    return overwrite(x, DualTensor(apply_activation(stack, *kind)))


@rule("rrelu_with_noise")
def _random_relu(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    """Apply a leaky ReLU with the mean slope, which is RReLU in eval mode."""
    named = named_arguments(func, args, kwargs)
    if named["training"]:
        return NotImplemented
    slope = (named["lower"] + named["upper"]) / 2
    return DualTensor(apply_activation(x.stack, "leaky_relu", slope))


@rule("_prelu_kernel")
def _prelu(func: Operator, x: DualTensor, weight: Tensor) -> Any:
    if isinstance(weight, DualTensor) or not isinstance(x, DualTensor) or x.dim() < 2:
        return NotImplemented
    slope = weight.detach().flatten()
    if slope.numel() == 1:
        slope = slope.expand(x.shape[1])
    stack, affine = x.pending()
    return DualTensor(apply_activation(stack, "prelu", slope=slope, affine=affine))


@rule("batch_norm")
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
    scale = (variance + named["eps"]).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    return DualTensor.awaiting(x, scale.to(x.dtype), shift.to(x.dtype))
