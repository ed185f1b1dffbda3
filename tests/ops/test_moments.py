"""Sums of products: accuracy about a pilot, the same bits whatever else is computed with them."""

import resource
import sys

import pytest
import torch
from support.op_cases import added, pair

from fisherfast import _native, ops


@pytest.mark.parametrize("op", ["moments", "spatial_moments"])
def test_a_pilot_near_the_mean_avoids_cancellation(normal, device, op):
    """Mean 1000, spread 1, float32: the covariance is right to 1e-5. Catches a pilot subtracted
    from the sums afterwards."""
    x = 1000 + normal(3000, 3, 1, 1, dtype=torch.float32, device=device)
    rows = x[:, :, 0, 0]
    if op == "moments":
        count, sums, cross = ops.moments(rows, pilot=rows.mean(0))
        assert count.tolist() == [3000]
        assert count.dtype == torch.int64
    else:
        sums, cross = (t[0] for t in ops.spatial_moments(x, pilot=x.mean(0)))
    assert sums.dtype == cross.dtype == torch.float64
    covariance = (cross - sums[:, :, None] * sums[:, None, :] / 3000) / 2999
    torch.testing.assert_close(covariance[0], rows.double().T.cov(), rtol=1e-5, atol=1e-6)


def test_more_than_2_to_the_24_rows():
    """Catches float32 sums, which stop at 2^24, and a copy of x, which the contract excludes."""
    rows = 2**26
    if not _native.build_info():
        pytest.skip("plain torch copies x; the kernel does not")
    x = torch.ones(1, 1, 1, 1).expand(rows, 1, 1, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sums, cross = ops.spatial_moments(x)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert sums.item() == cross.item() == rows
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    assert grown * unit < rows


def test_cross_products_are_symmetric_to_the_bit(normal, device, dtype):
    """Over several tiles of each. Catches the two halves computed apart."""
    x = normal(70, 100, dtype=dtype, device=device)
    gram = ops.gradient_gram(x.view(5, 70, 20), x.view(5, 2, 70, 10))
    for matrix in (
        ops.moments(x)[2],
        ops.spatial_moments(x.view(7, 40, 5, 5))[1],
        ops.patch_moments(x.view(2, 20, 25, 7), (2, 2))[1],
        gram.reshape(10, 10),
        ops.fisher_solve_backward(x.view(7, 10, 100)[:, :, :10], x.view(7, 100, 10))[0],
    ):
        assert torch.equal(matrix, matrix.mT)


def test_pairs_of_gradients_do_not_see_each_other(normal, device, dtype):
    """Every pair has the bits that it has alone: catches panels that hold two samples. Without
    columns there is one."""
    a, b = pair(normal, 5, 2, 9, 11, 10, dtype=dtype, device=device)
    whole = ops.gradient_gram(a, b, a, b)
    for i, j in ((0, 3), (4, 2)):
        alone = ops.gradient_gram(*(t[i, None] for t in (a, b)), *(t[j, None] for t in (a, b)))
        assert torch.equal(whole[i, :, j], alone[0, :, 0])
    assert torch.equal(ops.gradient_gram(a, b[:, 0]), ops.gradient_gram(a, b[:, :1])[:, 0, :, 0])
    assert ops.gradient_gram(a, b[:, 0], a, b).shape == (5, 1, 5, 2)


@pytest.mark.parametrize(
    ("dim", "steps"), [(1, [0, 2, 5]), (10, [0, 1, 17, 62, 63]), (33, [64, 200]), (130, [37, 90])]
)
@pytest.mark.parametrize("rows", [1, 130, 1300])
def test_growing_gives_the_same_bits(normal, device, dtype, rows, dim, steps):
    """The contract that makes growing worth it: a first pass with features [0, k0) and start = 0,
    then passes with more weights and start = d + k0, give the bits of one pass with all k: no entry
    depends on which others are computed with it. Nothing above the diagonal is written."""
    kind = {"dtype": dtype, "device": device}
    _, _, z, *dictionary, _, slope, _ = added(normal, rows, dim, steps[-1], **kind)

    def run(sums, cross, k, start):
        for batch in z.split(max(1, rows // 2 - 7)):
            ends = torch.linspace(0, len(batch), len(sums) + 1, device=device).long()
            ops.lift_moments_(
                sums, cross, batch, *(v[:k] for v in dictionary), offsets=ends, slope=slope,
                start=start,
            )  # fmt: skip

    def zeros(size):
        return (torch.zeros(*shape, size, device=device).double() for shape in ((16,), (2, size)))

    expected = tuple(zeros(dim + steps[-1]))
    run(*expected, steps[-1], 0)
    sums, cross = zeros(0)
    for k in steps:
        start = sums.shape[1]
        wider_sums, wider_cross = zeros(dim + k)
        wider_sums[:, :start], wider_cross[:, :start, :start] = sums, cross
        sums, cross = wider_sums, wider_cross
        run(sums, cross, k, start)
    assert torch.equal(sums, expected[0])
    assert torch.equal(cross, expected[1])
    assert not cross.triu(1).any()
