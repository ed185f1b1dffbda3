"""Compressed measurements without a network, and the truth about what they have learned."""

from __future__ import annotations

from typing import Any

import torch

from fisherfast.data import Data
from fisherfast.measurement.compressed_layer import CompressedMeter
from fisherfast.measurement.settings import MeasurementSettings
from fisherfast.model.sites import Site
from fisherfast.results.layer import LayerFisher

RIDGE = "auto"


def measured(data: Data, *, batch_size: int = 1000, **options: Any) -> CompressedMeter:
    """A compressed measurement of the data themselves, after its last pass."""
    shape = tuple(next(data.read(0, 1)).x.shape[1:])
    meter = CompressedMeter(Site("input", "data", shape))
    for condition in range(data.conditions):
        meter.observe_pilot(next(data.read(condition, 64)).x)
    meter.prepare(data, MeasurementSettings.of(data, **options))
    while True:
        for streams in data.rounds(batch_size):
            first = 0 if data.paired else meter.seen.index(0)
            for _, batches in streams:
                for offset, batch in enumerate(batches):
                    carried = {"tangents": batch.tangents, "score": batch.score}
                    meter.observe(first + offset, batch.x, **carried)
        if not meter.end_pass(data.contrast(), RIDGE):
            return meter


def estimated(data: Data, *, batch_size: int = 1000, **options: Any) -> LayerFisher:
    """The result of a compressed measurement of the data themselves."""
    return measured(data, batch_size=batch_size, **options).estimate(data, data.contrast(), RIDGE)


def information_in(
    weights: torch.Tensor, derivative: torch.Tensor, covariance: torch.Tensor
) -> torch.Tensor:
    """Linear Fisher information [P, P] of the features weights x, for weights [k, d], D [d, P] and
    S [d, d] float64."""
    D, S = weights @ derivative, weights @ covariance @ weights.T
    return D.T @ torch.linalg.solve(S, D)


def dense_krylov(
    x: torch.Tensor, derivative: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle, float64: an orthonormal basis [k, d] of the Krylov space of samples x [n, d]
    standardised by their own deviation, and that deviation [d]; no x is rare. D [d, P] is in units
    of x."""
    x = x.double()
    z = x - x.mean(0)
    variance = z.square().sum(0) / (len(x) - 1)
    std = variance.sqrt()
    assert (z.square().sum(0).square() > 16 * z.pow(4).sum(0)).all()
    z = z / std
    blocks = [derivative / std[:, None]]
    for _ in range(steps - 1):
        block = torch.linalg.qr(blocks[-1])[0]  # the same space, without its growth
        blocks.append(z.T @ (z @ block) / (len(x) - 1))
    return torch.linalg.qr(torch.cat(blocks, 1))[0].T, std
