"""Who measures which samples, and what adds up: everything of many processes but the processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import fisherfast as ff
from fisherfast.data import Data, KeptData, sources
from fisherfast.data.dealing import Place
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.features import Lift
from fisherfast.estimation.fold_moments import FoldMoments
from fisherfast.estimation.krylov import KrylovSpace
from fisherfast.estimation.maps import MapMoments
from fisherfast.estimation.pilot import PilotMoments, Standardisation
from fisherfast.measurement.batches import PILOT_SAMPLES, Streams, scattered
from fisherfast.parallel.ranks import check_same, ranks_of
from fisherfast.parallel.share import Share, WholeData, shares_of

FOLDS, RAW = 4, 5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counted(Dataset):
    """Rows that are counted when they are read."""

    def __init__(self, x: torch.Tensor, *more: torch.Tensor) -> None:
        self._tensors = (x, *more)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self._tensors[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        self.read.append(index)
        return tuple(tensor[index] for tensor in self._tensors)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_batches_are_dealt_to_one_rank_each(size):
    """Catches a batch that two ranks measure, or none, and ranks without work where there is some
    for all: one batch of each of two conditions."""
    for stream in range(2):
        begins = [Share(rank, size).begin(stream) for rank in range(size)]
        assert sorted(begins) == list(range(size))
    busy = [any(Share(rank, 2).begin(stream) == 0 for stream in range(2)) for rank in range(2)]
    assert all(busy)


def test_shares_lie_one_after_the_other():
    """Catches offsets of another rank or condition."""
    counts = [[5, 1], [0, 2], [7, 3]]
    shares, totals = zip(*(shares_of(counts, rank) for rank in range(3)), strict=True)
    assert [share.before for share in shares] == [(0, 0), (5, 1), (5, 3)]
    assert [share.own for share in shares] == [(5, 1), (0, 2), (7, 3)]
    assert set(totals) == {(12, 6)}
    assert [share.pilot_rows(0, 8) for share in shares] == [5, 0, 3]
    assert [share.pilot_rows(1, 2) for share in shares] == [1, 1, 0]


def test_shares_of_unknown_length_begin_anew():
    """Catches an offset that is made up of some of the lengths."""
    share, total = shares_of([[5], [None]], 1)
    assert total is None
    assert (share.before, share.own) == ((), ())
    assert share.pilot_rows(0, 8) == 8


BATCHES = (7, 3, 5, 6, 4)
SAMPLES = sum(BATCHES)
KINDS = {
    "independent": (2, {}),
    "paired": (2, {"paired": True}),
    "tangents": (1, {"tangents": 2}),
    "score": (1, {"score": 2}),
}


def deal(
    whole: Any, parts: list[Any], conditions: int, add: Callable[[Any, slice, int], None]
) -> None:
    """Add all batches to the whole, and in turn to its parts; what is left in the first part is
    what many processes have after adding up."""
    for number in range(len(BATCHES)):
        rows = slice(sum(BATCHES[:number]), sum(BATCHES[: number + 1]))
        for condition in range(conditions):
            add(whole, rows, condition)
            add(parts[number % len(parts)], rows, condition)
    for mine, *others in zip(*(part.shared_sums() for part in parts), strict=True):
        for other in others:
            mine += other


def placed(rows: slice, *columns: torch.Tensor | None) -> tuple[Place, list[torch.Tensor | None]]:
    """The place of rows that are dealt in turn, and those of columns [..., n, k] in its order."""
    place, order = Place.in_turn(rows.start, rows.stop - rows.start, FOLDS)
    return place, [None if c is None else c[..., rows, :][..., order, :] for c in columns]


def carried_by(kind: str, size: int) -> torch.Tensor | None:
    if kind == "tangents":
        return normal(2, SAMPLES, size, seed=1)
    return normal(SAMPLES, 2, seed=1) if kind == "score" else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [0, RAW + 2])
def test_moments_of_processes_are_those_of_one(kind, known):
    """Catches counts of own samples alone, a sum that is not shared, and one of a known feature
    that is shared again."""
    conditions, settings = KINDS[kind]
    x, carried = normal(2, SAMPLES, RAW), carried_by(kind, RAW)
    lift = Lift(normal(7, RAW, seed=2), normal(7, seed=3), torch.zeros(7, dtype=torch.float64))

    def add(moments: FoldMoments, rows: slice, condition: int) -> None:
        place, (raw, extra) = placed(rows, x[condition], carried)
        own = lift.leading(moments.size - RAW)
        moments.update(condition, raw, own, extra, place)
        if kind == "paired" and condition:
            held = [x[c, rows] for c in range(conditions)]
            moments.update_products([torch.cat([raw, own(raw)], 1) for raw in held])

    def begin() -> FoldMoments:
        moments = FoldMoments(known or RAW + 7, conditions, folds=FOLDS, **settings)
        if known:
            for condition in range(conditions):
                add(moments, slice(0, SAMPLES), condition)
            moments = moments.grown(RAW + 7)
        return moments

    whole, parts = begin(), [begin(), begin(), begin()]
    deal(whole, parts, conditions, add)
    found = parts[0]
    assert found.seen == whole.seen == [SAMPLES] * conditions
    assert torch.equal(found.counts, whole.counts)
    torch.testing.assert_close(found.sums, whole.sums)
    torch.testing.assert_close(found.products, whole.products)
    torch.testing.assert_close(found.cross.tril(), whole.cross.tril())
    if carried is not None:
        assert type(found.carried) is type(whole.carried)
        for name in ("sums", "score_sums", "score_cross")[: 3 if kind == "score" else 1]:
            torch.testing.assert_close(getattr(found.carried, name), getattr(whole.carried, name))


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_processes_are_those_of_one(kind):
    """Catches the same at each position of a map."""
    conditions, settings = KINDS[kind]
    settings = {"paired": False} | settings
    x, carried = normal(2, SAMPLES, 11, 2, 3), carried_by(kind, 66)

    def add(moments: MapMoments, rows: slice, condition: int) -> None:
        place, (flat, extra) = placed(rows, x[condition].flatten(1), carried)
        if kind == "tangents":
            extra = extra.unflatten(-1, (11, 2, 3))
        moments.update(condition, flat.unflatten(1, (11, 2, 3)), extra, place)

    whole, *parts = (
        MapMoments(pilot_of(66), (11, 2, 3), conditions, folds=FOLDS, **settings) for _ in range(3)
    )
    deal(whole, parts, conditions, add)
    contrast = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)[:conditions]
    pairs = [
        (whole.covariance()[0], parts[0].covariance()[0]),
        *zip(whole.derivatives(contrast), parts[0].derivatives(contrast), strict=True),
    ]
    for expected, found in pairs:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["independent", "tangents", "score"])
def test_krylov_spaces_of_processes_are_that_of_one(kind):
    """Catches products or counts of own samples alone: other vectors, from the first pass on; and a
    process without a sample of its own that lists fewer sums."""
    conditions, _ = KINDS[kind]
    x, carried = normal(2, SAMPLES, 40) + 1, carried_by(kind, 40)
    pilot = pilot_of(40)

    def add(space: KrylovSpace, rows: slice, condition: int) -> None:
        extra = None if carried is None else carried[..., rows, :]
        also = {"tangents": extra} if kind == "tangents" else {"score": extra}
        space.observe(condition, x[condition, rows], **also)

    whole, *parts = (
        KrylovSpace(
            pilot,
            conditions=conditions,
            parameters=1 if kind == "independent" else 2,
            steps=3,
            dtype=torch.float64,
            scored=kind == "score",
        )
        for _ in range(4)
    )
    contrast = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    if kind != "independent":
        contrast = torch.zeros(1, 2, dtype=torch.float64)
    idle = [len(part.shared_sums()) for part in parts]
    for _ in range(3):
        deal(whole, parts, conditions, add)
        for part in parts[1:]:
            for mine, theirs in zip(part.shared_sums(), parts[0].shared_sums(), strict=True):
                mine.copy_(theirs)
        more = [space.advance(contrast) for space in (whole, *parts)]
        assert len(set(more)) == 1
    assert len(set(idle)) == 1
    assert len(whole) == 3 * (1 if kind == "independent" else 2)
    torch.testing.assert_close(parts[2].projection(), whole.projection(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("capacity", [3, 7, SAMPLES])
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


def pilot_of(width: int) -> Standardisation:
    """Of activations with mean 0 and variance 1."""
    scale = torch.ones(width, dtype=torch.float64)
    return Standardisation(torch.zeros_like(scale), scale, scale > 0, 1e-12, 1e-12)


def given(kind: str) -> tuple[Data, Counted | None]:
    """Data of 25 samples, and what counts how many of them are read."""
    x, y = normal(25, 3), normal(25, 3, seed=1)
    if kind == "tensors":
        return ff.FiniteDifference(x, y, dtheta=0.1), None
    if kind == "arrays":
        return ff.Score(x.numpy(), y.numpy()), None
    if kind == "tangents":
        return ff.Pathwise(x, y), None
    if kind == "simulator":
        return ff.Simulator(
            lambda t, n, g: t + torch.randn(n, 2, generator=g), 0.5, samples=25
        ), None
    counted = Counted(x) if kind == "dataset" else Counted(x, y[:, :1])
    if kind == "dataset":
        return ff.FiniteDifference(counted, y, dtheta=0.1), counted
    if kind == "pairs":
        return ff.Score(counted), counted
    if kind == "loader":
        return ff.Score(DataLoader(counted, batch_size=4)), None
    kept = KeptData(ff.Score(counted), 2**20)
    list(kept.read(0, 4))
    return kept, None


GIVEN = ["tensors", "arrays", "tangents", "simulator", "dataset", "pairs", "loader", "kept"]


@pytest.mark.parametrize("kind", GIVEN)
def test_every_third_batch_is_dealt(kind):
    """Catches the batch of another number, a wrong number of its first sample, and a Dataset that
    is read for the other batches."""
    data, counted = given(kind)
    everything = list(data.read(0, 4))
    if counted is not None:
        counted.read.clear()
    firsts, parts = zip(*data.deal(0, 4, 1, 3), strict=True)
    assert firsts == (4, 16)
    for part, batch in zip(parts, everything[1::3], strict=True):
        for name in ("x", "tangents", "score"):
            expected = getattr(batch, name)
            assert expected is None or torch.equal(getattr(part, name), expected)
    if counted is not None:
        assert counted.read == [*range(4, 8), *range(16, 20)]


@pytest.mark.parametrize("kind", ["tensors", "dataset"])
def test_an_empty_source_says_so_when_dealt(kind):
    """Catches a measurement of nothing."""
    x = torch.zeros(0, 3)
    data = ff.FiniteDifference(x if kind == "tensors" else Counted(x), torch.ones(4, 3), dtheta=0.1)
    with pytest.raises(ValueError, match="minus must yield at least one sample"):
        list(data.deal(0, 4, 0, 2))


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


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("size", [1, 3])
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


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ("wrld", ValueError, "process_group must be None, \"world\" or a ProcessGroup, got 'wrld'"),
        (3, TypeError, 'process_group must be None, "world" or a ProcessGroup, got int'),
    ],
)
def test_wrong_groups_are_refused(group, error, message):
    """Catches a name that is taken for this process alone."""
    with pytest.raises(error, match=message), ranks_of(group):
        pass


def test_what_differs_is_named_with_its_ranks():
    """Catches a difference that is not seen, or is blamed on another rank."""
    check_same([{"a": 1, "b": [2]}] * 3)
    with pytest.raises(ValueError, match="a must be the same on all ranks, got 1 on ranks 0, 2; 4"):
        check_same([{"a": 1}, {"a": 4}, {"a": 1}])
    with pytest.raises(ValueError, match="got none on rank 0; 2 on rank 1: see x"):
        check_same([{}, {"b": 2}], ": see x")
