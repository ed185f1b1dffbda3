"""Restore a network after use: its mode, buffers and caches, and the random states."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fisherfast.model.unwrap import as_written

_ONE_AT_A_TIME = threading.RLock()
"""Modes, buffers and global random states are saved and restored, so by one thread at a time."""


@contextlib.contextmanager
def own_random_state(model: nn.Module | None, seed: int) -> Iterator[None]:
    """Seed all random numbers inside the block, and restore the states of torch, numpy and Python.

    One thread at a time may be inside; others wait.
    """
    with _ONE_AT_A_TIME:
        numpy_state, python_state = np.random.get_state(), random.getstate()
        devices = {torch.cuda.current_device()} if torch.cuda.is_initialized() else set()
        if model is not None:
            devices |= {p.device.index for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=sorted(devices)):
            try:
                torch.manual_seed(seed)
                yield
            finally:
                np.random.set_state(numpy_state)
                random.setstate(python_state)


@contextlib.contextmanager
def _own_state(model: nn.Module) -> Iterator[None]:
    """Restore buffers and tensors that a forward pass leaves in a module."""
    values = [
        (buffer, buffer._version, buffer.clone())
        for buffer in model.buffers()
        if not is_lazy(buffer) and not buffer.is_inference()
    ]
    try:
        with forgetting(model):
            yield
    finally:
        for buffer, version, value in values:
            if buffer._version != version:
                buffer.copy_(value)


@contextlib.contextmanager
def forgetting(model: nn.Module, kind: type = Tensor) -> Iterator[None]:
    """Restore attributes of modules that a forward pass sets (a state, a cache), if they hold
    tensors of a kind."""
    places = [place for module in model.modules() for place in (vars(module), module._buffers)]
    kept = [(place, dict(place)) for place in places]
    try:
        yield
    finally:
        for place, before in kept:
            for name, value in list(place.items()):
                if value is not before.get(name) and holds(value, kind):
                    if name in before:
                        place[name] = before[name]
                    else:
                        del place[name]


def holds(value: Any, kind: type) -> bool:
    """Return whether nested containers hold an object of a kind."""
    if isinstance(value, dict):
        return any(holds(item, kind) for item in value.values())
    if isinstance(value, list | tuple):
        return any(holds(item, kind) for item in value)
    return isinstance(value, kind)


@contextlib.contextmanager
def evaluation(model: nn.Module, seed: int) -> Iterator[None]:
    """Set eval mode without gradients, and restore the mode and buffers of every module and all
    random states. Compiled modules and functions run uncompiled.

    A model that draws random numbers in eval mode draws the same ones for the same seed.
    """
    with (
        own_random_state(model, seed),
        as_written(),
        torch.inference_mode(False),  # its tensors do not count in-place changes
        torch.no_grad(),
        _own_state(model),
    ):
        modes = [(module, module.training) for module in model.modules()]
        fast_path = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # it hides the layers inside from hooks
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
            torch.backends.mha.set_fastpath_enabled(fast_path)
