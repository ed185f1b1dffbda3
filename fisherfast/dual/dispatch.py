"""Choose how an operation is differentiated: by its rule, by none, or by PyTorch's forward mode.

`RULES` maps an operator of ATen to a function (operator, *arguments) -> result. Rule modules fill
it with `rule`. Operations without a rule go to `fallback.forward_mode`, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._mode_utils import no_dispatch

from fisherfast.dual import memory
from fisherfast.dual.coverage import Coverage
from fisherfast.dual.errors import DerivativeError, current_layer, no_derivative, warn_of_randomness
from fisherfast.dual.fallback import forward_mode, replaced
from fisherfast.dual.stacks import aligned
from fisherfast.dual.tensor import DualTensor, is_differentiable

aten: Any = torch.ops.aten

Operator = OpOverload
Rule = Callable[..., Any]

RULES: dict[Operator, Rule] = {}

MISSING: set[str] = set()
"""Names of operators that rules exist for but this version of PyTorch does not have."""

RECORD: ContextVar[Coverage | None] = ContextVar("fisherfast_dual_record", default=None)
"""Counts every operation; with one, an operation that fails has zero tangents."""


def overload(name: str, variant: str = "default") -> Operator | None:
    """Return aten.<name>.<variant>, or None if this version of PyTorch does not have it."""
    return getattr(getattr(aten, name, None), variant, None)


def overloads(*names: str) -> list[Operator]:
    """Return operators by name, "relu" or "sum.dim_IntList", without those in `MISSING`."""
    found = {name: overload(*name.split(".")) for name in names}
    MISSING.update(name for name, operator in found.items() if operator is None)
    return [operator for operator in found.values() if operator is not None]


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, named as for `overloads`."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(overloads(*names), function))
        return function

    return register


def dispatch(func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute one operation on dual tensors (and others)."""
    try:
        return _derived(func, args, kwargs)
    except DerivativeError:
        if RECORD.get() is None:
            raise
    _count(func, "failed")
    result = func(*primals(args), **primals(kwargs))
    if func._schema.is_mutable:
        return kwargs.get("out", args[0])
    return with_zero_tangents(result, args, kwargs)


def _derived(func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute one operation and its derivative."""
    memory.trim()
    served = RULES.get(func)
    mutable = func._schema.is_mutable
    if mutable:
        _check_target(func, args, kwargs)
    elif not func.is_view and any(d.memory.constant for d in duals_of(args, kwargs)):
        plain_args, plain_kwargs = without_constants(args), without_constants(kwargs)
        if not has_dual(plain_args, plain_kwargs):
            warn_of_randomness(func, args, kwargs)
            result = plain(func, plain_args, plain_kwargs)
            return with_zero_tangents(result, args) if func in COPIES else result
        args, kwargs = plain_args, plain_kwargs
    if served is None and mutable:
        served = _in_place(func)
    if served is not None:
        result = served(func, *args, **kwargs)
        if result is not NotImplemented:
            _count(func, "rule")
            return result
    if func._can_decompose():
        return func.decompose(*args, **kwargs)
    warn_of_randomness(func, args, kwargs)
    result = forward_mode(func, args, kwargs)
    _count(func, "fallback")
    return result


def plain(func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute an operation on plain tensors.

    Inside a dispatched operation PyTorch ignores the mark of complex tensors that are conjugated
    when they are read, which an operation made of others may set: here it counts.
    """
    if not any(isinstance(item, Tensor) and item.is_complex() for item in args):
        return func(*args, **kwargs)
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.Conjugate)
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        return func(*args, **kwargs)


def _count(func: Operator, how: str) -> None:
    record = RECORD.get()
    if record is not None and func not in BOOKKEEPING:
        record.add(str(func).removeprefix("aten."), how, current_layer())


def _check_target(func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if a dual tensor would be written into a plain tensor, which cannot hold tangents."""
    target = kwargs.get("out", args[0] if args else None)
    if isinstance(target, Tensor) and not isinstance(target, DualTensor):
        raise no_derivative(
            str(func),
            "a write of values that depend on theta into a tensor that the forward pass did not"
            " create: write into tensor.clone() or x.new_zeros(...)",
        )


RENAMED = {"transpose_": "int"}
"""In-place operations whose out-of-place overload has another name."""


def _in_place(func: Operator) -> Rule | None:
    """Make the rule of an in-place operation from the rule of its out-of-place version."""
    name = func._schema.name.removeprefix("aten::")
    if func._schema.arguments[-1].is_out:
        return _into(name)
    if not name.endswith("_") or name.endswith("__"):
        return None
    functional = overload(name[:-1], RENAMED.get(name, func._overloadname))
    if functional is None:
        return None
    if torch.Tag.inplace_view in func.tags:
        return _reshaped_in_place(functional)

    def write(_: Operator, target: DualTensor, *args: Any, **kwargs: Any) -> Any:
        served = RULES.get(functional)
        result = NotImplemented if served is None else served(functional, target, *args, **kwargs)
        return result if result is NotImplemented else overwrite(target, result)

    return write


def _reshaped_in_place(functional: Operator) -> Rule | None:
    """Make the rule of `squeeze_`, `transpose_` and the like: take another view of the stack and
    update the shape of the wrapper."""
    if functional not in RULES:
        return None

    def reshape(func: Operator, target: DualTensor, *args: Any, **kwargs: Any) -> DualTensor:
        stack = RULES[functional](functional, target, *args, **kwargs).stack
        with no_dispatch():
            func(target, *args, **kwargs)
        target.settle(stack)
        return target

    return reshape


def _into(name: str) -> Rule | None:
    """Make the rule of an operation that writes its result into `out`."""
    function = getattr(torch, name, None)
    if function is None:
        return None

    def write(_: Operator, *args: Any, out: Any, **kwargs: Any) -> Any:
        if not isinstance(out, DualTensor):
            return NotImplemented
        return overwrite(out, function(*args, **kwargs))

    return write


def overwrite(target: DualTensor, source: Any) -> DualTensor:
    """Write a tensor or number into a dual tensor and its views."""
    stack = target.before_writing()
    if isinstance(source, DualTensor):
        stack.copy_(aligned(source, target.dim()))
        return target
    if isinstance(source, Tensor):
        stack[0].copy_(source)
    else:
        stack[0].fill_(source)
    stack[1:].zero_()
    return target


def duals_of(*containers: Any) -> Iterator[DualTensor]:
    """Yield all dual tensors in nested arguments."""
    for item in containers:
        if isinstance(item, DualTensor):
            yield item
        elif isinstance(item, list | tuple):
            yield from duals_of(*item)
        elif isinstance(item, dict):
            yield from duals_of(*item.values())


def directions_of(*containers: Any) -> int:
    """Return P of the first dual tensor in nested arguments."""
    return next(duals_of(*containers)).directions


def has_dual(*containers: Any) -> bool:
    """Return whether nested arguments contain a dual tensor."""
    return any(True for _ in duals_of(*containers))


def primals(container: Any) -> Any:
    """Replace every dual tensor in nested arguments by its primal."""
    return replaced(container, lambda dual: dual.primal)


def without_constants(container: Any) -> Any:
    """Replace dual tensors whose tangents are known to be zero by their primals, in nested
    arguments."""
    return replaced(container, lambda dual: dual.primal if dual.memory.constant else dual)


@cache
def _behind_first(func: Operator) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the arguments of an operator after the first, and the defaults of some."""
    arguments = func._schema.arguments[1:]
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return tuple(a.name for a in arguments), defaults


def named_arguments(
    func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments after the first by name, including defaults."""
    names, defaults = _behind_first(func)
    return defaults | dict(zip(names, args, strict=False)) | kwargs


def with_zero_tangents(result: Any, *arguments: Any) -> Any:
    """Turn the real and complex tensors of a plain result into dual tensors with zero tangents."""
    if isinstance(result, list | tuple):
        return type(result)(with_zero_tangents(item, *arguments) for item in result)
    if is_differentiable(result):
        return DualTensor.constant(result, directions_of(*arguments))
    return result


COPIES = frozenset(overloads("clone", "_to_copy"))
"""Operations whose results a model may write into, also those of constants."""

BOOKKEEPING = frozenset(overloads("detach", "alias", "is_same_size"))
"""Operations that compute nothing: `coverage` does not count them."""


DualTensor.apply_rule = staticmethod(dispatch)
