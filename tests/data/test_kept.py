"""Samples that are kept: the same ones at every pass, within their limit; and what is unwrapped."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fisherfast as ff
from fisherfast.data import KeptData
from fisherfast.model.unwrap import unwrapped

ROWS, DIM = 50, 3
SIDE_BYTES = ROWS * DIM * 4  # of one condition


class Stream(IterableDataset):
    """Other samples at each pass, all read into the same memory."""

    def __init__(self) -> None:
        self.passes = 0
        self.memory = torch.empty(10, DIM)

    def __iter__(self):
        self.passes += 1
        for number in range(ROWS // 10):
            yield self.memory.fill_(100 * self.passes + number)


def streams() -> tuple[Stream, Stream, ff.FiniteDifference]:
    minus, plus = Stream(), Stream()
    loaders = [DataLoader(side, batch_size=None) for side in (minus, plus)]
    return minus, plus, ff.FiniteDifference(*loaders, dtheta=0.1)


def values(data: KeptData, condition: int = 0) -> list[float]:
    return [float(batch.x[0, 0]) for batch in data.read(condition, 10)]


def test_each_pass_gives_the_samples_of_the_first():
    """Catches a source that is read again, batches kept by reference (the loader fills the same
    memory again and again), and a kept source that passes for a stream of unknown length."""
    minus, plus, source = streams()
    data = KeptData(source, 10**6)
    assert not data.repeats(0)
    assert data.samples(0) is None
    first = values(data)
    assert first == [100, 101, 102, 103, 104]
    assert values(data) == first
    assert (minus.passes, plus.passes) == (1, 0)
    assert (data.repeats(0), data.repeats(1)) == (True, False)
    assert data.samples(0) == ROWS
    assert values(data, 1) == first
    assert (minus.passes, plus.passes) == (1, 1)
    assert data._held == 2 * SIDE_BYTES


def test_it_is_the_source_in_everything_else():
    """Catches a source whose step, pairing or names are lost on the way."""
    x = torch.randn(4, ROWS, DIM)
    source = ff.FiniteDifference([x[0], x[2]], [x[1], x[3]], dtheta=[0.1, 0.2], paired=True)
    data = KeptData(source, 10**6)
    for name in ("source", "parameters", "conditions", "dtheta", "paired"):
        assert getattr(data, name) == getattr(source, name)
    assert torch.equal(data.contrast(), source.contrast())
    assert repr(data) == repr(source)
    names = [data.condition_name(c) for c in range(4)]
    assert names == [source.condition_name(c) for c in range(4)]
    (rounds,) = data.rounds(20)
    assert [(first, len(batches)) for first, batches in rounds] == [(0, 4), (20, 4), (40, 4)]


@pytest.mark.parametrize(("cls", "carried"), [(ff.Pathwise, "tangents"), (ff.Score, "score")])
def test_what_samples_carry_is_kept_with_them(cls, carried):
    """Catches tangents or scores of other samples, and samples counted without them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, DIM, generator=generator)
    pairs = TensorDataset(x, 2 * x[:, None] if cls is ff.Pathwise else 2 * x[:, :1].double())
    loader = DataLoader(pairs, batch_size=10, shuffle=True, generator=generator)
    data = KeptData(cls(loader, parameters=1), 10**6)
    for one, two in zip(list(data.read(0, 10)), list(data.read(0, 10)), strict=True):
        assert torch.equal(one.x, two.x)
        expected = 2 * one.x[None] if cls is ff.Pathwise else 2 * one.x[:, :1].double()
        assert torch.equal(getattr(two, carried), expected)
    assert data._held == SIDE_BYTES + (SIDE_BYTES if cls is ff.Pathwise else 8 * ROWS)


# --- the limit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "sides"), [(2 * SIDE_BYTES, 2), (2 * SIDE_BYTES - 1, 1), (0, 0)])
@pytest.mark.parametrize("abreast", [False, True])
def test_the_limit_holds_while_conditions_are_read(limit, sides, abreast):
    """One after the other, and abreast as paired ones are. Catches a limit for each condition
    instead of all, and a part that stays when the whole does not fit."""
    *_, source = streams()
    data = KeptData(source, limit)
    reads = [data.read(condition, 10) for condition in range(2)]
    batches = zip(*reads, strict=True) if abreast else itertools.chain(*reads)
    for _ in batches:
        assert data._held <= limit
    assert data._held == sides * SIDE_BYTES
    if sides == 0:
        assert values(data)[0] == 200  # read again
        assert data.samples(0) is None
    assert [data.repeats(0), data.repeats(1)].count(True) == sides


def test_a_pass_that_is_broken_off_keeps_nothing():
    """Catches the first batches taken for the whole, and room that is never given back."""
    _, _, source = streams()
    data = KeptData(source, 10**6)
    reading = data.read(0, 10)
    next(reading), next(reading)
    assert data._held > 0
    reading.close()
    assert data._held == 0
    assert not data.repeats(0)
    assert values(data) == [200, 201, 202, 203, 204]


def test_a_source_that_fails_keeps_nothing():
    """Catches half a stream that passes for all of it at the next try."""

    def failing():
        yield torch.zeros(10, DIM)
        raise RuntimeError("a file is gone")

    data = KeptData(ff.FiniteDifference(failing, failing, dtheta=0.1), 10**6)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a file is gone"):
            values(data)
        assert data._held == 0


# --- the module inside ----------------------------------------------------------------------------


def test_wrappers_are_taken_off():
    """Catches a wrapper around a wrapper, copies of averaged weights taken for the network, and
    wrappers told by their name alone."""
    model = nn.Linear(2, 1)
    assert unwrapped(model) is model
    assert unwrapped(nn.DataParallel(model)) is model
    compiled = torch.compile(model, backend="eager")
    assert unwrapped(compiled) is model
    assert unwrapped(torch.compile(nn.DataParallel(model), backend="eager")) is model
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert unwrapped(averaged) is averaged
    inherited = type("Mine", (nn.DataParallel,), {})(model)
    assert unwrapped(inherited) is model
    mine = type("DataParallel", (nn.Module,), {})()
    mine.module = model
    assert unwrapped(mine) is mine


def test_a_flow_of_a_wrapped_network_has_its_names():
    """Catches layers named with the prefix of their wrapper."""
    model = nn.Sequential(nn.Linear(DIM, 2), nn.Linear(2, 1))
    x = torch.randn(2, 200, DIM)
    data = ff.FiniteDifference(x[0] - 0.05, x[1] + 0.05, dtheta=0.1)
    flows = [ff.fisher_flow(m, data, max_features=8) for m in (model, nn.DataParallel(model))]
    assert flows[0].to_dict() == flows[1].to_dict()
