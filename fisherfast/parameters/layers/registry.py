"""The rule of each module of PyTorch, found by its class and settings.

Parameters without a rule are measured by per-sample gradients (`backward/per_sample.py`), which is
slower and always right.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layers.convolution import (
    CONVOLUTIONS,
    TRANSPOSED,
    Convolution,
    TransposedConvolution,
)
from fisherfast.parameters.layers.embedding import Embedding
from fisherfast.parameters.layers.linear import Linear
from fisherfast.parameters.layers.norm import BATCH_NORMS, INSTANCE_NORMS, Norm

__all__ = ["rule_for"]


def rule_for(module: nn.Module, own: Mapping[str, str]) -> Rule | None:
    """The rule of a module whose parameters `own` (attribute -> full name) are measured, or None
    where it has none."""
    if not set(own) <= {"weight", "bias"} or "forward" in vars(module):  # modified by the user
        return None
    if type(module) is nn.Linear:
        return Linear(module, own)
    if type(module) in CONVOLUTIONS:
        return Convolution(module, own)
    if type(module) in TRANSPOSED:
        return TransposedConvolution(module, own)
    if type(module) in BATCH_NORMS:
        fixed = not module.training and module.running_mean is not None
        return Norm(module, own) if fixed else None
    if type(module) in (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm):
        return Norm(module, own)
    if type(module) in INSTANCE_NORMS and not module.track_running_stats:
        return Norm(module, own)
    if type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
        return Embedding(module, own)
    return None
