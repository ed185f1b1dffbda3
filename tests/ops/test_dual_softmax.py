"""dual_softmax against its reference in float64, the reference against PyTorch's forward mode."""

import pytest
import torch
from ops.dual_buffers import jvp_of, largest_error, skip_without_kernel
from support.op_bounds import BOUNDS
from support.pairwise import DTYPES, pairwise

from fisherfast import ops
from fisherfast.ops import reference_dual

# Largest error of a slice relative to its largest number. Measured: 2.3e-7, and
# 2.6e-15, part of it the reference's own.
TOLERANCE = BOUNDS["dual_softmax"]

WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 197, 1024, 4099]
TANGENTS = [0, 1, 2, 3, 4, 5, 9, 16]
INFINITY = float("inf")


LOG = [False, True]


def assert_matches(x, dim, log):
    truth = reference_dual.dual_softmax(x.double(), dim, log)
    got = ops.dual_softmax(x, dim, log=log)
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    # Before the mean is taken off, which may leave nothing.
    scale = truth.abs() + (1.0 if log else torch.softmax(x[0].double(), dim - (dim > 0))) * x.abs()
    assert largest_error(got, truth, scale) <= TOLERANCE[x.dtype]


# --- against the reference -----------------------------------------------------------------------


def test_by_hand(device, dtype):
    """s = [1/4, 3/4]. Catches a mean without weights, a lost factor s, and a logarithm of it."""
    third = torch.tensor(3.0, dtype=torch.float64).log().item()
    x = torch.tensor([[0.0, third], [4.0, 0.0]], dtype=dtype, device=device)
    truth = torch.tensor([[0.25, 0.75], [0.75, -0.75]], dtype=torch.float64, device=device)
    assert largest_error(ops.dual_softmax(x), truth) <= TOLERANCE[dtype]
    truth = torch.stack([truth[0].log(), torch.tensor([3.0, -1.0]).to(truth)])
    assert largest_error(ops.dual_softmax(x, log=True), truth) <= TOLERANCE[dtype]


@pairwise(width=WIDTHS, log=LOG, dtype=DTYPES)
def test_every_width(normal, device, dtype, width, log):
    """Catches a tail of a row that is lost, or summed with the numbers after it."""
    x = 2 * normal(6, 5, width, dtype=dtype, device=device)
    assert_matches(x, -1, log)
    assert_matches(x.mT.contiguous(), 1, log)


@pairwise(inner=[1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 70], log=LOG, dtype=DTYPES)
def test_every_inner_size(normal, device, dtype, inner, log):
    """Catches neighbouring rows that are lost, and rows of the next outer number."""
    assert_matches(2 * normal(4, 3, 6, inner, dtype=dtype, device=device), 2, log)


@pairwise(tangents=TANGENTS, dim=[1, 2], log=LOG, dtype=DTYPES)
def test_every_number_of_tangents(normal, device, dtype, tangents, dim, log):
    """Catches a group of tangents that is cut off, and an exponential of one that was kept."""
    assert_matches(normal(1 + tangents, 19, 37, dtype=dtype, device=device), dim, log)


@pairwise(dim=[1, 2, 3, -1, -2, -3], log=LOG, dtype=DTYPES)
def test_every_dimension(normal, device, dtype, dim, log):
    assert_matches(normal(3, 4, 5, 6, dtype=dtype, device=device), dim, log)


# --- accuracy and infinities ---------------------------------------------------------------------


@pairwise(dim=[1, 2], log=LOG, dtype=DTYPES)
def test_a_million_numbers(normal, device, dtype, dim, log):
    """Catches sums in float32 of one number after another (error 1e-3)."""
    skip_without_kernel(device, "its sums are those of torch")
    shape = (3, 2, 1_000_003) if dim == 2 else (2, 300_007, 3)
    assert_matches(normal(*shape, dtype=dtype, device=device), dim, log)


@pairwise(offset=[-3e38, -800.0, 800.0, 3e38], dim=[1, 2], log=LOG, dtype=DTYPES)
def test_exponents_out_of_range(normal, device, dtype, offset, dim, log):
    """exp(800) is infinite and exp(-800) zero in both dtypes: catches a maximum not taken off."""
    x = normal(3, 20, 20, dtype=dtype, device=device)
    x[0] += offset
    assert_matches(x, dim, log)


def test_denormal_results(device, dtype):
    """Numbers below the smallest normal one come out, rounded, and not as zero."""
    lowest = -100.0 if dtype == torch.float32 else -740.0
    x = torch.linspace(lowest, 0, 41, dtype=dtype, device=device)[None, None]
    got, truth = ops.dual_softmax(x), torch.softmax(x.double(), -1)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert 0 < got[0, 0, 0] < torch.finfo(dtype).smallest_normal
    error = (got.double() - truth).abs()
    assert (error <= 2 * torch.finfo(dtype).eps * truth + smallest).all()


@pairwise(dim=[1, 2], log=LOG, dtype=DTYPES)
def test_minus_infinity_is_a_mask(normal, device, dtype, dim, log):
    """Masked entries have s = 0 and give nothing to the others. Catches -inf - -inf."""
    x = normal(4, 23, 23, dtype=dtype, device=device)
    hidden = torch.ones(23, 23, dtype=torch.bool, device=device).triu(1)
    masked = x.clone()
    masked[0] = masked[0].masked_fill(hidden if dim == 2 else hidden.T, -INFINITY)
    got = ops.dual_softmax(masked, dim, log=log)
    truth = reference_dual.dual_softmax(masked.double(), dim, log)
    seen = ~(hidden if dim == 2 else hidden.T)
    assert largest_error(got[:, seen], truth[:, seen], 1 + truth[:, seen].abs()) <= TOLERANCE[dtype]
    assert got[0][~seen].eq(-INFINITY if log else 0).all()
    if not log:
        assert got[:, ~seen].eq(0).all()


@pairwise(value=[float("nan"), INFINITY, None], dim=[1, 2], log=LOG, dtype=DTYPES)
def test_rows_without_a_value(normal, device, dtype, value, dim, log):
    """As in PyTorch, NaN fills the row of a NaN, of inf and of -inf alone; no other row."""
    x = normal(6, 21, 21, dtype=dtype, device=device)
    expected = ops.dual_softmax(x, dim, log=log)
    row = x[0, 4] if dim == 2 else x[0, :, 4]
    if value is None:
        row.fill_(-INFINITY)
    else:
        row[20] = value
    plain = (torch.log_softmax if log else torch.softmax)(x[0], dim - 1)
    got = ops.dual_softmax(x, dim, log=log)
    torch.testing.assert_close(got[0], plain, equal_nan=True)
    got, expected = (t if dim == 2 else t.mT for t in (got, expected))
    others = torch.arange(21) != 4
    assert torch.equal(got[:, others], expected[:, others])
    assert got[1:, 4].isnan().all()


# --- contracts -----------------------------------------------------------------------------------


def test_a_single_number_has_all_the_weight(device, dtype):
    got = ops.dual_softmax(torch.ones(3, 1, 1, dtype=dtype, device=device))
    assert got.flatten().tolist() == [1, 0, 0]


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("log", LOG)
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_reference_is_softmax(normal, dim, log):
    function = torch.log_softmax if log else torch.softmax
    x = normal(3, 4, 5, 6)
    truth = jvp_of(lambda u: function(u, dim - (dim > 0)), x)
    torch.testing.assert_close(reference_dual.dual_softmax(x, dim, log), truth)
