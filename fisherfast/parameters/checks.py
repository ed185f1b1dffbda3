"""Checks before a network is measured: arguments, its mode, its buffers."""

from __future__ import annotations

import contextlib
import inspect
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast.model.default_device import on_host
from fisherfast.model.isolation import forgetting, own_random_state

DROPOUT = (nn.modules.dropout._DropoutNd, nn.RReLU)


def check_choice(name: str, value: Any, choices: Mapping[str, Any] | tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: Any) -> None:
    """Raise TypeError unless the value is a real number, or a tensor of one."""
    if isinstance(value, Tensor):
        real = value.numel() == 1 and not value.is_complex()
    else:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real:
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_damping(damping: float) -> None:
    """Raise unless damping is a finite number of at least 0."""
    check_number("damping", damping)
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be finite and at least 0, got {damping}")


def check_fits(what: str, needed: int, budget: float, advice: str) -> None:
    """Raise MemoryError unless the bytes needed are within the budget."""
    if needed > budget:
        raise MemoryError(
            f"{what} must fit into memory_budget = {budget} bytes, got {needed}: {advice}"
        )


def check_options(function: Callable[..., Any], given: Mapping[str, Any], structure: str) -> None:
    """Raise TypeError for a keyword that a structure does not take."""
    taken = inspect.signature(function).parameters.values()
    known = [option.name for option in taken if option.kind is option.KEYWORD_ONLY]
    for name in given:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none of its own"
            raise TypeError(
                f"settings must be those of structure {structure!r}, which {takes}, got {name!r}"
            )


def check_evaluation(model: nn.Module) -> None:
    """Refuse layers that mix the samples of a batch or draw random numbers, before they run.

    Raises:
        ValueError: batch norm that uses the statistics of its batch, active dropout.
    """
    for name, module in model.named_modules():
        what = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training:
                raise ValueError(
                    f"model must be in evaluation mode, got {what} {name!r} in training mode, where"
                    " every sample depends on its batch: call model.eval()"
                )
            if module.running_mean is None:
                raise ValueError(
                    f"model must treat every sample by itself, got {what} {name!r} without running"
                    " statistics, where every sample depends on its batch"
                )
        elif isinstance(module, DROPOUT) and module.training and getattr(module, "p", 1) > 0:
            raise ValueError(
                f"model must be in evaluation mode, got {what} {name!r} in training mode, which"
                " draws random numbers: call model.eval()"
            )


@contextlib.contextmanager
def untouched(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Restore random states and the attributes that a forward pass writes to modules; inside, new
    tensors are on the CPU, whatever the user's default device."""
    with on_host(), own_random_state(model, seed), forgetting(model):
        yield


@contextlib.contextmanager
def forward_alone(model: nn.Module) -> Iterator[None]:
    """Around the first forward pass: restore buffers that it changes, and raise an error.

    Raises:
        ValueError: a buffer changed.
    """
    before = {name: value.detach().clone() for name, value in model.named_buffers()}
    try:
        with untouched(model):
            yield
    finally:
        changed = []
        for name, value in model.named_buffers():
            if name in before and not torch.allclose(value, before[name], 0, 0, equal_nan=True):
                changed.append(name)
                with torch.no_grad():
                    value.copy_(before[name])
    if changed:
        raise ValueError(
            f"model must leave its buffers as they are in a forward pass, got {changed[0]!r}"
            " changed: call model.eval()"
        )
