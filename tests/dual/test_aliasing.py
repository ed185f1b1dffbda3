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


def _write_flattened(y: Tensor) -> Tensor:
    y.flatten(1).relu_()
    return y


def _write_reshaped(y: Tensor) -> Tensor:
    y.reshape(len(y), -1).mul_(2)
    return y


def _write_contiguous(y: Tensor) -> Tensor:
    y.contiguous().mul_(2)
    return y


def _write_below_an_earlier_view(y: Tensor) -> Tensor:
    first = y[:, :2]
    y.view(len(y), -1).mul_(2)
    return first


def _write_above_a_view_of_a_view(y: Tensor) -> Tensor:
    y[:, :2].view(len(y), -1).mul_(2)
    return y


def _write_a_copy(y: Tensor) -> Tensor:
    y.permute(0, 2, 3, 1).reshape(len(y), -1).mul_(2)
    return y


def _write_above(y: Tensor) -> Tensor:
    flat = y.flatten(1)
    relu(y, inplace=True)
    return flat


def _strided(y: Tensor) -> Tensor:
    return y.as_strided((len(y), 3, 4), (48, 16, 1))


def _ask_for_the_order(y: Tensor) -> Tensor:
    return y.ravel() if y.is_contiguous() else y.permute(0, 2, 3, 1).ravel()


def _behind_an_activation(y: Tensor) -> Tensor:
    return _write_flattened(relu(y) - 0.5)


@pytest.mark.parametrize(
    "change",
    [
        _write_flattened,
        _write_reshaped,
        _write_contiguous,
        _write_below_an_earlier_view,
        _write_above_a_view_of_a_view,
        _write_a_copy,
        _write_above,
        _strided,
        _ask_for_the_order,
        _behind_an_activation,
    ],
    ids=lambda change: change.__name__.strip("_"),
)
def test_views_of_a_convolution(change):
    """Catches views made in the order that the convolution leaves: copies where the model writes
    into a view, views where it writes into a copy."""
    weight = torch.randn(3, 2, 3, 3)
    x, dx = torch.randn(4, 2, 6, 6), torch.randn(2, 4, 2, 6, 6)

    def forward(x: Tensor) -> Tensor:
        return change(conv2d(x, weight))

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
