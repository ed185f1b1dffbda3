"""Operands that PyTorch treats in ways of their own: promotion, NaN that lose, views and copies.

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

EXACT = 1e-12
"""In float64, one operation."""

SINGLE = 1e-5
"""In float32, a few operations; what a missed write changes is of order 1."""


def _tangents(function, x, dx):
    return torch.stack([torch.func.jvp(function, (x,), (direction,))[1] for direction in dx])


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("function", [torch.fmax, torch.fmin, torch.maximum, torch.minimum])
def test_extremes_of_two_operands(function, swapped):
    """Catches equal operands that share where PyTorch lets one win, and the tangent of a NaN that
    lost."""
    other = torch.tensor([1.0, 2.0, 0.0]).double()
    if function in (torch.fmax, torch.fmin):
        other = torch.cat([other, torch.tensor([torch.nan]).double()])
    x, dx = torch.ones(len(other)).double(), torch.randn(2, len(other)).double()

    def forward(x):
        return function(other, x) if swapped else function(x, other)

    y, dy = ff.jvp(Function(forward), x, dx)
    assert torch.equal(y, forward(x))
    torch.testing.assert_close(dy, _tangents(forward, x, dx), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("operation", [torch.add, torch.sub, torch.mul, torch.div])
def test_numbers_of_another_dtype(operation):
    """Catches a float64 tensor without dimensions that turns a float32 network into float64."""
    x, dx = torch.rand(4, 3) + 1, torch.randn(2, 4, 3)
    for function in (
        lambda x: operation(x, x.double().mean()),
        lambda x: operation(x.double().mean(), x),
    ):
        y, dy = ff.jvp(Function(function), x, dx)
        assert y.dtype == dy.dtype == function(x).dtype == torch.float32
        exact = _tangents(function, x.double(), dx.double())
        torch.testing.assert_close(dy.double(), exact, rtol=SINGLE, atol=SINGLE)


def test_counts_with_weights():
    """Catches weights whose tangents are dropped: PyTorch calls the sum of them no derivative."""
    index = torch.tensor([0, 1, 1, 2])
    x, dx = torch.randn(4).double(), torch.randn(2, 4).double()
    y, dy = ff.jvp(Function(lambda x: torch.bincount(index, x, minlength=5)), x, dx)
    expected = torch.zeros(3, 5).double().index_add_(1, index, torch.cat([x[None], dx]))
    torch.testing.assert_close(torch.cat([y[None], dy]), expected, rtol=EXACT, atol=EXACT)


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
"""For each case, the part of y that is returned and the part that is overwritten; both are taken
before the write."""


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
    torch.testing.assert_close(y, forward(x), rtol=SINGLE, atol=SINGLE)
    torch.testing.assert_close(dy, _tangents(forward, x, dx), rtol=SINGLE, atol=SINGLE)


def test_an_offset_into_the_memory_of_a_view():
    """Catches an offset that is counted from the view, where PyTorch counts from its memory."""
    model = Function(lambda x: x[:, 1:].as_strided((3, 2), (3, 1), 0))
    with pytest.raises(ff.dual.DerivativeError, match="leave storage_offset out"):
        ff.jvp(model, torch.randn(4, 3), torch.randn(1, 4, 3))
