"""The derivatives of functions of one number, each against forward mode."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support.dual_oracle import Function

import fisherfast as ff
from fisherfast.dual.rules.pointwise import SLOPES

POSITIVE = ("log", "log2", "log10", "sqrt", "rsqrt", "reciprocal", "pow.Tensor_Scalar")

HALF = torch.tensor(0.5, dtype=torch.float64)

ARGUMENTS = {
    "hardshrink": (0.5,),
    "softshrink": (0.5,),
    "threshold": (0.5, 20.0),
    "pow.Tensor_Scalar": (2.5,),
    "clamp": (-0.5, 0.8),
    "clamp.Tensor": (-HALF, 1.5 * HALF),
    "clamp_min": (0.5,),
    "clamp_max": (0.5,),
    "clamp_min.Tensor": (HALF,),
    "clamp_max.Tensor": (HALF,),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's forward mode
@pytest.mark.parametrize("name", SLOPES)
def test_slope(name):
    """Where the function is defined and has a derivative."""
    operator, _, overload = name.partition(".")
    function = getattr(getattr(torch.ops.aten, operator), overload or "default")
    x = torch.linspace(-0.9, 0.9, 31, dtype=torch.float64)[:, None]
    x = {"acosh": 1.1 + x.abs()}.get(name, 0.1 + x.abs() if name in POSITIVE else x)
    model = Function(lambda t: function(t, *ARGUMENTS.get(name, ())))
    dx = torch.full_like(x, 0.7)
    y, dy = ff.jvp(model, x, dx[None])
    with forward_ad.dual_level():
        truth = forward_ad.unpack_dual(model(forward_ad.make_dual(x, dx)))
    torch.testing.assert_close(y, truth.primal, rtol=0, atol=0)
    torch.testing.assert_close(dy[0], truth.tangent, rtol=1e-12, atol=1e-12)
    assert not ff.dual.coverage(model, x).fallbacks
