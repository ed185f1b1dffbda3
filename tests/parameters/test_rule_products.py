"""What rules know of products with vectors, against their per-sample gradients."""

from __future__ import annotations

import re

import pytest
import torch
from support.parameters_zoo import NETWORKS
from torch import Tensor

from fisherfast.parameters.backward.backpropagation import Backpropagation
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layout import ParameterLayout

ROUNDING = 1e-12
"""Relative to the largest number of the truth or of g: behind an instance norm, the gradients of a
bias cancel."""

NAMES = [name for name in NETWORKS if "former" not in name and name != "attention"]


def relative(got: Tensor, truth: Tensor, g: Tensor) -> float:
    return float(
        (got - truth).abs().max() / torch.maximum(truth.abs().max(), g.abs().max()).clamp_min(1e-30)
    )


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # PyTorch's, at the first such layer
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attribute", ["weight|bias", "weight$", "bias$"])
def test_products_and_weighted_sums(name: str, attribute: str) -> None:
    """Catches a layer whose forward or backward pass is not that of its own parameters: a missing
    bias, another padding, the padding row of an embedding, the statistics of a norm; and one whose
    weight or bias alone is measured."""
    network = NETWORKS[name]
    model, x = network.make(), network.inputs(4)
    named = model.named_parameters()
    chosen = [n for n, p in named if p.requires_grad and re.search(attribute, n)]
    if not chosen:
        pytest.skip(f"{name} has no such parameter")
    layout = ParameterLayout.of(model, chosen)
    batch = Backpropagation(model, layout, x)
    generator = torch.Generator().manual_seed(3)
    seen = []

    def visit(rule: Rule, x: Tensor, g: Tensor) -> None:
        v = [torch.randn(s, dtype=torch.float64, generator=generator) for s in rule.shapes]
        u = torch.randn(len(g), dtype=torch.float64, generator=generator)
        rows = torch.cat([part.reshape(len(g), -1) for part in rule.gradients(x, g)], dim=1)
        flat = torch.cat([part.flatten() for part in v])
        assert relative(rule.products(x, g, v), rows @ flat, g) < ROUNDING
        sums = rule.weighted_sum(x, g, u)
        assert [part.shape for part in sums] == list(rule.shapes)
        assert relative(torch.cat([part.flatten() for part in sums]), u @ rows, g) < ROUNDING
        seen.append(rule)

    vector = torch.randn(batch.outputs.shape, dtype=torch.float64, generator=generator)
    batch.visit(vector, visit)
    assert seen
