"""Rules without the network: plain numbers in place of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layers.convolution import Convolution
from fisherfast.parameters.layers.embedding import Embedding
from fisherfast.parameters.layers.linear import Linear

__all__ = ["DetachedRule", "detached", "rule_from_settings", "settings_of"]

DetachedRule = Linear | Convolution | Embedding
"""Rules that depend on sizes alone. A norm's depends on its running statistics, which change when
training goes on: its per-sample gradients are kept instead, two numbers for each channel."""

KINDS: dict[str, tuple[type[DetachedRule], type[nn.Module], tuple[str, ...]]] = {
    "linear": (Linear, nn.Linear, ("in_features", "out_features")),
    "embedding": (Embedding, nn.Embedding, ("num_embeddings", "embedding_dim", "padding_idx")),
    **{
        f"conv{spatial}d": (
            Convolution,
            kind,
            (
                "in_channels",
                "out_channels",
                "kernel_size",
                "stride",
                "padding",
                "dilation",
                "groups",
                "padding_mode",
            ),
        )
        for spatial, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1)
    },
}
"""Name in files -> rule, module, and the arguments that it is made of."""


def detached(rule: Rule) -> DetachedRule | None:
    """A copy of a rule that holds no tensor of the network; None where sizes are not enough."""
    try:
        return rule_from_settings(settings_of(rule))
    except TypeError:
        return None


def settings_of(rule: Rule) -> dict[str, Any]:
    """Strings and numbers that `rule_from_settings` makes the rule of.

    Raises:
        TypeError: the rule is none of those.
    """
    for kind, (rule_type, module_type, arguments) in KINDS.items():
        if not isinstance(rule, Linear | Convolution | Embedding):
            break
        if type(rule) is rule_type and type(rule.module) is module_type:
            return {
                "kind": kind,
                "module": {name: getattr(rule.module, name) for name in arguments},
                "own": dict(zip(rule.attributes, rule.names, strict=True)),
            }
    raise TypeError(f"rule must be one of {', '.join(KINDS)}, got {type(rule).__name__}")


def rule_from_settings(settings: Mapping[str, Any]) -> DetachedRule:
    """The rule whose `settings_of` these are."""
    rule_type, module_type, _ = KINDS[settings["kind"]]
    module = module_type(**settings["module"], device=torch.device("meta"))
    return rule_type(module, settings["own"])
