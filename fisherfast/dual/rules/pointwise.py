"""Rules of elementwise non-linear operations, of one operand (y = f(x), dy = f'(x) dx, from a table
of f') and of two.

At a kink the derivative is that of PyTorch's autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherfast.dual.dispatch import Operator, aten, has_dual, named_arguments, overwrite, rule
from fisherfast.dual.rules.complex_numbers import size_of
from fisherfast.dual.stacks import aligned, in_one_dtype
from fisherfast.dual.tensor import DualTensor

# --- One operand ---------------------------------------------------------------------------------

Derivative = Callable[..., Tensor]
"""Computes f'(x) from x, y = f(x) and the other arguments of f by name."""


def _pow_slope(x: Tensor, y: Tensor, exponent: float) -> Tensor:
    return torch.zeros_like(x) if exponent == 0 else exponent * x.pow(exponent - 1)


def _clamp_slope(x: Tensor, y: Tensor, **limits: Any) -> Tensor:
    inside = torch.ones_like(x, dtype=torch.bool)
    if limits.get("min") is not None:
        inside &= x >= limits["min"]
    if limits.get("max") is not None:
        inside &= x <= limits["max"]
    return inside.to(x.dtype)


CLAMPS = ("clamp", "clamp.Tensor", "clamp_min", "clamp_min.Tensor", "clamp_max", "clamp_max.Tensor")

STEPS = ("sign", "sgn", "floor", "ceil", "round", "trunc")


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
    "hardshrink": lambda x, y, lambd: (x.abs() > lambd).to(x.dtype),
    "softshrink": lambda x, y, lambd: (x.abs() > lambd).to(x.dtype),
    "threshold": lambda x, y, threshold, value: (x > threshold).to(x.dtype),
    "pow.Tensor_Scalar": _pow_slope,
    **dict.fromkeys(CLAMPS, _clamp_slope),
    **dict.fromkeys(STEPS, lambda x, y: torch.zeros_like(x)),
    "frac": lambda x, y: torch.ones_like(x),
    "nan_to_num": lambda x, y, **_: torch.isfinite(x).to(x.dtype),
}
"""f'(x) by the name of f in ATen."""

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

HOLOMORPHIC_NAMES = """
exp exp2 expm1 log log1p sqrt rsqrt reciprocal square sin cos tan sinh cosh pow.Tensor_Scalar
"""
HOLOMORPHIC = frozenset(HOLOMORPHIC_NAMES.split())
"""Functions whose f' is also their derivative at complex x."""


def _elementwise(name: str, slope: Derivative) -> Callable[..., Any]:
    def apply(func: Operator, x: DualTensor, *args: Any, **kwargs: Any) -> Any:
        if name == "abs" and x.is_complex():
            return size_of(func, x)
        known = x.dtype in REAL or (x.is_complex() and name in HOLOMORPHIC)
        if has_dual(args, kwargs) or not known:
            return NotImplemented
        primal = x.primal
        value = func(primal, *args, **kwargs)
        if value.shape != x.shape or value.dtype != x.dtype:
            return NotImplemented
        stack = torch.empty_like(x.stack, dtype=value.dtype)
        stack[0] = value
        named = named_arguments(func, args, kwargs)
        torch.mul(x.tangents, slope(primal, value, **named), out=stack[1:])
        return DualTensor(stack)

    return apply


for _name, _slope in SLOPES.items():
    rule(_name)(_elementwise(_name, _slope))


# --- Two operands --------------------------------------------------------------------------------


def _parts(item: Any, ndim: int) -> tuple[Any, Any]:
    """Return primal and tangents of an operand, shaped to broadcast in ndim dimensions; None as the
    tangents of a plain one."""
    if not isinstance(item, DualTensor):
        return item, None
    stack = aligned(item, ndim)
    return stack[0], stack[1:]


def _dims(a: Any, b: Any) -> int:
    return max(item.dim() for item in (a, b) if isinstance(item, Tensor))


def _chained(value: Tensor, *terms: tuple[Tensor | None, Callable[[], Tensor]]) -> DualTensor:
    """Make a dual tensor of f(a, b) by the chain rule, from the tangents of each operand (None for
    a plain one) and a function that computes the derivative by it."""
    tangents: Any = sum(tangents * slope() for tangents, slope in terms if tangents is not None)
    return DualTensor(torch.cat([value[None], tangents.expand(-1, *value.shape)]))


@rule("mul.Tensor", "mul.Scalar")
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


@rule("div.Tensor", "div.Scalar")
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


@rule("mul_.Tensor", "mul_.Scalar", "div_.Tensor", "div_.Scalar")
def _scale_in_place(func: Operator, x: DualTensor, other: Any) -> DualTensor:
    if isinstance(other, DualTensor):
        return overwrite(x, x * other if "mul" in func._schema.name else x / other)
    func(x.before_writing(), other)
    return x


@rule("pow.Tensor_Tensor", "pow.Scalar")
def _power(func: Operator, base: Any, exponent: Any) -> DualTensor:
    ndim = _dims(base, exponent)
    (b, db), (e, de) = _parts(base, ndim), _parts(exponent, ndim)
    value = torch.pow(b, e)

    def by_base() -> Tensor:
        slope = e * torch.pow(b, e - 1)
        return torch.where(torch.as_tensor(e == 0), torch.zeros_like(slope), slope)

    def by_exponent() -> Tensor:
        plain = torch.as_tensor(b, dtype=value.dtype, device=value.device)
        return torch.where(plain == 0, 0.0, value * plain.log())

    return _chained(value, (db, by_base), (de, by_exponent))


def _choice(a_wins: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., DualTensor]:
    """Make the rule of the larger or smaller of two operands. Equal operands share the derivative;
    if NaN is ignored in favour of a number, one operand gets all of it, as in PyTorch."""

    def choose(func: Operator, a: Any, b: Any) -> DualTensor:
        ndim = _dims(a, b)
        (a_primal, a_tangents), (b_primal, b_tangents) = _parts(a, ndim), _parts(b, ndim)
        value = func(a_primal, b_primal)
        share = a_wins(a_primal, b_primal).to(value.dtype)
        if func in (aten.fmax.default, aten.fmin.default):
            share = torch.where(b_primal.isnan(), 1, share)
        else:
            share = torch.where(a_primal == b_primal, 0.5, share)
        return _chained(value, (a_tangents, lambda: share), (b_tangents, lambda: 1 - share))

    return choose


rule("maximum", "fmax")(_choice(torch.gt))
rule("minimum")(_choice(torch.lt))
rule("fmin")(_choice(torch.le))


@rule("atan2")
def _angle(func: Operator, a: Any, b: Any) -> DualTensor:
    ndim = _dims(a, b)
    (y, dy), (x, dx) = _parts(a, ndim), _parts(b, ndim)
    square = x.square() + y.square()
    return _chained(torch.atan2(y, x), (dy, lambda: x / square), (dx, lambda: -(y / square)))


@rule("lerp.Scalar", "lerp.Tensor")
def _lerp(func: Operator, start: Any, end: Any, weight: Any) -> Any:
    return start + weight * (end - start)


@rule("addcmul", "addcdiv")
def _add_combined(func: Operator, x: Any, a: Any, b: Any, *, value: float = 1) -> Any:
    combined = a * b if func is aten.addcmul.default else a / b
    return x + value * combined


@rule("glu")
def _glu(func: Operator, x: DualTensor, dim: int = -1) -> Any:
    first, second = x.chunk(2, dim)
    return first * second.sigmoid()
