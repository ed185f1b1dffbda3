"""Taps after layers, the modes in which a network runs, and uses of parameters in the graph.

A tap is an identity after a layer; its backward pass reads the gradient at the layer's output.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast.model.default_device import outside
from fisherfast.model.unwrap import as_written
from fisherfast.parameters.layers.base import Rule


@dataclass(eq=False)
class Call:
    """One call of a layer in the forward pass.

    Attributes:
        rule: of the layer.
        rows: of its output; 0 where input and output have different numbers of rows.
        arrived: called with the call, x and g when the gradient passes.
        last: no other vector is sent back, so that x can be freed.
    """

    rule: Rule
    rows: int
    arrived: Callable[[Call, Tensor, Tensor], None] | None = None
    last: bool = False


def tap(
    module: nn.Module, rule: Rule, anchor: Tensor, called: Callable[[Call], None]
) -> torch.utils.hooks.RemovableHandle:
    """Tap a layer, before all hooks of the user; `called` gets each of its calls.

    Args:
        module: the layer.
        rule: its rule.
        anchor: a number that requires grad: its gradient brings a vector to all taps, and to
            nothing else.
        called: appends the call.
    """

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        x = next(iter((*args, *kwargs.values())), None)
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            return None
        if not x.dim() or not output.dim() or not torch.is_grad_enabled():
            return None
        call = Call(rule, len(output) if len(x) == len(output) else 0)
        called(call)
        return _Tap.apply(output, anchor, x.detach(), call)

    return module.register_forward_hook(hook, prepend=True, with_kwargs=True)


class _Tap(torch.autograd.Function):
    """The identity. Later layers may overwrite the output in place: layers with taps do not keep
    their output.

    It keeps x itself, outside autograd, so that checkpoints neither count nor recompute it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, x: Tensor, call: Call) -> Tensor:
        ctx.call, ctx.x, ctx.version = call, x, x._version
        return output.data

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        unchanged = ctx.x._version == ctx.version  # else the input is lost
        if ctx.call.arrived is not None and unchanged:
            ctx.call.arrived(ctx.call, ctx.x, g)
        if ctx.call.last:
            ctx.x = torch.empty(0)
            ctx.version = ctx.x._version
        return g, None, None, None


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Turn gradients on and autocast off, in any mode of the caller: F is that of the
    parameters in their own precision. cuDNN has no backward pass for recurrent layers in eval
    mode, so they run without it."""
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            modes.enter_context(torch.autocast(device, enabled=False))
        modes.enter_context(as_written())
        modes.enter_context(outside())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            modes.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def parameter_uses(outputs: Tensor) -> Counter[int]:
    """How often each parameter (by id) enters the graph of the outputs.

    Raises:
        ValueError: the graph has a checkpoint that hides its parameters.
    """
    uses: Counter[int] = Counter()
    seen, waiting = set(), [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "model must not hide parameters from autograd, got a checkpoint with"
                " use_reentrant=True; use torch.utils.checkpoint with use_reentrant=False"
            )
        for follower, _ in node.next_functions:
            variable = getattr(follower, "variable", None)
            if variable is not None:
                uses[id(variable)] += 1
            elif follower is not None:
                waiting.append(follower)
    return uses
