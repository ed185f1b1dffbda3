"""Who measures which samples, and what adds up: everything of many processes but the processes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import fisherfast as ff
from fisherfast.data import Data, KeptData, sources
from fisherfast.data.dealing import Place
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.pilot import PilotMoments
from fisherfast.measurement.batches import PILOT_SAMPLES, Streams, scattered
from fisherfast.parallel.ranks import check_same
from fisherfast.parallel.share import Share, WholeData, shares_of

FOLDS = 4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


READ: list[int] = []  # the rows that were read of a `Counted`


class Counted(TensorDataset):
    """Rows that are counted when they are read."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        READ.append(index)
        return super().__getitem__(index)


def test_shares_lie_one_after_the_other():
    """Catches offsets of another rank or condition, and those made up of some of the lengths."""
    counts = [[5, 1], [0, 2], [7, 3]]
    shares, totals = zip(*(shares_of(counts, rank) for rank in range(3)), strict=True)
    assert [share.before for share in shares] == [(0, 0), (5, 1), (5, 3)]
    assert [share.own for share in shares] == [(5, 1), (0, 2), (7, 3)]
    assert set(totals) == {(12, 6)}
    assert [share.pilot_rows(0, 8) for share in shares] == [5, 0, 3]
    assert [share.pilot_rows(1, 2) for share in shares] == [1, 1, 0]
    share, total = shares_of([[5], [None]], 1)  # of unknown length: they begin anew
    assert total is None
    assert (share.before, share.own) == ((), ())
    assert share.pilot_rows(0, 8) == 8


BATCHES = (7, 3, 5, 6, 4)
SAMPLES = sum(BATCHES)


@pytest.mark.parametrize("capacity", [3, SAMPLES])
def test_processes_train_on_the_samples_of_one(capacity):
    """Catches a sample that is trained on in the place of another, one that is kept twice, a
    process that keeps more than the capacity, and one without samples that stops the others."""
    x, score = normal(2, SAMPLES, 4).float(), normal(2, SAMPLES, 2, seed=1).float()

    def add(kept: KeptSamples, rows: slice) -> None:
        place, order = Place.in_turn(rows.start, rows.stop - rows.start, FOLDS)
        for condition in range(2):
            kept.add(condition, place, x[condition, rows][order], score[condition, rows][order])

    whole, *parts = (KeptSamples(2, capacity) for _ in range(7))  # one of them has no batch
    for number, batch in enumerate(BATCHES):
        begin = sum(BATCHES[:number])
        for rank, kept in enumerate(parts):
            if rank == number:
                add(kept, slice(begin, begin + batch))
        add(whole, slice(begin, begin + batch))
    states = [part.state() for part in parts]
    assert all(sum(len(c[0]) for c in chunks) <= capacity for _, kept in states for chunks in kept)
    for part in parts:
        part.join(states, torch.device("cpu"))
    found, other, expected = parts[0].take(), parts[5].take(), whole.take()
    assert all(map(torch.equal, found, other))
    assert len(expected[0]) == -(
        -SAMPLES // (1 if capacity == SAMPLES else 4 if capacity > 3 else 16)
    )
    assert all(map(torch.equal, found, expected))


def test_a_pilot_of_one_process_keeps_its_bits():
    """Catches a pilot that is rounded on the way, and a merge that is no Chan update."""
    x = normal(50, 3) + 5
    whole, first, second, merged = (PilotMoments() for _ in range(4))
    for rows in (x[:20], x[20:]):
        whole.update(rows)
    first.update(x[:20])
    second.update(x[20:])
    merged.merge(20, first.parts(), first.rounding, first.noise, None)
    assert torch.equal(merged.standardisation().scale, first.standardisation().scale)
    merged.merge(30, second.parts(), second.rounding, second.noise, None)
    torch.testing.assert_close(merged.standardisation().mean, x.mean(0))
    torch.testing.assert_close(merged.standardisation().scale, whole.standardisation().scale)
    assert merged.count == 50


def kept(x: torch.Tensor, y: torch.Tensor) -> Data:
    data = KeptData(ff.Score(Counted(x, y)), 2**20)
    list(data.read(0, 4))
    return data


GIVEN = {
    "tensors": lambda x, y: ff.FiniteDifference(x, y, dtheta=0.1),
    "arrays": lambda x, y: ff.Score(x.numpy(), y.numpy()),
    "tangents": ff.Pathwise,
    "simulator": lambda x, y: ff.Simulator(
        lambda t, n, g: t + torch.randn(n, 2, generator=g), 0.5, samples=25
    ),
    "dataset": lambda x, y: ff.FiniteDifference(Counted(x), y, dtheta=0.1),
    "pairs": lambda x, y: ff.Score(Counted(x, y[:, :1])),
    "loader": lambda x, y: ff.Score(DataLoader(Counted(x, y[:, :1]), batch_size=4)),
    "stream": lambda x, y: ff.Score(lambda: zip(x.split(4), y[:, :1].split(4), strict=True)),
    "kept": lambda x, y: kept(x, y[:, :1]),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_every_third_batch_is_dealt(kind):
    """Catches the batch of another number, a wrong number of its first sample, and a Dataset that
    is read for the other batches."""
    data = GIVEN[kind](normal(25, 3), normal(25, 3, seed=1))
    everything = list(data.read(0, 4))
    READ.clear()
    firsts, parts = zip(*data.deal(0, 4, 1, 3), strict=True)
    assert firsts == (4, 16)
    for part, batch in zip(parts, everything[1::3], strict=True):
        for name in ("x", "tangents", "score"):
            expected = getattr(batch, name)
            assert expected is None or torch.equal(getattr(part, name), expected)
    if kind in ("dataset", "pairs"):
        assert [*range(4, 8), *range(16, 20)] == READ


def test_loaders_tell_how_much_they_yield():
    """Catches the length of the Dataset where a sampler draws a part of it, or batches are
    dropped."""
    data = TensorDataset(normal(25, 3))
    sampler = DistributedSampler(data, num_replicas=2, rank=0, shuffle=False)
    assert sources.count(DataLoader(data, batch_size=4)) == 25
    assert sources.count(DataLoader(data, batch_size=4, drop_last=True)) == 24
    assert sources.count(DataLoader(data, batch_size=4, sampler=sampler)) == 13
    assert sources.count(DataLoader(data, batch_size=None)) is None
    batches = torch.utils.data.BatchSampler(sampler, 4, drop_last=False)
    assert sources.count(DataLoader(data, batch_sampler=batches)) is None


@pytest.mark.parametrize(
    ("loader", "paired", "size"),
    [(False, True, 1), (True, False, 1), (False, False, 3), (True, True, 3)],
)
def test_streams_of_all_ranks_hold_each_sample_once(loader, paired, size):
    """Catches a batch that the pilot has read and no rank measures, one that all measure, one with
    the number of another, and pairs that are torn apart."""
    x = torch.arange(2 * 3000.0).reshape(2, 3000, 1)
    given = [DataLoader(TensorDataset(own), batch_size=128) for own in x] if loader else list(x)
    data = ff.FiniteDifference(*given, dtheta=0.1, paired=paired)
    seen = []
    for rank in range(size):
        streams = Streams(data, 128, folds=FOLDS, share=Share(rank, size))
        streams.first(64)
        pilot = list(streams.pilot())
        assert sum(len(batch) for c, _, batch in pilot if c == 0) == PILOT_SAMPLES // 2
        for c, number, part in streams:
            assert torch.equal(part.x[:, 0], 3000.0 * c + part.place.numbers)
            assert int(part.place.numbers.min()) == 128 * number
            seen.append(part.x)
    assert torch.equal(torch.cat(seen).sort(0).values, x.reshape(-1, 1))


def test_streams_of_shares_stand_between_those_of_others():
    """Catches offsets of another condition, a pilot of samples that are not this share's part of
    those of all, and a share that has another length than it announces."""
    x = normal(900, 2)
    data = ff.FiniteDifference(x[:300], x[300:], dtheta=0.1)
    share = Share(1, before=(1000, 20), own=(300, 600))
    streams = Streams(WholeData(data, [1305, 620]), 200, folds=FOLDS, share=share)
    assert [len(batch) for batch in streams.first(64)] == [64, 64]
    pilot = list(streams.pilot())
    all_numbers = scattered(1305, 1024)
    numbers = all_numbers[(all_numbers >= 1000) & (all_numbers < 1300)] - 1000
    assert len(numbers) == pytest.approx(1024 * 300 / 1305, abs=2)
    assert torch.equal(torch.cat([batch.x for c, _, batch in pilot if c == 0]), x[numbers])
    assert sum(len(batch) for c, _, batch in pilot if c == 1) == 600
    spans = [(c, int(part.place.numbers.min()), part.place.end) for c, _, part in streams]
    assert spans == [(0, 1000, 1200), (0, 1200, 1300), (1, 20, 220), (1, 220, 420), (1, 420, 620)]
    assert streams.samples == 900
    other = Share(1, before=(0, 0), own=(300, 500))
    wrong = Streams(data, 200, folds=FOLDS, share=other)
    with pytest.raises(
        ValueError, match="plus must have the 500 samples that it announces, got 60"
    ):
        list(wrong)


def test_a_share_alone_is_all_there_is():
    """Catches a share that is measured as something else without a group, and "world" where
    nothing is initialised."""
    data = ff.FiniteDifference(normal(500, 3) - 0.1, normal(500, 3, seed=1) + 0.1, dtheta=0.2)
    expected = ff.fisher_information(data, max_features=16)
    for given in (data, ff.Shard(data)):
        found = ff.fisher_information(given, max_features=16, process_group="world")
        assert torch.equal(found.J, expected.J)
    with pytest.raises(TypeError, match="data must be a FiniteDifference, Pathwise"):
        ff.Shard(normal(3, 3))


def test_what_differs_is_named_with_its_ranks():
    """Catches a difference that is not seen, or is blamed on another rank."""
    check_same([{"a": 1, "b": [2]}] * 3)
    with pytest.raises(ValueError, match="a must be the same on all ranks, got 1 on ranks 0, 2; 4"):
        check_same([{"a": 1}, {"a": 4}, {"a": 1}])
    with pytest.raises(ValueError, match="got none on rank 0; 2 on rank 1: see x"):
        check_same([{}, {"b": 2}], ": see x")
