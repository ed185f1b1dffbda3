"""The fallback for operations without a rule: PyTorch's forward-mode derivative of one operation.

The operation runs once per direction on PyTorch's own dual numbers, without a graph. In-place
operations run on copies, and the result is written back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fisherfast.dual.errors import no_derivative
from fisherfast.dual.tensor import DualTensor, is_differentiable

_INCLUDED = torch._C._dispatch_tls_local_include_set()
_EXCLUDED = torch._C._dispatch_tls_local_exclude_set()
"""State of PyTorch's dispatcher outside of any dispatched operation, where derivatives are on."""

Pair = tuple[Any, Tensor | None]
"""A result along one direction and its tangent."""


def forward_mode(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute an operation on dual tensors by PyTorch's forward mode.

    Raises:
        DerivativeError: PyTorch has no forward derivative of the operation either.
    """
    found: list[DualTensor] = []
    replaced((args, kwargs), found.append)
    directions, in_place = found[0].directions, func._schema.is_mutable
    runs = []
    try:
        random_state = torch.get_rng_state()
        with _autograd_alive():
            for direction in range(directions):
                torch.set_rng_state(random_state)  # the same random numbers in each direction
                pairs, structure = _along(func, args, kwargs, direction, copy=in_place)
                runs.append(pairs)
    except (NotImplementedError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise no_derivative(str(func), f"none ({reason})") from error
    real = [pair for run in runs for pair in run if is_differentiable(pair[0])]
    if real and all(tangent is None for _, tangent in real):  # PyTorch raises no error
        raise no_derivative(str(func), "none: neither PyTorch nor the operation's library has one")
    if directions == 0:
        plain_args, plain_kwargs = replaced((args, kwargs), lambda dual: dual.primal.clone())
        pairs, structure = _pairs(func(*plain_args, **plain_kwargs))
        runs.append(pairs)
    result = tree_unflatten(
        [_join(each, directions) for each in zip(*runs, strict=True)], structure
    )
    if not in_place:
        return result
    if not isinstance(args[0], DualTensor) or not isinstance(result, DualTensor):
        raise no_derivative(str(func), "none for an operation that overwrites several tensors")
    args[0].before_writing().copy_(result.stack)
    return args[0]


def _along(
    func: Any, args: Any, kwargs: Any, direction: int, *, copy: bool
) -> tuple[list[Pair], TreeSpec]:
    """Compute the operation along one direction."""

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
    with warnings.catch_warnings(), torch._C._ForceDispatchKeyGuard(_INCLUDED, _EXCLUDED):
        # PyTorch compiles some derivatives with its old TorchScript at first use, with a warning.
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _pairs(result: Any) -> tuple[list[Pair], TreeSpec]:
    """Split every tensor of a nested result into (primal, tangent or None)."""
    leaves, structure = tree_flatten(result)
    pairs = [
        tuple(forward_ad.unpack_dual(x)) if is_differentiable(x) else (x, None) for x in leaves
    ]
    return pairs, structure


def _join(pairs: Sequence[Pair], directions: int) -> Any:
    """Join (primal, tangent) along each direction into one dual tensor."""
    primal = pairs[0][0]
    if not is_differentiable(primal):
        return primal
    stack = primal.new_zeros((1 + directions, *primal.shape))
    stack[0] = primal
    for row, (_, tangent) in zip(stack[1:], pairs, strict=False):
        if tangent is not None:
            row.copy_(tangent)
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
