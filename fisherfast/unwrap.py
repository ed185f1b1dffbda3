"""The module inside a wrapper: what compiles it, spreads it over processes, or averages it."""

from __future__ import annotations

from torch import nn

__all__ = ["unwrapped"]

WRAPPED_AS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "DataParallel": "module",
}
"""Attribute of the module inside, by the name of the wrapper's class. An `AveragedModel` has
weights of its own and is measured as it is."""


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
