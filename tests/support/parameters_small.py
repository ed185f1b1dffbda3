"""One small network whose parameters' Fisher matrix is asked for in many ways.

For properties of the matrix itself; many networks are in `parameters_zoo`.
"""

from __future__ import annotations

from typing import Any

import torch
from support.networks_zoo import seeded
from torch import Tensor, nn

import fisherfast as ff

STRUCTURES = ("diag", "block", "kfac", "full", "gram", "lowrank")
"""Structures that store F."""
LINEAR_IN_F = ("diag", "block", "full", "gram")
"""Structures that are F, or entries of it: linear in the data."""

OUTPUTS = 3
CATEGORICAL = ff.parameters.Categorical()

ROUNDING = 1e-11
"""In float64, relative to the largest entry; measured: below 2e-14."""


def network() -> nn.Module:
    """A convolution in groups, a norm and a head: two shared positions, correlations between
    layers."""

    def build() -> nn.Module:
        convolution = nn.Conv1d(2, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten()
        return nn.Sequential(*convolution, nn.LayerNorm(8), nn.Linear(8, OUTPUTS)).double()

    return seeded(build).eval()


def inputs(samples: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 2, 5, generator=generator, dtype=torch.float64)


def rows(samples: int) -> Tensor:
    """Inputs of a network that takes 4 numbers."""
    return inputs(samples)[:, 0, :4]


def labels(samples: int) -> Tensor:
    return torch.randint(OUTPUTS, (samples,), generator=torch.Generator().manual_seed(4))


def measure(
    structure: str,
    data: Any = None,
    fisher_type: str = "exact",
    *,
    model: nn.Module | None = None,
    likelihood: ff.parameters.Likelihood = CATEGORICAL,
    **settings: Any,
) -> ff.parameters.ParameterFisher:
    """The Fisher matrix of the small network, or of another; low rank keeps 4 directions."""
    if structure == "lowrank":
        settings = {"rank": 4} | settings
    return ff.parameters.fisher(
        network() if model is None else model,
        likelihood,
        inputs(7) if data is None else data,
        structure=structure,
        fisher_type=fisher_type,
        **settings,
    )


def difference(found: Tensor, truth: Tensor) -> float:
    """Relative to the largest entry of the truth."""
    return float((found - truth).abs().max() / truth.abs().max())


def blocks_of(dense: Tensor, layout: ff.parameters.ParameterLayout) -> Tensor:
    """A matrix [P, P] without the entries between modules, read off the parameters' names."""
    modules = []
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        modules += [name.rpartition(".")[0]] * shape.numel()
    return dense * torch.tensor([[a == b for a in modules] for b in modules])
