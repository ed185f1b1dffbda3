"""A sum of parabolas, one per parameter, as cheap as reading the parameters twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it has a half type, which is for storage only."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class Parabola:
    """1/2 sum_i F_i (w_i - m_i)^2, with F and m where the parameters are and in their dtype."""

    key: tuple[Any, ...]
    names: tuple[str, ...]
    information: tuple[Tensor, ...]
    anchors: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, Tensor],
        information: Mapping[str, Tensor],
        anchors: Mapping[str, Tensor],
    ) -> Parabola:
        """Convert float64 F and m for these parameters."""
        with torch.inference_mode(False), torch.no_grad():
            like = {
                name: at_least_float32(parameters[name].reshape(-1)[:0]) for name in information
            }
            rows = [
                tuple(kept[name].to(like[name]) for name in information)
                for kept in (information, anchors)
            ]
        return cls(cls.key_of(parameters, information), tuple(information), *rows)

    @staticmethod
    def key_of(parameters: Mapping[str, Tensor], names: Mapping[str, Any]) -> tuple[Any, ...]:
        """Changes when a parameter changes its place or dtype."""
        return tuple((parameters[name].device, parameters[name].dtype) for name in names)

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The value, differentiable with respect to the parameters any number of times."""
        found: Tensor = _Value.apply(
            self.information, self.anchors, *(parameters[name] for name in self.names)
        )
        return found


class _Value(torch.autograd.Function):
    """The forward pass computes the gradient F (w - m) and keeps it for the backward pass. All
    tensors go in one call for each operation, one kernel on a GPU (private names of torch, on which
    its own optimizers rest)."""

    @staticmethod
    def forward(
        ctx: Any, information: tuple[Tensor, ...], anchors: tuple[Tensor, ...], *w: Tensor
    ) -> Tensor:
        steps = torch._foreach_sub(w, anchors)
        forces = torch._foreach_mul(steps, information)
        ctx.save_for_backward(*w)
        ctx.information, ctx.anchors, ctx.forces = information, anchors, forces
        place = anchors[0]
        parts = [
            torch.dot(a.reshape(-1), b.reshape(-1)).to(place)
            for a, b in zip(forces, steps, strict=True)
        ]
        return 0.5 * torch.stack(parts).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a second derivative is wanted
            pairs = zip(ctx.saved_tensors, ctx.anchors, ctx.information, strict=True)
            return (None, None, *(g.to(m.device) * F * (w - m) for w, m, F in pairs))
        if len({force.device for force in ctx.forces}) == 1:
            return (None, None, *torch._foreach_mul(ctx.forces, g))
        return (None, None, *(g.to(force.device) * force for force in ctx.forces))
