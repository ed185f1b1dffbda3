"""Networks trained on half of the samples: what they learn from, what they may not see, what J
gains, and what becomes of those that learn nothing.

Statistical tests: bounds of 4 standard errors, a false alarm in 16 000 runs; seeds are fixed.
"""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from support.networks_zoo import untouched
from support.scripts import ROOT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherfast as ff
from benchmarks.accuracy import probe as script
from fisherfast.data.dealing import Place
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation import probe as probes
from fisherfast.estimation.features import FeatureDictionary
from fisherfast.estimation.pilot import PilotMoments
from fisherfast.estimation.probe import Probe, ProbedDictionary, Regression
from fisherfast.measurement import probe_layer as probed
from fisherfast.problems import GaussianScale, GaussianShift, invertible_chain

SIGMAS = 4.0
DIM, DTHETA = 4, 0.25
SOURCES = ("independent", "paired", "pathwise", "score")
SHIFTS = {1: torch.ones(DIM), 2: torch.eye(DIM)[:, :2] + 0.3}


def data_of(source: str, samples: int, parameters: int = 1, seed: int = 0) -> ff.data.Data:
    """A Gaussian shift, as each source gives it."""
    problem, theta = GaussianShift(SHIFTS[parameters]), [0.0] * parameters
    if source == "pathwise":
        return problem.pathwise(theta, samples, seed=seed)
    if source == "score":
        return problem.scored(theta, samples, seed=seed)
    steps = DTHETA if parameters == 1 else [DTHETA] * parameters
    paired = source == "paired"
    return problem.finite_difference(theta, steps, samples, seed=seed, paired=paired)


def truth_of(parameters: int = 1) -> torch.Tensor:
    """The information of the shift, [P, P]."""
    shift = SHIFTS[parameters].double().reshape(DIM, -1)
    return shift.T @ shift


def chain() -> nn.Module:
    """Loses no information, and leaves little of it linear."""
    return invertible_chain(DIM, depth=4, slope=0.2)


def measure(data: ff.data.Data, model: nn.Module | None = None, **options: object) -> ff.FisherFlow:
    """Only the last layer, without lifted features unless they are asked for."""
    options = {"max_features": DIM, "probe": "network", "layers": "output"} | options
    return ff.fisher_flow(chain() if model is None else model, data, **options)


SMALL = {
    "WIDTH": 16,
    "BATCH_ROWS": 256,
    "EVALUATIONS": 10,
    "PATIENCE": 5,
    "STEPS": 300,
    "LEAST_STEPS": 100,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that are trained in a second."""
    for name, value in SMALL.items():
        monkeypatch.setattr(probes, name, value)


@pytest.fixture(scope="module")
def usual() -> ff.FisherFlow:
    """What 2000 pairs show with small networks."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(probes, name, value)
        return measure(data_of("paired", 2000))


def some_probe(dim: int = 5, outputs: int = 2, width: int = 7) -> Probe:
    """Random weights in float64."""
    generator = torch.Generator().manual_seed(3)

    def layer(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.randn(rows, columns + 1, generator=generator, dtype=torch.float64)
        return weight[:, :columns], weight[:, columns]

    blocks = tuple(layer(width, width) for _ in range(probes.BLOCKS))
    return Probe(layer(width, dim), blocks, layer(outputs, width), layer(outputs, dim)[0])


def regression_of(source: str, generator: torch.Generator) -> tuple[Regression, torch.Tensor]:
    """Samples as a training sees them, and the derivative of their mean [d, P] in plain words."""
    n, P = 50, 2
    if source in ("independent", "paired"):
        z = torch.randn(n, 2 * P, DIM, generator=generator, dtype=torch.float64)
        minus, plus = torch.arange(0, 2 * P, 2), torch.arange(1, 2 * P, 2)
        steps = torch.tensor([0.2, 0.5], dtype=torch.float64)
        contrast = torch.zeros(2 * P, P, dtype=torch.float64)
        contrast[minus, range(P)], contrast[plus, range(P)] = -1 / steps, 1 / steps
        return Regression(z, (2 * P * contrast)[None]), (
            (z[:, plus] - z[:, minus]).mean(0) / steps[:, None]
        ).T
    z = torch.randn(n, 1, DIM, generator=generator, dtype=torch.float64)
    if source == "pathwise":
        tangents = torch.randn(n, P, DIM, generator=generator, dtype=torch.float64)
        return Regression(z, z.new_zeros(1), tangents), tangents.mean(0).T
    score = torch.randn(n, 1, P, generator=generator, dtype=torch.float64)
    return Regression(z, score), (z[:, 0].T @ score[:, 0]) / n


@pytest.mark.parametrize("source", SOURCES)
def test_targets_carry_the_derivative_of_the_mean(source):
    """Catches a factor (half a step for a whole one, C conditions that count once), a sign, and
    parameters that are exchanged: the mean of activation times target is the derivative."""
    regression, derivative = regression_of(source, torch.Generator().manual_seed(0))
    scale = torch.tensor([3.0, 0.5], dtype=torch.float64)
    points, targets = regression.batch(torch.arange(len(regression)), scale)
    products = points[..., :, None] * targets[..., None, :]
    assert points.shape[1] == regression.points()
    torch.testing.assert_close(products.mean((0, 1)), derivative / scale)


def test_tangents_of_a_probe():
    """Catches a bias that moves, a branch without its tangent, and the derivative where activations
    are cut; the oracle is a difference of outputs."""
    probe, generator = some_probe(), torch.Generator().manual_seed(1)
    z, dz = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    z[0, 2] = 3 * probes.LIMIT
    dz = torch.stack([dz, dz.flip(0)])
    step = 1e-5
    expected = torch.stack([(probe(z + step * t) - probe(z - step * t)) / (2 * step) for t in dz])
    # 1e-9 was seen
    torch.testing.assert_close(probe.tangents(z, dz), expected, rtol=1e-6, atol=1e-7)


def test_a_trained_probe_reads_raw_features(small, monkeypatch):
    """Catches a mean or a whitening that is lost when training ends: what was best on the samples
    held out is reached again by the probe that is returned, from the raw features."""
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(DIM, DIM, generator=generator)
    z = (torch.randn(2000, DIM, generator=generator) @ mixing + 1.5)[:, None]
    score = (z.square() - z.square().mean(0)).sum(2, keepdim=True)
    regression, seen = Regression(z, score), []
    held_out = probes._Training._held_out

    def remember(self, probe):
        seen.append(held_out(self, probe))
        return seen[-1]

    monkeypatch.setattr(probes._Training, "_held_out", remember)
    scale = score[:, 0].std(0).double()
    covariance = torch.cov(z[:, 0].T).double()
    readout = torch.zeros(DIM, 1, dtype=torch.float64)
    trained = probes.train_probe(regression, covariance, readout, scale, dof=2000, seed=0)
    rows = torch.arange(2000) % probes.VALIDATION == 0
    out, target = trained.probe(z[rows, 0]), score[rows, 0] / scale
    assert min(seen) < -0.9  # of -1: a power check
    again = float((out.square() - 2 * out * target).mean())
    assert again == pytest.approx(min(seen), rel=1e-3)  # 1e-6 was seen


def test_probed_features_stand_between_raw_and_lifted():
    """Catches a lift that reads the probe, and tangents of another order."""
    pilot, generator = PilotMoments(), torch.Generator().manual_seed(4)
    x = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    pilot.update(x)
    base = FeatureDictionary(pilot.standardisation(), 20, dtype=torch.float64)
    both = ProbedDictionary(base, some_probe(), 10)
    features, plain = both(x), base(x)
    assert (both.linear, both.raw, both.size) == (5, 7, 17)
    assert torch.equal(features[:, :5], plain[:, :5])
    assert torch.equal(features[:, 5:7], both.probe(plain[:, :5]))
    torch.testing.assert_close(features[:, 7:], plain[:, 5:15])
    with pytest.raises(ValueError, match=r"^raw must be given"):
        both.raw_tangents(x[None])


@pytest.mark.parametrize("batches", [[100], [33, 1, 66]])
def test_kept_samples_are_few_and_evenly_spaced(batches):
    """Catches memory that grows with the samples, and pairs that part: what is kept depends on
    neither the batches nor the condition."""
    x = torch.arange(200.0).reshape(2, 100, 1)
    kept = KeptSamples(2, 30)
    for condition in range(2):
        start = 0
        for size in batches:
            place, order = Place.in_turn(start, size, 4)
            kept.add(condition, place, x[condition, start : start + size][order], None)
            start += size
    (rows,) = kept.take()
    assert torch.equal(rows[:, 0, 0], torch.arange(0.0, 100, 4))
    assert torch.equal(rows[:, 1], rows[:, 0] + 100)


@pytest.mark.parametrize(
    ("source", "parameters"), [("independent", 1), ("paired", 2), ("pathwise", 2), ("score", 1)]
)
def test_a_probe_finds_what_is_not_linear(small, source, parameters):
    """Catches targets, tangents or halves that do not fit together: J must lie between the truth
    and what is linear, 4 standard errors from the latter, and the bound must know it too."""
    samples = 20_000 if source == "independent" else 3000
    flow = measure(data_of(source, samples, parameters))
    layer, truth = flow["output"], float(truth_of(parameters).trace())
    J, error, linear = (float(m.trace()) for m in (layer.J, layer.stderr, layer.linear))
    lower, lower_error = float(layer.lower.trace()), float(layer.lower_stderr.trace())
    assert layer.feature_kind == "probe"
    assert linear + SIGMAS * error < J < truth + SIGMAS * error
    assert linear < lower < truth + SIGMAS * lower_error
    assert torch.equal(layer.curve_J[0], layer.linear)


class _OwnHalf(probed.ProbeMeter):
    """The mistake: each half is measured with the network that was trained on it."""

    def _train(self):
        super()._train()
        self.halves.reverse()


def test_what_a_network_has_memorised_does_not_count(monkeypatch):
    """Catches a half that is measured with its own network. The networks memorise their samples:
    nothing stops them. J stays below the truth, 20; measured on what was memorised it is a
    hundred times that."""
    countdown = itertools.count(0, -1)
    monkeypatch.setattr(probes._Training, "_held_out", lambda *_: float(next(countdown)))
    monkeypatch.setattr(probes, "LEAST_STEPS", 100)
    monkeypatch.setattr(probes, "DECAY", 0.0)
    monkeypatch.setattr(probes, "NOISE", 0.0)
    problem = GaussianScale(10)
    data = problem.finite_difference(1.0, 0.1, 600, seed=0)
    truth = float(problem.fisher(1.0))
    right = ff.fisher_information(data, max_features=10, probe="network")
    monkeypatch.setattr("fisherfast.measurement.run.ProbeMeter", _OwnHalf)
    with pytest.warns(ff.FisherWarning, match="finite step"):
        wrong = ff.fisher_information(data, max_features=10, probe="network")
    assert right.feature_kind == wrong.feature_kind == "probe"
    assert right.value < truth + SIGMAS * float(right.stderr)
    assert wrong.value > truth + SIGMAS * float(wrong.stderr)


@pytest.mark.slow
def test_a_probe_sees_through_four_layers():
    """Catches a probe too weak for what it is there for: the information is 8 in all layers, and
    the lift shows less than 0.9 of it. Six layers of 16 are in the benchmark."""
    problem, model = GaussianShift(torch.ones(8)), invertible_chain(8, depth=4, slope=0.2)
    data, options = problem.scored(0.0, 30_000, seed=0), {"max_features": 100}
    lift = measure(data, model, probe=None, **options)["output"]
    flow = measure(data, model, **options)
    assert lift.value / 8 < 0.9
    assert 0.95 < flow.fractions()["output"] < 1.03
    assert float(flow["output"].lower) / 8 > 0.92


def test_training_in_any_mode_touches_nothing(small, usual):
    """Catches weights drawn from the global random state, gradients left in the model, another
    dtype, mode or number of threads; a training that needs gradients where the user has switched
    them off, and one that autocast makes coarse: the same bits everywhere."""
    model = chain()
    with untouched(model), torch.inference_mode():
        assert measure(data_of("paired", 2000), model).to_dict() == usual.to_dict()
    assert all(p.grad is None for p in model.parameters())
    model.forward = torch.autocast("cpu", enabled=False)(model.forward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measure(data_of("paired", 2000), model)
    assert found.to_dict()["layers"] == usual.to_dict()["layers"]


def test_same_samples_same_result(small, usual, tmp_path):
    """Catches time in a result, halves or pairs that depend on where a batch ends, and a network in
    another precision than its layer; another seed is another network. Files bring
    back what was saved."""
    data = data_of("paired", 2000)
    assert measure(data, seed=1)["output"].value != usual["output"].value
    parts = measure(data, settings=ff.Settings(batch_size=333))["output"]
    double = measure(data, chain().double())["output"]
    assert double.feature_kind == "probe"
    assert double.value == pytest.approx(usual["output"].value, rel=0.02)
    # sums in another order lead training elsewhere
    assert parts.value == pytest.approx(usual["output"].value, rel=0.02)
    usual.save(tmp_path / "flow.json")
    loaded = ff.FisherFlow.load(tmp_path / "flow.json")
    assert loaded.to_dict() == usual.to_dict()
    assert loaded.settings["probe"] == "network"
    assert any(row[-2].startswith("probe ") for row in loaded.table())
    assert "probes of " in loaded["output"].notes[0]


def test_a_budget_holds_whatever_the_samples(small, monkeypatch):
    """Catches a reservoir that keeps all samples: a tenth of the memory, a fraction of the rows,
    and all samples measured."""
    monkeypatch.setattr("fisherfast.measurement.run.PROBE_BYTES", 2 * 4 * 2 * 2 * DIM * 500)
    layer = measure(data_of("paired", 6000))["output"]
    assert layer.samples == 12_000
    assert layer.feature_kind == "probe"
    # of both halves 6000 / 8 = 750 fit into 1000: 347 in the smaller one, an eighth held out
    assert " on 304 samples" in layer.notes[0]


def test_a_memory_budget_counts_the_probes(small, usual):
    """Catches moments of the halves that no budget knows: the least one is larger by these. One
    that is large enough changes nothing."""
    data, needed = data_of("paired", 2000), []
    for probe in (None, "network"):
        with pytest.raises(ValueError, match=r"^memory_budget must be at least ") as raised:
            measure(data, memory_budget=1000, probe=probe, max_features=600)
        needed.append(float(str(raised.value).split("at least ")[1].split(" MB")[0]))
    halves = 2 * 2 * (2 * 8 * 600**2) / 1e6  # two layers, two halves, two matrices each
    assert needed[1] > needed[0] + halves
    layer = measure(data, memory_budget="60 MB")["output"]
    assert layer.feature_kind == "probe"
    assert layer.value == usual["output"].value


def test_a_probe_that_diverges_is_left_out(small, monkeypatch):
    """Catches NaN in J: the result is that without a probe, to the bit."""
    monkeypatch.setattr(probes, "CAREFUL_RATE", math.inf)
    data = data_of("paired", 2000)
    layer, plain = measure(data)["output"], measure(data, probe=None)["output"]
    assert layer.notes == ("no probe: training diverged",)
    assert layer.to_dict() | {"notes": ()} == plain.to_dict() | {"notes": ()}


def test_where_nothing_is_left_to_find_there_is_no_probe(small):
    """Catches noise that is fitted and kept: all information of the input is linear. The result
    is that without a probe."""
    data = data_of("score", 4000)
    flow, plain = measure(data), measure(data, probe=None)
    assert flow["input"].value == plain["input"].value
    assert "found nothing beyond the raw activations" in flow["input"].notes[0]


@pytest.mark.parametrize(
    ("samples", "model", "kind", "note"),
    [
        (100, chain(), "raw", "no probe: half of 100 samples per condition are too few"),
        (
            1000,
            nn.Sequential(nn.Linear(DIM, 3), nn.Threshold(1e9, 0.0)),
            "none",
            "all 3 activations",
        ),
        (1000, nn.Linear(DIM, 5000), "krylov", "no probe: the layer is too wide for a covariance"),
    ],
)
def test_layers_without_a_probe(small, samples, model, kind, note):
    """Catches an error where a measurement without a probe succeeds, a training on nothing, and a
    wide layer that is silently without a probe."""
    data = data_of("paired", samples)
    layer = measure(data, model)["output"]
    assert layer.value == measure(data, model, probe=None)["output"].value
    assert layer.feature_kind == kind
    assert any(line.startswith(note) for line in layer.notes)


def test_growing_comes_first(small):
    """Catches probes beside fewer lifted features than the curve asks for."""
    data = data_of("score", 6000)
    grown = measure(data, settings=ff.Settings(grow=True), max_features=DIM + 128)["output"]
    plain = measure(data, settings=ff.Settings(grow=True), max_features=DIM + 128, probe=None)[
        "output"
    ]
    assert grown.feature_kind == "probe"
    assert int(plain.curve_k[-1]) > DIM + 64  # a power check: there was growth
    assert int(grown.curve_k[-1]) == int(plain.curve_k[-1]) + 1


def test_samples_that_went_missing_between_passes_are_an_error(small):
    """Catches halves that are not those which the networks were trained without."""
    data, reads = data_of("score", 3000), itertools.count()
    whole = data.read
    data.read = lambda c, _: itertools.islice(whole(c, 500), 6 if next(reads) == 0 else 5)
    with pytest.raises(ValueError, match=r"same at every pass, got \[2500\] after \[3000\]"):
        measure(data)


@pytest.mark.parametrize("value", ["mlp", "", 1, True, ["network"]])
def test_unknown_probes_are_refused(value):
    """Catches a probe that is ignored."""
    with pytest.raises(ValueError, match=r"^probe must be None or 'network', got "):
        measure(data_of("score", 200), probe=value)
    with pytest.raises(ValueError, match=r"^probe must be None or 'network', got "):
        ff.fisher_information(data_of("score", 200), probe=value)


def test_data_that_do_not_repeat_are_refused():
    """Catches a second pass over other samples."""
    shuffled = DataLoader(TensorDataset(torch.randn(64, DIM)), batch_size=16, shuffle=True)
    data = ff.FiniteDifference(shuffled, shuffled, dtheta=0.1)
    text = "^data must come in the same order at every pass for probe='network'"
    with pytest.raises(ValueError, match=text):
        measure(data)


@pytest.mark.slow
def test_the_benchmark_runs(small, tmp_path):
    """Catches a benchmark that does not run, a choice that is not one of the probe's, and one that
    stays changed."""
    former = {name: getattr(probes, name) for name in ("WIDTH", "schedule", "_whitening")}
    figures = script.measure(tmp_path / "training.json", tiny=True)
    assert figures["choices"].keys() == set(script.TINY_CHOICES)
    assert figures["stack"][0]["probe"]["processor seconds"] > 0
    for _, _, changes in script.CHOICES.values():
        with script.changed(changes):
            pass
    assert all(getattr(probes, name) is value for name, value in former.items())


def test_the_documentation_shows_what_was_measured():
    """Catches numbers in the text that no command has measured, and the promise that is broken:
    at least 0.92 behind six layers, never above 1.03, in less than two minutes of two cores."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "training.json").read_text())
    figures = stored["probe"]["figures"]
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert all(line in text for line in script.table(figures).splitlines())
    many = [row for row in figures["stack"] if row["samples"] == script.MANY]
    rows = [row["probe"] for row in many if row["source"] == "score"]
    assert len(rows) == 3
    assert all(0.92 <= row["J / J_input"] <= 1.03 for row in rows)
    assert all(row["processor seconds"] < 120 for row in rows)


def test_the_learning_rate_rises_and_ends_at_zero():
    """Catches a schedule whose last steps still move the weights, or whose first ones are large."""
    rates = [probes.schedule(step / 1000) for step in range(1001)]
    top = rates.index(max(rates))
    assert (rates[0], rates[-1]) == (0, 0)
    assert 0.95 < rates[top] <= 1
    assert sorted(rates[:top]) == rates[:top]
    assert sorted(rates[top:], reverse=True) == rates[top:]
    assert probes.schedule(0.5) == pytest.approx(0.5)
