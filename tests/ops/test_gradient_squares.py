"""gradient_squares against its definition in float64."""

import pytest
import torch
from support.closeness import assert_close
from support.op_bounds import BOUNDS

from fisherfast import ops
from fisherfast.ops import reference

# Relative to the sum over samples of (sum_t |g x|)^2, entry by entry. Measured: 5e-7 and 9e-16.
TOLERANCE = BOUNDS["gradient_squares"]

ONE = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}

# x [n, C, H, W], M, kernel, settings
CASES = {
    "one": ((1, 1, 1, 1), 1, (1, 1), {}),
    "3 x 3": ((5, 3, 6, 7), 4, (3, 3), {"padding": (1, 1)}),
    "1 x 1": ((5, 7, 6, 3), 9, (1, 1), {}),
    "strided": ((5, 3, 9, 8), 4, (3, 2), {"stride": (2, 3), "padding": (1, 0)}),
    "dilated": ((5, 3, 9, 8), 4, (3, 2), {"dilation": (2, 3), "padding": (0, 2)}),
    "groups": ((5, 6, 5, 4), 9, (2, 3), {"groups": 3, "padding": (1, 1)}),
    "depthwise": ((4, 19, 5, 6), 19, (3, 3), {"groups": 19, "padding": (1, 1)}),
    "depthwise, two for each": (
        (70, 3, 9, 8),
        6,
        (3, 4),
        {"stride": (2, 3), "padding": (0, 2), "dilation": (2, 1), "groups": 3},
    ),
    "few rows, many columns": ((3, 80, 4, 5), 6, (3, 3), {"padding": (1, 1), "groups": 2}),
    "everything": (
        (3, 8, 11, 10),
        6,
        (3, 4),
        {"stride": (3, 1), "padding": (2, 3), "dilation": (2, 2), "groups": 2},
    ),
    "wide margins": ((3, 2, 2, 3), 3, (2, 2), {"stride": (2, 3), "padding": (4, 5)}),
    "many rows and columns": ((3, 31, 4, 5), 150, (3, 3), {"padding": (1, 1)}),
    "many samples": ((199, 3, 3, 4), 5, (2, 2), {}),
    "many positions": ((2, 2, 47, 53), 3, (2, 2), {}),
    "line": ((3, 5, 1, 40), 6, (1, 5), {"padding": (0, 2)}),
    "one window": ((70, 3, 3, 3), 17, (3, 3), {}),
}


def out_size(shape, kernel, stride, padding, dilation, **_):
    sizes = zip(shape[2:], kernel, stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]


def drawn(normal, case, **kind):
    """x and g with channels of different size, so that two exchanged ones show; the arguments."""
    shape, outputs, kernel, settings = CASES[case]
    settings = ONE | settings
    x = normal(*shape) * torch.arange(1, shape[1] + 1).sqrt()[:, None, None]
    g = normal(shape[0], outputs, *out_size(shape, kernel, **settings))
    g = g * torch.arange(1, outputs + 1).sqrt()[:, None, None]
    return x.to(**kind), g.to(**kind), kernel, settings


def gradients(x, g, kernel, settings):
    """The gradients of every sample [n, M, C / groups, kh, kw], by autograd, in float64."""
    shape = (g.shape[1], x.shape[1] // settings["groups"], *kernel)
    weight = torch.zeros(shape, dtype=torch.float64, device=x.device, requires_grad=True)
    rows = []
    for image, gradient in zip(x.double(), g.double(), strict=True):
        y = torch.nn.functional.conv2d(image[None], weight, **settings)
        rows.append(torch.autograd.grad(y, weight, gradient[None])[0])
    return torch.stack(rows) if rows else torch.zeros(0, *shape, dtype=torch.float64)


def assert_matches(got, x, g, kernel, settings):
    truth = gradients(x, g, kernel, settings).square().sum(0)
    magnitude = gradients(x.abs(), g.abs(), kernel, settings).square().sum(0)
    assert got.dtype == torch.float64
    assert_close(got, truth, TOLERANCE[x.dtype], magnitude)


# --- against the definition ----------------------------------------------------------------------


def test_by_hand(device, dtype, route):
    """Two samples: catches squares of single positions (101), of the batch (1089), and a mean."""
    kind = {"dtype": dtype, "device": device}
    x = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, -1.0]], **kind)[:, None, None]
    g = torch.tensor([[1.0, 10.0], [2.0, 1.0]], **kind)[:, None, None]
    got = ops.gradient_squares(x, g, (1, 2))
    assert got.tolist() == [[[[21.0**2 + 2.0**2, 32.0**2 + 1.0]]]]


@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(normal, device, dtype, route, case):
    """Catches a kernel that is flipped, a margin or a tail that is lost, a group that is mixed."""
    x, g, kernel, settings = drawn(normal, case, dtype=dtype, device=device)
    assert_matches(ops.gradient_squares(x, g, kernel, **settings), x, g, kernel, settings)


@pytest.mark.parametrize("count", [*range(1, 20), 31, 32, 33, 64, 65, 127, 128, 129, 256, 257, 513])
def test_every_size_around_a_panel(normal, device, dtype, count):
    """Catches outputs, inputs or positions that are cut off, read twice or past the last."""
    for outputs, inputs, positions in ((count, 2, 15), (3, count, 15), (17, 17, count)):
        x = normal(3, inputs, 1, positions, dtype=dtype, device=device)
        g = normal(3, outputs, 1, positions, dtype=dtype, device=device)
        assert_matches(ops.gradient_squares(x, g), x, g, (1, 1), ONE)


# --- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_a_nan_reaches_its_channels_alone(normal, device, dtype, last):
    """Catches 0 * NaN in lanes that are not there, and channels that touch others."""
    x, g, kernel, settings = drawn(normal, "3 x 3", dtype=dtype, device=device)
    expected = ops.gradient_squares(x, g, kernel, **settings)
    x[2, 1, 3, 3] = float("nan")
    if last:
        x, g = (part.contiguous(memory_format=torch.channels_last) for part in (x, g))
    got = ops.gradient_squares(x, g, kernel, **settings)
    assert got[:, 1].isnan().all()
    assert torch.equal(got[:, [0, 2]], expected[:, [0, 2]])
    x[2, 1, 3, 3], g[1, 3, 2, 2] = 0.0, float("nan")
    got = ops.gradient_squares(x, g, kernel, **settings)
    assert got.isnan().flatten(1).any(1).tolist() == [False, False, False, True]


def test_the_reference_takes_samples_in_parts(normal, monkeypatch):
    """One sample at a time gives the same sum. Catches a part that is lost."""
    x, g, kernel, settings = drawn(normal, "groups")
    settings = {name: settings[name] for name in ("stride", "padding", "dilation", "groups")}
    whole = reference.gradient_squares(x, g, kernel, *settings.values())
    monkeypatch.setattr(reference, "GRADIENT_NUMBERS", 1)
    parts = reference.gradient_squares(x, g, kernel, *settings.values())
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)
