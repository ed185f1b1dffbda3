"""The rules of convolutions and transposed convolutions, by the patches under their kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fisherfast import ops
from fisherfast.parameters.layers.base import (
    Layer,
    as_image,
    as_kernels_read,
    kernel_squares,
    sum_of_squares,
)
from fisherfast.parameters.layers.linear import MatrixRule, Sharing, bordered

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)


class Convolution(MatrixRule):
    """nn.Conv1d, Conv2d, Conv3d, any stride, padding, dilation and groups."""

    def input_rows(self, x: Tensor) -> Tensor:
        return _patches(self.module, padded(self.module, x))

    def input_factor(self, x: Tensor, g: Tensor, sharing: Sharing) -> Tensor:
        module = self.module
        if sharing == "reduce" or "weight" not in self.attributes:
            return super().input_factor(x, g, sharing)
        if not isinstance(module, nn.Conv1d | nn.Conv2d):
            return super().input_factor(x, g, sharing)
        image, window = as_image(*_windowed(module, x))
        sums, cross = ops.patch_moments(as_kernels_read(image), **window)
        positions = g[0, 0].numel()
        if "bias" in self.attributes:
            cross = bordered(sums, cross, len(x) * positions)
        return cross / positions

    def output_rows(self, g: Tensor) -> Tensor:
        groups = self.module.groups
        return g.reshape(len(g), groups, g.shape[1] // groups, -1).transpose(-1, -2)

    def applied(self, x: Tensor, v: Sequence[Tensor]) -> Tensor:
        parts = dict(zip(self.attributes, v, strict=True))
        weight = parts.get("weight")
        if weight is None:
            weight = x.new_zeros(self.module.weight.shape)
        return self.module._conv_forward(x, weight, parts.get("bias"))  # with its padding mode

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See `Rule.squares`; a few samples at a time for three dimensions."""
        module = self.module
        if not isinstance(module, nn.Conv1d | nn.Conv2d):  # the kernel takes images only
            return super().squares(x, g)
        image, window = _windowed(module, x)
        return self._shaped(
            weight=lambda: kernel_squares(image, g, **window),
            bias=lambda: sum_of_squares(g.flatten(2).sum(2)),
        )


class TransposedConvolution(Layer):
    """nn.ConvTranspose1d, ConvTranspose2d: the convolution that takes g to the shape of x has the
    same gradients, with x and g in exchanged roles."""

    def _margins(self, x: Tensor, g: Tensor) -> list[int]:
        """The margins that the windows over g need, in the form of F.pad; negative where
        `output_padding` widens g on one side beyond every window."""
        margins, own = [], self.module
        settings = zip(own.stride, own.dilation, own.kernel_size, own.padding, strict=True)
        for axis, (stride, dilation, kernel, padding) in enumerate(settings, start=2):
            last = (x.shape[axis] - 1) * stride - padding + dilation * (kernel - 1)
            margins.append([padding, last + 1 - g.shape[axis]])
        return [margin for pair in reversed(margins) for margin in pair]

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        def weight() -> Tensor:
            groups = self.module.groups
            b = x.reshape(len(x), groups, x.shape[1] // groups, -1)
            return b @ _patches(self.module, F.pad(g, self._margins(x, g)))

        return self._shaped(len(g), weight=weight, bias=lambda: g.flatten(2).sum(2))

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        def weight() -> Tensor:
            module, padding = self.module, self.module.padding
            margins, image = self._margins(x, g), g
            wider = [
                before - after for before, after in zip(margins[::2], margins[1::2], strict=True)
            ]
            if any(wide >= jump for wide, jump in zip(reversed(wider), module.stride, strict=True)):
                image, padding = F.pad(g, margins), (0,) * len(padding)  # else a window more
            window = {"stride": module.stride, "padding": padding, "dilation": module.dilation}
            window |= {"kernel": module.kernel_size, "groups": module.groups}
            return kernel_squares(image, x, **window)

        return self._shaped(weight=weight, bias=lambda: sum_of_squares(g.flatten(2).sum(2)))


def padded(module: Any, x: Tensor) -> Tensor:
    """x with the margins of a convolution, in any padding mode."""
    around = list(module._reversed_padding_repeated_twice)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, around, mode=mode) if any(around) else x


def _windowed(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """x and the window arguments of the ops.

    x contains the padding already, unless that is the same zeros on both sides.
    """
    around = list(module._reversed_padding_repeated_twice)
    padding = around[::2][::-1]  # before each axis, the first one first
    if module.padding_mode != "zeros" or around[::2] != around[1::2]:
        x, padding = padded(module, x), [0] * len(padding)
    names = ("stride", "dilation", "groups")
    window = {name: getattr(module, name) for name in names}
    return x, window | {"kernel": module.kernel_size, "padding": padding}


def _patches(module: Any, x: Tensor) -> Tensor:
    """The patches of x under the kernel of a convolution, [n, G, T, C / G kernel]."""
    settings = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (size, step, gap) in enumerate(settings, start=2):
        x = x.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    spatial = len(module.kernel_size)  # x is a view [n, C, *positions, *kernel]
    positions = x.shape[2 : 2 + spatial].numel()
    x = x.movedim(tuple(range(2, 2 + spatial)), tuple(range(-spatial, 0)))
    return x.reshape(len(x), module.groups, -1, positions).mT
