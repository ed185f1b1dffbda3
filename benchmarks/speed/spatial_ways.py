"""The ways to compute the moments of feature maps at every position: ours, and those of torch.

Each takes x [n, C, H, W] and returns sums [H, W, C] and cross [H, W, C, C].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fisherfast import ops

Pair = tuple[Tensor, Tensor]


def draw_maps(
    shape: tuple[int, int, int, int], layout: str, device: torch.device | str = "cpu"
) -> Tensor:
    """Normal feature maps float32 [n, C, H, W] in a layout, drawn without temporaries."""
    n, channels, height, width = shape
    generator = torch.Generator(device).manual_seed(n)
    if layout == "channels_last":
        x = torch.randn(n, height, width, channels, generator=generator, device=device)
        return x.permute(0, 3, 1, 2)
    return torch.randn(shape, generator=generator, device=device)


def truth_of(x: Tensor) -> Pair:
    """In float64."""
    positions = x.double().permute(2, 3, 1, 0)
    return positions.sum(-1), positions @ positions.mT


def ours(x: Tensor) -> Pair:
    """The op."""
    sums, cross = ops.spatial_moments(x)
    return sums, cross


def by_channels(x: Tensor) -> Tensor:
    """[H W, C, n], a view where H and W lie together in memory."""
    return x.permute(2, 3, 1, 0).flatten(0, 1)


def by_samples(x: Tensor) -> Tensor:
    """[H W, n, C], a view where H and W lie together in memory."""
    return x.permute(2, 3, 0, 1).flatten(0, 1)


def channels_bmm(x: Tensor, rows: Tensor) -> Pair:
    """rows [H W, C, n]."""
    cross = torch.bmm(rows, rows.mT)
    return x.sum(0).permute(1, 2, 0), cross.unflatten(0, x.shape[2:])


def samples_bmm(x: Tensor, rows: Tensor) -> Pair:
    """rows [H W, n, C]."""
    cross = torch.bmm(rows.mT, rows)
    return x.sum(0).permute(1, 2, 0), cross.unflatten(0, x.shape[2:])


def accumulated(x: Tensor) -> Pair:
    """Into an accumulator: what a user who streams batches would write."""
    rows, channels = by_channels(x), x.shape[1]
    cross = x.new_zeros(len(rows), channels, channels).baddbmm_(rows, rows.mT)
    return x.sum(0).permute(1, 2, 0), cross.unflatten(0, x.shape[2:])


def einsum(x: Tensor) -> Pair:
    """torch.einsum."""
    return x.sum(0).permute(1, 2, 0), torch.einsum("nchw,ndhw->hwcd", x, x)


WAYS: dict[str, Callable[[Tensor], Pair]] = {
    "fisherfast": ours,
    "bmm of the view [HW, C, n]": lambda x: channels_bmm(x, by_channels(x)),
    "bmm of a copy [HW, C, n]": lambda x: channels_bmm(x, by_channels(x).contiguous()),
    "bmm of the view [HW, n, C]": lambda x: samples_bmm(x, by_samples(x)),
    "bmm of a copy [HW, n, C]": lambda x: samples_bmm(x, by_samples(x).contiguous()),
    "baddbmm of the view [HW, C, n]": accumulated,
    "einsum": einsum,
}
