"""dual_pool against PyTorch's max pooling, whose indices say where each tangent comes from."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from ops.dual_buffers import jvp_of
from support.pairwise import DTYPES, pairwise

from fisherfast import ops
from fisherfast.ops import reference_dual

POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
TANGENTS = [0, 1, 2, 3, 4, 5, 8, 9, 13, 16]

# spatial size, kernel, stride, padding, dilation
WINDOWS = [
    ([17], [2], [2], [0], [1]),
    ([40], [3], [1], [1], [1]),
    ([75], [5], [3], [2], [2]),
    ([2], [2], [1], [1], [1]),
    ([12, 36], [2, 2], [2, 2], [0, 0], [1, 1]),
    ([15, 67], [3, 3], [2, 2], [1, 1], [1, 1]),
    ([9, 11], [3, 3], [1, 1], [1, 1], [1, 1]),
    ([13, 50], [2, 4], [3, 1], [1, 2], [4, 3]),
    ([7, 7], [7, 7], [1, 1], [0, 0], [1, 1]),
    ([1, 1], [3, 3], [1, 1], [1, 1], [1, 1]),
    ([6, 70], [1, 1], [1, 2], [0, 0], [1, 1]),
    ([5, 6, 37], [2, 2, 2], [2, 2, 2], [0, 0, 0], [1, 1, 1]),
    ([4, 7, 35], [3, 3, 3], [2, 1, 2], [1, 1, 1], [1, 2, 1]),
]


@pytest.fixture(params=[False, True], ids=["contiguous", "channels_last"])
def last(request):
    return request.param


def channels_last(x):
    """The same numbers, every slice with its channels next to each other."""
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


def assert_matches(x, *window, ceil_mode=False):
    """Bit for bit: nothing is computed."""
    truth = reference_dual.dual_pool(x, *window, ceil_mode)
    got = ops.dual_pool(x, *window, ceil_mode=ceil_mode)
    assert got.dtype == x.dtype
    torch.testing.assert_close(got, truth, rtol=0, atol=0, equal_nan=True)
    return got


# --- against PyTorch -----------------------------------------------------------------------------


def test_by_hand(device, dtype):
    """Catches a tangent pooled by itself, and the place of the last of equals."""
    kind = {"dtype": dtype, "device": device}
    x = torch.tensor([[1.0, 5.0, 2.0, 2.0], [9.0, 2.0, -3.0, 4.0]], **kind)[:, None, None]
    assert ops.dual_pool(x, [2]).flatten(1).tolist() == [[5.0, 2.0], [2.0, -3.0]]
    got = ops.dual_pool(x, [3], [2], [1])
    assert got.flatten(1).tolist() == [[5.0, 5.0], [2.0, 2.0]]


@pairwise(
    window=WINDOWS,
    channels=[1, 3, 16, 21],
    last=[False, True],
    ceil_mode=[False, True],
    dtype=DTYPES,
)
def test_windows(normal, device, dtype, window, channels, last, ceil_mode):
    """Catches windows that reach over an end, a row or a channel, and a wrong number of them."""
    size, *window = window
    x = normal(4, 2, channels, *size, dtype=dtype, device=device)
    assert_matches(channels_last(x) if last else x, *window, ceil_mode=ceil_mode)


@pairwise(width=[*range(3, 41), 63, 64, 65, 66, 67, 130], stride=[1, 2, 3], dtype=DTYPES)
def test_every_width(normal, device, dtype, width, stride):
    """Catches vectors that run over the end of a row."""
    x = normal(3, 1, 2, 5, width, dtype=dtype, device=device)
    assert_matches(x, [3, 3], [1, stride], [1, 1], [1, 1])
    assert_matches(x, [2, 2], [2, stride], [0, 0], [1, 1])


@pytest.mark.parametrize("channels", [*range(1, 36), 64, 65])
def test_every_number_of_channels(normal, device, dtype, channels):
    x = channels_last(normal(6, 2, channels, 5, 6, dtype=dtype, device=device))
    assert_matches(x, [3, 2], [2, 1], [1, 1], [1, 2])


@pytest.mark.parametrize("tangents", TANGENTS)
def test_every_number_of_tangents(normal, device, dtype, tangents, last):
    """Catches a group of tangents that is cut off, or taken from another pass."""
    x = normal(1 + tangents, 2, 3, 6, 43, dtype=dtype, device=device)
    assert_matches(channels_last(x) if last else x, [3, 3], [2, 2], [1, 1], [1, 1])


def test_number_of_windows(device):
    """PyTorch's rule, ceil_mode and not, over every small geometry. Catches a last window that
    begins in the right padding, and -1 // 2 rounded to zero."""
    shapes = itertools.product(range(1, 9), range(1, 5), range(1, 5), range(3), range(1, 4))
    checked = 0
    for size, kernel, stride, padding, dilation in shapes:
        if 2 * padding > kernel:
            continue
        x = torch.arange(2.0 * size, device=device).reshape(2, 1, 1, size)
        for ceil_mode in (False, True):
            window = ([kernel], [stride], [padding], [dilation])
            try:
                expected, index = F.max_pool1d(x[0], *window, ceil_mode, return_indices=True)
            except RuntimeError:
                with pytest.raises(ValueError, match="x must hold at least one window"):
                    ops.dual_pool(x, *window, ceil_mode=ceil_mode)
                continue
            if expected.isinf().any():  # of nothing: its index is that of no number
                assert index.max() >= size
                with pytest.raises(ValueError, match="where a window begins in the padding"):
                    ops.dual_pool(x, *window, ceil_mode=ceil_mode)
                continue
            assert torch.equal(ops.dual_pool(x, *window, ceil_mode=ceil_mode)[0], expected)
            checked += 1
    assert checked > 500


# --- ties, NaN and infinities --------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_ties_and_nan(normal, device, dtype, window, last):
    """Few values, so that most windows have equals, -0 and 0, NaN and infinities among them.
    Catches the last of equals, the first of NaN, and a NaN that a larger number replaces."""
    size, *window = window
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, float("nan"), float("inf"), -float("inf")])
    x = normal(4, 3, 17, *size, dtype=dtype, device=device)
    for choices in (2, 4, 5, 7):
        pick = torch.arange(x[0].numel(), device=device).mul(7919) % 104729 % choices
        x[0] = values.to(x)[pick].reshape(x[0].shape)
        assert_matches(channels_last(x) if last else x, *window)
    x[0] = -float("inf")
    got = assert_matches(channels_last(x) if last else x, *window)
    assert got[1:].isfinite().all()


# --- layouts and contracts -----------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_channels_last_stays_so(normal, device, dtype, spatial):
    """Slices with gaps too. Catches a copy in between, whose result would be contiguous."""
    x = channels_last(normal(6, 2, 5, *[6] * spatial, dtype=dtype, device=device))
    for one in (x, x[::2], x[:1].expand(x.shape)):
        got = assert_matches(one, *([number] * spatial for number in (2, 2, 0, 1)))
        assert got.movedim(2, -1).is_contiguous()
    if spatial > 1:
        assert got[0].is_contiguous(memory_format=LAST[spatial])


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_reference_is_max_pool(normal, window):
    size, *window = window
    x = normal(3, 2, 3, *size)
    truth = jvp_of(lambda u: POOLS[len(size)](u, *window), x)
    assert torch.equal(reference_dual.dual_pool(x, *window), truth)
