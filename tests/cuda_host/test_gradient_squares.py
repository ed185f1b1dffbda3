"""The CUDA kernels of gradient_squares, run on the host, against patches and sums in float64."""

import pytest
import torch
from support.closeness import assert_close
from torch.nn.functional import unfold

from fisherfast import ops

# Errors relative to the largest result, float32 and float64. Measured: 3e-7 and 6e-16.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 2e-14}

# x [n, C, H, W], M, kernel, stride, padding, dilation, groups: small tiles and large ones, one and
# several of each, samples in one part and in many.
CASES = {
    "one": ((1, 1, 1, 1), 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "small tiles": ((3, 3, 5, 6), 5, (3, 2), (2, 1), (1, 0), (1, 2), 1),
    "several small tiles": ((2, 9, 4, 5), 18, (1, 2), (1, 1), (0, 1), (1, 1), 1),
    "large tiles": ((2, 8, 4, 3), 70, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "groups": ((4, 6, 5, 3), 4, (3, 1), (1, 2), (1, 0), (1, 1), 2),
    "depthwise": ((3, 5, 4, 4), 5, (2, 2), (1, 1), (0, 0), (1, 1), 5),
    "more than 64 positions": ((2, 2, 9, 11), 3, (2, 2), (1, 1), (1, 1), (1, 1), 1),
    "wide margins": ((2, 2, 2, 3), 3, (2, 2), (2, 3), (4, 5), (1, 1), 1),
}


def drawn(normal, case, dtype):
    shape, outputs, kernel, stride, padding, dilation, _ = CASES[case]
    sizes = zip(shape[2:], kernel, stride, padding, dilation, strict=True)
    out = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]
    return normal(*shape, dtype=dtype), normal(shape[0], outputs, *out, dtype=dtype)


def gradient_squares(kernels, x, g, case, **settings):
    _, _, kernel, stride, padding, dilation, groups = CASES[case]
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    with kernels.serving(**settings):
        return ops.gradient_squares(x, g, kernel, **geometry)


def definition(x, g, case):
    _, _, kernel, stride, padding, dilation, groups = CASES[case]
    patches = unfold(x.double(), kernel, dilation, padding, stride).unflatten(1, (groups, -1))
    rows = g.double().flatten(2).unflatten(1, (groups, -1))
    squares = torch.einsum("nGmt,nGdt->nGmd", rows, patches).square().sum(0)
    return squares.reshape(g.shape[1], x.shape[1] // groups, *kernel)


def assert_matches(got, x, g, case):
    assert_close(got, definition(x, g, case), TOLERANCE[x.dtype])


@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(kernels, normal, dtype, case):
    """Catches a margin that is read, a tail of a tile, positions squared one by one."""
    x, g = drawn(normal, case, dtype)
    assert_matches(gradient_squares(kernels, x, g, case), x, g, case)


@pytest.mark.parametrize("view", ["channels last", "transposed", "cut"])
def test_strided_input(kernels, normal, dtype, view):
    """Bit for bit the same: the order of the sums does not follow the strides."""
    x, g = drawn(normal, "small tiles", dtype)
    views = {
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "transposed": lambda t: t.mT.contiguous().mT,
        "cut": lambda t: torch.cat([t, t], 1).repeat_interleave(2, 3)[:, : t.shape[1], :, ::2],
    }
    expected = gradient_squares(kernels, x, g, "small tiles")
    got = gradient_squares(kernels, views[view](x), views[view](g), "small tiles")
    assert torch.equal(got, expected)


def test_no_samples(kernels, normal, dtype):
    """Zeros, not what happens to be in memory."""
    x, g = drawn(normal, "groups", dtype)
    assert gradient_squares(kernels, x[:0], g[:0], "groups").eq(0).all()


def test_small_integers_are_exact(kernels, dtype):
    """Every partial sum is an integer below 2^24: a lost or doubled sample fails."""
    x = (torch.arange(70 * 2 * 4 * 4).reshape(70, 2, 4, 4) * 37 % 5 - 2).to(dtype)
    g = (torch.arange(70 * 3 * 5 * 5).reshape(70, 3, 5, 5) * 29 % 5 - 2).to(dtype)
    got = gradient_squares(kernels, x, g, "more than 64 positions")
    assert torch.equal(got, definition(x, g, "more than 64 positions"))


@pytest.mark.parametrize("case", ["groups", "several small tiles"])
def test_blocks_take_turns(kernels, normal, dtype, case):
    """Tiles and splits beyond the largest grid."""
    x, g = drawn(normal, case, dtype)
    expected = gradient_squares(kernels, x, g, case)
    assert torch.equal(gradient_squares(kernels, x, g, case, grid=(2, 1)), expected)
