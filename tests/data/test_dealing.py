"""Folds and halves of the samples: balanced, whatever the order of a file, the same for every batch
size, and what depends on them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherfast as ff
from fisherfast.data.dealing import Dealing, Place, cells_of, folds_of_half, groups_by_fold, hashed
from fisherfast.measurement.batches import Streams, scattered
from fisherfast.parallel.share import Share
from fisherfast.problems import Laplace

FOLDS = 16
SAME = nn.Hardtanh(-1e9, 1e9)  # J of a score source is read behind a layer


def folds_of(dealing: Dealing, samples: int, folds: int = FOLDS) -> torch.Tensor:
    return dealing.cells_from(0, samples) % folds


# --- who belongs where ---------------------------------------------------------------------------


@pytest.mark.parametrize("folds", [4, 6, 10, 16, 64, 300])
@pytest.mark.parametrize("samples", [1, 37, 1000, 4096])
def test_known_samples_are_dealt_evenly(folds, samples):
    """Catches folds, halves and folds of halves that differ by more than one sample."""
    cells = Dealing.of(samples, folds).cells_from(0, samples)
    assert int(cells.max()) < cells_of(folds)
    for dealt, count in (
        (cells % folds, folds),
        (cells % 2, 2),
        (cells[cells % 2 == 0] // 2 % folds, folds),
        (cells[cells % 2 == 1] // 2 % folds_of_half(folds), folds_of_half(folds)),
    ):
        counts = torch.bincount(dealt, minlength=count)
        assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize("length", [None, 20_000])
def test_folds_know_nothing_of_order_or_period(length):
    """Catches a fold that goes by the position in the file, by parity or by another remainder: the
    correlation with each is that of chance, 5 standard errors at most (6e-7 each)."""
    samples = 20_000
    numbers = torch.arange(samples)
    folds = folds_of(Dealing.of(length, FOLDS), samples)
    for period in (samples, 2, 3, 4, 5, 8, 16, 32, 64, 1000, 4096):
        position = numbers % period
        table = torch.zeros(8, FOLDS)
        part = position * min(period, 8) // period
        table.index_put_((part, folds), torch.ones(samples), accumulate=True)
        expected = table.sum(1, keepdim=True) * table.sum(0) / samples
        freedom = (min(period, 8) - 1) * (FOLDS - 1)
        square = ((table - expected).square() / expected.clamp_min(1e-9)).sum()
        assert abs(float(square) - freedom) < 5 * (2 * freedom) ** 0.5
    neighbours = (folds[1:] == folds[:-1]).double().mean()
    assert abs(float(neighbours) - 1 / FOLDS) < 5 * (15 / 256 / samples) ** 0.5


def test_streams_are_dealt_evenly_but_for_chance():
    """Catches a hash that prefers some folds, and ranks whose samples are dealt alike."""
    samples = 64_000
    dealt = [folds_of(Dealing.of(None, FOLDS, rank=rank), samples) for rank in range(2)]
    for folds in dealt:
        counts = torch.bincount(folds, minlength=FOLDS).double()
        square = float(((counts - samples / FOLDS).square() / (samples / FOLDS)).sum())
        assert square < 15 + 5 * 30**0.5
    same = float((dealt[0] == dealt[1]).double().mean())
    assert abs(same - 1 / FOLDS) < 5 * (15 / 256 / samples) ** 0.5


def test_dealing_draws_nothing():
    """Catches the random state of the process, and a dealing by other numbers of samples."""
    before = torch.get_rng_state()
    first = folds_of(Dealing.of(1234, FOLDS), 1234)
    assert torch.equal(torch.get_rng_state(), before)
    Dealing.of(77, FOLDS), Dealing.of(1234, 8)
    assert torch.equal(folds_of(Dealing.of(1234, FOLDS), 1234), first)
    assert not torch.equal(folds_of(Dealing.of(1235, FOLDS), 1234), first)
    assert hashed(torch.tensor([0, 1, 2**40])).tolist() == [
        0xE220A8397B1DCDAF & (2**63 - 1),  # of splitmix64 from seed 0, without the sign
        0x6E789E6AA1B965F4,
        hashed(torch.tensor([2**40])).item(),
    ]


def test_more_samples_than_announced_are_dealt_on():
    """Catches an index beyond the table, of a loader whose length is wrong."""
    dealing = Dealing.of(100, FOLDS)
    cells = dealing.cells_from(90, 30)
    assert torch.equal(cells[:10], dealing.cells_from(90, 10))
    assert torch.equal(cells[10:], Dealing.of(None, FOLDS).cells_from(100, 20))


def test_places_are_sorted_and_complete():
    """Catches rows between two segments, a half in the other, and an order that is not stable."""
    dealing = Dealing.of(5000, FOLDS)
    place, order = dealing.place(700, 999, FOLDS)
    cells = dealing.cells_from(700, 999)
    assert torch.equal(place.numbers, 700 + order)
    assert torch.equal(place.fold, cells[order] % FOLDS)
    in_order = [*range(0, FOLDS, 2), *range(1, FOLDS, 2)]
    assert [fold for fold, _, _ in place.segments] == in_order
    for fold, begin, end in place.segments:
        numbers = place.numbers[begin:end]
        assert bool((place.fold[begin:end] == fold).all())
        assert torch.equal(numbers, numbers.sort().values)
    even, odd = place.halves
    assert bool((place.fold[even] % 2 == 0).all())
    assert bool((place.fold[odd] % 2 == 1).all())
    assert even.stop == odd.start == 999 - (odd.stop - odd.start)
    for half, rows in enumerate(place.halves):
        own, own_order = place.half(half, 8)
        assert torch.equal(own.numbers, place.numbers[rows][own_order])
        assert torch.equal(own.fold, place.fold[rows][own_order] // 2)  # F / 2 folds: the same ones
    assert torch.equal(torch.bincount(cells % FOLDS, minlength=FOLDS), place.counts)
    assert place.end == 1699
    assert Place.in_turn(3, 5, 4)[0].fold.tolist() == [0, 2, 1, 3, 3]
    whole, _ = Dealing.of(500, FOLDS).place(0, 500, FOLDS)  # groups are dealt like samples
    assert torch.equal(groups_by_fold(500, FOLDS), whole.counts)
    for half in range(2):
        counts = groups_by_fold(500, FOLDS, half, 8)
        assert torch.equal(counts, whole.half(half, 8)[0].counts)


def test_scattered_rows_come_from_everywhere():
    """Catches rows twice, rows that are not there, and a pilot of the first rows."""
    for samples, rows in ((10, 4), (1000, 1000), (7, 20), (0, 5), (100_000, 1024)):
        numbers = scattered(samples, rows)
        assert len(numbers) == len(numbers.unique()) == min(rows, samples)
        if len(numbers):
            assert int(numbers.min()) >= 0
            assert int(numbers.max()) < samples
    parts = torch.bincount(numbers // 10_000)
    assert int(parts.min()) > 100
    assert int(torch.bincount(numbers[:256] // 10_000, minlength=10).min()) > 5


# --- batches -------------------------------------------------------------------------------------


def read(data, batch_size, **options):
    """Number, fold and value of each sample of each condition, as a measurement sees them."""
    found = [[] for _ in range(data.conditions)]
    streams = Streams(data, batch_size, folds=FOLDS, **options)
    list(streams.pilot())
    for condition, _, batch in streams:
        place = batch.place
        values = batch.x[:, 0].long()
        found[condition] += zip(
            place.numbers.tolist(), place.fold.tolist(), values.tolist(), strict=True
        )
    return [sorted(rows) for rows in found]


@pytest.mark.parametrize("kind", ["tensor", "loader", "generator", "short generator"])
def test_folds_do_not_depend_on_batches(kind):
    """Catches rows that lose their number or fold on the way, and pairs that are torn apart."""
    n = 500 if kind == "short generator" else 3000
    x = torch.arange(float(n))[:, None]

    def given(y: torch.Tensor, size: int):
        if kind == "tensor":
            return y
        if kind == "loader":
            return DataLoader(TensorDataset(y), batch_size=size)
        return lambda: iter(y.split(size))

    read_all = [
        read(ff.FiniteDifference(given(x, size), given(x + n, size), 0.1, paired=True), size)
        for size in (64, 501, 4096)
    ]
    assert read_all[0] == read_all[1] == read_all[2]
    minus, plus = read_all[0]
    length = None if kind == "generator" else n  # a stream that ends within the pilot is known
    expected = folds_of(Dealing.of(length, FOLDS), n).tolist()
    assert minus == list(zip(range(n), expected, range(n), strict=True))
    assert plus == list(zip(range(n), expected, range(n, 2 * n), strict=True))


def test_samples_of_all_ranks_are_dealt_as_those_of_one():
    """Catches folds that begin anew on a rank, of batches in turn and of shares."""
    x = torch.arange(1000.0)[:, None]
    (alone,) = read(ff.Score(x, x), 128)
    taken = [read(ff.Score(x, x), 128, share=Share(rank, 3))[0] for rank in range(3)]
    assert sorted(itertools.chain(*taken)) == alone
    lengths = (200, 700, 100)
    for rank, length in enumerate(lengths):
        before = sum(lengths[:rank])
        share = Share(rank, 1, (before,), (length,))
        own = x[before : before + length]
        streams = Streams(ff.Score(own, own), 64, folds=FOLDS, share=share)
        streams.dealings = [Dealing.of(1000, FOLDS)]
        for _, _, part in streams:
            values = part.x[:, 0].long().tolist()
            folds = part.place.fold.tolist()
            assert [alone[value][:2] for value in values] == list(zip(values, folds, strict=True))


# --- what a measurement makes of it --------------------------------------------------------------


def result(data, **settings):
    return ff.fisher_flow(SAME, data, **settings)["output"]


ERRORS = {"J": "stderr", "lower": "lower_stderr"}
SOURCES = ["tensor", "loader", "generator"]


def pairs_of(cls, kind: str, x: torch.Tensor, companion: torch.Tensor):
    """Samples and what they carry, as tensors, a loader or batches of unknown number."""
    if kind == "tensor":
        return cls(x, companion)
    if kind == "loader":
        return cls(DataLoader(TensorDataset(x, companion), batch_size=100))
    return cls(list(zip(x.split(100), companion.split(100), strict=True)))


@pytest.mark.filterwarnings("ignore::fisherfast.FisherWarning")
@pytest.mark.parametrize(("seed", "kind"), list(enumerate(SOURCES)))
def test_a_sorted_file_is_as_good_as_a_shuffled_one(seed, kind):
    """Laplace numbers, sorted. With folds by the remainder of the number J was 9, not 1 or less:
    each fold had the same samples but for neighbours, and the tangents' noise was no noise."""
    x = Laplace(1).sample(0.0, 4000, torch.Generator().manual_seed(seed)).sort(0).values
    found = result(pairs_of(ff.Pathwise, kind, x, torch.ones_like(x)))
    for name in ("J", "lower"):  # all of the information, or the linear half, as the choice falls
        J, error = float(getattr(found, name)), float(getattr(found, ERRORS[name]))
        assert 0.5 - 3 * error < J < 1 + 3 * error


@pytest.mark.filterwarnings("ignore::fisherfast.FisherWarning")
@pytest.mark.parametrize(("seed", "kind"), list(enumerate(SOURCES)))
def test_a_file_sorted_by_its_score(seed, kind):
    """Five of the ten numbers whose sum is the score: J = 1 / 2, within 3 errors."""
    x = torch.randn(4000, 10, generator=torch.Generator().manual_seed(seed))
    score = (x.sum(1, keepdim=True) / 10**0.5).double()
    order = score[:, 0].argsort()
    found = result(pairs_of(ff.Score, kind, x[order, :5], score[order]))
    for name in ("J", "lower"):
        assert abs(float(getattr(found, name)) - 0.5) < 3 * float(getattr(found, ERRORS[name]))


def gaussian(kind: str, order: torch.Tensor):
    """3000 samples of each condition, five numbers shifted by theta, in an order int64 [n]."""
    noise = torch.randn(2, 3000, 5, generator=torch.Generator().manual_seed(7))
    x, other = noise[0, order], noise[1, order]
    if kind == "independent":
        return ff.FiniteDifference(x - 0.05, other + 0.05, 0.1)
    if kind == "paired":
        return ff.FiniteDifference(x - 0.05, x.tanh() + 0.05, 0.1, paired=True)
    if kind == "pathwise":
        return ff.Pathwise(x.tanh(), 1 - x.tanh().square())
    return ff.Score(x[:, :3], x.sum(1))


KINDS = ["independent", "paired", "pathwise", "score"]


@pytest.mark.filterwarnings("ignore::fisherfast.FisherWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_samples_is_chance(kind):
    """The same samples in 8 random orders, sorted, and in blocks: J moves by half of its standard
    error at most, root mean square, and not at all for the same order."""
    generator = torch.Generator().manual_seed(1)
    orders = [torch.randperm(3000, generator=generator) for _ in range(8)]
    first = torch.randn(2, 3000, 5, generator=torch.Generator().manual_seed(7))[0, :, 0]
    orders.append(first.argsort())
    orders.append(torch.arange(3000).view(30, 100).flip(0).flatten())
    orders.append(torch.arange(3000).view(30, 100).T.flatten())
    layers = [result(gaussian(kind, order), max_features=16) for order in orders]
    J = torch.tensor([layer.value for layer in layers])
    error = torch.tensor([float(layer.stderr) for layer in layers])
    assert float((J - J[:8].mean()).square().mean().sqrt()) < 0.5 * float(error.mean())
    assert float((J[8:] - J[:8].mean()).abs().max()) < float(error.mean())
    again = result(gaussian(kind, orders[0]), max_features=16)
    for name in ("J", "stderr", "lower", "curve_J"):
        assert torch.equal(getattr(again, name), getattr(layers[0], name))
