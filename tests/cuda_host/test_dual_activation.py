"""The CUDA kernel of dual_activation, run on the host, against the float64 reference."""

import math

import pytest
import torch
from cuda_host.dual_buffers import assert_matches, buffer
from support.pairwise import DTYPES, pairwise

from fisherfast import ops
from fisherfast.ops import reference_dual
from fisherfast.ops._dual_activation import KINDS

# Measured: 2.4e-7 and 4e-15, where the reference takes a difference of numbers near one.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}

# Parameters that float32 holds exactly: the kernel and the reference see the same numbers.
PARAMETERS = {
    "leaky_relu": (0.25,),
    "hardtanh": (-1.5, 2.0),
    "elu": (1.5, 1.0625, 0.5),
    "softplus": (2.0, 16.0),
}
KINKS = [0.0, -0.0, -1.5, 2.0, -3.0, 3.0, 8.0]  # 8: where softplus becomes linear
PIECEWISE_LINEAR = ["identity", "relu", "leaky_relu", "prelu", "hardtanh", "hardsigmoid"]
SMALL = {torch.float32: 1e-30, torch.float64: 1e-100}
SHAPES = [(1, 1, 1), (7, 1, 301), (3, 5, 7), (2, 3, 64), (5, 16, 4), (400, 3, 1), (3, 129, 1)]


def dual_activation(kernels, x, kind, output_gap=0, in_place=False, **options):
    """The result for x [1 + P, outer, C, inner], and what lies between its slices."""
    settings = {"grid": options.pop("grid", None)}
    how = (kind, *PARAMETERS.get(kind, ()))
    size = x[0].numel()
    lines = torch.full((len(x), size + output_gap), math.nan, dtype=x.dtype)
    out = x if in_place else lines[:, :size].unflatten(1, x.shape[1:])
    with kernels.serving(**settings):
        ops.dual_activation(x, *how, **options, out=out)
    return out, lines[:, size:]


def truth_of(x, kind, scale=None, shift=None, slope=None):
    vectors = (None if v is None else v.double() for v in (scale, shift, slope))
    return reference_dual.dual_activation(x.double(), kind, PARAMETERS.get(kind, ()), *vectors)


def slope_of(normal, kind, channels, dtype):
    return normal(channels, dtype=dtype) if kind == "prelu" else None


def points_of(name, normal, dtype):
    if name == "all sizes":  # from deep saturation to deep saturation
        return torch.cat([torch.linspace(-40, 40, 801), 2 * normal(200), 1e-3 * normal(100)])
    small = SMALL[dtype]
    special = [math.nan, math.inf, -math.inf, 1 / small, -1 / small, small]
    return torch.tensor(KINKS if name == "kinks" else special, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("points", ["all sizes", "kinks", "not finite or large"])
def test_every_kind(kernels, normal, dtype, kind, points):
    """Catches a wrong formula, a lost factor, cancellation, >= for > at a kink, an overflow on the
    way (exp, the cube of gelu_tanh) and a NaN that is swallowed."""
    z = points_of(points, normal, dtype).to(dtype)
    tangents = torch.stack([torch.ones_like(z), normal(len(z), dtype=dtype)])
    x = torch.cat([z[None], tangents])[:, None, None]
    slope = slope_of(normal, kind, 1, dtype)
    y, _ = dual_activation(kernels, x, kind, slope=slope)
    exact = points == "kinks" and kind in PIECEWISE_LINEAR
    tolerance = torch.finfo(dtype).eps if exact else TOLERANCE[dtype]
    assert_matches(y, truth_of(x, kind, slope=slope), tolerance)


@pairwise(shape=SHAPES, tangents=[0, 1, 4, 9], kind=["prelu", "silu"], dtype=DTYPES)
def test_scale_and_shift_of_each_channel(kernels, normal, dtype, kind, shape, tangents):
    """Catches the channel of a neighbour, a shift of the tangents, and a tangent that is left out
    (four are loaded together)."""
    x, channels = buffer(normal, dtype, (1 + tangents, *shape), gap=3), shape[1]
    scale, shift = normal(channels, dtype=dtype), normal(channels, dtype=dtype)
    vectors = {"scale": scale, "shift": shift, "slope": slope_of(normal, kind, channels, dtype)}
    y, _ = dual_activation(kernels, x, kind, **vectors)
    assert_matches(y, truth_of(x, kind, **vectors), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["identity", "tanh"])
@pytest.mark.parametrize("given", ["scale", "shift"])
def test_one_vector_alone(kernels, normal, dtype, given, kind):
    """Catches a kernel that reads the other vector, which is null."""
    x, vector = buffer(normal, dtype, (3, 2, 5, 6)), {given: normal(5, dtype=dtype)}
    y, _ = dual_activation(kernels, x, kind, **vector)
    assert_matches(y, truth_of(x, kind, **vector), TOLERANCE[dtype])


@pairwise(size=[5, 64, 1023], gap=[0, 1, 4], offset=[0, 1], dtype=DTYPES)
def test_any_alignment_gives_the_same_bits(kernels, normal, dtype, size, gap, offset):
    """Catches a vector access at an address that does not allow it, at the tail, or outside; and a
    write between the slices of y."""
    x = buffer(normal, dtype, (4, 1, 1, size), gap=gap, offset=offset)
    expected, _ = dual_activation(kernels, x.contiguous(), "gelu")
    y, between = dual_activation(kernels, x, "gelu", output_gap=gap)
    assert torch.equal(y, expected)
    assert between.isnan().all()


@pytest.mark.parametrize("tangents", [0, 2, 6])
def test_in_place(kernels, normal, dtype, tangents):
    """Catches a primal that is read after it was written."""
    x = buffer(normal, dtype, (1 + tangents, 3, 4, 9), gap=2)
    vectors = {"scale": normal(4, dtype=dtype), "shift": normal(4, dtype=dtype)}
    expected, _ = dual_activation(kernels, x, "mish", **vectors)
    y, _ = dual_activation(kernels, x, "mish", in_place=True, **vectors)
    assert torch.equal(y, expected)
