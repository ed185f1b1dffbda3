"""`Observer` records activations of training batches, with hooks that stay for one batch, and
passes them to the regressions of `regression.py`.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fisherfast._fields import Count, inside, read_fields
from fisherfast.data.inputs import Inputs, floating, joined
from fisherfast.model.graph import PASSIVE
from fisherfast.model.hooks import only_output
from fisherfast.model.sites import INPUT, OUTPUT
from fisherfast.training.regression import LiveEstimate, RegressionMoments, ThetaBatch

WIDEST = 256
"""Width of the widest layer that is observed: for wider ones the cost exceeds the benefit."""

PARAMETRIZED = "parametrizations"
"""Name of the child that computes the weights of a module in `torch.nn.utils.parametrize`."""

_STATE = {
    "calls": Count,
    "read": Count,
    "measured": Count,
    "listening": bool,
    "moments": dict[str, object],
}

Caught = tuple[torch.Tensor, int]
"""An activation, and its count of in-place changes when it was recorded."""


class Hook:
    """A hook whose copies do nothing, because a network may be copied or pickled while observed.

    A copy is a function of the standard library that accepts anything and returns None, so that a
    file of such a network loads without this library. Hooks are excluded from compilation.
    """

    def __init__(self, react: Callable[..., None]) -> None:
        self._react = react

    def __call__(self, *given: Any) -> None:
        if not torch.compiler.is_compiling():
            self._react(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class Observer:
    """Read activations of one training batch in `every`, with hooks that stay for that batch.

    Args:
        model: in training; hooks are removed after each batch that is read.
        parameters: P.
        every: number of batches per batch that is read.
        modules: names and modules to read, in addition to the output.

    Attributes:
        moments: by name of the layer.
    """

    def __init__(
        self, model: nn.Module, parameters: int, *, every: int, modules: Mapping[str, nn.Module]
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._every = every
        self._modules = modules
        self._handles: list[torch.utils.hooks.RemovableHandle | _AroundCompiled] = []
        self._caught: dict[str, Caught] = {}
        self._sizes: list[int] = []  # batch sizes of the recorded input and output
        self._calls = 0
        self._read = 0  # call in which a batch was read last
        self._measured = 0  # call before the last measurement
        self.moments: dict[str, RegressionMoments] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, without recorded activations, which are part of
        a graph, and without hooks, whose copies do nothing."""
        return vars(self) | {
            "_handles": [],
            "_caught": {},
            "_sizes": [],
            "listening": bool(self._handles),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, which observes its own network if the original did."""
        listening = state.pop("listening")
        vars(self).update(state)
        if listening:
            self._listen()

    def observe(self, theta: torch.Tensor) -> None:
        """Add the last batch of the model if it is one of those to read.

        Args:
            theta: [n] or [n, P] of the samples.

        Raises:
            TypeError: theta does not hold real numbers.
        """
        self._calls += 1
        if self._handles:
            try:
                with torch.no_grad():
                    if self._take(theta):
                        self._read = self._calls
            finally:
                self.release()
        if (self._calls - 1) % self._every == 0:
            self._listen()

    def release(self) -> None:
        """Remove the hooks and drop the recorded activations."""
        while self._handles:
            self._handles.pop().remove()
        self._caught, self._sizes = {}, []

    def estimates(self) -> dict[str, LiveEstimate]:
        """Return J of each layer with enough samples."""
        found = {name: moments.estimate() for name, moments in self.moments.items()}
        age = self._calls - self._read
        return {name: replace(live, age=age) for name, live in found.items() if live is not None}

    def note(self) -> list[str]:
        """Make a note if an epoch is shorter than `every` batches; call it at each measurement."""
        batches, self._measured = self._calls - self._measured, self._calls
        if not 0 < batches < self._every:
            return []
        return [
            f"live may be older than its epoch: observe_every must be at most the {batches} batches"
            f" between two measurements, got {self._every}; pass observe_every={batches}"
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain numbers, without a batch that is being observed."""
        moments = {name: m.state_dict() for name, m in self.moments.items()}
        counts = {"calls": self._calls, "read": self._read, "measured": self._measured}
        return counts | {"listening": bool(self._handles), "moments": moments}

    def load_state_dict(self, state: Any) -> None:
        """Load the result of `state_dict`, and observe the next batch if that was so.

        Raises:
            ValueError: the state is damaged; nothing is changed.
        """
        values = read_fields(_STATE, state, "observer")
        moments = {}
        for name, sums in values["moments"].items():
            with inside(f"observer.moments[{name!r}]"):
                moments[name] = RegressionMoments.from_state_dict(sums, self._parameters)
        self.release()
        self._calls, self.moments = values["calls"], moments
        self._read, self._measured = values["read"], values["measured"]
        if values["listening"]:
            self._listen()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Remove the hooks inside the block, and put them back if there were any."""
        listening = bool(self._handles)
        self.release()
        try:
            yield
        finally:
            if listening:
                self._listen()

    def _listen(self) -> None:
        catch_input, catch_output = Hook(self._catch_input), Hook(self._catch_output)
        if self._model._compiled_call_impl is not None:  # by `model.compile()`
            self._handles.append(_AroundCompiled(self._model, catch_input, catch_output))
            return
        self._handles.append(self._model.register_forward_pre_hook(catch_input, with_kwargs=True))
        self._handles.append(self._model.register_forward_hook(catch_output))
        for name, module in self._modules.items():
            hook = Hook(lambda _, args, output, name=name: self._keep(name, output))
            self._handles.append(module.register_forward_hook(hook))

    def _trains(self) -> bool:
        """Return whether this forward pass is training: neither a validation nor a measurement."""
        return self._model.training or torch.is_grad_enabled()

    def _catch_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._trains():
            self._caught, self._sizes = {}, []  # only the last pass is used
            self._keep(INPUT, _input_of(args, kwargs))

    def _catch_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._sizes and not isinstance(output, torch.Tensor):
            output = only_output(output, self._sizes[0])
        # the same tensor as the last layer's: one of them is enough
        same = [name for name, (tensor, _) in self._caught.items() if tensor is output]
        for name in same:
            del self._caught[name]
        self._keep(OUTPUT, output)

    def _keep(self, name: str, output: Any) -> None:
        """Keep a reference; the backward pass keeps the activations in memory anyway."""
        if not (self._trains() and isinstance(output, torch.Tensor) and output.ndim):
            return
        if name in (INPUT, OUTPUT):
            self._sizes.append(len(output))
        floating = output.is_floating_point() and name not in self._caught
        if floating and output[:1].numel() <= WIDEST:
            version = -1 if output.is_inference() else output._version
            self._caught[name] = (output, version)

    def _take(self, theta: torch.Tensor) -> bool:
        """Add the recorded activations, and return whether there were any to add."""
        caught = {name: tensor for name, tensor in self._caught.items() if self._intact(tensor)}
        if not caught:
            return False
        rows = self._theta(theta, self._sizes or [len(output) for output, _ in caught.values()])
        if len(rows) < 2:
            return False
        batch = ThetaBatch(rows)
        if not batch.usable:
            return False
        for name, (output, _) in caught.items():
            flat = output.detach().flatten(1) if output.ndim > 1 else output.detach()[:, None]
            if len(flat) != len(rows):
                continue
            moments = self.moments.get(name)
            if moments is None:
                moments = RegressionMoments(flat.shape[1], self._parameters, device=flat.device)
                self.moments[name] = moments
            if flat.shape[1] == moments.dim:  # sequences may differ in length
                with torch.autocast(flat.device.type, enabled=False):
                    moments.update(batch.to(flat.device), flat)
        return True

    def _intact(self, caught: Caught) -> bool:
        """Return whether no in-place activation has overwritten the tensor since."""
        output, version = caught
        return version == -1 or version == output._version

    def _theta(self, theta: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Return theta as [n, P] float64 on the CPU; n must be one of the sizes, because the batch
        need not be the first dimension."""
        try:
            rows = torch.as_tensor(theta, device=getattr(theta, "device", "cpu")).detach()
        except (TypeError, ValueError, RuntimeError):
            rows = torch.empty(0, dtype=torch.complex64, device="cpu")
        if rows.is_complex():
            raise TypeError(f"theta must be a tensor of real numbers, got {reprlib.repr(theta)}")
        flat = rows.flatten(1) if rows.ndim > 1 else rows.reshape(-1, 1)
        if len(flat) not in sizes or flat.shape[1] != self._parameters:
            raise ValueError(
                f"theta must have shape [n, P] = [{sizes[0]}, {self._parameters}], one row per"
                f" sample of the last forward pass, got {list(rows.shape)}"
            )
        return flat.to("cpu", torch.float64)


class _AroundCompiled:
    """Hooks around a module that compiles its own call together with its hooks. Those of several
    observers are nested, and may be removed in any order."""

    def __init__(self, module: nn.Module, catch_input: Hook, catch_output: Hook) -> None:
        self._module = module
        self._inner: Any = module._compiled_call_impl
        self._catch_input, self._catch_output = catch_input, catch_output
        self._removed = False
        module._compiled_call_impl = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._removed:
            return self._inner(*args, **kwargs)
        self._catch_input(self._module, args, kwargs)
        output = self._inner(*args, **kwargs)
        self._catch_output(self._module, args, output)
        return output

    def remove(self) -> None:
        """Restore the compiled call once no other hooks are around it."""
        self._removed = True
        call: Any = self._module._compiled_call_impl
        while isinstance(call, _AroundCompiled) and call._removed:
            call = call._inner
        self._module._compiled_call_impl = call


def _input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the one input of a model; of several with as many rows the floating ones side by side
    if they are narrow enough to be read, else the first."""
    given = dict(enumerate(args)) | dict(kwargs)
    found = {k: v for k, v in given.items() if isinstance(v, torch.Tensor) and v.ndim}
    if not found:
        return None
    inputs = Inputs(found, named=True)
    parts, apart = floating(inputs), len({len(entry) for entry in found.values()}) > 1
    if apart or not parts or sum(part[:1].numel() for part in parts) > WIDEST:
        first: torch.Tensor = inputs.samples[0]
        return first
    with torch.no_grad():
        return joined(inputs)


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Return modules without children by name, except passive ones, those inside compiled modules,
    and those that compute weights."""
    compiled = [  # in place, by their method `compile`, which adds no wrapper
        f"{name}." for name, module in model.named_modules() if module._compiled_call_impl
    ]
    found = {}
    for name, module in model.named_modules():
        inside = {"_orig_mod", PARAMETRIZED} & set(name.split("."))
        inside |= {prefix for prefix in compiled if f"{name}.".startswith(prefix)}
        branches = any(child != PARAMETRIZED for child, _ in module.named_children())
        if name and not (inside or branches or isinstance(module, PASSIVE)):
            found[f"self.{name}" if name in (INPUT, OUTPUT) else name] = module
    return found
