"""The default device is the user's: statistics are made on devices of their own choice.

After ``torch.set_default_device("cuda")`` every tensor made without a device is one of that device,
and every random number is asked of its generators. A measurement therefore runs with the CPU as the
default, and goes back to the user's where it runs what the user wrote: the network and the source
of the samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TypeVar

import torch

__all__ = ["each_as_outside", "on_host", "outside"]

T = TypeVar("T")

_OUTSIDE: ContextVar[torch.device | None] = ContextVar("outside", default=None)
"""The user's default device inside `on_host`; None where that is the CPU too."""


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """The CPU is the default device inside. Free where it is anyway."""
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


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """The default device is the user's inside, within `on_host`."""
    theirs = _OUTSIDE.get()
    if theirs is None:
        yield
        return
    with theirs:
        yield


def each_as_outside(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made with the user's default device."""
    while True:
        with outside():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
