"""Rules without the network: plain numbers in place of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import nn

from fisherfast._fields import Count, OneOf, read_fields
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layers.convolution import Convolution
from fisherfast.parameters.layers.embedding import Embedding
from fisherfast.parameters.layers.linear import Linear

DetachedRule = Linear | Convolution | Embedding
"""Rules that depend on sizes alone. A norm's depends on its running statistics, which change when
training goes on: its per-sample gradients are kept instead, two numbers for each channel."""

Sizes = tuple[Count, ...]

CONVOLUTION = {
    "in_channels": Count,
    "out_channels": Count,
    "kernel_size": Sizes,
    "stride": Sizes,
    "padding": str | Sizes,
    "dilation": Sizes,
    "groups": Count,
    "padding_mode": str,
}
LINEAR = {"in_features": Count, "out_features": Count}
EMBEDDING = {"num_embeddings": Count, "embedding_dim": Count, "padding_idx": Count | None}

KINDS: dict[str, tuple[type[DetachedRule], type[nn.Module], dict[str, Any]]] = {
    "linear": (Linear, nn.Linear, LINEAR),
    "embedding": (Embedding, nn.Embedding, EMBEDDING),
    "conv1d": (Convolution, nn.Conv1d, CONVOLUTION),
    "conv2d": (Convolution, nn.Conv2d, CONVOLUTION),
    "conv3d": (Convolution, nn.Conv3d, CONVOLUTION),
}
"""Name in files -> rule, module, and the arguments that it is made of, with their kinds."""


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
    kind = Annotated[str, OneOf(tuple(KINDS))]
    parts = {"kind": kind, "module": object, "own": dict[str, str]}
    values = read_fields(parts, settings, "rule")
    rule_type, module_type, kinds = KINDS[values["kind"]]
    arguments = read_fields(kinds, values["module"], "rule.module")
    try:
        module = module_type(**arguments, device=torch.device("meta"))
        rule = rule_type(module, values["own"])
    except (AttributeError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"rule must have the settings of a layer, got {arguments}: {error}"
        ) from None
    if not values["own"] or settings_of(rule) != values | {"module": arguments}:
        raise ValueError(f"rule must have the settings of a layer, got {arguments}")
    return rule
