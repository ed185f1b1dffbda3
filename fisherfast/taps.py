"""Where activations are read: every module's output, and the functional activations that hooks
cannot see.

A *site* is one place in the forward pass: the output of a module ("fc1", "fc1#2" on its second
call, "lstm[0]" inside a tuple), of a functional activation ("fc1/relu": `F.relu` after fc1), or
"input" and "output". A model that returns a tuple, a list or a dict has *heads*, "output[0]" or
"output[mean]", and "output" holds them side by side. `survey` runs the model once on a few samples
and lists the sites; `Forward` runs it for good and hands each activation over the moment it exists,
before an in-place operation can overwrite it. Mode, hooks, random state and the attention fast path
are put back afterwards, also after an error.
"""

from __future__ import annotations

import contextlib
import difflib
import random
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from fisherfast.default_device import outside
from fisherfast.unwrap import as_written, is_shell, name_inside

__all__ = [
    "Forward",
    "Site",
    "evaluation",
    "forgetting",
    "holds",
    "own_random_state",
    "select",
    "survey",
]

Layers = str | Sequence[str] | re.Pattern[str] | Callable[[str, nn.Module | None], bool]

INPUT = "input"
OUTPUT = "output"
HEAD = f"{OUTPUT}["
"""How the names of heads begin: "output[0]", "output[mean]"."""

JOINT = "outputs"
"""Kind of the site that holds several heads side by side."""

PASSIVE = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
"""Modules that change nothing in eval mode but the shape: "auto" leaves them out."""

ACTIVATIONS = frozenset(
    {
        "relu",
        "relu6",
        "leaky_relu",
        "prelu",
        "rrelu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "softplus",
        "softsign",
        "sigmoid",
        "logsigmoid",
        "tanh",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "hardshrink",
        "softshrink",
        "tanhshrink",
        "threshold",
        "softmax",
        "log_softmax",
        "softmin",
        "glu",
    }
)
"""Names of functions and methods that are tapped when a forward method calls them itself."""


@dataclass
class Site:
    """One place where activations are read.

    Attributes:
        name: as `model.named_modules()` has it, with "#2" for the second call and "/relu" for a
            function.
        kind: class of the module, or name of the function.
        shape: of one sample's activations, without the batch.
        aliases: other names of the same activations (a Sequential and its last layer, "output" and
            "fc5").
        passive: a reshape, dropout or identity: not measured unless asked for by name.
        descendants: names of the sites that are a function of this one alone (see `chains`).
        module: the module itself; None for "input" and functions.
        event: the first of its names that a forward pass reports.
        heads: names of the outputs that it holds side by side; empty for all but a joint "output".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    aliases: list[str] = field(default_factory=list)
    passive: bool = False
    descendants: set[str] = field(default_factory=set)
    module: nn.Module | None = field(default=None, repr=False)
    event: str = ""
    heads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.event = self.event or self.name

    @property
    def names(self) -> list[str]:
        """Its name and all aliases."""
        return [self.name, *self.aliases]

    @property
    def dim(self) -> int:
        """d, the number of activations of one sample."""
        return int(np.prod(self.shape, dtype=np.int64))

    def also(self, name: str) -> None:
        """Add a name; "output" becomes the main one, except at the input."""
        if name == OUTPUT and self.name != INPUT:
            self.aliases.insert(0, self.name)
            self.name = OUTPUT
            self.passive = False
        else:
            self.aliases.append(name)


Consumer = Callable[[str, str, nn.Module | None, torch.Tensor], torch.Tensor | None]
"""Called with event name, kind, module and output; a returned tensor takes the place of the
output."""


class Forward(TorchFunctionMode):
    """Runs a model and reports every activation.

    Use as a context manager (hooks are there inside only) and call `run` for each batch.

    Args:
        model: any module.
        consume: gets each event as it happens.
        sites: from `survey`. The heads of a joint "output" are reported side by side, last of all.
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
                self._handles.append(module.register_forward_pre_hook(self._enter_module))
                self._handles.append(module.register_forward_hook(self._leave_module))
        except BaseException:
            self._remove_hooks()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._remove_hooks()

    def run(self, batch: torch.Tensor) -> Any:
        """Run the model on a batch [n, ...]; events are reported on the way. Returns the model's
        output."""
        self._calls = {}
        self._stack = []
        self._last = INPUT
        self._samples = len(batch)
        self._report(INPUT, INPUT, None, batch)
        super().__enter__()
        try:
            with outside():
                output = self._model(batch)
                self._join(output)
                return output
        finally:
            super().__exit__(None, None, None)

    def _join(self, output: Any) -> None:
        """Report the heads as one "output" [n, sum of d] in the widest of their dtypes."""
        found: dict[str, torch.Tensor] = {}
        if self._heads:
            map_tensors(output, lambda place, head: found.setdefault(OUTPUT + place, head))
        heads = [found[name] for name in self._heads if self._readable(found.get(name))]
        rows = [head.flatten(1) if head.ndim > 1 else head[:, None] for head in heads]
        if rows:  # a head that is missing shows as another width, all of them as a skipped layer
            self._report(OUTPUT, JOINT, None, torch.cat(rows, 1))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._busy or not isinstance(result, torch.Tensor):
            return result
        kind = getattr(func, "__name__", "").rstrip("_")
        if kind not in ACTIVATIONS or self._inside_layer():
            return result
        return self._report(self._count(f"{self._last}/{kind}"), kind, None, result)

    def _inside_layer(self) -> bool:
        """Is the innermost running module a ready-made layer, whose own hook reports its output?"""
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

    def _report(
        self,
        name: str,
        kind: str,
        module: nn.Module | None,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Hand an activation [n, ...] of floating dtype to the consumer."""
        if self._busy or not self._readable(output):
            return output
        self._busy = True
        try:
            replacement = self._consume(name, kind, module, output)
        finally:
            self._busy = False
        return output if replacement is None else replacement

    def _readable(self, output: torch.Tensor | None) -> bool:
        """Whether there is a floating tensor with one row per sample."""
        if output is None or output.ndim == 0 or len(output) != self._samples:
            return False
        return output.is_floating_point()

    def _count(self, name: str) -> str:
        self._calls[name] = calls = self._calls.get(name, 0) + 1
        return name if calls == 1 else f"{name}#{calls}"

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()


_ONE_AT_A_TIME = threading.RLock()
"""Modes, buffers and global random states are borrowed: by one thread, or they would not return."""


@contextlib.contextmanager
def own_random_state(model: nn.Module | None, seed: int) -> Iterator[None]:
    """Random numbers from a stream of our own: the states of torch, numpy and Python return.

    One thread at a time; another waits.
    """
    with _ONE_AT_A_TIME, _own_random_state(model, seed):
        yield


@contextlib.contextmanager
def _own_random_state(model: nn.Module | None, seed: int) -> Iterator[None]:
    numpy_state = np.random.get_state()
    python_state = random.getstate()
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
    """Buffers that a forward pass writes return, and so does what it leaves in a module."""
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
def forgetting(model: nn.Module, kind: type = torch.Tensor) -> Iterator[None]:
    """What a module keeps of a forward pass (a state, a cache) is put back, where it holds tensors
    of a kind."""
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
    """Whether there is an object of a kind in nested containers."""
    if isinstance(value, dict):
        return any(holds(item, kind) for item in value.values())
    if isinstance(value, list | tuple):
        return any(holds(item, kind) for item in value)
    return isinstance(value, kind)


@contextlib.contextmanager
def evaluation(model: nn.Module, seed: int) -> Iterator[None]:
    """Eval mode and no gradients; the mode of every module, its buffers and all random states
    return. What is compiled runs as it is written.

    A model that draws random numbers in eval mode draws the same ones for the same seed.
    """
    with (
        own_random_state(model, seed),
        as_written(),
        torch.inference_mode(False),  # its tensors do not tell when they were overwritten
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


def survey(model: nn.Module, batch: torch.Tensor) -> list[Site]:
    """List all sites of a model in execution order, with aliases and chains. Call inside
    `evaluation`.

    Two events with the very same activations (a container returns its last child's output) are one
    site. What has one row per sample is told from a table that happens to have as many rows by a
    run on one sample less. Several heads make one more site, the joint "output", of each tensor
    once; a single head is the "output" itself. Cost: two forward passes.
    """
    per_sample = _events(model, batch[:-1]) if len(batch) > 1 else None
    sites: list[Site] = []
    seen: list[tuple[weakref.ref[torch.Tensor], int, Site]] = []

    heads: dict[int, tuple[str, Site]] = {}  # by the site: a tensor returned twice is one head

    def consume(name: str, kind: str, module: nn.Module | None, output: torch.Tensor) -> None:
        if per_sample is not None and name not in per_sample:
            return
        for reference, version, site in seen:
            if reference() is _original(output) and version == _version(output):
                site.also(name)
                break
        else:
            passive = isinstance(module, PASSIVE) and name != OUTPUT
            site = Site(name, kind, tuple(output.shape[1:]), passive=passive, module=module)
            sites.append(site)
            seen.append((weakref.ref(output), _version(output), site))
        if name.startswith(HEAD):
            heads.setdefault(id(site), (name, site))
            site.passive = False

    with Forward(model, consume) as forward:
        output = forward.run(batch.clone())
        del output
    names = tuple(name for name, _ in heads.values())
    if len(names) == 1:
        heads.popitem()[1][1].also(OUTPUT)
    elif names:
        width = sum(site.dim for _, site in heads.values())
        sites.append(Site(OUTPUT, JOINT, (width,), heads=names))
    return sites


def _events(model: nn.Module, batch: torch.Tensor) -> set[str]:
    """Names of all events of a run."""
    names: set[str] = set()
    with Forward(model, lambda name, kind, module, output: names.add(name)) as forward:
        forward.run(batch.clone())
    return names


CHAIN_SAMPLES = 8
"""Fewest samples that tell two activations apart; more also see a path that few samples take."""

CHAIN_TOLERANCE = 1e-3
"""Relative difference below which two activations count as equal: rounding of another batch order
is 1e-5."""


def chains(model: nn.Module, batch: torch.Tensor, sites: list[Site]) -> None:
    """Find which sites are a function of which other site alone; fills `Site.descendants`.

    The model runs on *other* samples while one site's output is replaced by what it was for these.
    A later site that is as it was depends on nothing else; past a skip connection it differs.
    """
    if len(batch) < 2:
        return
    other = batch.roll(1, 0)
    original = _record(model, batch, sites)
    for site in sites:
        try:
            replay = _record(model, other, sites, replace=(site.name, original))
        except Exception:  # a network may refuse exchanged values: no chain is known
            continue
        past = False
        for later in sites:
            if past and later.name in replay and _same(replay[later.name], original[later.name]):
                site.descendants.add(later.name)
            past = past or later is site


def select(
    sites: list[Site], layers: Layers, model: nn.Module, output: str | None = None
) -> list[Site]:
    """The sites that `layers` asks for, in execution order, always with "input" and "output".

    Args:
        layers: "auto" (all but passive ones), a name or a list of names, a regular expression
            (searched for in every name), or a function (name, module or None) -> bool.
        output: a head that is always there too.

    Raises:
        ValueError: a name that does not exist (with the nearest ones) or a layer that never ran; an
            output that does not exist (with those that do).
    """
    known = {name: site for site in sites for name in site.names}
    if output is not None and not (output in known and _is_output(output)):
        outputs = [name for name in known if _is_output(name)]
        raise ValueError(f"output must be one of {outputs}, got {output!r}")
    if isinstance(layers, str) and layers == "auto":
        return [site for site in sites if not site.passive]
    _check_layers(layers)
    if callable(layers) and not isinstance(layers, re.Pattern):
        wanted = {id(s) for s in sites if any(layers(name, s.module) for name in s.names)}
    elif isinstance(layers, re.Pattern) or (isinstance(layers, str) and layers not in known):
        wanted = _match(layers, known, model)
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
        for name in names:
            if name not in known:
                raise ValueError(_unknown(name, known, model))
        wanted = {id(known[name]) for name in names}
    wanted |= {id(known[name]) for name in (INPUT, OUTPUT, output) if name in known}
    return [site for site in sites if id(site) in wanted]


def _is_output(name: str) -> bool:
    return name == OUTPUT or name.startswith(HEAD)


def _check_layers(layers: Any) -> None:
    if isinstance(layers, str | re.Pattern):
        return
    names = isinstance(layers, Sequence) and not isinstance(layers, bytes)
    if names and all(isinstance(name, str) for name in layers):
        return
    if names or not callable(layers) or isinstance(layers, nn.Module):
        raise TypeError(
            'layers must be "auto", a name, a list of names, a regular expression or a function,'
            f" got {layers!r}"
        )


def _match(layers: str | re.Pattern[str], known: dict[str, Site], model: nn.Module) -> set[int]:
    try:
        pattern = re.compile(layers)
    except re.error as error:
        raise ValueError(
            f"layers must be names or a regular expression, got {layers!r}: {error}"
        ) from None
    wanted = {id(site) for name, site in known.items() if pattern.search(name)}
    if not wanted:
        raise ValueError(_unknown(pattern.pattern, known, model))
    return wanted


def _unknown(name: str, known: Mapping[str, Site], model: nn.Module) -> str:
    if name in dict(model.named_modules(remove_duplicate=False)):
        return (
            f"layer {name!r} must run in the forward pass, got none: it never ran, or returned no"
            " floating tensor with one row per sample"
        )
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or list(known)[:5]
    return f"layers must name layers of the model, got {name!r}; nearest: {', '.join(near)}"


def _record(
    model: nn.Module,
    x: torch.Tensor,
    sites: Sequence[Site],
    replace: tuple[str, Mapping[str, torch.Tensor]] | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs of all sites; one of them replaced by what it was in an earlier record."""
    by_event = {event: site for site in sites for event in site.names}
    outputs: dict[str, torch.Tensor] = {}

    def consume(
        event: str, kind: str, module: nn.Module | None, output: torch.Tensor
    ) -> torch.Tensor | None:
        site = by_event.get(event)
        if site is None or site.name in outputs:
            return None
        if replace is not None and site.name == replace[0] and event != INPUT:
            outputs[site.name] = replace[1][site.name]
            return outputs[site.name].clone()
        outputs[site.name] = output.detach().clone()
        return None

    start = x if replace is None or replace[0] != INPUT else replace[1][INPUT]
    with Forward(model, consume, sites) as forward:
        forward.run(start.clone())
    return outputs


def _event_name(module_name: str) -> str:
    """The root is "output"; a submodule that is called so itself becomes "self.output"."""
    if not module_name:
        return OUTPUT
    return f"self.{module_name}" if module_name in (INPUT, OUTPUT) else module_name


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= CHAIN_TOLERANCE * b.abs().max().clamp_min(1e-30))


def _version(output: torch.Tensor) -> int:
    """Counts in-place changes; inference tensors have no counter."""
    return -1 if output.is_inference() else output._version


def _original(output: torch.Tensor) -> torch.Tensor:
    """The tensor that a reshaping view shows whole, or the tensor itself."""
    base = output._base
    return base if base is not None and base.numel() == output.numel() else output


def map_tensors(output: Any, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    """Apply change(place, tensor) to the tensors of a nested output; places are "[0]", "[mean]".

    What is not changed is returned as it is, containers of the user's own classes included.
    """

    def visit(item: Any, place: str) -> Any:
        if isinstance(item, torch.Tensor):
            return change(place, item)
        if isinstance(item, Mapping):
            changed = {key: visit(value, f"{place}[{key}]") for key, value in item.items()}
            same = all(changed[key] is value for key, value in item.items())
            return item if same else type(item)(changed)  # type: ignore[call-arg]
        if isinstance(item, list | tuple):
            entries = [visit(value, f"{place}[{index}]") for index, value in enumerate(item)]
            if all(new is old for new, old in zip(entries, item, strict=True)):
                return item
            return type(item)(*entries) if hasattr(item, "_fields") else type(item)(entries)
        return item

    return visit(output, "")
