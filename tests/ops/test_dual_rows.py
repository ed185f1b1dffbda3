"""Norms and softmax of rows far from zero or one, and the geometry of pooling."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.closeness import assert_close
from support.op_cases import channels_last
from support.op_oracle import BOUNDS, assert_right, truth_of

from fisherfast import _native, ops

LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def test_norm_of_a_mean_far_from_zero(normal, device, dtype):
    """Mean 1000 or -4000, spread 1, in numbers that both dtypes hold: the truth is that without the
    mean. Catches E[u^2] - m^2 (error 0.1 in float32), and a mean rounded to float32 (6e-5)."""
    if not _native.serves(torch.empty(0, device=device)):
        pytest.skip("plain torch runs the op: its means are rounded")
    x = ((normal(3, 2, 2000) * 2**11).round() / 2**11).to(device)  # 12 bits before the point
    offset = torch.tensor([[1000.0], [-4000.0]], dtype=torch.float64, device=device)
    truth = truth_of("dual_norm", (x,))[0]
    assert_close(ops.dual_norm((x + offset).to(dtype)), truth, 4 * BOUNDS["dual_norm"][dtype])


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("spread", [1e-12, 1e12])
def test_norm_of_a_spread_far_from_one(normal, device, dtype, spread, centre):
    """eps = 0. Catches the square of the rate, which float32 does not hold."""
    x = normal(3, 2, 100).to(device)
    x[0] *= spread
    assert_right("dual_norm", (x.to(dtype), None, None, 0.0, 1, 1, centre))


def test_norm_of_a_constant_row(device, dtype):
    """The variance is zero, never below: catches the root of a negative number."""
    x = torch.full((2, 3, 77), 0.1, dtype=dtype, device=device)
    got = ops.dual_norm(x, eps=1e-30)
    assert got.isfinite().all()
    assert got[0].abs().max() <= 77 * torch.finfo(dtype).eps / 1e-15


def test_softmax_of_exponents_out_of_range(normal, device, dtype):
    """exp(800) is infinite and exp(-800) zero in both dtypes: catches a maximum not taken off."""
    for offset in (-3e38, -800.0, 800.0, 3e38):
        x = normal(3, 20, 20, dtype=dtype, device=device)
        x[0] += offset
        for dim, log in itertools.product((1, 2), (False, True)):
            assert_right("dual_softmax", (x, dim, log))


def test_softmax_gives_denormal_numbers(device, dtype):
    """Numbers below the smallest normal one come out, rounded, and not as zero."""
    lowest = -100.0 if dtype == torch.float32 else -740.0
    x = torch.linspace(lowest, 0, 41, dtype=dtype, device=device)[None, None]
    got, truth = ops.dual_softmax(x), torch.softmax(x.double(), -1)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert 0 < got[0, 0, 0] < torch.finfo(dtype).smallest_normal
    error = (got.double() - truth).abs()
    assert (error <= 2 * torch.finfo(dtype).eps * truth + smallest).all()


def test_pool_has_the_windows_of_pytorch(device):
    """ceil_mode and not, over every small geometry. Catches a last window that begins in the right
    padding, and -1 // 2 rounded to zero."""
    shapes = itertools.product(range(1, 7), range(1, 4), range(1, 4), range(2), range(1, 4))
    checked = 0
    for size, *window in shapes:
        kernel, _, padding, _ = window
        if 2 * padding > kernel:
            continue
        x = torch.arange(2.0 * size, device=device).reshape(2, 1, 1, size)
        for ceil_mode in (False, True):
            numbers = [[number] for number in window]
            try:
                expected, index = F.max_pool1d(x[0], *numbers, ceil_mode, return_indices=True)
            except RuntimeError:
                with pytest.raises(ValueError, match="x must hold at least one window"):
                    ops.dual_pool(x, *numbers, ceil_mode=ceil_mode)
                continue
            if expected.isinf().any():  # of nothing: its index is that of no number
                assert index.max() >= size
                with pytest.raises(ValueError, match="where a window begins in the padding"):
                    ops.dual_pool(x, *numbers, ceil_mode=ceil_mode)
                continue
            assert torch.equal(ops.dual_pool(x, *numbers, ceil_mode=ceil_mode)[0], expected)
            checked += 1
    assert checked > 200


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_pool_keeps_channels_last(normal, device, dtype, spatial):
    """Slices with gaps too. Catches a copy in between, whose result would be contiguous."""
    x = channels_last(normal(6, 2, 5, *[6] * spatial, dtype=dtype, device=device))
    for one in (x, x[::2], x[:1].expand(x.shape)):
        windows = ([number] * spatial for number in (2, 2, 0, 1))
        (got,) = assert_right("dual_pool", (one, *windows, False))
        assert got.movedim(2, -1).is_contiguous()
    if spatial > 1:
        assert got[0].is_contiguous(memory_format=LAST[spatial])
