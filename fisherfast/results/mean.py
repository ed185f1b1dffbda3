"""The mean of the results of one layer at several theta."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfast.results.layer import LayerFisher
from fisherfast.results.profile import Profile

MATRICES = ("J", "stderr", "lower", "lower_stderr", "linear", "linear_stderr", "naive")
"""Fields of a layer that hold a matrix [P, P]."""

CURVE_POINTS = 64
"""Sizes at which the mean of the curves is kept."""


def averaged(
    layers: Sequence[LayerFisher], theta: Tensor, failed: Iterable[int] = ()
) -> LayerFisher:
    """Average the results of independent samples at each point theta [Q, P], weighted by their
    numbers; those at points that failed are only in the profile."""
    profile = Profile(
        theta=theta,
        J=torch.stack([layer.J for layer in layers]),
        stderr=torch.stack([layer.stderr for layer in layers]),
        samples=torch.tensor([layer.samples for layer in layers]),
        rounding=max(layer.rounding for layer in layers),
    )
    numbers = [point for point in range(len(layers)) if point not in set(failed)]
    good = [layers[point] for point in numbers]
    weight = torch.tensor([layer.samples for layer in good], dtype=torch.float64)
    weight /= weight.sum()

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.einsum("q,q...->...", weight, torch.stack(list(values)))

    def error(values: Sequence[Tensor]) -> Tensor:
        return torch.einsum(
            "q,q...->...", weight.square(), torch.stack(list(values)).square()
        ).sqrt()

    matrices: dict[str, Any] = {
        name: (error if name.endswith("stderr") else mean)([getattr(layer, name) for layer in good])
        for name in MATRICES
    }
    covariances = [layer.error_covariance for layer in good]
    known = [covariance for covariance in covariances if covariance is not None]
    curves = _curves(good)
    responses = [layer.response for layer in good if layer.response is not None]
    replicates = good[0].replicates[:0]
    if all(len(layer.replicates) for layer in good):
        replicates = mean([layer.replicates for layer in good])
    kinds = [layer.feature_kind for layer in good]
    return replace(
        good[0],
        **matrices,
        curve_k=curves[0],
        curve_J=mean(curves[1]) if curves[1] else good[0].curve_J[:0],
        curve_stderr=error(curves[2]) if curves[2] else good[0].curve_stderr[:0],
        features=max(layer.features for layer in good),
        feature_kind=max(kinds, key=kinds.count),
        effective_dim=float(
            weight @ torch.tensor([layer.effective_dim for layer in good]).double()
        ),
        samples=sum(layer.samples for layer in layers),
        dropped=max(layer.dropped for layer in good),
        plateau=all(layer.plateau for layer in good),
        notes=_notes(layers),
        error_covariance=(
            torch.einsum("q,q...->...", weight.square(), torch.stack(known))
            if len(known) == len(good)
            else None
        ),
        response=mean(responses) if len(responses) == len(good) else None,
        compressed=any(layer.compressed for layer in good),
        carried=all(layer.carried for layer in good),
        sensitive=all(layer.sensitive for layer in good),
        rounding=profile.rounding,
        replicates=replicates,
        profile=profile,
        readout=None,  # an efficient estimate has another at each theta
    )


def _curves(layers: Sequence[LayerFisher]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return sizes at which all curves are known, and the J and errors of each there."""
    ends = [layer.curve_k for layer in layers]
    if not all(map(len, ends)):
        return ends[0][:0], [], []
    first, last = max(int(k[0]) for k in ends), min(int(k[-1]) for k in ends)
    sizes = torch.linspace(min(first, last), last, CURVE_POINTS).round().long().unique()
    rows = [(torch.searchsorted(k, sizes, right=True) - 1).clamp_min(0) for k in ends]
    values = [layer.curve_J[row] for layer, row in zip(layers, rows, strict=True)]
    errors = [layer.curve_stderr[row] for layer, row in zip(layers, rows, strict=True)]
    return sizes, values, errors


def _notes(layers: Sequence[LayerFisher]) -> tuple[str, ...]:
    """Return each note once, with the bins that it concerns; notes that differ in their numbers
    alone count as the same."""
    found: dict[str, tuple[str, list[int]]] = {}
    for point, layer in enumerate(layers):
        for note in layer.notes:
            found.setdefault(re.sub(r"[\d.]+", "#", note), (note, []))[1].append(point)
    return tuple(
        note if len(points) == len(layers) else f"{note} (bin {', '.join(map(str, points))})"
        for note, points in found.values()
    )
