"""Find the module inside a wrapper that compiles it, distributes it, or averages it."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from torch import nn

WRAPPED_AS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}
"""Attribute that holds the module inside, by the name of the wrapper's class. An `AveragedModel`
has its own weights and is measured as it is; a `FullyShardedDataParallel` gathers its parameters in
its own forward pass, which all processes must run."""

SHELLS = ("_orig_mod", "_fsdp_wrapped_module")
"""Attribute that holds the module inside, for wrappers that may be anywhere in a model."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module without its wrappers.

    It shares its parameters with the wrapper, so the trained network is measured, and its names
    have no wrapper prefix. A compiled model is not compiled again when hooks change, and no process
    waits for another.
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


def check_model(model: Any) -> None:
    """Raise TypeError unless a model is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def is_shell(module: nn.Module) -> bool:
    """Return whether a module, anywhere in a model, only wraps another one."""
    return any(name in module._modules for name in SHELLS)


def name_inside(name: str) -> str:
    """Remove the names of wrappers from the name of a module."""
    return ".".join(part for part in name.split(".") if part not in SHELLS)


def as_written() -> contextlib.AbstractContextManager[Any]:
    """Run compiled modules and functions uncompiled inside the block, also those inside a model.

    Otherwise they would be compiled again at each change of hooks and modes.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet, and its import takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
