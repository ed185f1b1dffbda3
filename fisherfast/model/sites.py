"""Sites, the places where activations are read: their names, and how to select them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

Layers = str | Sequence[str] | re.Pattern[str] | Callable[[str, nn.Module | None], bool]

INPUT = "input"

OUTPUT = "output"

HEAD = f"{OUTPUT}["
"""Prefix of the names of heads: "output[0]", "output[mean]"."""

CUTS = "cuts"
"""Value of `layers` that selects the layers which everything passes."""

JOINT = "outputs"
"""Kind of the site that holds several heads side by side."""


@dataclass
class Site:
    """A place where activations are read.

    Attributes:
        name: as in `model.named_modules()`, with "#2" for the second call and "/relu" for a
            function.
        kind: class of the module, or name of the function.
        shape: of one sample's activations, without the batch.
        aliases: other names of the same activations (a Sequential and its last layer, "output" and
            "fc5").
        passive: a reshape, dropout or identity: measured only if selected by name.
        descendants: names of the sites that are a function of this one alone (see `follow`).
        cut: the output depends on the input through this site alone; None if that is unknown.
        copy_of: name of the site of which this one is an invertible affine map.
        copies: names of such maps of this site, after `merged`.
        summed: names of the sites that were added up directly before.
        module: the module itself; None for "input" and functions.
        event: the first of its names that a forward pass reports.
        heads: names of the outputs in a joint "output", side by side; empty for other sites.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    aliases: list[str] = field(default_factory=list)
    passive: bool = False
    descendants: set[str] = field(default_factory=set)
    cut: bool | None = None
    copy_of: str | None = None
    copies: list[str] = field(default_factory=list)
    summed: tuple[str, ...] = ()
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

    @property
    def label(self) -> str:
        """What tables and figures call it: for the activation of a sum the block that ends with it,
        or else what was added up, as in "layer1.0 (sum)" and "fc2 + act (sum)"."""
        if self.name == OUTPUT or len(self.summed) < 2 or not self._is_activation():
            return self.name
        blocks = [name for name in self.aliases if self.name.startswith(f"{name}.")]
        if blocks:
            return f"{max(blocks, key=len)} (sum)"
        return f"{' + '.join(self.summed) if len(self.summed) < 4 else self.name} (sum)"

    @property
    def without_weights(self) -> bool:
        """Whether it is a function, or a module without parameters."""
        return self.module is None or next(self.module.parameters(), None) is None

    def _is_activation(self) -> bool:
        if self.module is None or isinstance(self.module, nn.MultiheadAttention):
            return self.module is None
        return type(self.module).__module__ == "torch.nn.modules.activation"

    def also(self, name: str) -> None:
        """Add a name; "output" becomes the main name, except for the input."""
        if name == OUTPUT and self.name != INPUT:
            self.aliases.insert(0, self.name)
            self.name = OUTPUT
            self.passive = False
        else:
            self.aliases.append(name)


def select(
    sites: list[Site], layers: Layers, model: nn.Module, output: str | None = None
) -> list[Site]:
    """Select the sites that `layers` describes, in execution order, with "input" and "output".

    Args:
        layers: "auto" (all but passive ones), "cuts" (see `_stages`), a name or a list of names, a
            regular expression (searched for in every name), or a function (name, module or None)
            -> bool.
        output: a head that is always included.

    Raises:
        ValueError: a name that does not exist (lists the nearest names), a layer that never ran, an
            output that does not exist (lists those that do), or "cuts" of a model whose cuts are
            unknown.
    """
    known = {name: site for site in sites for name in site.names}
    if output is not None and not (output in known and _is_output(output)):
        outputs = [name for name in known if _is_output(name)]
        raise ValueError(f"output must be one of {outputs}, got {output!r}")
    if isinstance(layers, str) and layers == "auto":
        return [site for site in sites if not site.passive]
    _check_layers(layers)
    if isinstance(layers, str) and layers == CUTS:
        wanted = {id(site) for site in _stages(sites)}
    elif callable(layers) and not isinstance(layers, re.Pattern):
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


def _stages(sites: Sequence[Site]) -> list[Site]:
    """Return the cuts, one per stage: of a layer with weights and the layers without weights that
    follow it (normalisation, activation, pooling) the last, which the next layer reads."""
    if any(site.cut is None for site in sites):
        raise ValueError(
            'layers must be "auto" or names for this model, got "cuts": its operations could not be'
            " followed from the input to one output, so its cuts are unknown"
        )
    sites = [site for site in sites if not site.passive]
    stages = []
    for site, following in zip(sites, [*sites[1:], None], strict=True):
        goes_on = following is not None and following.cut and following.name != OUTPUT
        if site.cut and not (goes_on and following is not None and following.without_weights):
            stages.append(site)
    return stages


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
            'layers must be "auto", "cuts", a name, a list of names, a regular expression or a'
            f" function, got {layers!r}"
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
            " floating tensor with one row per sample (a layer inside torch.func.vmap sees one"
            " sample, one inside torch.jit.script is not seen: name the layer around it, or use the"
            " module that was scripted)"
        )
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or list(known)[:5]
    return f"layers must name layers of the model, got {name!r}; nearest: {', '.join(near)}"
