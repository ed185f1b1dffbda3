"""Report every activation of a forward pass: the outputs of modules and of functional activations,
for which modules have no hooks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisherfast.data.inputs import Samples, call, joined
from fisherfast.model.default_device import outside
from fisherfast.model.sites import INPUT, JOINT, OUTPUT, Site
from fisherfast.model.unwrap import is_shell, name_inside

NAMES = """
relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish softplus softsign sigmoid logsigmoid
tanh hardtanh hardswish hardsigmoid hardshrink softshrink tanhshrink threshold softmax log_softmax
softmin glu
"""
ACTIVATIONS = frozenset(NAMES.split())
"""Functions and methods that are reported when a forward method calls them itself."""

Consumer = Callable[[str, str, nn.Module | None, Tensor], Tensor | None]
"""Called with event name, kind, module and output; a returned tensor replaces the output."""


class Forward(TorchFunctionMode):
    """Run a model and report every activation.

    Use it as a context manager, which adds and removes the hooks, and call `run` for each batch.

    Args:
        model: any module.
        consume: gets each event as it happens.
        sites: from `survey`. The heads of a joint "output" are reported side by side, at the end.
    """

    def __init__(self, model: nn.Module, consume: Consumer, sites: Sequence[Site] = ()) -> None:
        super().__init__()
        self._model = model
        self._consume = consume
        self._heads = [head for site in sites for head in site.heads]
        self._names = {
            id(module): _event_name(name_inside(name)) for name, module in model.named_modules()
        }
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._calls: dict[str, int] = {}
        self._stack: list[nn.Module] = []
        self._last = INPUT
        self._samples = 0
        self._busy = False

    def __enter__(self) -> Forward:
        try:
            for module in self._model.modules():
                if is_shell(module):
                    continue
                # the functions of the class: a scripted module hides its own, and takes hooks
                before = nn.Module.register_forward_pre_hook(module, self._enter_module)
                self._handles.append(before)
                after = nn.Module.register_forward_hook(module, self._leave_module)
                self._handles.append(after)
        except BaseException:
            self._remove_hooks()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._remove_hooks()

    def run(self, batch: Samples) -> Any:
        """Run the model on a batch [n, ...], report all events, and return the model's output. The
        floating entries of several inputs are reported side by side as "input"."""
        self._calls = {}
        self._stack = []
        self._last = INPUT
        self._samples = len(batch)
        self._report(INPUT, INPUT, None, joined(batch))
        super().__enter__()
        try:
            with outside():
                output = call(self._model, batch)
                self._join(output)
                return output
        finally:
            super().__exit__(None, None, None)

    def _join(self, output: Any) -> None:
        """Report the heads as one "output" [n, sum of d] in the widest of their dtypes."""
        found: dict[str, Tensor] = {}
        if self._heads:
            map_tensors(output, lambda place, head: found.setdefault(OUTPUT + place, head))
        heads = [found[name] for name in self._heads if self._readable(found.get(name))]
        rows = [head.flatten(1) if head.ndim > 1 else head[:, None] for head in heads]
        if rows:  # a missing head changes the width; with none left the layer counts as skipped
            self._report(OUTPUT, JOINT, None, torch.cat(rows, 1))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._busy or not isinstance(result, Tensor):
            return result
        kind = getattr(func, "__name__", "").rstrip("_")
        if kind not in ACTIVATIONS or self._inside_layer():
            return result
        return self._report(self._count(f"{self._last}/{kind}"), kind, None, result)

    def _inside_layer(self) -> bool:
        """Return whether the innermost running module is a torch layer, whose hook reports its
        output."""
        if not self._stack:
            return False
        module = self._stack[-1]
        ready_made = type(module).__module__.startswith("torch.nn")
        is_container = any(True for _ in module.children()) and not isinstance(
            module, nn.MultiheadAttention
        )
        return ready_made and not is_container

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._stack.append(module)

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._stack:
            self._stack.pop()
        name = self._count(self._names.get(id(module), type(module).__name__))
        kind = type(module).__name__
        output = map_tensors(
            output, lambda suffix, tensor: self._report(name + suffix, kind, module, tensor)
        )
        self._last = name
        return output

    def _report(self, name: str, kind: str, module: nn.Module | None, output: Tensor) -> Tensor:
        """Pass an activation [n, ...] of floating dtype to the consumer."""
        if self._busy or not self._readable(output):
            return output
        self._busy = True
        try:
            replacement = self._consume(name, kind, module, output)
        finally:
            self._busy = False
        return output if replacement is None else replacement

    def _readable(self, output: Tensor | None) -> bool:
        """Return whether the output is a floating tensor with one row per sample."""
        if output is None or output.ndim == 0 or len(output) != self._samples:
            return False
        return output.is_floating_point()

    def _count(self, name: str) -> str:
        self._calls[name] = calls = self._calls.get(name, 0) + 1
        return name if calls == 1 else f"{name}#{calls}"

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _event_name(module_name: str) -> str:
    """Name an event: the root is "output", and a submodule named "output" is "self.output"."""
    if not module_name:
        return OUTPUT
    return f"self.{module_name}" if module_name in (INPUT, OUTPUT) else module_name


def map_tensors(output: Any, change: Callable[[str, Tensor], Tensor], place: str = "") -> Any:
    """Apply change(place, tensor) to the tensors of a nested output; places are "[0]", "[mean]",
    "[logits]" for an attribute.

    Unchanged parts are returned as they are, including objects of the user's own classes; changed
    ones are copies of the same class.
    """
    if isinstance(output, Tensor):
        return change(place, output)
    if isinstance(output, Mapping):
        parts: dict[Any, Any] = dict(output)
    elif isinstance(output, list | tuple):
        parts = dict(enumerate(output))
    else:
        parts = _attributes(output)
    changed = {k: map_tensors(v, change, f"{place}[{k}]") for k, v in parts.items()}
    if all(changed[key] is value for key, value in parts.items()):
        return output
    if isinstance(output, list | tuple):
        entries = changed.values()
        return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)
    copied = copy.copy(output)
    for key, value in changed.items():
        if isinstance(output, Mapping):
            copied[key] = value
        else:
            object.__setattr__(copied, key, value)
    return copied


def only_output(output: Any, samples: int) -> Any:
    """Return the one floating tensor [n, ...] in an output, such as its logits; the output itself
    if there are none or several."""
    found: dict[int, Tensor] = {}

    def look(place: str, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.ndim and len(tensor) == samples:
            found[id(tensor)] = tensor
        return tensor

    map_tensors(output, look)
    return next(iter(found.values())) if len(found) == 1 else output


def _attributes(output: Any) -> dict[str, Any]:
    """Return the attributes of an object that hold tensors, alone or in containers; none unless one
    is a tensor itself: caches and modules are no outputs."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        found = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    else:
        found = dict(getattr(output, "__dict__", None) or {})
    alone = any(isinstance(value, Tensor) for value in found.values())
    if isinstance(output, nn.Module | type) or not alone:
        return {}
    return {k: v for k, v in found.items() if isinstance(v, Tensor | Mapping | list | tuple)}
