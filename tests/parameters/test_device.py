"""On a GPU as on the CPU."""

from __future__ import annotations

import pytest
import torch
from support.parameters_small import STRUCTURES, measure
from support.parameters_zoo import NETWORKS

from fisherfast.parameters import Categorical, ElasticWeightConsolidation

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = ("shared linear", "conv2d strided", "batch norm", "embedding")
TOLERANCE = 1e-9
"""Of the largest entry, float64; sums are taken in another order."""


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_matrix(name: str, structure: str) -> None:
    """Catches kernels that differ, and numbers made on another device than they are used on."""
    model, x = NETWORKS[name].make(), NETWORKS[name].inputs(5)
    expected = measure(structure, x, model=model).to_dense()
    there = measure(structure, x.cuda(), model=model.cuda())
    assert there.diag().device.type == "cuda"
    error = (there.to_dense().cpu() - expected).abs().max()
    assert error < TOLERANCE * expected.abs().max()


def test_drawn_labels_importance_and_consolidation() -> None:
    """Catches labels that are drawn by the device, and anchors and masks that stay on the CPU."""
    model, x = NETWORKS["linear"].make(), NETWORKS["linear"].inputs(5)
    expected = measure("diag", x, "mc", model=model, samples=3).diag()
    model, x = model.cuda(), x.cuda()
    found = measure("diag", x, "mc", model=model, samples=3)
    torch.testing.assert_close(found.diag().cpu(), expected)
    keep = ElasticWeightConsolidation(strength=1.0)
    keep.consolidate(model, Categorical(), x)
    assert keep.penalty(model).item() == pytest.approx(0, abs=TOLERANCE)
    assert all(mask.device.type == "cuda" for mask in found.importance().least(0.5).values())
