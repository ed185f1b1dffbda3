"""The CUDA kernels of dual_norm, run on the host, against the float64 reference."""

import math

import pytest
import torch
from cuda_host.dual_buffers import assert_matches, buffer
from support.pairwise import DTYPES, pairwise

from fisherfast import ops
from fisherfast.ops import reference_dual

# Measured: 8.7e-7 and 1.8e-15.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-14}
EPS = 2.0**-10  # the same number in float32 and float64

# Rows of a warp; of a block, in registers; walked along (more than 4096 float32, 2048 float64).
WIDTHS = [1, 3, 32, 127, 200, 512, 513, 1500, 2048, 2500, 4097]


def dual_norm(kernels, x, *vectors, groups=1, inner=1, centre=1, in_place=False, **settings):
    with kernels.serving(in_place=in_place, **settings):
        options = {"eps": EPS, "groups": groups, "inner": inner, "centre": bool(centre)}
        y = ops.dual_norm(x, *vectors, **options)
    return x if in_place else y


def truth_of(x, weight=None, bias=None, groups=1, inner=1, centre=1, eps=EPS):
    weight, bias = (None if v is None else v.double() for v in (weight, bias))
    return reference_dual.dual_norm(x.double(), weight, bias, eps, groups, inner, bool(centre))


@pairwise(width=WIDTHS, tangents=[0, 1, 5], centre=[1, 0], dtype=DTYPES)
def test_matches_the_reference(kernels, normal, dtype, width, tangents, centre):
    """Layer norm and RMS norm with weights. Catches a sum over part of the row, a tangent that
    gets the sums of another, a bias on the tangents, and a mean where there should be none."""
    x = buffer(normal, dtype, (1 + tangents, 5, width), gap=3) + 0.5
    weight, bias = normal(width, dtype=dtype), normal(width, dtype=dtype)
    y = dual_norm(kernels, x, weight, bias, centre=centre)
    assert_matches(y, truth_of(x, weight, bias, centre=centre), TOLERANCE[dtype])


GROUPS = [(1, 1, 6), (4, 5, 10), (4, 1, 7), (3, 6, 18), (2, 37, 370), (3, 700, 2800), (1, 45, 4500)]


@pairwise(size=GROUPS, given=["weight", "bias", "both"], dtype=DTYPES)
def test_weights_of_groups(kernels, normal, dtype, given, size):
    """Group and instance norm, with several samples. Catches the weight of a neighbour, and a null
    vector that is read."""
    groups, inner, width = size
    x = buffer(normal, dtype, (4, 3 * groups, width))
    vectors = {name: normal(groups * width // inner, dtype=dtype) for name in ("weight", "bias")}
    if given != "both":
        vectors = {given: vectors[given]}
    y = dual_norm(kernels, x, *map(vectors.get, ("weight", "bias")), groups=groups, inner=inner)
    truth = truth_of(x, groups=groups, inner=inner, **vectors)
    assert_matches(y, truth, TOLERANCE[dtype])


@pytest.mark.parametrize("width", [100, 1000, 5000])
def test_a_mean_far_above_the_deviations(kernels, normal, dtype, width):
    """Catches a variance from the mean of the squares, and a mean rounded to the dtype: one part in
    10^8 of it is 6 % of a deviation here."""
    far = {torch.float32: 1e4, torch.float64: 1e12}[dtype]
    x = buffer(normal, dtype, (3, 3, width))
    x[0] = (x[0].double() + far).to(dtype)
    near = x.double()
    near[0] -= far  # exact; normalised rows do not depend on it
    assert_matches(dual_norm(kernels, x), truth_of(near), TOLERANCE[dtype])


def test_a_row_of_many_numbers(kernels, normal, dtype):
    """Catches sums that lose digits with the width."""
    x = buffer(normal, dtype, (2, 1, 100_001)) + 1
    assert_matches(dual_norm(kernels, x), truth_of(x), TOLERANCE[dtype])


@pytest.mark.parametrize("width", [40, 600, 4500])
def test_equal_numbers_without_eps(kernels, dtype, width):
    """Rows: catches a variance that rounding makes negative."""
    x = torch.full((2, 4, width), 0.1, dtype=dtype)
    x[0] *= torch.tensor([1.0, 3.0, 7.0, 1e3], dtype=dtype)[:, None]
    y = dual_norm(kernels, x)
    assert y.isfinite().all()
    assert y.abs().max() <= 1e3 * torch.finfo(dtype).eps / math.sqrt(EPS)


@pytest.mark.parametrize("width", [40, 600, 4500])
def test_a_nan_stays_in_its_row_and_slice(kernels, normal, dtype, width):
    """A NaN of the primal reaches its row in every slice, one of a tangent its row there."""
    x = buffer(normal, dtype, (3, 4, width))
    x[0, 1, 7] = math.nan
    x[2, 3, 9] = math.nan
    y = dual_norm(kernels, x)
    assert y[:, 1].isnan().all()
    assert y[2, 3].isnan().all()
    assert y.isnan().sum() == 4 * width


@pairwise(width=[9, 40, 1001, 4504], offset=[0, 1], dtype=DTYPES)
def test_any_alignment_gives_the_same_bits(kernels, normal, dtype, width, offset):
    """Catches a vector access at an address that does not allow it."""
    x = buffer(normal, dtype, (3, 3, width), gap=1, offset=offset)
    weight = normal(1 + width, dtype=dtype)[1:]
    expected = dual_norm(kernels, x.contiguous(), weight.clone())
    assert torch.equal(dual_norm(kernels, x, weight), expected)


@pairwise(width=[40, 600, 4500], tangents=[0, 3, 9], dtype=DTYPES)
def test_in_place(kernels, normal, dtype, width, tangents):
    """Catches a primal that is overwritten while tangents still need it: a long row takes nine of
    them in three turns."""
    x, weight = buffer(normal, dtype, (1 + tangents, 3, width)), normal(width, dtype=dtype)
    expected = dual_norm(kernels, x, weight)
    assert torch.equal(dual_norm(kernels, x, weight, in_place=1), expected)
