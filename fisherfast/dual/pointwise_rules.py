"""Rules of elementwise non-linear operations: y = f(x), dy = f'(x) dx.

Activations go through the fused kernel, which reads and writes the stack once; the rest through a
table of f and f'. At a kink the derivative is the one of PyTorch's autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherfast import ops
from fisherfast.dual.dispatch import Operator, aten, overload, overloads, overwrite, rule
from fisherfast.dual.stacks import aligned, in_one_dtype
from fisherfast.dual.tensor import Affine, DualTensor, apply_activation

SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946
"""Of Klambauer et al. 2017: the fixed point with mean 0 and variance 1."""

SOFTPLUS_THRESHOLD = 20.0
RELU6_END = 6.0
RRELU_LOWER, RRELU_UPPER = 1 / 8, 1 / 3
"""PyTorch's defaults."""

# --- Activations -------------------------------------------------------------------------------

Kind = tuple[Any, ...]
"""Kind of activation and its parameters, as `ops.dual_activation` takes them."""


def _default(
    args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str, value: Any
) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, value)


def _leaky_relu(*args: Any, **kwargs: Any) -> Kind:
    return "leaky_relu", _default(args, kwargs, 0, "negative_slope", 0.01)


def _hardtanh(*args: Any, **kwargs: Any) -> Kind:
    low = _default(args, kwargs, 0, "min_val", -1.0)
    return "hardtanh", low, _default(args, kwargs, 1, "max_val", 1.0)


def _elu(*args: Any, **kwargs: Any) -> Kind:
    return (
        "elu",
        _default(args, kwargs, 0, "alpha", 1.0),
        _default(args, kwargs, 1, "scale", 1.0),
        _default(args, kwargs, 2, "input_scale", 1.0),
    )


def _celu(*args: Any, **kwargs: Any) -> Kind:
    alpha = _default(args, kwargs, 0, "alpha", 1.0)
    return "elu", alpha, 1.0, 1.0 / alpha


def _gelu(*args: Any, **kwargs: Any) -> Kind:
    return ("gelu_tanh",) if kwargs.get("approximate", "none") == "tanh" else ("gelu",)


def _softplus(*args: Any, **kwargs: Any) -> Kind:
    beta = _default(args, kwargs, 0, "beta", 1.0)
    return "softplus", beta, _default(args, kwargs, 1, "threshold", SOFTPLUS_THRESHOLD)


KINDS: dict[str, Callable[..., Kind]] = {
    "relu": lambda: ("relu",),
    "relu6": lambda: ("hardtanh", 0.0, RELU6_END),
    "leaky_relu": _leaky_relu,
    "hardtanh": _hardtanh,
    "elu": _elu,
    "selu": lambda: ("elu", SELU_ALPHA, SELU_SCALE, 1.0),
    "celu": _celu,
    "gelu": _gelu,
    "silu": lambda: ("silu",),
    "mish": lambda: ("mish",),
    "softplus": _softplus,
    "sigmoid": lambda: ("sigmoid",),
    "tanh": lambda: ("tanh",),
    "hardswish": lambda: ("hardswish",),
    "hardsigmoid": lambda: ("hardsigmoid",),
}
"""Name in ATen -> kind and parameters, from the arguments behind the first."""


def _activate(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> DualTensor:
    name = func._schema.name.removeprefix("aten::")
    kind = KINDS[name.rstrip("_")](*args, **kwargs)
    if name.endswith("_"):
        return _activated_in_place(x, kind)
    stack, affine = x.pending()
    return DualTensor(apply_activation(stack, *_numbers(kind), affine=affine))


def _activated_in_place(x: DualTensor, kind: Kind) -> DualTensor:
    stack, affine = x.pending()
    if affine is not None:  # nobody else has seen these values
        x.settle(apply_activation(stack, *_numbers(kind), affine=affine))
        return x
    stack = x.before_writing()
    if stack.dtype in (torch.float32, torch.float64):
        ops.dual_activation_(stack, *_numbers(kind))
        return x
    return overwrite(x, DualTensor(apply_activation(stack, *_numbers(kind))))


def _numbers(kind: Kind) -> Kind:
    return (kind[0], *(float(parameter) for parameter in kind[1:]))


for _name in KINDS:
    rule(overload(_name), overload(f"{_name}_"))(_activate)


@rule(*overloads("rrelu", "rrelu_with_noise"))
def _random_relu(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    """In eval mode a leaky ReLU of the mean slope."""
    names = [argument.name for argument in func._schema.arguments[1:]]
    named = dict(zip(names, args, strict=False)) | kwargs
    if named.get("training", False):
        return NotImplemented
    slope = (named.get("lower", RRELU_LOWER) + named.get("upper", RRELU_UPPER)) / 2
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


@rule(*overloads("batch_norm", "cudnn_batch_norm", "native_batch_norm"))
def _batch_norm(func: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
    """In eval mode a scale and a shift, which waits for the activation behind it."""
    named = dict(zip((a.name for a in func._schema.arguments[1:]), args, strict=False)) | kwargs
    tensors = [named.get(n) for n in ("weight", "bias", "running_mean", "running_var")]
    if named["training"] or any(isinstance(item, DualTensor) for item in tensors) or x.dim() < 2:
        return NotImplemented
    weight, bias, mean, variance = tensors
    if mean is None or variance is None or func is not aten.batch_norm.default:
        return NotImplemented
    scale, shift = eval_affine(mean, variance, weight, bias, named["eps"])
    return DualTensor.awaiting(x, scale.to(x.dtype), shift.to(x.dtype))


def eval_affine(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Affine:
    """Scale and shift [C] of a batch norm with running statistics."""
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


# --- f and f' of the rest ------------------------------------------------------------------------

Derivative = Callable[..., Tensor]
"""f'(x), from x, y = f(x) and the arguments of f."""


def _pow_slope(x: Tensor, y: Tensor, exponent: float) -> Tensor:
    return torch.zeros_like(x) if exponent == 0 else exponent * x.pow(exponent - 1)


def _clamp_slope(x: Tensor, y: Tensor, low: Any = None, high: Any = None, **kw: Any) -> Tensor:
    low, high = kw.get("min", low), kw.get("max", high)
    inside = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        inside &= x >= low
    if high is not None:
        inside &= x <= high
    return inside.to(x.dtype)


def _at_least_slope(x: Tensor, y: Tensor, low: Any = None, **kw: Any) -> Tensor:
    return _clamp_slope(x, y, kw.get("min", low))


def _at_most_slope(x: Tensor, y: Tensor, high: Any = None, **kw: Any) -> Tensor:
    return _clamp_slope(x, y, None, kw.get("max", high))


def _flat(x: Tensor, y: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros_like(x)


SLOPES: dict[str, Derivative] = {
    "exp": lambda x, y: y,
    "exp2": lambda x, y: math.log(2) * y,
    "expm1": lambda x, y: y + 1,
    "log": lambda x, y: x.reciprocal(),
    "log2": lambda x, y: (math.log(2) * x).reciprocal(),
    "log10": lambda x, y: (math.log(10) * x).reciprocal(),
    "log1p": lambda x, y: (1 + x).reciprocal(),
    "sqrt": lambda x, y: 0.5 / y,
    "rsqrt": lambda x, y: -0.5 * y.pow(3),
    "reciprocal": lambda x, y: -y.square(),
    "square": lambda x, y: 2 * x,
    "abs": lambda x, y: x.sign(),
    "sin": lambda x, y: x.cos(),
    "cos": lambda x, y: -x.sin(),
    "tan": lambda x, y: 1 + y.square(),
    "asin": lambda x, y: (1 - x.square()).rsqrt(),
    "acos": lambda x, y: -(1 - x.square()).rsqrt(),
    "atan": lambda x, y: (1 + x.square()).reciprocal(),
    "sinh": lambda x, y: x.cosh(),
    "cosh": lambda x, y: x.sinh(),
    "asinh": lambda x, y: (1 + x.square()).rsqrt(),
    "acosh": lambda x, y: (x.square() - 1).rsqrt(),
    "atanh": lambda x, y: (1 - x.square()).reciprocal(),
    "erf": lambda x, y: 2 / math.sqrt(math.pi) * torch.exp(-x.square()),
    "erfc": lambda x, y: -2 / math.sqrt(math.pi) * torch.exp(-x.square()),
    "sinc": lambda x, y: torch.where(
        x == 0, 0.0, ((math.pi * x).cos() - y) / torch.where(x == 0, 1.0, x)
    ),
    "log_sigmoid": lambda x, y: torch.sigmoid(-x),
    "softsign": lambda x, y: (1 + x.abs()).square().reciprocal(),
    "tanhshrink": lambda x, y: (x - y).square(),
    "hardshrink": lambda x, y, cut=0.5: (x.abs() > cut).to(x.dtype),
    "softshrink": lambda x, y, cut=0.5: (x.abs() > cut).to(x.dtype),
    "threshold": lambda x, y, threshold, value: (x > threshold).to(x.dtype),
    "pow.Tensor_Scalar": _pow_slope,
    "clamp": _clamp_slope,
    "clamp.Tensor": _clamp_slope,
    "clip": _clamp_slope,
    "clamp_min": _at_least_slope,
    "clamp_min.Tensor": _at_least_slope,
    "clamp_max": _at_most_slope,
    "clamp_max.Tensor": _at_most_slope,
    "sign": _flat,
    "sgn": _flat,
    "floor": _flat,
    "ceil": _flat,
    "round": _flat,
    "trunc": _flat,
    "frac": lambda x, y: torch.ones_like(x),
    "nan_to_num": lambda x, y, *_, **__: torch.isfinite(x).to(x.dtype),
}
"""f'(x) by the name of f in ATen."""

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _elementwise(slope: Derivative) -> Callable[..., Any]:
    def apply(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
        others = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]
        if any(isinstance(item, DualTensor) for item in others) or x.dtype not in REAL:
            return NotImplemented
        primal = x.primal
        value = func(primal, *args, **kwargs)
        if value.shape != x.shape or value.dtype != x.dtype:
            return NotImplemented
        stack = torch.empty_like(x.stack, dtype=value.dtype)
        stack[0] = value
        torch.mul(x.tangents, slope(primal, value, *args, **kwargs), out=stack[1:])
        return DualTensor(stack)

    return apply


for _name, _slope in SLOPES.items():
    rule(*overloads(_name))(_elementwise(_slope))


# --- Two operands --------------------------------------------------------------------------------


def _parts(item: Any, ndim: int) -> tuple[Any, Any]:
    """Primal and tangents of an operand as they broadcast in ndim dimensions; no tangents of a
    plain one."""
    if not isinstance(item, DualTensor):
        return item, None
    stack = aligned(item, ndim)
    return stack[0], stack[1:]


def _dims(a: Any, b: Any) -> int:
    return max(item.dim() for item in (a, b) if isinstance(item, Tensor))


@rule(*overloads("mul.Tensor", "mul.Scalar", "multiply.Tensor", "multiply.Scalar"))
def _multiply(func: Operator, a: Any, b: Any) -> DualTensor:
    a, b = in_one_dtype(a, b)
    if not isinstance(a, DualTensor):
        a, b = b, a
    ndim = _dims(a, b)
    stack = aligned(a, ndim)
    if not isinstance(b, DualTensor):
        return DualTensor(torch.mul(stack, b))
    b_primal, b_tangents = _parts(b, ndim)
    result = torch.mul(stack, b_primal)
    result[1:].addcmul_(stack[0], b_tangents)
    return DualTensor(result)


@rule(*overloads("mul_.Tensor", "mul_.Scalar", "div_.Tensor", "div_.Scalar"))
def _scale_in_place(func: Operator, x: DualTensor, other: Any) -> Any:
    if not isinstance(other, DualTensor):
        func(x.before_writing(), other)
        return x
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    function = _multiply if name == "mul" else _divide
    return overwrite(x, function(func, x, other))


@rule(*overloads("div.Tensor", "div.Scalar", "divide.Tensor", "true_divide.Tensor"))
def _divide(func: Operator, a: Any, b: Any) -> DualTensor:
    a, b = in_one_dtype(a, b)
    ndim = _dims(a, b)
    if not isinstance(b, DualTensor):
        return DualTensor(torch.div(aligned(a, ndim), b))
    b_primal, b_tangents = _parts(b, ndim)
    a_primal, a_tangents = _parts(a, ndim)
    value = torch.div(a_primal, b_primal)
    tangents = -value * b_tangents
    if a_tangents is not None:
        tangents = tangents + a_tangents
    return DualTensor(torch.cat([value[None], tangents / b_primal]))


@rule(*overloads("pow.Tensor_Tensor", "pow.Scalar"))
def _power(func: Operator, base: Any, exponent: Any) -> Any:
    ndim = _dims(base, exponent)
    base_primal, base_tangents = _parts(base, ndim)
    exponent_primal, exponent_tangents = _parts(exponent, ndim)
    value = torch.pow(base_primal, exponent_primal)
    tangents: Any = 0
    if base_tangents is not None:
        slope = exponent_primal * torch.pow(base_primal, exponent_primal - 1)
        slope = torch.where(torch.as_tensor(exponent_primal == 0), torch.zeros_like(slope), slope)
        tangents = base_tangents * slope
    if exponent_tangents is not None:
        base_primal = torch.as_tensor(base_primal, dtype=value.dtype, device=value.device)
        growth = torch.where(base_primal == 0, 0.0, value * base_primal.log())
        tangents = tangents + exponent_tangents * growth
    return DualTensor(torch.cat([value[None], tangents.expand(-1, *value.shape)]))


IGNORE_NAN = overloads("fmax", "fmin")


def _choice(a_wins: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., DualTensor]:
    """The larger or smaller of two operands. Equal ones share the derivative; where a NaN loses
    against a number, one of them has it, as in PyTorch."""

    def choose(func: Operator, a: Any, b: Any) -> DualTensor:
        ndim = _dims(a, b)
        (a_primal, a_tangents), (b_primal, b_tangents) = _parts(a, ndim), _parts(b, ndim)
        value = func(a_primal, b_primal)
        share = a_wins(a_primal, b_primal).to(value.dtype)
        if func in IGNORE_NAN:
            share = torch.where(b_primal.isnan(), 1, share)
        else:
            share = torch.where(a_primal == b_primal, 0.5, share)
        tangents: Any = 0
        if a_tangents is not None:
            tangents = tangents + share * a_tangents
        if b_tangents is not None:
            tangents = tangents + (1 - share) * b_tangents
        return DualTensor(torch.cat([value[None], tangents]))

    return choose


rule(*overloads("maximum", "fmax"))(_choice(torch.gt))
rule(*overloads("minimum"))(_choice(torch.lt))
rule(*overloads("fmin"))(_choice(torch.le))


@rule(*overloads("atan2"))
def _angle(func: Operator, a: Any, b: Any) -> DualTensor:
    ndim = _dims(a, b)
    (y, dy), (x, dx) = _parts(a, ndim), _parts(b, ndim)
    value, square = torch.atan2(y, x), x.square() + y.square()
    tangents: Any = 0
    if dy is not None:
        tangents = tangents + dy * (x / square)
    if dx is not None:
        tangents = tangents - dx * (y / square)
    return DualTensor(torch.cat([value[None], tangents]))


@rule(*overloads("lerp.Scalar", "lerp.Tensor"))
def _lerp(func: Operator, start: Any, end: Any, weight: Any) -> Any:
    return start + weight * (end - start)


@rule(*overloads("addcmul", "addcdiv"))
def _add_combined(func: Operator, x: Any, a: Any, b: Any, *, value: float = 1) -> Any:
    combined = a * b if func is aten.addcmul.default else a / b
    return x + value * combined


@rule(*overloads("glu"))
def _glu(func: Operator, x: DualTensor, dim: int = -1) -> Any:
    first, second = x.chunk(2, dim)
    return first * second.sigmoid()
