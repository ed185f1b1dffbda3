"""gradient_gram against inner products of gradients in float64."""

import pytest
import torch
from support.closeness import assert_close
from support.op_bounds import BOUNDS

from fisherfast import ops

# Relative to the same sums of magnitudes. Measured: 4e-8 in float32, 2e-15 in float64.
TOLERANCE = BOUNDS["gradient_gram"]

# Odd sizes around the panels of every instruction set (4 to 32 columns), the blocks of positions
# (128 and 256) and of depth (256): n C T D M.
SIZES = [
    (1, 1, 1, 1, 1),
    (3, 1, 5, 7, 4),
    (4, 3, 9, 17, 10),
    (2, 2, 33, 31, 33),
    (2, 1, 131, 5, 9),
    (2, 2, 7, 519, 65),
    (1, 3, 300, 3, 2),
]


def definition(a, b, other_a=None, other_b=None):
    """<G, G'> of G = sum_t b_t a_t^T, by the formula alone: [n, C, n', C']."""
    if other_a is None:
        other_a, other_b = a, b
    left = torch.einsum("itd,ictm->icmd", a.double(), b.double())
    right = torch.einsum("itd,ictm->icmd", other_a.double(), other_b.double())
    return torch.einsum("icmd,jemd->icje", left, right)


def magnitude(a, b, other_a=None, other_b=None):
    """The same of the numbers' magnitudes: what rounding errors are relative to."""
    parts = [None if part is None else part.abs() for part in (a, b, other_a, other_b)]
    return definition(*parts)


def assert_matches(got, *given):
    assert got.dtype == torch.float64
    assert_close(got, definition(*given), TOLERANCE[given[0].dtype], magnitude(*given))


def side(normal, n, C, T, D, M, **kind):
    return normal(n, T, D).to(**kind), normal(n, C, T, M).to(**kind)


# --- against the definition ----------------------------------------------------------------------


def test_by_hand(device, dtype):
    """Catches a transposed pair of columns, and positions that are multiplied with themselves
    alone: G = [[1, 2], [0, 1]] and [[3, 0], [0, 3]], [[0, 2], [0, 0]]."""
    kind = {"dtype": dtype, "device": device}
    a = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]], **kind)
    b = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]], **kind)
    other_a = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], **kind)
    other_b = torch.tensor([[[[3.0, 0.0], [0.0, 3.0]], [[0.0, 0.0], [2.0, 0.0]]]], **kind)
    assert ops.gradient_gram(a, b, other_a, other_b).tolist() == [[[[6.0, 4.0]]]]
    assert ops.gradient_gram(other_a, other_b, a, b).tolist() == [[[[6.0]], [[4.0]]]]
    assert ops.gradient_gram(other_a, other_b).tolist() == [[[[18.0, 0.0]], [[0.0, 4.0]]]]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_the_definition(normal, device, dtype, size):
    """Catches a lost tail of samples, positions, inputs or outputs, and columns that are mixed."""
    kind = {"dtype": dtype, "device": device}
    n, C, T, D, M = size
    left = side(normal, n, C, T, D, M, **kind)
    right = side(normal, n + 2, C + 1, 2 * T + 1, D, M, **kind)
    assert_matches(ops.gradient_gram(*left, *right), *left, *right)
    assert_matches(ops.gradient_gram(*left), *left)


@pytest.mark.parametrize("count", [*range(1, 36), 63, 64, 65])
def test_every_size_around_a_panel(normal, device, dtype, count):
    """Catches vector loads that run over the end of a row, one size at a time."""
    kind = {"dtype": dtype, "device": device}
    for T, D, M in ((count, 3, 2), (3, count, 2), (3, 2, count)):
        left = side(normal, 2, 2, T, D, M, **kind)
        assert_matches(ops.gradient_gram(*left), *left)


def test_more_samples_than_a_square(normal, device, dtype):
    """Catches a square of samples that is left out, and a mirror image in a wrong place."""
    left = side(normal, 41, 2, 3, 5, 4, dtype=dtype, device=device)
    right = side(normal, 37, 2, 3, 5, 4, dtype=dtype, device=device)
    assert_matches(ops.gradient_gram(*left), *left)
    assert_matches(ops.gradient_gram(*left, *right), *left, *right)


def test_symmetric_to_the_last_bit(normal, device, dtype):
    a, b = side(normal, 19, 3, 21, 40, 33, dtype=dtype, device=device)
    gram = ops.gradient_gram(a, b).reshape(57, 57)
    assert torch.equal(gram, gram.T)
    assert torch.linalg.eigvalsh(gram).min() > -TOLERANCE[dtype] * gram.trace()


def test_without_columns(normal, device, dtype):
    a, b = side(normal, 4, 1, 3, 5, 2, dtype=dtype, device=device)
    other_a, other_b = side(normal, 6, 2, 4, 5, 2, dtype=dtype, device=device)
    assert torch.equal(ops.gradient_gram(a, b[:, 0]), ops.gradient_gram(a, b)[:, 0, :, 0])
    assert ops.gradient_gram(a, b[:, 0], other_a, other_b).shape == (4, 1, 6, 2)


def test_samples_do_not_see_each_other(normal, device, dtype):
    """Catches panels that hold two samples, and zeros that become NaN: every pair has the bits that
    it has alone, and a NaN stays in its row."""
    a, b = side(normal, 5, 2, 9, 11, 10, dtype=dtype, device=device)
    whole = ops.gradient_gram(a, b, a, b)
    for i, j in ((0, 3), (4, 2)):
        alone = ops.gradient_gram(a[i, None], b[i, None], a[j, None], b[j, None])
        assert torch.equal(
            whole[i, None, :, j, None].transpose(1, 2).reshape(-1), alone.reshape(-1)
        )
    b[2, 1, 4, 3] = float("nan")
    got = ops.gradient_gram(a, b).reshape(10, 10)
    hit = torch.zeros(10, 10, dtype=torch.bool, device=device)
    hit[5], hit[:, 5] = True, True
    assert torch.equal(got.isnan(), hit)


# --- strides -------------------------------------------------------------------------------------


def test_patches_that_overlap(normal, device, dtype):
    """Views of one image, as a convolution of three rows with stride 2 sees it."""
    x = normal(3, 9, 8, dtype=dtype, device=device)
    a = x.as_strided((3, 4, 24), (72, 16, 1))
    b = normal(3, 1, 4, 5, dtype=dtype, device=device)
    assert_matches(ops.gradient_gram(a, b), a, b)
