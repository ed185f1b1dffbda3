"""What the fused dual ops are compared with: the formula, backward kernels, forward mode.

Each way takes a dual buffer x [1 + P, ...] and returns the buffer of the result, or primal and
tangents as a pair where that saves torch a copy. A `backward` of torch applies a Jacobian that is
diagonal or symmetric, so that it serves for tangents too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherfast import ops
from fisherfast.ops import reference_dual

aten = torch.ops.aten

Result = Tensor | tuple[Tensor, Tensor]
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OpCase:
    """One op on one shape.

    Attributes:
        name: of the case.
        shape: of the dual buffer x.
        ours: the op.
        formula: the same in plain torch; in float64 the truth.
        plain: torch's own op, of a batch without tangents: u [rows of all slices, ...].
        more: further ways of torch.
    """

    name: str
    shape: tuple[int, ...]
    ours: Function
    formula: Function
    plain: Function
    more: dict[str, Callable[[Tensor], Result]] = field(default_factory=dict)

    def ways(self) -> dict[str, Callable[[Tensor], Result]]:
        """All of torch's."""
        ways = {"formula": self.formula, "vmap of jvp": self.by_forward_mode}
        return ways | self.more

    def by_forward_mode(self, x: Tensor) -> Result:
        """torch.func.jvp of the plain op, all tangents at once."""

        def along(tangent: Tensor) -> Any:
            return torch.func.jvp(self.plain, (x[0],), (tangent,))

        return torch.func.vmap(along, out_dims=(None, 0))(x[1:])


def relu_tangents(v: Tensor, z: Tensor, _: Tensor) -> Tensor:
    """f'(z) v of ReLU."""
    return aten.threshold_backward(v, z, 0)


def gelu_tangents(v: Tensor, z: Tensor, _: Tensor) -> Tensor:
    """f'(z) v of GELU."""
    return aten.gelu_backward(v, z)


def silu_tangents(v: Tensor, z: Tensor, _: Tensor) -> Tensor:
    """f'(z) v of SiLU."""
    return aten.silu_backward(v, z)


def tanh_tangents(v: Tensor, _: Tensor, y: Tensor) -> Tensor:
    """f'(z) v of tanh from y = tanh(z)."""
    return aten.tanh_backward(v, y)


ACTIVATIONS: dict[str, tuple[Function, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "relu": (F.relu, relu_tangents),
    "gelu": (F.gelu, gelu_tangents),
    "silu": (F.silu, silu_tangents),
    "tanh": (torch.tanh, tanh_tangents),
}


def activation(kind: str, shape: tuple[int, ...], affine: bool, device: Any) -> OpCase:
    """dual_activation of x [1 + P, n, C, H, W], alone or behind a batch norm.

    The scales are powers of two: their product is exact, so z has the sign that it has in float64
    and a ReLU cannot differ by rounding alone.
    """
    function, tangents = ACTIVATIONS[kind]
    if not affine:

        def by_backward(x: Tensor) -> Result:
            y = function(x[0])
            v = x[1:]
            return y, tangents(v, x[:1].expand_as(v), y.expand_as(v))

        return OpCase(
            kind,
            shape,
            lambda x: ops.dual_activation(x, kind),
            lambda x: reference_dual.dual_activation(x, kind),
            function,
            {"backward kernel": by_backward},
        )
    channels = shape[2]
    generator = torch.Generator().manual_seed(channels)
    scale = 2.0 ** torch.randint(-1, 2, (channels,), generator=generator)
    shift = torch.randn(channels, generator=generator)
    scale, shift = scale.to(device), shift.to(device)
    mean, variance = torch.zeros_like(scale), torch.ones_like(scale)

    def plain(u: Tensor) -> Tensor:
        return function(F.batch_norm(u, mean, variance, scale, shift, eps=0.0))

    def affine_backward(x: Tensor) -> Result:
        column = scale[:, None, None]
        z = torch.addcmul(shift[:, None, None], x[0], column)
        v, y = x[1:] * column, function(z)
        return y, tangents(v, z.expand_as(v), y.expand_as(v))

    return OpCase(
        f"batch norm + {kind}",
        shape,
        lambda x: ops.dual_activation(x, kind, scale=scale, shift=shift),
        lambda x: reference_dual.dual_activation(
            x, kind, scale=scale.to(x.dtype), shift=shift.to(x.dtype)
        ),
        plain,
        {"backward kernel": affine_backward},
    )


def layer_norm(shape: tuple[int, ...], device: Any) -> OpCase:
    """dual_norm of x [1 + P, rows, width] with weight and bias."""
    generator = torch.Generator().manual_seed(shape[-1])
    weight, bias = (torch.randn(shape[-1:], generator=generator).to(device) for _ in range(2))
    return OpCase(
        "layer norm",
        shape,
        lambda x: ops.dual_norm(x, weight, bias),
        lambda x: reference_dual.dual_norm(x, weight.to(x.dtype), bias.to(x.dtype)),
        lambda u: F.layer_norm(u, shape[-1:], weight, bias),
    )


def softmax(shape: tuple[int, ...]) -> OpCase:
    """dual_softmax of x [1 + P, rows, width] along the rows."""

    def by_backward(x: Tensor) -> Result:
        y = torch.softmax(x[0], -1)
        v = x[1:]
        return y, aten._softmax_backward_data(v, y.expand_as(v), -1, x.dtype)

    return OpCase(
        "softmax",
        shape,
        ops.dual_softmax,
        lambda x: reference_dual.dual_softmax(x, -1),
        lambda u: torch.softmax(u, -1),
        {"backward kernel": by_backward},
    )


def max_pool(shape: tuple[int, ...], kernel: int, padding: int) -> OpCase:
    """dual_pool of x [1 + P, n, C, H, W] with stride 2."""
    sizes = [kernel] * 2, [2] * 2, [padding] * 2
    return OpCase(
        f"max pool {kernel}, stride 2",
        shape,
        lambda x: ops.dual_pool(x, *sizes),
        lambda x: reference_dual.dual_pool(x, *sizes, [1] * 2),
        lambda u: F.max_pool2d(u, *sizes),
    )


def op_cases(
    maps: tuple[int, ...],
    rows: tuple[int, ...],
    scores: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> list[OpCase]:
    """Every op: on feature maps [1 + P, n, C, H, W], rows [1 + P, rows, width] of a layer norm,
    scores [1 + P, rows, width] of an attention."""
    return [
        *(
            activation(kind, maps, affine, device)
            for kind in ACTIVATIONS
            for affine in (False, True)
        ),
        layer_norm(rows, device),
        softmax(scores),
        max_pool(maps, 2, 0),
        max_pool(maps, 3, 1),
    ]
