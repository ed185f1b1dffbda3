"""The references, the oracles of every other test of an op, against closed forms, PyTorch's
derivatives and numbers by hand."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from support.op_cases import CASES, WINDOWS
from support.op_oracle import truth_of
from support.solve_failures import COUNT, with_failures

from fisherfast.ops import reference, reference_dual

SETTINGS = ("stride", "padding", "dilation", "groups")


def close(got, expected):
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def jvp_of(function, x):
    """Value and tangents [1 + P, ...] by PyTorch's forward mode."""
    with warnings.catch_warnings():  # it builds some rules with torch.jit.script, which is old
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        slices = [torch.func.jvp(function, (x[0],), (tangent,)) for tangent in x[1:]]
    return torch.stack([slices[0][0], *(tangent for _, tangent in slices)])


# --- systems -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 2.0])
def test_fisher_solve(systems, ridge):
    """Catches a ridge on I in place of diag C, and a wrong power of L."""
    cov, deriv = systems((4,), 9, 2)
    regular = cov + ridge * torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1))
    fisher, half, info, condition, inverse_rows, solution = reference.fisher_solve(
        cov, deriv, ridge, True, True
    )
    torch.testing.assert_close(solution, torch.linalg.solve(regular, deriv))
    torch.testing.assert_close(fisher, deriv.mT @ torch.linalg.solve(regular, deriv))
    torch.testing.assert_close(half, torch.linalg.inv(torch.linalg.cholesky(regular)) @ deriv)
    assert info.dtype == torch.int32
    assert info.tolist() == [0] * 4
    s = cov.diagonal(dim1=-2, dim2=-1).rsqrt()
    correlation = s[:, :, None] * regular * s[:, None, :]
    inverse = torch.linalg.inv(torch.linalg.cholesky(correlation))
    torch.testing.assert_close(inverse_rows, inverse.square().sum(-1))
    assert (condition <= torch.linalg.cond(correlation, 2) * (1 + 1e-12)).all()
    assert (condition >= 1).all()


def test_fisher_solve_finds_the_failed_pivots(systems):
    """Catches a failure at another pivot, or a number in place of NaN."""
    cov, deriv = systems((COUNT,), 5, 2)
    broken, pivots = with_failures(cov)
    results = reference.fisher_solve(broken, deriv, 0.0, True, True)
    assert results[2].tolist() == pivots
    for result in (*results[:2], *results[3:]):
        assert result[::2].isfinite().all()
        assert result[1::2].isnan().all()


def test_fisher_solve_backward(normal):
    """Catches G for G + G^T, and a diagonal without its factor."""
    G, X = normal(3, 2, 2), normal(3, 5, 2)
    Z = X @ (G + G.mT)
    factor = 1 + 0.3 * torch.eye(5, dtype=torch.float64)
    close(reference.fisher_solve_backward(G, X, 0.3), (-factor * (Z @ X.mT) / 2, Z))


# --- moments -------------------------------------------------------------------------------------


def test_moments(normal):
    """Catches a pilot that is not subtracted, and rows of another group."""
    x, pilot, group = normal(20, 3), normal(3), torch.arange(20) % 2
    count, sums, cross = reference.moments(x, group, 3, pilot)
    assert count.tolist() == [10, 10, 0]
    rows = [x[::2] - pilot, x[1::2] - pilot, x[:0]]
    close(sums, [part.sum(0) for part in rows])
    close(cross, [part.T @ part for part in rows])
    close(reference.moments(x)[1:], (x.sum(0)[None], (x.T @ x)[None]))


def test_spatial_moments():
    """Catches [W, H] for [H, W], a mean for a sum, and a pilot that is not subtracted."""
    x = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]], [[[5.0, 6.0]], [[7.0, 9.0]]]])
    sums, cross = reference.spatial_moments(x)
    assert sums.tolist() == [[[6.0, 10.0], [8.0, 13.0]]]
    assert cross.tolist() == [[[[26.0, 38.0], [38.0, 58.0]], [[40.0, 62.0], [62.0, 97.0]]]]
    sums, cross = reference.spatial_moments(x, torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]]]))
    assert sums.tolist() == [[[4.0, 4.0], [8.0, 5.0]]]
    assert cross.tolist() == [[[[16.0, 16.0], [16.0, 16.0]], [[40.0, 30.0], [30.0, 25.0]]]]


@pytest.mark.parametrize("case", range(6))
def test_patch_moments(normal, case):
    """The patches that a convolution with unit weights cuts out. Catches a flipped kernel, borders,
    strides and dilations that are off by one, and groups that are mixed."""
    x, kernel, *settings = CASES["patch_moments"](normal)[case]
    groups = settings[-1]
    size = kernel[0] * kernel[1]
    unit = torch.eye(size, dtype=torch.float64).reshape(size, 1, *kernel)
    channels = x.shape[1]
    options = dict(zip(SETTINGS, (*settings[:-1], channels), strict=True))
    patches = F.conv2d(x, unit.repeat(channels, 1, 1, 1), **options)  # [n, C kh kw, Ho, Wo]
    rows = patches.transpose(0, 1).flatten(1).unflatten(0, (groups, -1))
    close(reference.patch_moments(x, kernel, *settings), (rows.sum(-1), rows @ rows.mT))


def test_lift_moments():
    """Catches halves for folds, a sum that overwrites, slope on the wrong side, pilot on z."""
    kind = {"dtype": torch.float64}
    z, offsets = torch.tensor([[-2.0], [1.0], [3.0]], **kind), torch.tensor([0, 1, 3])
    vectors = (torch.tensor([[2.0]], **kind), torch.ones(1, **kind), torch.full((1,), 0.5, **kind))
    for start in (0, 1):
        sums = torch.tensor([[10.0, 20.0], [30.0, 40.0]], **kind)
        cross = torch.full((2, 2, 2), 100.0, **kind)
        reference.lift_moments_(sums, cross, z, *vectors, offsets, 0.5, start)
        # lifted: -1.5 - 0.5, 3 - 0.5, 7 - 0.5; rows 1 and 2 are of fold and half 1
        raw = (10.0, 30.0, 100.0, 100.0) if start else (8.0, 34.0, 104.0, 110.0)
        assert sums.tolist() == [[raw[0], 18.0], [raw[1], 49.0]]
        assert cross.tolist() == [
            [[raw[2], 100.0], [104.0, 104.0]], [[raw[3], 100.0], [122.0, 148.5]]
        ]  # fmt: skip


def test_lift_moments_order_of_folds(normal):
    """Folds in the order 0, 2, 4, 1, 3, slopes above one and below zero."""
    z, weight, vectors = normal(10, 2), normal(3, 2), (normal(3), normal(3))
    for slope in (-1.0, 0.0, 3.0):
        before = z @ weight.T + vectors[0]
        f = torch.cat([z, torch.where(before > 0, before, slope * before) - vectors[1]], 1)
        sums, cross = torch.zeros(5, 5).double(), torch.zeros(2, 5, 5).double()
        offsets = torch.tensor([0, 1, 3, 6, 6, 10])
        reference.lift_moments_(sums, cross, z, weight, *vectors, offsets, slope)
        close(sums, [f[rows].sum(0) for rows in ([0], [], [1, 2], [6, 7, 8, 9], [3, 4, 5])])
        close(cross, [(f[:6].T @ f[:6]).tril(), (f[6:].T @ f[6:]).tril()])


# --- gradients -----------------------------------------------------------------------------------


def test_gradient_gram(normal):
    """Catches a transposed pair of columns, and positions that are multiplied with themselves
    alone."""
    for a, b, other_a, other_b in CASES["gradient_gram"](normal)[:4]:
        G = torch.einsum("itd,ictm->icmd", a, b)
        H = G if other_a is None else torch.einsum("itd,ictm->icmd", other_a, other_b)
        got = reference.gradient_gram(a, b, other_a, other_b)
        torch.testing.assert_close(got, torch.einsum("icmd,jemd->icje", G, H))


@pytest.mark.parametrize("case", range(8))
def test_gradient_squares(normal, monkeypatch, case):
    """Autograd of each sample. Catches squares of single positions or of the batch, and a part of
    the samples that is lost: one at a time gives the same sum."""
    x, g, kernel, *settings = CASES["gradient_squares"](normal)[case]
    options = dict(zip(SETTINGS, settings, strict=True))
    shape = (g.shape[1], x.shape[1] // settings[-1], *kernel)
    weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    expected = 0
    for image, gradient in zip(x, g, strict=True):
        y = F.conv2d(image[None], weight, **options)
        expected = expected + torch.autograd.grad(y, weight, gradient[None])[0].square()
    torch.testing.assert_close(reference.gradient_squares(x, g, kernel, *settings), expected)
    monkeypatch.setattr(reference, "GRADIENT_NUMBERS", 1)
    torch.testing.assert_close(reference.gradient_squares(x, g, kernel, *settings), expected)


# --- dual ops ------------------------------------------------------------------------------------


def test_dual_activation_scales_and_shifts_by_channel(normal):
    """What a batch norm in eval mode and GELU give."""
    x, scale, shift = normal(3, 4, 6, 5), normal(6), normal(6)
    truth = jvp_of(lambda u: F.gelu(scale[:, None] * u + shift[:, None]), x)
    close(reference_dual.dual_activation(x, "gelu", (), scale, shift), truth)


def test_dual_activation_of_prelu_by_channel(normal):
    """By reverse mode: at 0 the forward mode of PyTorch has the other slope."""
    x, slope = normal(3, 4, 6, 5), normal(6)
    got = reference_dual.dual_activation(x, "prelu", slope=slope)
    primal = x[0].clone().requires_grad_()
    value = F.prelu(primal, slope)
    (gradient,) = torch.autograd.grad(value.sum(), primal)
    assert torch.equal(got, torch.cat([value.detach()[None], x[1:] * gradient]))


def test_dual_norm(normal):
    """Layer, group and RMS norm."""
    norm, (weight, bias) = reference_dual.dual_norm, (normal(12), normal(12))
    x = normal(3, 4, 12)
    close(
        norm(x, weight, bias, 1e-3), jvp_of(lambda u: F.layer_norm(u, (12,), weight, bias, 1e-3), x)
    )
    rms = norm(x, weight, eps=1e-3, centre=False)
    close(rms, jvp_of(lambda u: F.rms_norm(u, (12,), weight, 1e-3), x))
    x = normal(3, 2, 12, 5, 2)
    got = norm(x.reshape(3, 6, 40), weight, bias, 1e-3, 3, 10).reshape(x.shape)
    close(got, jvp_of(lambda u: F.group_norm(u, 3, weight, bias, 1e-3), x))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_dual_softmax(normal, dim, log):
    function = torch.log_softmax if log else torch.softmax
    x = normal(3, 4, 5, 6)
    truth = jvp_of(lambda u: function(u, dim - (dim > 0)), x)
    close(truth_of("dual_softmax", (x, dim, log))[0], truth)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_dual_pool(normal, window):
    size, *window = window
    x = normal(3, 2, 3, *size)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(size) - 1]
    truth = jvp_of(lambda u: pool(u, *window), x)
    assert torch.equal(reference_dual.dual_pool(x, *window), truth)
