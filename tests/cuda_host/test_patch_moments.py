"""The CUDA kernels of patch_moments, run on the host, against unfolded patches in float64."""

import pytest
import torch

# Errors relative to the largest result, float32 and float64. Measured: 3e-7 and 1e-15.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 2e-14}

# Shape, kernel, stride, padding, dilation, groups: one tile of entries and several.
CASES = [
    ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((2, 4, 5, 7), (3, 2), (2, 1), (1, 3), (1, 2), 2),
    ((2, 9, 6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((3, 5, 4, 40), (1, 3), (1, 2), (0, 1), (1, 1), 5),
]


def patch_moments(kernels, x, kernel, stride, padding, dilation, groups, **settings):
    """The launcher on x [n, C, H, W] of any strides."""
    pairs = {"size": x.shape[2:], "kernel": kernel, "step": stride, "padding": padding}
    pairs |= {"dilation": dilation}
    pairs["out"] = [
        (size + 2 * pad - d * (k - 1) - 1) // s + 1
        for size, k, s, pad, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    numbers = {f"{name}{i}": pair[i] for name, pair in pairs.items() for i in (0, 1)}
    numbers |= {f"stride{i}": x.stride(i) for i in range(4)}
    numbers |= {"samples": x.shape[0], "channels": x.shape[1] // groups, "groups": groups}
    outputs = {"sums": torch.float64, "cross": torch.float64}
    got = kernels.run("patch_moments", x.dtype, outputs, x=x, **numbers, **settings)
    width = x.shape[1] // groups * kernel[0] * kernel[1]
    return got["sums"].view(groups, width), got["cross"].view(groups, width, width)


def definition(x, kernel, stride, padding, dilation, groups):
    patches = torch.nn.functional.unfold(x.double(), kernel, dilation, padding, stride)
    rows = patches.unflatten(1, (groups, -1))
    return rows.sum((0, 3)), torch.einsum("ngap,ngbp->gab", rows, rows)


def assert_matches(got, x, *geometry):
    assert torch.equal(got[1], got[1].mT)
    for result, truth in zip(got, definition(x, *geometry), strict=True):
        error = (result - truth).abs().max()
        assert error <= TOLERANCE[x.dtype] * truth.abs().max()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_definition(kernels, normal, dtype, case):
    shape, *geometry = case
    x = normal(*shape, dtype=dtype)
    assert_matches(patch_moments(kernels, x, *geometry), x, *geometry)


def test_several_splits(kernels, normal, dtype):
    """More than 4096 patches: catches a split that is lost or summed twice."""
    x, geometry = normal(2, 1, 60, 50, dtype=dtype), ((2, 2), (1, 1), (0, 1), (1, 1), 1)
    assert_matches(patch_moments(kernels, x, *geometry), x, *geometry)


def test_strided_input(kernels, normal, dtype):
    x = normal(2, 4, 6, 5, dtype=dtype)
    geometry = ((3, 3), (1, 2), (1, 1), (1, 1), 2)
    truth = patch_moments(kernels, x, *geometry)
    last = x.contiguous(memory_format=torch.channels_last)
    for got, right in zip(patch_moments(kernels, last, *geometry), truth, strict=True):
        assert torch.equal(got, right)


def test_blocks_take_turns(kernels, normal, dtype):
    x, geometry = normal(2, 6, 5, 5, dtype=dtype), ((3, 3), (1, 1), (1, 1), (1, 1), 3)
    truth = patch_moments(kernels, x, *geometry)
    for got, right in zip(patch_moments(kernels, x, *geometry, grid=(2, 1)), truth, strict=True):
        assert torch.equal(got, right)
