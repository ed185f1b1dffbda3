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
