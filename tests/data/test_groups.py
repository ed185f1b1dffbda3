"""`groups=`: samples that depend on each other share a fold and count as one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherfast as ff
from fisherfast.data.dealing import Dealing
from fisherfast.data.groups import Groups, joined_groups
from fisherfast.measurement.batches import Streams

FOLDS = 16
SAME = nn.Hardtanh(-1e9, 1e9)  # J of a score source is read behind a layer


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(x: torch.Tensor, **options) -> ff.Pathwise:
    """Samples [n, d] whose mean moves along (1, ..., 1) / sqrt(d): J = 1 for unit variances."""
    n, d = x.shape
    return ff.Pathwise(x, torch.full((n, d), d**-0.5), **options)


def result(data, model: nn.Module = SAME, **settings):
    return ff.fisher_flow(model, data, **settings)["output"]


# --- labels --------------------------------------------------------------------------------------

LABELS = torch.arange(100) // 4


@pytest.mark.parametrize(
    "given",
    [
        LABELS,
        tuple(LABELS.tolist()),
        np.array([f"object {label}" for label in LABELS.tolist()]),
        1000 - 7 * LABELS,
        LABELS / 8,
    ],
)
def test_labels_of_any_kind_are_the_same_groups(given):
    """Catches labels that are read as numbers of groups, or in the order of their values."""
    data = ff.FiniteDifference(normal(100, 2), normal(100, 2), 0.1, groups=given)
    assert len(data.groups) == 25
    assert all(torch.equal(numbers, LABELS) for numbers in data.groups.numbers)
    assert [data.units(c) for c in range(2)] == [25, 25]
    assert torch.equal(moved(normal(100, 2), groups=given).groups.numbers[0], LABELS)
    assert torch.equal(
        ff.Score(normal(100, 2), normal(100), groups=given).groups.numbers[0], LABELS
    )


def numbers_of(groups: Groups) -> list[list[int]]:
    return [numbers.tolist() for numbers in groups.numbers]


def test_a_label_is_the_same_group_in_all_conditions():
    """Catches groups that are numbered in each condition anew."""
    x, labels = normal(5, 2), [list("aabcc"), list("cbba")]
    groups = ff.FiniteDifference(x, x[:4], 0.1, groups=labels).groups
    assert groups.labels == ("a", "b", "c")
    assert numbers_of(groups) == [[0, 0, 1, 2, 2], [2, 1, 1, 0]]
    pair, labels = [x[:4]] * 2, [list(word) for word in ("aabb", "aabb", "abab", "bbaa")]
    several = ff.FiniteDifference(pair, pair, 0.1, groups=labels).groups
    assert numbers_of(several) == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0]]
    joined = joined_groups([groups, Groups(("z", "c"), (torch.tensor([0]), torch.tensor([1])))])
    assert joined.labels == ("a", "b", "c", "z")
    assert numbers_of(joined) == [[0, 0, 1, 2, 2, 3], [2, 1, 1, 0, 2]]


def batches():
    return (x for x in normal(100, 2).split(10))


X = normal(100, 2)
SHUFFLED = DataLoader(TensorDataset(X), batch_size=10, shuffle=True)
BOTH = "groups must be the same in all conditions, got "
# minus and plus, groups, message
WRONG = {
    "length": (X, X, LABELS[:99], "groups must hold one label .* samples of minus, got 99"),
    "length of plus": (X, X, [LABELS, LABELS[:7]], "groups must hold one .* of plus, got 7"),
    "2-d": (X, X, LABELS[:, None], r"groups must have shape \[n\], got \[100, 1\]"),
    "number": (X, X, 3, r"groups must have shape \[n\], got \[\]"),
    "arrays": (X, X, [LABELS] * 3, "groups must be one array, or .* 2 conditions, got 3"),
    "NaN": (X, X, LABELS / 0.0 * 0, "groups must hold a label for each sample, got NaN"),
    "one": (X, X, [7] * 100, "groups must be at least two, got 1: 7"),
    "others": (X, X, [LABELS, LABELS + 1], f"{BOTH}25 in plus and not in minus"),
    "fewer": (X, X, [LABELS, LABELS.clamp_max(22)], f"{BOTH}23, 24 in minus and not in plus"),
    "pairs": (X, X, [LABELS, LABELS.flip(0)], ".*got 24 in plus and 0 in minus for sample 0"),
    "stream": (batches, X, LABELS, "groups must label .* fixed .*, got function for minus"),
    "shuffled": (X, SHUFFLED, LABELS, "groups must label .* fixed .*, got DataLoader for plus"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_groups_are_refused(case):
    """Each message names what is wrong, and where."""
    minus, plus, groups, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        ff.FiniteDifference(minus, plus, 0.1, groups=groups, paired=case == "pairs")


@pytest.mark.parametrize("labels", [[1j] * 100, [None] * 100, np.zeros(100, "datetime64[s]")])
def test_other_labels_are_refused(labels):
    """Catches what has no order and no name."""
    with pytest.raises(TypeError, match=r"^groups must be whole numbers or strings, got"):
        moved(X, groups=labels)


def test_too_few_groups_say_how_many_are_needed():
    """Catches folds without a group, and too few groups for the activations."""
    x = normal(1000, 3)
    with pytest.raises(ValueError, match=r"^groups must be at least 16, one per fold, got 10: use"):
        ff.fisher_information(moved(x, groups=torch.arange(1000) // 100))
    with pytest.raises(ValueError, match=r"must see at least 32 groups of samples .*, got 20"):
        ff.fisher_information(moved(x, groups=torch.arange(1000) // 50))
    assert ff.fisher_information(
        moved(x, groups=torch.arange(1000) // 60), settings=ff.Settings(folds=6), max_features=1
    )


# --- folds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scattered", [False, True])
def test_samples_of_a_group_share_a_fold(scattered):
    """Catches a group in two folds, folds of different numbers of groups, and neighbours in a row
    of groups that are dealt in turn."""
    labels = torch.arange(4000) // 10
    labels = labels[torch.randperm(4000)] if scattered else labels
    data = ff.FiniteDifference(normal(4000, 2), normal(4000, 2), 0.1, groups=labels)
    for condition, _, batch in Streams(data, 300, folds=FOLDS):
        own = data.groups.numbers[condition][batch.place.numbers]
        for group in own.unique():
            assert len(batch.place.fold[own == group].unique()) == 1
    numbers = data.groups.numbers[0]
    folds = Dealing.of_groups(numbers, FOLDS).cells_from(0, 4000) % FOLDS
    of_group = torch.stack([folds[numbers == group][0] for group in range(400)])
    assert torch.equal(folds, of_group[numbers])
    assert torch.bincount(of_group).tolist() == [25] * FOLDS
    assert len(of_group[:16].unique()) < 16


def test_own_groups_change_nothing_but_the_statistic():
    """Catches samples that count twice, or half: groups of one sample give what no groups give."""
    x = normal(3000, 4)
    alone, grouped = result(moved(x)), result(moved(x, groups=torch.arange(3000)))
    for name in ("J", "stderr", "lower", "lower_stderr", "curve_J", "replicates"):
        torch.testing.assert_close(getattr(grouped, name), getattr(alone, name))


# --- what a measurement makes of them -------------------------------------------------------------

TWICE = torch.arange(4000) // 2


def twice(seed: int, d: int = 8) -> torch.Tensor:
    return normal(2000, d, seed=seed).repeat_interleave(2, 0)


def repeated(kind: str, count: int):
    """2000 samples with J = 1, each of them so many times."""
    a, b = (normal(2000, 8, seed=seed).repeat_interleave(count, 0) for seed in (0, 1))
    groups = None if count == 1 else torch.arange(2000).repeat_interleave(count)
    step = 0.25 * 8**-0.5
    if kind == "pathwise":
        return moved(a, groups=groups)
    if kind == "score":
        return ff.Score(a, a.sum(1) / 8**0.5, groups=groups)
    other = a if kind == "paired" else b
    paired = kind == "paired"
    return ff.FiniteDifference(a - step, other + step, 0.5, paired=paired, groups=groups)


@pytest.mark.parametrize("kind", ["pathwise", "score", "independent", "paired"])
def test_samples_stored_twice_count_once(kind):
    """J within 4 errors of the truth, 1, and close to what the samples give that are stored once;
    without groups J is far too large (22 for independent conditions), or its error too small."""
    grouped, alone = (result(repeated(kind, count), max_features=8) for count in (2, 1))
    assert abs(grouped.value - 1) < 4 * float(grouped.stderr)
    assert abs(float(grouped.lower) - 1) < 4 * float(grouped.lower_stderr)
    assert abs(grouped.value - alone.value) < 2 * float(alone.stderr)
    assert 0.5 < float(grouped.stderr / alone.stderr) < 2
    assert grouped.independent


def above(make, repeats: int, groups: torch.Tensor | None) -> int:
    """In how many data sets the bound is clearly above zero."""
    layers = [result(make(seed, groups)) for seed in range(repeats)]
    return sum(float(layer.lower) > 3 * float(layer.lower_stderr) for layer in layers)


NOTHING = {
    "score": lambda seed, groups: ff.Score(twice(seed), twice(seed + 1000, 1)[:, 0], groups=groups),
    "independent": lambda seed, groups: ff.FiniteDifference(
        twice(seed), twice(seed + 1000), 0.1, groups=groups
    ),
}


@pytest.mark.filterwarnings("ignore::fisherfast.FisherWarning")
@pytest.mark.parametrize("kind", NOTHING)
def test_samples_stored_twice_show_no_information_where_there_is_none(kind):
    """I = 0: in none of 6 data sets is the bound above 3 of its errors (a false alarm in 120
    seeds); without groups in all."""
    assert above(NOTHING[kind], 6, TWICE) == 0
    assert above(NOTHING[kind], 1, None) == 1


@pytest.mark.parametrize("width", [8, 3000])
def test_antithetic_pairs(width):
    """Noise (e, -e), in a layer measured as a whole and in one that is compressed: J = 1 within 4
    errors, and the pairs are no sign of dependence between groups."""
    e = normal(1000, 8)
    x = torch.stack([e, -e], 1).flatten(0, 1)
    torch.manual_seed(0)
    model = SAME if width == 8 else nn.Linear(8, width)
    layer = result(moved(x, groups=torch.arange(2000) // 2), model, max_features=64)
    assert layer.feature_kind == ("krylov" if width > 8 else layer.feature_kind)
    assert abs(layer.value - 1) < 4 * float(layer.stderr)
    assert abs(float(layer.lower) - 1) < 4 * float(layer.lower_stderr)
    assert layer.independent


@pytest.mark.parametrize("width", [8, 3000])
def test_dependence_between_groups_is_still_found(width):
    """Catches a test that is switched off by groups: every sample four times, groups of two."""
    x = normal(800, 8).repeat_interleave(4, 0)
    torch.manual_seed(0)
    model = SAME if width == 8 else nn.Linear(8, width)
    with pytest.warns(ff.FisherWarning, match="pass groups= for samples that belong together"):
        layer = result(moved(x, groups=torch.arange(3200) // 2), model, max_features=64)
    assert not layer.independent


def test_maps_and_probes_of_groups(monkeypatch):
    """Catches groups that stop at a layer: the map of a layer, and a probe's halves."""
    x = normal(1500, 2, 3, 3).repeat_interleave(2, 0)
    dx = torch.full((3000, 2, 3, 3), 0.5)
    labels = torch.arange(3000) // 2
    model = nn.Conv2d(2, 2, 1)
    found, once = (
        ff.fisher_flow(model, data, max_features=16, settings=ff.Settings(maps=True))
        for data in (ff.Pathwise(x, dx, groups=labels), ff.Pathwise(x[::2], dx[::2]))
    )
    for name in ("input", "output"):
        grouped, alone = found.map(name), once.map(name)
        torch.testing.assert_close(grouped.J, alone.J, rtol=0.1, atol=0.05)
        torch.testing.assert_close(grouped.stderr, alone.stderr, rtol=0.6, atol=0.0)
    for name, value in {"WIDTH": 16, "STEPS": 300, "LEAST_STEPS": 100}.items():
        monkeypatch.setattr(f"fisherfast.estimation.probe.{name}", value)  # trained in a second
    y = normal(1500, 2).repeat_interleave(2, 0)
    score = y.square().sum(1) - 2
    probed = ff.fisher_flow(
        SAME, ff.Score(y, score, groups=labels), probe="network", max_features=8
    )["output"]
    assert abs(probed.value - 4) < 0.4 + 4 * float(probed.stderr)
