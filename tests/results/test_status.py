"""The status of a layer: each reason for it, on layers made by hand and on measured ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from results.test_comparison import symmetric, with_replicates
from support.training_histories import layer as layer_of
from torch import nn

import fisherfast as ff
from fisherfast.results.status import with_status

ONE_OR_THREE = pytest.mark.parametrize("P", [1, 3])


def mixed(P: int, J: float) -> torch.Tensor:
    """A matrix [P, P] with correlated parameters in different units, whose worst direction is J as
    the others are."""
    units = torch.tensor([1.0, 1e3, 1e-3], dtype=torch.float64)[:P]
    shape = 0.3 * torch.ones(P, P, dtype=torch.float64) + 0.7 * torch.eye(P, dtype=torch.float64)
    return J * shape * torch.outer(units, units)


def layer(
    name: str, P: int, J: float, relative: float, *, later: Sequence[str] = (), **fields
) -> ff.LayerFisher:
    """A layer with an error of `relative` of `scale` (1 by default) for each entry."""
    size = mixed(P, 1.0).diagonal().sqrt()
    error = relative * torch.outer(size, size)
    base = layer_of(name, mixed(P, J), stderr=1.0)
    fields = {"lower": mixed(P, J), "lower_stderr": error} | fields
    return dataclasses.replace(base, stderr=error, descendants=tuple(later), **fields)


def statuses(*layers: ff.LayerFisher, score: bool = False) -> list[str]:
    """Of all layers."""
    return [judged.status for judged in with_status(layers, score=score)]


# --- one layer ---


@ONE_OR_THREE
@pytest.mark.parametrize(
    ("J", "relative", "fields", "expected"),
    [
        (1.0, 0.03, {}, "resolved"),  # for three parameters J of the worst direction is 0.7
        (1.0, 0.15, {}, "noisy"),
        (3.1, 1.4, {}, "noisy"),  # this and the next were called converged
        (0.02, 0.04, {}, "noisy"),
        (-3.0, 0.01, {}, "noisy"),
        (0.0, 0.0, {}, "resolved"),  # a constant layer is known exactly
        (1.0, 0.001, {"carried": False}, "noisy"),
        (1.0, 0.001, {"independent": False}, "noisy"),
        (1.0, 0.01, {"plateau": False}, "rising"),
    ],
)
def test_one_layer(P, J, relative, fields, expected):
    """Catches a status that says no to everything, 0 / 0, and a size without its sign."""
    (judged,) = with_status([layer("input", P, J, relative, **fields)], score=False)
    assert judged.status == expected
    assert judged.converged is (expected == "resolved")
    assert judged.notes == ()


def test_worst_direction_counts():
    """Two parameters that are nearly one, each known to 1 %: catches a look at the diagonal."""
    J = torch.tensor([[1.0, 0.97], [0.97, 1.0]], dtype=torch.float64)
    assert statuses(layer_of("input", J, stderr=0.01)) == ["noisy"]


@ONE_OR_THREE
def test_bound_above_J(P):
    """J = 1 +- 0.02 and a bound of 1.2 +- 0.02 cannot both be right; 1.05 +- 0.02 can."""
    size = mixed(P, 1.0).diagonal().sqrt()
    error = 0.02 * torch.outer(size, size) / P**2  # as errors of entries are added up for `lower`
    for lower, expected in ((1.2, "noisy"), (1.05, "resolved")):
        judged = layer("input", P, 1.0, 0.02, lower=mixed(P, lower), lower_stderr=error)
        (judged,) = with_status([judged], score=False)
        assert judged.status == expected
        assert any("lower is above J" in note for note in judged.notes) == (expected == "noisy")


@ONE_OR_THREE
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(P, value):
    """Catches NaN that passes every comparison, and an error of the eigenvalue solver."""
    broken = dataclasses.replace(layer("fc", P, 1.0, 0.01), J=torch.full((P, P), value))
    assert statuses(layer("input", P, 1.0, 0.01), broken) == ["resolved", "unresolved"]


# --- what later layers show ---


@ONE_OR_THREE
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0.02, 0.04), (6.35, 0.05), "unresolved"),  # the input has what the output shows
        ((0.02, 0.04), (0.1, 0.2), "noisy"),  # the later one is within three errors of zero
        ((0.02, 0.04), (0.01, 0.001), "noisy"),  # or has less
        # J is right for its features, and more features would help: 25 % more beyond three errors
        ((1.0, 0.01), (1.25, 0.015), "rising"),
        ((1.0, 0.04), (1.15, 0.06), "resolved"),  # within three errors both may be right
        ((1.0, 0.001), (1.05, 0.0015), "resolved"),  # or 5 %
    ],
)
def test_what_a_later_layer_shows(P, first, second, expected):
    """Catches a later layer that is not looked at, one that is not a function of this one, and a
    later layer that counts although it may be noise."""
    one, two = layer("input", P, *first, later=["output"]), layer("output", P, *second)
    judged = with_status([one, two], score=False)[0]
    assert judged.status == expected
    noted = any("output" in note and "tightened" in note for note in judged.notes)
    assert noted or expected != "unresolved"
    unrelated = dataclasses.replace(one, descendants=())
    assert statuses(unrelated, two)[0] == ("noisy" if first[0] < 1 else "resolved")


def test_rise_is_judged_by_the_error_of_the_difference():
    """Errors of 7 % that layers share do not hide a rise of 15 %. Catches errors in square."""
    generator = torch.Generator().manual_seed(0)
    noise = symmetric(generator, 1, 1.0)
    first = with_replicates("fc1", mixed(1, 1.0), 0.02 * noise)
    second = with_replicates("fc2", mixed(1, 1.15), 0.023 * noise)
    assert 0.04 < float(first.stderr) < 0.1
    first = dataclasses.replace(first, descendants=("fc2",))
    assert statuses(first, second)[0] == "rising"
    alone = [
        dataclasses.replace(judged, replicates=torch.empty(0, 1, 1, dtype=torch.float64))
        for judged in (first, second)
    ]
    assert statuses(*alone)[0] == "resolved"


def test_rise_in_one_direction():
    """Catches a comparison of traces, and one that wants more in every direction."""
    first = layer("fc1", 3, 1.0, 0.005, later=["fc2"])
    units = torch.tensor([0.8, 1.0, 1.0], dtype=torch.float64)
    J = first.J * units * units[:, None]
    J[1, 1] *= 1.3
    second = dataclasses.replace(layer("fc2", 3, 1.0, 0.005), J=J)
    assert statuses(first, second)[0] == "rising"


# --- upper bounds ---


@ONE_OR_THREE
@pytest.mark.parametrize(
    ("name", "plateau", "score", "share", "expected"),
    [
        # layers at 0.995 to 1.000 of the input were said not to have converged
        ("input", True, False, 0.995, "resolved"),
        ("input", True, False, 1.0, "resolved"),
        ("input", True, False, 0.9, "rising"),
        # more may be in an input that is not resolved than its J shows; another layer is no bound
        ("input", False, False, 1.0, "rising"),
        ("conv", True, False, 1.0, "rising"),
        # V of a score needs no features
        ("input", False, True, 0.995, "resolved"),
        ("input", False, True, 0.95, "rising"),
    ],
)
def test_no_features_are_missing_at_an_upper_bound(P, name, plateau, score, share, expected):
    """Catches a bound that is not used, and one that is none."""
    inputs = layer(name, P, 2.0, 0.01, plateau=plateau)
    fc = layer("fc", P, 2.0 * share, 0.01, plateau=False)
    first = "resolved" if plateau or score else "rising"
    assert statuses(inputs, fc, score=score) == [first, expected]


def test_bound_in_the_worst_direction():
    """A layer that keeps two of three parameters is not at the bound."""
    inputs = layer("input", 3, 2.0, 0.005)
    kept = torch.tensor([1.0, 1.0, 0.8], dtype=torch.float64)
    J = inputs.J * kept * kept[:, None]
    lossy = dataclasses.replace(layer("fc", 3, 2.0, 0.005, plateau=False), J=J, lower=J)
    assert statuses(inputs, lossy)[1] == "rising"


# --- measured layers ---


def gaussian(n: int, seed: int = 0) -> ff.Pathwise:
    """White noise, all means shifted: J = 4, all of it linear."""
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return ff.Pathwise(x, torch.ones(n, 4))


def test_measurements_have_a_status():
    """Ordinary samples are resolved, in flows too; few samples are noisy. Of 40 problems with an
    error below a tenth, all information linear, 36 are resolved at least. Catches a status that is
    never set, and a test of the plateau that asks for more than samples can show."""
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4) + 0.1)
    flow = ff.fisher_flow(model, gaussian(4000), max_features=32)
    assert [judged.status for judged in flow] == ["resolved", "resolved"]
    x = torch.randn(2, 400, 4, generator=torch.Generator().manual_seed(1))
    noisy = ff.FiniteDifference(x[0] - 0.05, x[1] + 0.05, dtheta=0.1)
    assert ff.fisher_information(noisy, max_features=32).status == "noisy"
    found = [ff.fisher_information(gaussian(1000, seed), max_features=64) for seed in range(40)]
    assert all(judged.stderr < 0.1 * judged.J for judged in found)
    assert sum(judged.status == "resolved" for judged in found) >= 36
