"""What the forward pass of a network depends on, to be compared with what it was before."""

from __future__ import annotations

import enum
import types
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["settings"]

PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    enum.Enum,
    torch.device,
    torch.dtype,
    torch.layout,
    torch.memory_format,
)

DEEP = 4
"""Objects in objects that are looked into: a configuration in a configuration."""

GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def settings(model: nn.Module) -> Hashable:
    """Equal to what it was as long as nothing has changed that the network holds: its modules and
    their classes, attributes, hooks, parameters and buffers; nothing of it keeps the network alive.

    Numbers written into a tensor are seen by its version, which ``.data`` does not count: of whole
    numbers, of truth values and of single numbers, which may be switches. Weights and statistics
    move at every step of training and are left out, and so are the steps that batch norms count.

    Cost: a few microseconds for each attribute of a module, no number is read.
    """
    return tuple(_everything(model))


def _everything(model: nn.Module) -> Iterator[Hashable]:
    kinds: set[type] = set()
    for module in model.modules():
        yield (
            _Same(module),
            tuple((name, _held(module, name, value)) for name, value in vars(module).items()),
        )
        kinds.update(kind for kind in type(module).__mro__ if kind is not object)
    for kind in sorted(kinds, key=id):
        yield (
            _Same(kind),
            tuple(
                (name, _of_class(value))
                for name, value in vars(kind).items()
                if name == "__call__" or not name.startswith("__")
            ),
        )
    for name in GLOBAL_HOOKS:
        yield name, _settled(getattr(nn.modules.module, name, {}), DEEP)


def _held(module: nn.Module, name: str, value: Any) -> Hashable:
    """An attribute of a module; of batch norms without the count of their steps."""
    if name == "_buffers" and isinstance(module, nn.modules.batchnorm._NormBase):
        value = {key: held for key, held in value.items() if key != "num_batches_tracked"}
    return _settled(value, DEEP)


def _of_class(value: Any) -> Hashable:
    """What a class holds, methods by their functions."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        return tuple(_of_class(part) for part in (value.fget, value.fset))
    if isinstance(value, (*PLAIN, types.FunctionType, dict, tuple, list, Tensor)):
        return _settled(value, 1)
    return id(value)


class _Same:
    """Equal to one of the same object while that lives; the number of a dead one is given to
    others."""

    def __init__(self, value: Any) -> None:
        self._id = id(value)
        self._value = weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        here = self._value()
        return here is not None and isinstance(other, _Same) and here is other._value()

    def __hash__(self) -> int:
        return self._id


def _settled(value: Any, deep: int) -> Hashable:
    """Plain values as they are, collections and objects by what they hold, functions by themselves
    and what they have caught, tensors by their version."""
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, dict | types.MappingProxyType):
        return tuple((str(name), _settled(held, deep)) for name, held in value.items())
    if isinstance(value, tuple | list | set | frozenset):
        return tuple(_settled(held, deep) for held in value)
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, weakref.ref):
        return _settled(value(), deep)
    if isinstance(value, types.MethodType):
        return _settled(value.__func__, deep), _settled(value.__self__, deep - 1)
    if isinstance(value, types.FunctionType):
        caught = [cell for cell in value.__closure__ or () if deep > 0 and not _empty(cell)]
        return _Same(value), tuple(_settled(cell.cell_contents, deep - 1) for cell in caught)
    try:
        same = _Same(value)
    except TypeError:  # there is no telling: never the same
        return object()
    if isinstance(value, nn.Module | type) or deep <= 0 or not hasattr(value, "__dict__"):
        return same
    return same, tuple((name, _settled(held, deep - 1)) for name, held in vars(value).items())


def _empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _tensor(value: Tensor) -> Hashable:
    if value.is_inference():  # has no version
        return object()
    switch = not value.is_floating_point() or value.numel() == 1
    version = value._version if switch else None
    return _Same(value), version, value.requires_grad, value.shape, value.dtype, value.device
