"""Rules without the network: plain numbers in place of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import nn

from fisherfast._fields import OneOf, read_fields
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layers.convolution import Convolution
from fisherfast.parameters.layers.embedding import Embedding
from fisherfast.parameters.layers.linear import Linear

DetachedRule = Linear | Convolution | Embedding
"""Rules that depend on sizes alone. A norm's depends on its running statistics, which change when
training goes on: its per-sample gradients are kept instead, two numbers for each channel."""

CONVOLUTION = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
    "padding_mode",
)  # fmt: skip

KINDS: dict[str, tuple[type[DetachedRule], type[nn.Module], tuple[str, ...]]] = {
    "linear": (Linear, nn.Linear, ("in_features", "out_features")),
    "embedding": (Embedding, nn.Embedding, ("num_embeddings", "embedding_dim", "padding_idx")),
    "conv1d": (Convolution, nn.Conv1d, CONVOLUTION),
    "conv2d": (Convolution, nn.Conv2d, CONVOLUTION),
    "conv3d": (Convolution, nn.Conv3d, CONVOLUTION),
}
"""Name in files -> rule, module, and the arguments that it is made of."""


def detached(rule: Rule) -> DetachedRule | None:
    """A copy of a rule that holds no tensor of the network; None where sizes are not enough."""
    return rule_from_settings(settings_of(rule)) if isinstance(rule, DetachedRule) else None


def settings_of(rule: DetachedRule) -> dict[str, Any]:
    """Strings and numbers that `rule_from_settings` makes the rule of."""
    kind, (_, _, arguments) = next(
        item for item in KINDS.items() if type(rule.module) is item[1][1]
    )
    return {
        "kind": kind,
        "module": {name: getattr(rule.module, name) for name in arguments},
        "own": dict(zip(rule.attributes, rule.names, strict=True)),
    }


def rule_from_settings(settings: Mapping[str, Any]) -> DetachedRule:
    """The rule whose `settings_of` these are. Raises ValueError for anything else."""
    kinds = {
        "kind": Annotated[str, OneOf(tuple(KINDS))],
        "module": dict[str, Any],
        "own": dict[str, str],
    }
    values = read_fields(kinds, settings, "rule")
    rule_type, module_type, _ = KINDS[values["kind"]]
    try:
        module = module_type(**values["module"], device=torch.device("meta"))
        rule = rule_type(module, values["own"])
        same = repr(settings_of(rule)) == repr(values)  # True is not 1
    except Exception as error:
        raise ValueError(f"rule must have the settings of a layer, got {values}: {error}") from None
    if not same:
        raise ValueError(f"rule must have all settings of a layer, got {values}")
    return rule
