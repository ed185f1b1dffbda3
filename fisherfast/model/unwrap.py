"""The module inside a wrapper: what compiles it, spreads it over processes, or averages it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["as_written", "is_shell", "name_inside", "unwrapped"]

WRAPPED_AS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}
"""Attribute of the module inside, by the name of the wrapper's class. An `AveragedModel` has
weights of its own and is measured as it is; a `FullyShardedDataParallel` gathers its parameters in
its own forward pass, in which all processes must take part."""

SHELLS = ("_orig_mod", "_fsdp_wrapped_module")
"""What wrappers call the module inside, where they may be anywhere in a model."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The module whose forward pass runs as it is written.

    Parameters are shared with the wrapper, so what is measured is what is trained; names are those
    without the wrapper's prefix; a compiled model is not compiled again for hooks that come and go,
    and no process waits for another.
    """
    while True:
        inside = None
        for kind in type(model).__mro__:
            name = WRAPPED_AS.get(kind.__name__)
            if name is not None and kind.__module__.startswith("torch."):
                inside = getattr(model, name, None)
                break
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def is_shell(module: nn.Module) -> bool:
    """Whether a module, anywhere in a model, only wraps another one."""
    return any(name in module._modules for name in SHELLS)


def name_inside(name: str) -> str:
    """Name of a module without those of the wrappers around it and its parents."""
    return ".".join(part for part in name.split(".") if part not in SHELLS)


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Compiled modules and functions, also those inside of a model, run as they are written.

    Otherwise hooks and modes that come and go would be compiled into them, again at each change.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet, and its import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
