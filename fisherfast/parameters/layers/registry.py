"""The rule of each module of PyTorch, found by its class and settings.

Parameters without a rule are measured by per-sample gradients (`backward/per_sample.py`), which is
slower and always right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fisherfast.parameters.layers.base import Layer, Rule
from fisherfast.parameters.layers.convolution import (
    CONVOLUTIONS,
    TRANSPOSED,
    Convolution,
    TransposedConvolution,
)
from fisherfast.parameters.layers.embedding import Embedding
from fisherfast.parameters.layers.linear import Linear
from fisherfast.parameters.layers.norm import BATCH_NORMS, INSTANCE_NORMS, OTHER_NORMS, Norm

RULES: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    **dict.fromkeys(CONVOLUTIONS, Convolution),
    **dict.fromkeys(TRANSPOSED, TransposedConvolution),
    **dict.fromkeys((*BATCH_NORMS, *INSTANCE_NORMS, *OTHER_NORMS), Norm),
}


def rule_for(module: nn.Module, own: Mapping[str, str]) -> Rule | None:
    """The rule of a module whose parameters `own` (attribute -> full name) are measured, or None
    where it has none."""
    rule = RULES.get(type(module))
    if rule is None or not set(own) <= {"weight", "bias"} or "forward" in vars(module):
        return None  # another module, or one that the user modified
    return rule(module, own) if _follows(module) else None


def _follows(module: Any) -> bool:
    """True if the settings of the module are those that its rule is for."""
    if isinstance(module, BATCH_NORMS):
        return not module.training and module.running_mean is not None
    if isinstance(module, INSTANCE_NORMS):
        return not module.track_running_stats
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq
    return True
