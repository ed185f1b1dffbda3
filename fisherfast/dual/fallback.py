"""The fallback for operations without a rule: PyTorch's forward-mode derivative of one operation.

The operation runs once per direction on PyTorch's own dual numbers, without a graph. In-place
operations run on copies, and the result is written back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fisherfast.dual.errors import no_derivative
from fisherfast.dual.tensor import DualTensor

__all__ = ["forward_mode", "replaced"]

_INCLUDED = torch._C._dispatch_tls_local_include_set()
_EXCLUDED = torch._C._dispatch_tls_local_exclude_set()
"""State of PyTorch's dispatcher outside of any dispatched operation, where derivatives are on."""


def forward_mode(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute an operation on dual tensors by PyTorch's forward mode.

    Raises:
        DerivativeError: PyTorch has no forward derivative of the operation either.
    """
    found: list[DualTensor] = []
    replaced((args, kwargs), found.append)
    in_place = func._schema.is_mutable
    try:
        with _autograd_alive(), _same_random_numbers() as rewind:
            results = []
            for direction in range(found[0].directions):
                rewind()
                results.append(_along(func, args, kwargs, direction, copy=in_place))
    except (NotImplementedError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise no_derivative(str(func), f"none ({reason})") from error
    if results and _is_real(results[0]) and not any(_has_tangent(result) for result in results):
        raise no_derivative(str(func), "none: neither PyTorch nor the operation's library has one")
    if not results:  # P = 0: the primal alone
        plain_args, plain_kwargs = replaced((args, kwargs), lambda dual: dual.primal.clone())
        results = [_pairs(func(*plain_args, **plain_kwargs))]
    joined = _join(results, found[0].directions)
    if not in_place:
        return joined
    if not isinstance(args[0], DualTensor) or not isinstance(joined, DualTensor):
        raise no_derivative(str(func), "none for an operation that overwrites several tensors")
    args[0].before_writing().copy_(joined.stack)
    return args[0]


def _along(func: Any, args: Any, kwargs: Any, direction: int, *, copy: bool) -> Any:
    """(primal, tangent) of every result along one direction."""

    def make(dual: DualTensor) -> Tensor:
        primal, tangent = dual.primal, dual.tangents[direction]
        if dual.memory.constant:
            return primal.clone()
        if copy:
            primal, tangent = primal.clone(), tangent.clone()
        return forward_ad.make_dual(primal, tangent)

    with forward_ad.dual_level():
        new_args, new_kwargs = replaced((args, kwargs), make)
        return _pairs(func(*new_args, **new_kwargs))


@contextmanager
def _autograd_alive() -> Iterator[None]:
    """Enable derivatives inside a dispatched operation, where PyTorch disables them."""
    with (
        warnings.catch_warnings(),
        torch._C._ForceDispatchKeyGuard(_INCLUDED, _EXCLUDED),
    ):
        # PyTorch compiles some derivatives with its old TorchScript at first use, with a warning.
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextmanager
def _same_random_numbers() -> Iterator[Callable[[], None]]:
    """Yield a function that resets the CPU's random state to what it is now."""
    state = torch.get_rng_state()
    yield lambda: torch.set_rng_state(state)


def _pairs(result: Any) -> Any:
    """Split results into (primal, tangent or None); values that are not dual stay."""
    if isinstance(result, list | tuple):
        return [_pairs(item) for item in result]
    if isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex()):
        unpacked = forward_ad.unpack_dual(result) if forward_ad._current_level >= 0 else None
        if unpacked is None:
            return (result, None)
        return (unpacked.primal, unpacked.tangent)
    return result


def _is_real(result: Any) -> bool:
    """Return whether any result could have a tangent."""
    if isinstance(result, list):
        return any(_is_real(item) for item in result)
    return isinstance(result, tuple)


def _has_tangent(result: Any) -> bool:
    """Return whether PyTorch gave a tangent: without a derivative it gives none, and no error."""
    if isinstance(result, list):
        return any(_has_tangent(item) for item in result)
    return isinstance(result, tuple) and result[1] is not None


def _join(results: list[Any], directions: int) -> Any:
    """Join (primal, tangent) along each direction into one dual tensor."""
    first = results[0]
    if isinstance(first, list):
        return tuple(
            _join([result[index] for result in results], directions) for index in range(len(first))
        )
    if not isinstance(first, tuple):
        return first
    primal = first[0]
    stack = primal.new_zeros((1 + directions, *primal.shape))
    stack[0] = primal
    for direction, (_, tangent) in enumerate(results[:directions]):
        if tangent is not None:
            stack[1 + direction] = tangent
    return DualTensor(stack)


def replaced(container: Any, change: Callable[[DualTensor], Any]) -> Any:
    """Apply a change to every dual tensor in nested arguments."""
    if isinstance(container, DualTensor):
        return change(container)
    if isinstance(container, list | tuple):
        return type(container)(replaced(item, change) for item in container)
    if isinstance(container, dict):
        return {key: replaced(value, change) for key, value in container.items()}
    return container
