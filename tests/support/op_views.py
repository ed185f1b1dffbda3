"""Arguments of an op with the same numbers in other places of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def _unaligned(x: Tensor) -> Tensor:
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].view(x.shape).copy_(x)


def _expanded(x: Tensor) -> Tensor:
    """One column or, of more than two dimensions, one slice in the place of all."""
    return (x[:1] if x.dim() > 2 else x[..., :1]).expand(x.shape)


def _far_apart(x: Tensor) -> Tensor:
    """The last slice more than 2^31 numbers behind the first: memory that is never touched."""
    if len(x) < 2 or x.dtype != torch.float32 or x.device.type != "cpu":
        return x
    step = 2**31 // (len(x) - 1) + 1
    storage = torch.empty((len(x) - 1) * step + x[0].numel())
    strides = (step, *torch.empty(x.shape[1:], device="meta").stride())
    return storage.as_strided(x.shape, strides).copy_(x)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second slice": lambda x: x.repeat_interleave(2, 0)[::2],
    "slices apart": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]] if x.dim() > 1 else x,
    "columns cut": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every second number": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "slices last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "channels last": lambda x: x.movedim(-3, -1).contiguous().movedim(-1, -3) if x.dim() > 2 else x,
    "unaligned": _unaligned,
    "far apart": _far_apart,
    "expanded": lambda x: _expanded(x) if x.is_floating_point() else x,
}


def seen_through(view: str, op: str, call: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yields the arguments with all tensors in another layout, then with each of them alone; the
    accumulators of an op that changes them stay contiguous."""
    kept = 2 if op.endswith("_") else 0
    places = [i for i, a in enumerate(call) if isinstance(a, Tensor) and i >= kept]
    for chosen in (places, *([place] for place in places if len(places) > 1)):
        yield tuple(VIEWS[view](a) if i in chosen else a for i, a in enumerate(call))
