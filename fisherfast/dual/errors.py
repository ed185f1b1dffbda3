"""Errors and warnings of a dual forward pass, with the operation and the layer."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import nn

from fisherfast._errors import FisherWarning

RUNNING: ContextVar[nn.Module | None] = ContextVar("fisherfast_dual_model", default=None)
"""The model that names the layers."""

REMEDY = "use FiniteDifference(..., paired=True), Score or Labelled, which need no derivative"


class DerivativeError(RuntimeError):
    """An operation of the model has no derivative; the message names it and the layer."""


@contextmanager
def setting(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Give a context variable a value inside the block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def current_layer() -> str:
    """Find the name of the innermost module whose forward runs, on the call stack: modules need no
    hooks for it."""
    frames = traceback.walk_stack(sys._getframe(1))
    return _innermost(frame for frame, _ in frames)


def failed_layer(error: BaseException) -> str:
    """Find the name of the innermost module whose forward raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _innermost(reversed(frames))


def _innermost(frames: Iterable[FrameType]) -> str:
    """Name the first module among the owners of frames, ordered from the inside."""
    model = RUNNING.get()
    names = {} if model is None else {id(m): name for name, m in model.named_modules()}
    for frame in frames:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return names.get(id(owner), "") or type(owner).__name__
    return "the model"


def no_derivative(operation: str, reason: str, layer: str | None = None) -> DerivativeError:
    """Make the error for an operation without a derivative, in the running layer by default."""
    return DerivativeError(
        f"operation {operation} in layer {(layer or current_layer())!r} must have a derivative, got"
        f" {reason}; {REMEDY}"
    )


def autograd_call(error: BaseException) -> str | None:
    """Name the function of `torch.autograd` that raised an error ("torch.autograd.grad"), or
    None."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == torch.autograd.__file__:
            return f"torch.autograd.{frame.f_code.co_name}"
    return None


SWITCHES = ("train", "training", "dropout", "dropout_p")
"""Arguments that say whether an operation draws random numbers."""


def warn_of_randomness(operation: Any, args: Any = (), kwargs: Any = None) -> None:
    """Warn about an operation that draws random numbers although the network is in eval mode."""
    if torch.Tag.nondeterministic_seeded not in operation.tags:
        return
    names = [argument.name for argument in operation._schema.arguments]
    named = dict(zip(names, args, strict=False)) | (kwargs or {})
    if any(name in names and not named.get(name) for name in SWITCHES):
        return
    warnings.warn(
        f"layer {current_layer()!r} draws random numbers ({operation}) in eval mode: its noise is"
        " treated as fixed, the same for the samples and their tangents",
        FisherWarning,
        stacklevel=2,
    )
