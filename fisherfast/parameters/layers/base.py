"""Contractions of the per-sample gradients of one layer.

A layer that applies its parameters linearly has, for sample i with input x_i and gradient g_i of
the log-likelihood with respect to its output, the per-sample gradient

    G_i = sum_t g_it a_it^T          (t: positions that share the parameters)

where a_it is what multiplies the weights at position t: the input of a linear layer, a patch of a
convolution's, the normalised activation of a norm. Every structure of the Fisher matrix needs
some contraction of these G_i; a rule computes it without building them where possible. Each kind of
layer has one class of rule; `rule_for` finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast import ops


class Rule:
    """Contractions of the per-sample gradients of one layer.

    x is the input of the layer and g the gradient at its output, with samples first; `names`
    and `shapes` are those of the parameters measured, and every tuple returned has their order.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    folds = False  # True if x may be [n, positions, ...] where the layer had [n positions, ...]

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """G_i of every sample: one [n, *shape] per parameter."""
        raise NotImplementedError

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """sum_i G_i^2, entry by entry: one [*shape] per parameter."""
        return tuple(rows.square().sum(0) for rows in self.gradients(x, g))

    def products(self, x: Tensor, g: Tensor, v: Sequence[Tensor]) -> Tensor:
        """<G_i, v> of every sample, summed over the parameters: [n]."""
        rows = self.gradients(x, g)
        return sum(
            (
                row.reshape(len(row), -1) @ part.flatten().to(row.dtype)
                for row, part in zip(rows, v, strict=True)
            ),
            start=torch.zeros(len(g), dtype=g.dtype, device=g.device),
        )

    def weighted_sum(self, x: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        """sum_i u_i G_i, u [n]: one [*shape] per parameter."""
        return tuple(torch.tensordot(u, rows, dims=1) for rows in self.gradients(x, g))


class Rows(Rule):
    """Per-sample gradients that had to be computed one by one: x is not used, g is [n, p], the
    gradients of all its parameters side by side."""

    def __init__(self, names: Sequence[str], shapes: Sequence[torch.Size]) -> None:
        self.names, self.shapes = tuple(names), tuple(shapes)

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        parts = g.split([shape.numel() for shape in self.shapes], dim=1)
        return tuple(
            part.reshape(len(g), *shape) for part, shape in zip(parts, self.shapes, strict=True)
        )


class Layer(Rule):
    """A module whose own parameters `weight` and `bias` are measured, either or both."""

    def __init__(self, module: nn.Module, own: Mapping[str, str]) -> None:
        """own: attribute -> full name, of the parameters that are measured."""
        self.module: Any = module
        self.attributes = tuple(own)
        self.names = tuple(own.values())
        self.shapes = tuple(getattr(module, attribute).shape for attribute in own)

    def _shaped(self, *samples: int, **parts: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        """The parts of the parameters measured, each [*samples, *shape]; no others are run."""
        return tuple(
            parts[attribute]().reshape(*samples, *shape)
            for attribute, shape in zip(self.attributes, self.shapes, strict=True)
        )

    def _summed_squares(self, x: Tensor, g: Tensor, numbers: int, limit: int) -> tuple[Tensor, ...]:
        """sum_i G_i^2 in float64 from the gradients of a few samples at a time, see
        `some_samples`."""
        sums = [torch.zeros(shape, dtype=torch.float64, device=g.device) for shape in self.shapes]
        for part in some_samples(len(x), numbers, limit):
            for total, rows in zip(sums, self.gradients(x[part], g[part]), strict=True):
                total += sum_of_squares(rows)
        return tuple(sums)


class LinearMap(Layer):
    """A layer whose output is known to be linear in its parameters: products with vectors are
    passes of the layer, and no per-sample gradients."""

    def applied(self, x: Tensor, v: Sequence[Tensor]) -> Tensor:
        """The output [n, ...] for x if the parameters measured were v and all others zero: it is
        linear in v, and <G_i, v> = <g_i, output_i>."""
        raise NotImplementedError

    def products(self, x: Tensor, g: Tensor, v: Sequence[Tensor]) -> Tensor:
        """<G_i, v> [n], by one forward pass of the layer."""
        output = self.applied(x, [part.to(g.dtype) for part in v])
        return (g * output.reshape(g.shape)).flatten(1).sum(1)

    def weighted_sum(self, x: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        """sum_i u_i G_i, by one backward pass of the layer."""
        weighted = g * u.to(g.dtype).reshape(-1, *[1] * (g.dim() - 1))
        with torch.inference_mode(False), torch.enable_grad():
            v = [g.new_zeros(shape).requires_grad_() for shape in self.shapes]
            output = self.applied(x, v)
            return torch.autograd.grad(output, v, weighted.reshape(output.shape))


def some_samples(samples: int, numbers: int, limit: int) -> Iterator[slice]:
    """Slices of samples of `numbers` numbers each: of at most `limit` numbers, or one sample."""
    few = max(1, limit // max(1, numbers))
    return (slice(first, first + few) for first in range(0, samples, few))


def sum_of_squares(rows: Tensor) -> Tensor:
    """sum_i rows_i^2 of rows [n, ...], in float64."""
    return rows.double().square().sum(0)


def kernel_squares(x: Tensor, g: Tensor, **window: Any) -> Tensor:
    """`ops.gradient_squares` of x and g [n, C, L] or [n, C, H, W]; without a window each position
    by itself."""
    (x, window), (g, _) = as_image(x, window), as_image(g, {})
    return ops.gradient_squares(as_kernels_read(x), as_kernels_read(g), **window)


def as_image(x: Tensor, window: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """x [n, C, L] as an image of one row, with the arguments of a window over it."""
    if x.dim() == 4:
        return x, dict(window)
    row = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}
    lifted = {name: (row[name], *each) if name in row else each for name, each in window.items()}
    return x.unsqueeze(2), lifted


def as_kernels_read(x: Tensor) -> Tensor:
    """x in a dtype that kernels read: half precision in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
