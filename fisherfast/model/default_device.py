"""Keep the user's default device out of the library's own computations.

After ``torch.set_default_device("cuda")`` every tensor created without a device is on that device,
and random numbers come from its generators. A measurement therefore runs with the CPU as the
default, and restores the user's default to run the user's code: the network and the source of the
samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_OUTSIDE: ContextVar[torch.device | None] = ContextVar("outside", default=None)
"""The user's default device inside `on_host`; None if that is the CPU too."""


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """Make the CPU the default device inside the block. Costs nothing if it already is."""
    theirs = torch.get_default_device()
    if theirs.type == "cpu":
        yield
        return
    token = _OUTSIDE.set(theirs)
    try:
        with torch.device("cpu"):
            yield
    finally:
        _OUTSIDE.reset(token)


def outside() -> contextlib.AbstractContextManager[Any]:
    """Restore the user's default device inside the block, within `on_host`."""
    return _OUTSIDE.get() or contextlib.nullcontext()


def each_as_outside(items: Iterator[T]) -> Iterator[T]:
    """Yield the items, each created with the user's default device."""
    while True:
        with outside():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
