"""Bins of theta: intervals of one parameter, or the neighbourhoods of centres of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST_SAMPLES = 64
"""Fewest samples of a bin: four in each of 16 folds."""

CLUSTER_SAMPLES = 10_000
"""Most samples from which centres are learned."""

CLUSTER_STEPS = 30
"""Steps of k-means, which has settled long before."""


@dataclass(frozen=True)
class Bins:
    """Q bins of theta.

    Attributes:
        centres: [Q, P] float64; for one parameter the middle of each interval.
        edges: [Q + 1] float64 ascending, for one parameter; None where the nearest centre decides.
            A bin includes its lower edge, the last one both.
        scale: [P] unit of each parameter in the distance from a centre.
    """

    centres: Tensor
    edges: Tensor | None
    scale: Tensor

    @staticmethod
    def by_edges(edges: Tensor, middles: Tensor | None = None) -> Bins:
        """Make bins between edges [Q + 1], which may be infinite if the middles [Q] are given."""
        middles = (edges[1:] + edges[:-1]) / 2 if middles is None else middles
        return Bins(middles[:, None], edges, torch.ones(1, dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.centres)

    def of(self, theta: Tensor) -> Tensor:
        """Return the bin of each theta [n, P], int64 [n]; -1 outside of the edges."""
        if self.edges is None:
            scale = self.scale.to(theta)
            return torch.cdist(theta / scale, self.centres.to(theta) / scale).argmin(1)
        edges, values = self.edges.to(theta), theta[:, 0].contiguous()
        bins = torch.bucketize(values, edges, right=True) - 1
        bins = torch.where(values == edges[-1], len(self) - 1, bins)
        return torch.where((bins >= 0) & (bins < len(self)), bins, -1)

    def counts(self, theta: Tensor) -> list[int]:
        """Count the samples of each bin."""
        own = self.of(theta)
        return list(torch.bincount(own[own >= 0], minlength=len(self)).tolist())

    def merged(self, theta: Tensor, least: int = LEAST_SAMPLES) -> Bins:
        """Merge bins that hold fewer than `least` samples of these theta [n, P] with a neighbour,
        the smallest first."""
        bins = self
        while len(bins) > 1 and min(counts := bins.counts(theta)) < least:
            smallest = counts.index(min(counts))
            if bins.edges is None:
                kept = torch.arange(len(bins)) != smallest
                bins = replace(bins, centres=bins.centres[kept])
                continue
            before = smallest > 0 and (
                smallest + 1 == len(bins) or counts[smallest - 1] <= counts[smallest + 1]
            )
            inner = smallest if before else smallest + 1
            edges = torch.cat([bins.edges[:inner], bins.edges[inner + 1 :]])
            limits = edges.clamp(float(theta.min()), float(theta.max()))
            bins = Bins.by_edges(edges, (limits[1:] + limits[:-1]) / 2)
        return bins


def quantile_bins(theta: Tensor, bins: int) -> Bins:
    """Deal theta [n] to bins of about equally many samples, each with at least two values.

    Edges lie in the middle between neighbouring values, so that the samples of a grid value share a
    bin.
    """
    values, counts = theta.unique(return_counts=True)
    bins = max(min(bins, len(values) // 2), 1)
    before = counts.cumsum(0) - counts  # samples below each value
    ends, last = [], 0
    for q in range(1, bins):
        target = len(theta) * q / bins
        nearest = int((before - target).abs().argmin())
        last = max(min(nearest, len(values) - 2 * (bins - q)), last + 2)
        ends.append(last)
    first = torch.tensor(ends, dtype=torch.int64)
    inner = (values[first] + values[first - 1]) / 2
    outer = theta.new_tensor([torch.inf])
    limits = torch.cat([values[:1], inner, values[-1:]])
    edges = torch.cat([-outer, inner, outer])
    return Bins.by_edges(edges, (limits[1:] + limits[:-1]) / 2)


def cluster_bins(theta: Tensor, bins: int) -> Bins:
    """Deal theta [n, P] to bins around centres found by k-means (Lloyd 1982), from a fixed start:
    the same for the same theta, whatever the units of its entries."""
    scale = theta.std(0)
    step = -(-len(theta) // CLUSTER_SAMPLES)
    points = theta[::step] / scale
    generator = torch.Generator().manual_seed(0)
    centres = points[torch.randperm(len(points), generator=generator)[:bins]]
    for _ in range(CLUSTER_STEPS):
        nearest = torch.cdist(points, centres).argmin(1)
        counts = torch.bincount(nearest, minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return Bins(centres * scale, None, scale)


def check_edges(edges: Any) -> Tensor:
    """Return ascending edges [Q + 1] of bins.

    Raises:
        ValueError: they are not ascending, finite numbers, at least two.
    """
    values = _numbers(edges, "edges")
    rising = values.ndim == 1 and len(values) > 1 and bool((values.diff() > 0).all())
    if not rising or not bool(torch.isfinite(values).all()):
        shown = values.tolist()
        raise ValueError(f"edges must be at least two finite numbers, ascending, got {shown}")
    return values


def check_centres(at: Any, parameters: int | None) -> Tensor:
    """Return centres [Q, P] of bins, given as such or as [Q] for one parameter.

    Raises:
        ValueError: they have another shape, are not finite, or two are the same.
    """
    values = _numbers(at, "at")
    centres = values[:, None] if values.ndim == 1 and parameters in (1, None) else values
    if centres.ndim != 2 or 0 in centres.shape or parameters not in (centres.shape[1], None):
        shape = f"[Q, {'P' if parameters is None else parameters}]"
        raise ValueError(f"at must have shape {shape}, got {list(values.shape)}")
    if not bool(torch.isfinite(centres).all()):
        raise ValueError(f"at must be finite, got {centres.tolist()}")
    if len(centres.unique(dim=0)) < len(centres):
        raise ValueError(f"at must hold different centres, got {centres.tolist()}")
    return centres


def _numbers(values: Any, name: str) -> Tensor:
    given = values if isinstance(values, torch.Tensor) else torch.from_numpy(_array(values, name))
    if given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers, got {given.dtype}")
    return given.detach().cpu().double()


def _array(values: Sequence[Any] | np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be real numbers, got {values!r}")
    return np.ascontiguousarray(array, dtype=np.float64)
