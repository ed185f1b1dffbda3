"""dual_norm against its reference in float64, the reference against PyTorch's forward mode."""

import pytest
import torch
import torch.nn.functional as F
from ops.dual_buffers import jvp_of, largest_error, skip_without_kernel
from support.op_bounds import BOUNDS
from support.pairwise import DTYPES, pairwise

from fisherfast import ops
from fisherfast.ops import reference_dual

# Largest error of a slice relative to its largest number. Measured: 1.5e-7 and 7.3e-16.
TOLERANCE = BOUNDS["dual_norm"]

WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 257, 1023, 1024, 4099]
TANGENTS = [0, 1, 2, 3, 4, 5, 9, 16]


def assert_matches(x, weight=None, bias=None, offset=0.0, **options):
    """The truth is that of x - offset, which must be exact and change nothing."""
    wide, w, b = (None if v is None else v.double() for v in (x, weight, bias))
    truth = reference_dual.dual_norm(wide - offset, w, b, **options)
    # Before h mean(h v) is taken off, which may leave nothing.
    centred = wide - wide.mean(-1, keepdim=True) if options.get("centre", True) else wide
    rate = (centred[0].square().mean(-1, keepdim=True) + options.get("eps", 1e-5)).rsqrt()
    largest_weight = 1.0 if w is None else w.abs().max().item()
    got = ops.dual_norm(x, weight, bias, **options)
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    scale = truth.abs() + largest_weight * (rate * centred).abs()
    assert largest_error(got, truth, scale) <= TOLERANCE[x.dtype]


def affine(normal, size, **kind):
    """A weight and a bias with another number for every entry."""
    return 1 + 0.5 * normal(size, **kind), normal(size, **kind)


# --- against the reference -----------------------------------------------------------------------


def test_by_hand(device, dtype):
    """Catches std for variance, a variance over width - 1, and a tangent of the mean alone."""
    x = torch.tensor([[[1.0, 3.0]], [[1.0, 0.0]], [[5.0, 5.0]]], dtype=dtype, device=device)
    got = ops.dual_norm(x, eps=3.0)  # m = 2, r = 1/2, h = [-1/2, 1/2]
    assert got[0].tolist() == [[-0.5, 0.5]]
    assert got[1].tolist() == [[0.1875, -0.1875]]  # (v - 1/2 - h (-1/4)) / 2
    assert got[2].tolist() == [[0.0, 0.0]]
    got = ops.dual_norm(x, eps=4.0, centre=False)  # r = 1/3, h = [1/3, 1]
    expected = [[1 / 3, 1.0], [1 / 3 * (1 - 1 / 18), -1 / 18], [5 / 3 * 7 / 9, 5 / 3 / 3]]
    truth = torch.tensor(expected, dtype=torch.float64, device=device)[:, None]
    assert largest_error(got, truth) <= TOLERANCE[dtype]


@pairwise(width=WIDTHS, centre=[True, False], dtype=DTYPES)
def test_every_width(normal, device, dtype, width, centre):
    """Catches a tail of a row that is lost, or summed with the numbers after it."""
    x = normal(6, 5, width, dtype=dtype, device=device) + 0.5
    weight, bias = affine(normal, width, dtype=dtype, device=device)
    for eps in (0.125, 2.0**-17):
        assert_matches(x, weight, bias, eps=eps, centre=centre)


@pytest.mark.parametrize("tangents", TANGENTS)
def test_every_number_of_tangents(normal, device, dtype, tangents):
    """Catches a group of tangents that is cut off."""
    x = normal(1 + tangents, 3, 37, dtype=dtype, device=device)
    assert_matches(x, *affine(normal, 37, dtype=dtype, device=device))


@pytest.mark.parametrize("which", ["weight", "bias", "neither"])
def test_weight_and_bias_are_optional(normal, device, dtype, which):
    """Catches a null pointer that is read, and a bias that reaches the tangents."""
    x = normal(3, 4, 19, dtype=dtype, device=device)
    vector = normal(19, dtype=dtype, device=device)
    assert_matches(x, **({} if which == "neither" else {which: vector}))
    grouped = normal(3, 4, 20, dtype=dtype, device=device)
    vector = normal(8, dtype=dtype, device=device)
    options = {} if which == "neither" else {which: vector}
    assert_matches(grouped, **options, groups=2, inner=5)


@pytest.mark.parametrize(("groups", "channels", "positions"), [
    (1, 3, 5), (2, 6, 1), (3, 3, 49), (4, 8, 16), (5, 10, 33), (2, 2, 300), (1, 1, 1),
])  # fmt: skip
def test_group_norm_weights(normal, device, dtype, groups, channels, positions):
    """Catches the weight of a neighbour at the border of a channel, and rows of another group."""
    x = normal(4, 3 * groups, channels // groups * positions, dtype=dtype, device=device)
    weight, bias = affine(normal, channels, dtype=dtype, device=device)
    assert_matches(x, weight, bias, groups=groups, inner=positions)


@pytest.mark.parametrize(
    ("groups", "width", "inner"), [(4, 6, 8), (6, 10, 4), (4, 9, 6), (6, 5, 3)]
)
def test_a_weight_may_reach_into_the_next_row(normal, device, dtype, groups, width, inner):
    """Catches weights that are counted from the start of each row."""
    x = normal(2, 2 * groups + 1, width, dtype=dtype, device=device)
    weight, bias = affine(normal, groups * width // inner, dtype=dtype, device=device)
    assert_matches(x, weight, bias, groups=groups, inner=inner)


# --- accuracy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [256, 1_000_003])
def test_a_mean_far_from_zero(normal, device, dtype, width):
    """Mean 1000 or -4000, spread 1, in numbers that both dtypes hold. Catches E[u^2] - m^2 (error
    0.1 in float32), a mean rounded to float32 (6e-5), and sums of a million numbers one after
    another (1e-2)."""
    skip_without_kernel(device, "its means are rounded")
    x = (normal(3, 2, width) * 2**11).round() / 2**11  # 12 bits before the point, 11 after it
    offset = torch.tensor([[1000.0], [-4000.0]], dtype=torch.float64)
    assert_matches((x + offset).to(device, dtype), offset=offset.to(device))


@pytest.mark.parametrize("spread", [1e-12, 1e12])
def test_a_spread_far_from_one(normal, device, dtype, spread):
    """eps = 0. Catches the square of the rate, which float32 does not hold."""
    x = normal(3, 2, 100).to(device)
    x[0] *= spread
    for centre in (True, False):
        assert_matches(x.to(dtype), eps=0.0, centre=centre)


def test_a_constant_row(device, dtype):
    """The variance is zero, never below: catches the root of a negative number."""
    x = torch.full((2, 3, 77), 0.1, dtype=dtype, device=device)
    got = ops.dual_norm(x, eps=1e-30)
    assert got.isfinite().all()
    assert got[0].abs().max() <= 77 * torch.finfo(dtype).eps / 1e-15


def test_a_nan_stays_in_its_row(normal, device, dtype):
    """Catches sums that are shared by rows. A NaN in a tangent leaves the others alone."""
    x = normal(6, 4, 30, dtype=dtype, device=device)
    expected = ops.dual_norm(x)
    x[0, 1, 7] = x[3, 2, 29] = float("nan")
    got = ops.dual_norm(x)
    bad = torch.zeros(6, 4, dtype=torch.bool, device=device)
    bad[:, 1] = bad[3, 2] = True
    assert torch.equal(got[~bad], expected[~bad])
    assert got[bad].isnan().all()


# --- contracts -----------------------------------------------------------------------------------


def test_a_single_number_is_its_own_mean(device, dtype):
    assert ops.dual_norm(torch.ones(3, 1, 1, dtype=dtype, device=device)).eq(0).all()


# --- the reference -------------------------------------------------------------------------------


def test_reference_is_layer_norm(normal):
    x, (weight, bias) = normal(3, 4, 12), affine(normal, 12)
    truth = jvp_of(lambda u: F.layer_norm(u, (12,), weight, bias, 1e-3), x)
    torch.testing.assert_close(reference_dual.dual_norm(x, weight, bias, 1e-3), truth)


def test_reference_is_group_norm(normal):
    x, (weight, bias) = normal(3, 2, 6, 5, 4), affine(normal, 6)
    truth = jvp_of(lambda u: F.group_norm(u, 3, weight, bias, 1e-3), x)
    got = reference_dual.dual_norm(x.reshape(3, 6, 40), weight, bias, 1e-3, 3, 20)
    torch.testing.assert_close(got.reshape(x.shape), truth)


def test_reference_is_rms_norm(normal):
    x, weight = normal(3, 4, 12), normal(12)
    truth = jvp_of(lambda u: F.rms_norm(u, (12,), weight, 1e-3), x)
    torch.testing.assert_close(reference_dual.dual_norm(x, weight, eps=1e-3, centre=False), truth)
