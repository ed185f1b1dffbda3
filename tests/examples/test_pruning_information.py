"""The example of pruning at a small size: masks, bits, and what the claims rest on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pruning_information as example
import pytest
import torch

from benchmarks.accuracy import pruning

pytest.importorskip("matplotlib", reason="the example draws figures")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the quick example returns for the dense network, and its folder."""
    out = tmp_path_factory.mktemp("pruning")
    return example.main(["--quick", "--networks", "lognormal", "--out", str(out)]), out


def small_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(12, 1)
    )


def test_the_least_scores_go_first():
    """Catches a mask the wrong way round, and a share that is taken of each layer."""
    scores = {"a": torch.tensor([[5.0, 1.0]]), "b": torch.tensor([[4.0, 3.0], [2.0, 0.0]])}
    masks = example.keeping(scores, 0.5)
    assert masks["a"].tolist() == [[True, False]]
    assert masks["b"].tolist() == [[True, True], [False, False]]
    layers = {name: example.ranks(s) for name, s in scores.items()}
    assert [int(mask.sum()) for mask in example.keeping(layers, 0.5).values()] == [1, 2]


def test_a_unit_that_is_gone_is_silent():
    """Catches a unit whose bias stays, and a network that is changed in place."""
    network = small_network()
    before = {name: w.clone() for name, w in network.state_dict().items()}
    state = example.without_units(network, {"0": torch.tensor([True, False, True])})
    smaller = small_network()
    smaller.load_state_dict(state)
    hidden = smaller[0](torch.randn(5, 1, 3, 3))
    assert bool((hidden[:, 1] == 0).all())
    assert bool((hidden[:, 0] != 0).all())
    assert all(torch.equal(before[name], w) for name, w in network.state_dict().items())


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_rounding_has_its_levels(bits):
    """Catches steps of another size: 2^b levels, and no error above half a step."""
    w = torch.linspace(-1, 1, 4001)[None]
    found = example.rounded(w, bits)
    assert len(found.unique()) == 2**bits
    assert float((found - w).abs().max()) == pytest.approx(2.0**-bits, rel=1e-3)
    assert not example.rounded(w, 0).any()


def test_bits_go_where_the_curvature_is():
    """Catches a budget that is exceeded, counted in rows instead of weights, or spent without
    looking at what an error costs."""
    torch.manual_seed(0)
    weights = {"a": torch.randn(6, 20), "b": torch.randn(30, 4)}
    steep = {"a": torch.full((6, 20), 1e4), "b": torch.ones(30, 4)}
    bits = example.allotted(weights, steep, 3.0)
    used = 20 * int(bits["a"].sum()) + 4 * int(bits["b"].sum())
    assert 3.0 * 240 - 20 <= used <= 3.0 * 240
    assert float(bits["a"].double().mean()) > float(bits["b"].double().mean()) + 3

    def cost(bits: dict[str, torch.Tensor]) -> float:
        network = SimpleNamespace(state_dict=lambda: dict(weights))
        found = example.coarser(network, bits)
        return sum(float((steep[n] * (found[n] - w) ** 2).sum()) for n, w in weights.items())

    even = {name: torch.full((len(w),), 3) for name, w in weights.items()}
    assert cost(bits) < cost(even) / 10


def test_the_diagonal_predicts_independent_changes():
    """Catches a factor 2 in 1/2 F w^2 or in sigma^2: of small independent changes of all weights,
    the mean rise in nats is that of the diagonal, correlations or not. Within 4 standard errors
    (false alarm 6e-5) and 10 % for inputs and second order; a factor 2 is at least 8 of them."""
    meter = example.Meter(example.trained(example.TASKS["lognormal"](), example.QUICK, 0))
    network, generator = meter.network, torch.Generator().manual_seed(1)
    x, variance = meter.reader.test_x, meter.reader.variance
    scale, nats = 1e-3, []
    for _ in range(200):
        changed = {
            name: w * (1 + scale * torch.randn(w.shape, generator=generator))
            for name, w in meter.whole.items()
        }
        with torch.no_grad():
            found = torch.func.functional_call(network, changed, (x,))
        nats.append(float((found - meter.estimates).square().mean()) / (2 * variance))
    measured = torch.tensor(nats).double() / scale**2
    predicted = sum(float((meter.fisher[n] * w**2).sum()) for n, w in meter.whole.items()) / 2
    error = float(measured.std()) / len(nats) ** 0.5
    assert error < 0.1 * predicted
    assert abs(float(measured.mean()) - predicted) < 4 * error + 0.1 * predicted


def test_importance_keeps_what_chance_loses(run):
    """The claim at the size of a test: with 60 % of the weights all is there by importance (above
    95 % of the whole network's information, 4 standard errors of a measurement are 15 %), and less
    than two thirds by chance. Catches scores that are those of another parameter."""
    found, _ = run
    whole = found["lognormal"]["whole"]["transmission"]
    kept = {way: curve[0] for way, curve in found["lognormal"]["weights"].items()}
    assert kept["importance"]["left"] == 0.6
    assert kept["importance"]["transmission"] > 0.95 * whole
    assert kept["chance"]["transmission"] < 2 / 3 * whole


def test_files_and_tables(run):
    """Catches a figure that is not drawn, numbers that JSON cannot hold, a table without rows, and
    a size that is praised although a larger network has lost the information."""
    found, out = run
    assert json.loads((out / "result.json").read_text()) == found
    assert (out / "pruning.png").stat().st_size > 10_000
    assert example.table([found]).count("\n") == 3
    assert list(found["lognormal"]["layers"]) == ["whole", "importance", "magnitude", "chance"]
    assert next(iter(found["lognormal"]["layers"]["whole"])) == "input"
    curve = [{"left": left, "transmission": t} for left, t in ((0.8, 1.0), (0.4, 0.5), (0.2, 1.0))]
    assert example.intact(curve, "left", 1.0) == 0.8
    assert example.intact(curve, "left", 3.0) is None


@pytest.mark.slow
def test_the_benchmark_stores_a_run(run, monkeypatch):
    """Catches a benchmark that does not run, and a convolutional network that is not measured: at
    the tiny size importance keeps twice what chance keeps with 20 % of the weights."""
    measured = example.main

    def camera_alone(given: list[str]) -> dict[str, Any]:
        return run[0] | measured([*given, "--networks", "camera"])

    monkeypatch.setattr(example, "main", camera_alone)
    less = replace(example.QUICK, left=(0.2,), bits=(2.0,), samples=1500)
    monkeypatch.setattr(example, "QUICK", less)
    (found,) = pruning.pruning(tiny=True)["runs"]
    assert set(found) == set(example.TASKS)
    curves = found["camera"]["weights"]
    assert curves["importance"][0]["left"] == 0.2
    assert curves["importance"][0]["transmission"] > 2 * curves["chance"][0]["transmission"]
