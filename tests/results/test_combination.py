"""Independent data sets together: what adds up, what does not, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from support.training_histories import layer as layer_of
from torch import nn

import fisherfast as ff
from fisherfast.problems import GaussianShift
from fisherfast.results.status import BLIND

CAMERA = GaussianShift(torch.tensor([[1.0, 0.2], [0.0, 1.0], [0.5, 0.5], [1.0, -1.0]]))
PROBE = GaussianShift(torch.tensor([[2.0, 0.0], [1.0, 0.5]]), torch.eye(2) + 0.5)
AT = [0.0, 0.0]


def networks() -> tuple[nn.Module, nn.Module]:
    """Of the same layers, for 4 and 2 numbers; the hidden layer of each loses information."""
    torch.manual_seed(3)
    return tuple(
        nn.Sequential(nn.Linear(d, 3, bias=False), nn.Linear(3, 2, bias=False)) for d in (4, 2)
    )


def measured(seed: int, samples: int = 1000) -> list[ff.FisherFlow]:
    """One flow for each instrument."""
    return [
        ff.fisher_flow(
            model, problem.pathwise(AT, samples, seed=seed + 1000 * number), max_features=2
        )
        for number, (model, problem) in enumerate(zip(networks(), (CAMERA, PROBE), strict=True))
    ]


class Joined(nn.Module):
    """Both networks side by side."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x[:, :4]), self.other(x[:, 4:])], 1)


@pytest.fixture(scope="module")
def flows() -> list[ff.FisherFlow]:
    return measured(0, 4000)


def test_combined_is_the_measurement_of_both_side_by_side(flows):
    """Within 4 errors in 3 entries of 2 layers: a false alarm in 2600 choices of seeds. Catches a
    sum of bounds sigma^2 in place of information, a mean, and layers that are matched by place."""
    data = [p.pathwise(AT, 4000, seed=7 + n) for n, p in enumerate((CAMERA, PROBE))]
    parts = [next(iter(each.read(0, 4000))) for each in data]
    x = torch.cat([part.x for part in parts], 1)
    dx = torch.cat([part.tangents for part in parts], 2).movedim(0, 1)
    joined = ff.fisher_flow(Joined(*networks()), ff.Pathwise(x, dx), max_features=2)
    combined = ff.combine(*flows)
    assert combined.names == ["input", "0", "output"]
    for name in ("input", "output"):
        one, other = combined[name], joined[name]
        off = (one.J - other.J) / (one.stderr.square() + other.stderr.square()).sqrt()
        assert float(off.abs().max()) < 4, name
        assert one.dim == other.dim
        assert one.features == other.features
    truth = CAMERA.fisher(AT) + PROBE.fisher(AT)
    assert float(((combined["input"].J - truth) / combined["input"].stderr).abs().max()) < 4
    assert combined["input"].crlb.tolist() == pytest.approx(joined["input"].crlb.tolist(), rel=0.05)


def test_what_adds_up_and_what_does_not(flows, tmp_path):
    """Catches errors that are added instead of their squares, notes that do not say whose, and the
    reasons of a status that both together do not have."""
    noted = dataclasses.replace(flows[1]["0"], notes=("three features dropped", BLIND))
    layers = [noted if layer.name == "0" else layer for layer in flows[1]]
    one, other = flows[0]["0"], noted
    found = ff.combine(flows[0], dataclasses.replace(flows[1], layers=tuple(layers)))["0"]
    for name in ("J", "lower", "linear", "naive", "error_covariance"):
        assert torch.equal(getattr(found, name), getattr(one, name) + getattr(other, name)), name
    for name in ("stderr", "lower_stderr", "linear_stderr"):
        squares = getattr(one, name).square() + getattr(other, name).square()
        assert torch.allclose(getattr(found, name).square(), squares), name
    assert found.samples == one.samples + other.samples
    assert found.notes == ("data set 2: three features dropped",)
    shift = torch.cat([torch.ones(3), torch.zeros(3)])
    pull = one.readout.double().T @ torch.ones(3, dtype=torch.float64)
    assert torch.allclose(found.bias(shift), torch.linalg.solve(found.linear, pull))
    combined = ff.combine(*flows)
    assert "combined" in str(combined)
    combined.save(tmp_path / "both.json")
    assert ff.FisherFlow.load(tmp_path / "both.json").to_dict() == combined.to_dict()


@pytest.mark.slow
def test_errors_of_combined_ratios():
    """The spread of J_output / J_input over 24 runs is 0.6 to 1.6 of its stated error (4 errors
    of a spread of 24 are 0.6). Catches layers whose errors are taken for independent: 0.25."""
    runs = [ff.combine(*measured(seed)).compare("output", "input") for seed in range(24)]
    ratios = torch.tensor([run.ratio for run in runs])
    stated = torch.tensor([run.ratio_stderr for run in runs]).square().mean().sqrt()
    assert 0.6 < float(ratios.std() / stated) < 1.6


def test_errors_of_ratios_are_those_of_independent_data(flows):
    """With J_a and J_b measured apart, the variance of the combined replicates is the sum of both,
    also with another number of folds. Catches folds of both left out together, whose covariance is
    noise, and deviations without their factor."""
    few = ff.Settings(folds=8)
    other = ff.fisher_flow(
        networks()[1], PROBE.pathwise(AT, 2000, seed=5), max_features=2, settings=few
    )
    found = ff.combine(flows[0], other)["output"]
    errors = [
        r.var(0, correction=0) * (len(r) - 1)
        for r in (found.replicates, flows[0]["output"].replicates, other["output"].replicates)
    ]
    assert torch.allclose(errors[0], errors[1] + errors[2])
    assert torch.allclose(found.replicates.mean(0), found.J)
    ratio = ff.combine(flows[0], other).compare("output", "input")
    apart = [flow.compare("output", "input").ratio_stderr for flow in (flows[0], other)]
    assert 0 < ratio.ratio_stderr < sum(apart)
    bare = [dataclasses.replace(layer, replicates=layer.replicates[:0]) for layer in other]
    without = ff.combine(flows[0], dataclasses.replace(other, layers=tuple(bare)))
    assert len(without["output"].replicates) == 0
    assert without.compare("output", "input").ratio_stderr > ratio.ratio_stderr


def test_profiles_add_up_at_the_same_theta():
    """Catches profiles of other theta that are added bin by bin."""
    theta = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None]
    J, samples = torch.ones(4, 1, 1, dtype=torch.float64), torch.full((4,), 100)
    near, far = (ff.results.profile.Profile(t, J, 0.1 * J, samples) for t in (theta, theta + 0.1))
    layers = [
        dataclasses.replace(layer_of("fc", J[0], stderr=0.1), profile=p) for p in (near, near, far)
    ]
    profile = ff.combine(layers[0], dataclasses.replace(layers[1])).profile
    assert torch.equal(profile.J, 2 * J)
    assert torch.allclose(profile.stderr, math.sqrt(0.02) * J)
    assert profile.samples.tolist() == [200] * 4
    assert ff.combine(layers[0], layers[2]).profile is None


def test_what_cannot_be_combined_is_refused(flows):
    """Catches a prior that counts twice, theta of another meaning, and a data set that is counted
    twice."""
    one, other = flows[0]["input"], flows[1]["input"]
    named = dataclasses.replace(other, parameter_names=("x", "y"))
    single = layer_of("input", torch.ones(1, 1, dtype=torch.float64), stderr=0.1)
    renamed = dataclasses.replace(
        flows[1], layers=(dataclasses.replace(other, name="x", label="x"),)
    )
    for message, parts in {
        "combine must be given at least two data sets, got 1": [one],
        "combine must be given at least two data sets, got 0": [],
        "data sets must be independent, got the same result twice": [one, one],
        "data sets must have the same number of parameters, got 2 and 1": [one, single],
        "data sets must have the same names of parameters, got [] and ['x', 'y']": [one, named],
        "data sets must have no prior, which would count once for each of them, got one: combine"
        " first, then combined.with_prior(precision)": [one, other.with_prior([1.0, 1.0])],
        "flows must have layers of the same name, got [['input', '0', 'output'], ['x']]": [
            flows[0],
            renamed,
        ],
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            ff.combine(*parts)
    with pytest.raises(
        TypeError, match=r"^combine must be given flows, or layers, got FisherFlow, L"
    ):
        ff.combine(flows[0], other)
