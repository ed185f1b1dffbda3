"""`Labelled`: bins, sources and wrong input."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fisherfast as ff
from fisherfast.data.bins import cluster_bins, quantile_bins

N = 1200


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn(P: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator()
    theta = torch.rand(N, P, generator=g)
    x = 3 * theta.repeat(1, 3 // P + 1)[:, :3] + torch.randn(N, 3, generator=g)
    return x, theta[:, 0] if P == 1 else theta


class Pairs(Dataset):
    """Items (x, a Python number)."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, number: int) -> tuple[torch.Tensor, float]:
        x, theta = drawn()
        return x[number], float(theta[number])


def batches(size: int = 250):
    x, theta = drawn()
    return zip(x.split(size), theta.split(size), strict=True)


@pytest.mark.parametrize("values", [None, 31, 5])
def test_quantile_bins(values):
    """Every sample in a bin, about equally many in each, and whole grid values. Catches a bin of
    one grid value, and an edge that loses the largest sample."""
    theta = torch.rand(N, generator=generator(), dtype=torch.float64)
    theta = theta if values is None else (theta * values).floor()
    bins = quantile_bins(theta, 4)
    own = bins.of(theta[:, None])
    assert len(bins) == (2 if values == 5 else 4)
    assert int(own.min()) == 0
    counts = torch.bincount(own)
    assert int(counts.max()) < 1.6 * int(counts.min())
    for q in range(len(bins)):
        inside = theta[own == q]
        assert len(inside.unique()) >= 2
        assert q == 0 or float(inside.min()) > float(theta[own == q - 1].max())


def test_clusters_do_not_depend_on_units():
    """Catches distances in which the parameter with the larger numbers decides alone."""
    _, theta = drawn(2)
    unit = torch.tensor([1.0, 1000.0], dtype=torch.float64)
    theta = theta.double()
    own, scaled = (cluster_bins(t, 6).of(t) for t in (theta, theta * unit))
    assert torch.equal(own, scaled)
    given = ff.Labelled(drawn(2)[0], theta * unit, at=[[0.2, 200.0], [0.2, 800.0], [0.8, 500.0]])
    nearest = given.point_of(torch.tensor([[0.25, 210.0], [0.1, 790.0]], dtype=torch.float64))
    assert nearest.tolist() == [0, 1]


def test_edges_and_what_is_outside():
    """Catches a sample on an edge in two bins or in none."""
    x, _ = drawn()
    theta = torch.arange(N) // 100  # 0 to 11
    data = ff.Labelled(x, theta, edges=[1, 4, 10])
    assert [data.samples_at(q) for q in range(2)] == [300, 700]
    assert data.samples() == 1000
    assert data.notes() == ("200 samples outside of the edges left out",)


def test_few_samples_are_merged():
    """Catches a bin without enough samples for its folds."""
    x, theta = drawn()
    data = ff.Labelled(x[:300], theta[:300], bins=20)
    assert data.points == 4
    assert min(data.samples_at(q) for q in range(4)) >= 64
    assert data.notes() == (
        "bins merged from 20 to 4: each needs 64 samples and two values of theta",
    )
    at = torch.tensor([[0.2, 0.2], [0.5, 0.8], [9.0, 9.0]])
    assert ff.Labelled(*drawn(2), at=at).points == 2


@pytest.mark.parametrize(
    "source",
    [
        TensorDataset(*drawn()),
        Pairs(),
        DataLoader(Pairs(), batch_size=100),
        DataLoader(Pairs(), batch_size=100, shuffle=True),
        batches,
        list(batches()),
        (drawn()[0].numpy(), drawn()[1].tolist()),
    ],
    ids=["tensors", "dataset", "loader", "shuffled", "function", "batches", "arrays"],
)
def test_sources(source):
    """All hold the same samples: the same bins, J within the noise of other folds. Catches labels
    that lose their samples: J would be near 0, not 27."""
    want = ff.fisher_information(ff.Labelled(*drawn(), bins=3)).profile
    pairs = source if isinstance(source, tuple) else (source,)
    data = ff.Labelled(*pairs, bins=3)
    got = ff.fisher_information(data).profile
    assert got.samples.tolist() == want.samples.tolist()
    torch.testing.assert_close(got.theta, want.theta)
    assert bool(((got.J - want.J).abs() < want.stderr).all())
    assert bool(((got.J - 27).abs() < 4 * got.stderr).all())


def test_read_once():
    """A stream with edges is read once, and says what is outside."""
    info = ff.fisher_information(ff.Labelled(batches(), edges=[0, 0.5, 0.9]))
    assert len(info.profile) == 2
    assert bool(((info.profile.J - 27).abs() < 4 * info.profile.stderr).all())
    outside = int((drawn()[1] > 0.9).sum())
    assert f"{outside} samples outside of the edges left out" in info.notes


WRONG = {
    "constant": ({"theta": torch.ones(N)}, "theta must vary among the samples, got 1 for all"),
    "NaN": (
        {"theta": torch.full((N,), torch.nan)},
        "theta must be finite, got NaN or infinity for sample 0",
    ),
    "length": (
        {"theta": torch.rand(N - 1)},
        f"theta must hold one label for each of the {N} samples, got {N - 1}",
    ),
    "complex": ({"theta": torch.zeros(N).cfloat()}, "theta must be real numbers, got torch.compl"),
    "boolean": ({"theta": np.zeros(N, dtype=bool)}, "theta must be real numbers, got ndarray"),
    "shape": ({"theta": torch.rand(N, 1, 1)}, f"theta must have shape [n] or [n, P], got [{N}, 1,"),
    "none": ({"theta": None}, "theta must be given for x a tensor or array, got None"),
    "one value": (
        {"theta": torch.arange(N) // 600, "edges": [-0.5, 0.5, 1.5]},
        "theta must take at least two values in each bin, got only 0 in bin 0 of 2: use fewer bins",
    ),
    "bins": ({"bins": 0}, "bins must be at least 1, got 0"),
    "edges": (
        {"edges": [0, 2, 1]},
        "edges must be at least two finite numbers, ascending, got [0.0, 2.0, 1.0]",
    ),
    "edges of two": (
        {"theta": torch.rand(N, 2), "edges": [0, 1]},
        "edges must be left out for 2 parameters, got [0, 1]: pass at=, centres [Q, P]",
    ),
    "both": ({"edges": [0, 1], "at": [0.5]}, "edges must be left out where at is given, got both"),
    "at": (
        {"theta": torch.rand(N, 2), "at": [1, 2, 3]},
        "at must have shape [Q, 2], got [3]",
    ),
    "equal centres": ({"at": [0.5, 0.5]}, "at must hold different centres, got [[0.5], [0.5]]"),
    "names": ({"names": ["a", "b"]}, "names must hold one per parameter (1), got 2: ['a', 'b']"),
    "once": ({"x": batches(), "theta": None}, "edges or at must be given for samples that can be"),
    "not pairs": (
        {"x": DataLoader(drawn()[0]), "theta": None},
        "x must yield pairs (x, theta) where theta is not given, got Tensor in batch 0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name):
    """Each with its exact message."""
    wrong, message = WRONG[name]
    x, theta = drawn()
    arguments = {"x": x, "theta": theta} | wrong
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        ff.Labelled(arguments.pop("x"), arguments.pop("theta"), **arguments)


def test_what_a_measurement_refuses():
    """Shares with bins of their own, maps and probes."""
    x, theta = drawn()
    with pytest.raises(ValueError, match="data must have the same bins on all ranks"):
        ff.Shard(ff.Labelled(x, theta))
    shared = ff.fisher_information(ff.Shard(ff.Labelled(x, theta, edges=[0, 0.5, 1])))
    assert len(shared.profile) == 2
    data = ff.Labelled(x, theta, bins=2)
    with pytest.raises(ValueError, match="probe must be None for labelled data"):
        ff.fisher_information(data, probe="network")
    with pytest.raises(ValueError, match="maps must be False for data at several theta"):
        ff.fisher_flow(torch.nn.Identity(), data, settings=ff.Settings(maps=True))
    with pytest.raises(ValueError, match="must see at least 200 samples per bin"):
        ff.fisher_information(ff.Labelled(x, theta), settings=ff.Settings(folds=100))
