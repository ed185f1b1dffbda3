"""lift_moments_ against its definition in float64, bit for bit while it grows.

Features of row i: f = [z_i | leaky_relu(weight z_i + bias) - pilot]. Rows are sorted by fold in the
order 0, 2, ..., 1, 3, ...; fold g belongs to half g % H.
"""

import math

import pytest
import torch
from support.closeness import assert_close
from support.op_bounds import BOUNDS
from support.pairwise import pairwise

from fisherfast import ops

# Errors relative to the largest entry, as for moments.
TOLERANCE = BOUNDS["lift_moments_"]


def features(z, weight, bias, pilot, slope):
    """[n, K] in float64."""
    z, weight, bias, pilot = (t.double() for t in (z, weight, bias, pilot))
    before = z @ weight.T + bias
    return torch.cat([z, torch.where(before > 0, before, slope * before) - pilot], 1)


def folds_of(offsets):
    """The fold [n] of each row."""
    folds = len(offsets) - 1
    order = torch.tensor([*range(0, folds, 2), *range(1, folds, 2)], device=offsets.device)
    return order.repeat_interleave(offsets.diff())


def uneven(rows, folds, device="cpu"):
    """Offsets [F + 1] of segments of many lengths, some of them empty."""
    weight = torch.tensor([0.0 if g % 5 == 3 and folds > 4 else 1.0 + g % 3 for g in range(folds)])
    ends = (weight.cumsum(0) / weight.sum() * rows).round().long()
    return torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(device)


def definition(sums, cross, z, weight, bias, pilot, *, offsets=None, slope=0.7, start=0):
    """What sums and cross must be afterwards, in float64 and row by row of folds and halves."""
    f = features(z, weight, bias, pilot, slope)
    sums, cross = sums.clone(), cross.clone()
    none = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    row_fold = none if offsets is None else folds_of(offsets)
    for fold in range(len(sums)):
        sums[fold, start:] += f[row_fold == fold].sum(0)[start:]
    for half in range(len(cross)):
        rows = f[row_fold % len(cross) == half]
        cross[half, start:] += (rows.T @ rows).tril()[start:]
    return sums, cross


def assert_matches(got, truth, dtype):
    for result, expected in zip(got, truth, strict=True):
        assert result.dtype == torch.float64
        assert_close(result, expected, TOLERANCE[dtype])


@pytest.fixture
def inputs(normal, device, dtype):
    """inputs(n, d, k) -> z, weight, bias, pilot, at the sizes that a dictionary has."""

    def draw(rows, dim, lifted):
        kind = {"dtype": dtype, "device": device}
        weight = normal(lifted, dim, **kind) / max(dim, 1) ** 0.5
        return normal(rows, dim, **kind), weight, normal(lifted, **kind), normal(lifted, **kind)

    return draw


@pytest.fixture
def accumulators(normal, device):
    """accumulators(F, H, K) -> sums, cross that hold something already, upper triangle as well."""

    def draw(folds, halves, size):
        return normal(folds, size, device=device), normal(halves, size, size, device=device)

    return draw


@pytest.fixture
def matches(accumulators, dtype):
    """Adds moments to accumulators, compares with the definition, and returns both pairs."""

    def check(arguments, folds=4, halves=2, **options):
        before = accumulators(folds, halves, arguments[0].shape[1] + len(arguments[1]))
        got = tuple(t.clone() for t in before)
        assert ops.lift_moments_(*got, *arguments, **options) is None
        assert_matches(got, definition(*before, *arguments, **options), dtype)
        return before, got

    return check


def zeros(folds, halves, size, device):
    kind = {"dtype": torch.float64, "device": device}
    return torch.zeros(folds, size, **kind), torch.zeros(halves, size, size, **kind)


# --- against the definition ----------------------------------------------------------------------


def test_by_hand(device, dtype):
    """Catches halves for folds, a sum that overwrites, slope on the wrong side, pilot on z."""
    kind = {"dtype": dtype, "device": device}
    z = torch.tensor([[-2.0], [1.0], [3.0]], **kind)
    offsets = torch.tensor([0, 1, 3], device=device)
    weight = torch.tensor([[2.0]], **kind)
    bias, pilot = torch.tensor([1.0], **kind), torch.tensor([0.5], **kind)
    sums = torch.tensor([[10.0, 20.0], [30.0, 40.0]], dtype=torch.float64, device=device)
    cross = torch.full((2, 2, 2), 100.0, dtype=torch.float64, device=device)
    result = ops.lift_moments_(sums, cross, z, weight, bias, pilot, slope=0.5, offsets=offsets)
    # lifted: -1.5 - 0.5, 3 - 0.5, 7 - 0.5; rows 1 and 2 are of fold and half 1
    assert result is None
    assert sums.tolist() == [[8.0, 18.0], [34.0, 49.0]]
    assert cross.tolist() == [[[104.0, 100.0], [104.0, 104.0]], [[110.0, 100.0], [122.0, 148.5]]]


@pytest.mark.parametrize(("folds", "halves"), [(1, 1), (2, 2), (16, 2), (16, 1), (3, 2), (1, 2)])
@pytest.mark.parametrize("rows", [1, 2, 1000, 3001])
def test_folds_and_halves(inputs, matches, device, rows, folds, halves):
    """Catches segments in the order of the folds, empty ones that shift the others, rows of the
    other half in a tile, and a lost tail of rows."""
    matches(inputs(rows, 10, 21), folds, halves, offsets=uneven(rows, folds, device))


@pytest.mark.parametrize("fold", [0, 1, 2, 3])
def test_all_rows_in_one_fold(inputs, matches, device, fold):
    """Catches a half that is assumed to have rows."""
    end = 1 + [0, 2, 1, 3].index(fold)
    matches(inputs(700, 3, 9), offsets=torch.tensor([0] * end + [700] * (5 - end), device=device))


@pairwise(dim=[1, 10, 33, 130], lifted=[0, 1, 63, 200])
def test_sizes(inputs, matches, device, dim, lifted):
    """Catches the edges of tiles, in the product, in the triangle and between raw and lifted."""
    matches(inputs(517, dim, lifted), 16, offsets=uneven(517, 16, device))


@pytest.mark.parametrize("size", [*range(1, 35), 47, 48, 49, 64, 65])
def test_every_small_size(inputs, matches, device, size):
    """All K from 1 on, split into raw and lifted features in turn."""
    dim = 1 + size * 7 % size if size > 1 else 1
    matches(inputs(37, dim, size - dim), offsets=uneven(37, 4, device))


@pytest.mark.parametrize("slope", [0.7, -1.0, 1.0, 0.0, 3.0])
def test_slopes(inputs, matches, slope):
    """Catches max(x, slope x), which is wrong for slopes above 1. Without offsets all rows are of
    fold 0."""
    matches(inputs(200, 7, 20), slope=slope)


# --- batches and growing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "lifted", "steps"),
    [(1, 5, [0, 2]), (10, 40, [13]), (10, 63, [0, 1, 17, 62]), (33, 200, [64]), (130, 90, [37])],
)
@pytest.mark.parametrize("rows", [1, 130, 1300])
def test_growing_gives_the_same_bits(inputs, device, rows, dim, lifted, steps):
    """The contract that makes growing worth it: a first pass with features [0, k0) and start = 0,
    then passes with more weights and start = d + k0, give the bits of one pass with all k: no entry
    depends on which others are computed with it.
    """
    z, weight, bias, pilot = inputs(rows, dim, lifted)
    batches = z.split(max(1, rows // 2 - 7))

    def run(sums, cross, k, start):
        for batch in batches:
            options = {"offsets": uneven(len(batch), 16, device), "start": start}
            ops.lift_moments_(sums, cross, batch, weight[:k], bias[:k], pilot[:k], **options)

    whole_sums, whole_cross = zeros(16, 2, dim + lifted, device)
    run(whole_sums, whole_cross, lifted, 0)
    sums, cross = zeros(16, 2, 0, device)
    start = 0
    for k in (*steps, lifted):
        wider_sums, wider_cross = zeros(16, 2, dim + k, device)
        wider_sums[:, :start], wider_cross[:, :start, :start] = sums, cross
        sums, cross = wider_sums, wider_cross
        run(sums, cross, k, start)
        start = dim + k
    assert torch.equal(sums, whole_sums)
    assert torch.equal(cross.tril(), whole_cross.tril())


@pytest.mark.parametrize("start", [0, 5, 10, 13, 26, 39, 40])
def test_only_rows_from_start_on_are_touched(inputs, matches, device, start):
    """Catches old features that are counted twice, and writes above the diagonal."""
    options = {"offsets": uneven(100, 4, device), "start": start}
    (sums, cross), got = matches(inputs(100, 10, 30), **options)
    assert torch.equal(got[0][:, :start], sums[:, :start])
    assert torch.equal(got[1][:, :start], cross[:, :start])
    assert torch.equal(got[1].triu(1), cross.triu(1))


# --- properties ----------------------------------------------------------------------------------


def test_no_rows(inputs, matches):
    for before, got in zip(*matches(inputs(0, 3, 5)), strict=True):
        assert torch.equal(got, before)


@pytest.mark.parametrize("rows", [100, 2000])
def test_a_nan_reaches_its_fold_and_its_half_only(inputs, device, rows):
    """The last row is of fold 3 of 4, half 1. Catches 0 * NaN from masked rows."""
    z, *dictionary = inputs(rows, 5, 8)
    clean, got = zeros(4, 2, 13, device), zeros(4, 2, 13, device)
    offsets = uneven(rows, 4, device)
    ops.lift_moments_(*clean, z, *dictionary, offsets=offsets)
    z[-1, 2] = math.nan
    ops.lift_moments_(*got, z, *dictionary, offsets=offsets)
    sums, cross = got
    assert torch.equal(sums[[0, 1, 2]], clean[0][[0, 1, 2]])
    assert torch.equal(cross[0].tril(), clean[1][0].tril())
    assert sums[3].isnan().tolist() == [False, False, True, False, False] + [True] * 8
    others = [0, 1, 3, 4]
    assert cross[1][others][:, others].tril().isfinite().all()
    assert cross[1][2, :3].isnan().all()
    valid = torch.ones(8, 13, dtype=torch.bool, device=device).tril(5)
    assert cross[1][5:][valid].isnan().all()
