"""The rule of norms: a scale and a shift of what is normalised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherfast.parameters.layers.base import LinearMap

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

IN_CACHE = 1 << 18
"""Numbers of a temporary that stays in the caches, 2 MB: some samples at a time."""


class Norm(LinearMap):
    """Batch norm that uses its running statistics, layer, group, instance and RMS norm: a scale and
    a shift of the normalised activations, shared by all positions."""

    def __init__(self, module: nn.Module, own: Mapping[str, str]) -> None:
        super().__init__(module, own)
        self.folds = isinstance(module, nn.LayerNorm | nn.RMSNorm)

    def normalised(self, x: Tensor) -> Tensor:
        """The numbers that the scale multiplies, in the shape of x."""
        module = self.module
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            shape = [1, -1] + [1] * (x.dim() - 2)
            mean, variance = module.running_mean, module.running_var
            assert mean is not None
            assert variance is not None
            return (x - mean.view(shape)) * (variance.view(shape) + module.eps).rsqrt()
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, module.normalized_shape, None, module.eps)
        if isinstance(module, INSTANCE_NORMS):
            return F.instance_norm(x, eps=module.eps)
        return F.group_norm(x, module.num_groups, None, None, module.eps)

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return self._shaped(
            len(g),
            weight=lambda: self._shared(g * self.normalised(x)),
            bias=lambda: self._shared(g),
        )

    def applied(self, x: Tensor, v: Sequence[Tensor]) -> Tensor:
        last = isinstance(self.module, nn.LayerNorm | nn.RMSNorm)
        parts = {
            attribute: value if last else value.reshape(-1, *[1] * (x.dim() - 2))
            for attribute, value in zip(self.attributes, v, strict=True)
        }
        output = torch.zeros_like(x)
        if "weight" in parts:
            output = output + self.normalised(x) * parts["weight"]
        return output + parts["bias"] if "bias" in parts else output

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See `Rule.squares`; so few samples at a time that what is normalised is in the caches."""
        return self._summed_squares(x, g, x[:1].numel(), IN_CACHE)

    def _shared(self, values: Tensor) -> Tensor:
        """Sums over the positions that share a parameter: [n, numbers of the parameter]."""
        if isinstance(self.module, nn.LayerNorm | nn.RMSNorm):
            kept = self.shapes[0].numel()
            return values.reshape(len(values), -1, kept).sum(1)
        return values.flatten(2).sum(2) if values.dim() > 2 else values
