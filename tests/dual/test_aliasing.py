"""Views and copies are where PyTorch has them, whatever order a convolution leaves in memory.

A float32 convolution of dual tensors leaves its channels last, and a plain one does not: what is
written into a view must reach what it shares memory with, and nothing else.
"""

from __future__ import annotations

import pytest
import torch
from support.dual_oracle import Function
from torch import Tensor
from torch.nn.functional import conv2d, relu

import fisherfast as ff

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
"""PyTorch's own, at the first use of its forward mode."""

EXACT = 1e-5
"""In float32, a few operations; what a missed write changes is of order 1."""


CASES = {
    "flattened": (lambda y: y, lambda y: y.flatten(1)),
    "reshaped": (lambda y: y, lambda y: y.reshape(len(y), -1)),
    "contiguous": (lambda y: y, lambda y: y.contiguous()),
    "a view of a view": (lambda y: y, lambda y: y[:, :2].view(len(y), -1)),
    "a copy": (lambda y: y, lambda y: y.permute(0, 2, 3, 1).reshape(len(y), -1)),
    "below an earlier view": (lambda y: y[:, :2], lambda y: y.view(len(y), -1)),
    "above a view": (lambda y: y.flatten(1), lambda y: y),
    "strided": (lambda y: y.as_strided((len(y), 3, 4), (48, 16, 1)), lambda y: y),
    "by the order": (
        lambda y: y.ravel() if y.is_contiguous() else y.permute(0, 2, 3, 1).ravel(),
        lambda y: y,
    ),
}
"""What is returned of y, and what is written into: both are taken before the write."""


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_views_of_a_convolution(case, activated):
    """Catches views made in the order that the convolution leaves: copies where the model writes
    into a view, views where it writes into a copy."""
    read, written = CASES[case]
    weight = torch.randn(3, 2, 3, 3)
    x, dx = torch.randn(4, 2, 6, 6), torch.randn(2, 4, 2, 6, 6)

    def forward(x: Tensor) -> Tensor:
        y = conv2d(x, weight)
        y = relu(y) - 0.5 if activated else y
        seen, target = read(y), written(y)
        relu(target.mul_(2), inplace=True)
        return seen

    y, dy = ff.jvp(Function(forward), x, dx)
    expected = [torch.func.jvp(forward, (x,), (direction,)) for direction in dx]
    torch.testing.assert_close(y, expected[0][0], rtol=EXACT, atol=EXACT)
    for tangent, (_, truth) in zip(dy, expected, strict=True):
        torch.testing.assert_close(tangent, truth, rtol=EXACT, atol=EXACT)


def test_an_offset_into_the_memory_of_a_view():
    """Catches an offset that is counted from the view, where PyTorch counts from its memory."""
    model = Function(lambda x: x[:, 1:].as_strided((3, 2), (3, 1), 0))
    with pytest.raises(ff.dual.DerivativeError, match="leave storage_offset out"):
        ff.jvp(model, torch.randn(4, 3), torch.randn(1, 4, 3))
