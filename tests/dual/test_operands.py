"""Operands that PyTorch treats in ways of their own: promotion, repeated batches, NaN that lose."""

from __future__ import annotations

import pytest
import torch
from support.dual_oracle import Function

import fisherfast as ff

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
"""PyTorch's own, at the first use of its forward mode."""

EXACT = 1e-12
"""In float64, one operation."""


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
        torch.testing.assert_close(dy.double(), exact, rtol=1e-5, atol=1e-5)


def test_counts_with_weights():
    """Catches weights whose tangents are dropped: PyTorch calls the sum of them no derivative."""
    index = torch.tensor([0, 1, 1, 2])
    x, dx = torch.randn(4).double(), torch.randn(2, 4).double()
    y, dy = ff.jvp(Function(lambda x: torch.bincount(index, x, minlength=5)), x, dx)
    expected = torch.zeros(3, 5).double().index_add_(1, index, torch.cat([x[None], dx]))
    torch.testing.assert_close(torch.cat([y[None], dy]), expected, rtol=EXACT, atol=EXACT)
