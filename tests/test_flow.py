"""`fisher_flow` and `fisher_information`: formulas, properties, and errors that change nothing."""

from __future__ import annotations

import gc
import math
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from support.networks_zoo import (
    DTHETA,
    SHIFT,
    WIDTH,
    measure,
    mlp,
    noisy,
    samples,
    seeded,
    two_conditions,
    untouched,
)
from torch import nn

import fisherfast as ff
from fisherfast.data.dealing import Dealing

FOLDS = 16
MATRICES = ("J", "stderr", "lower", "lower_stderr", "linear", "linear_stderr", "naive")


def three_parameters(n: int = 400, dtype: torch.dtype = torch.float64, units=(1.0, 1.0, 1.0)):
    """Samples whose first three means are the parameters, measured in these units."""
    generator = torch.Generator().manual_seed(1)
    minus, plus = [], []
    for parameter in range(3):
        for sign, condition in ((-1, minus), (1, plus)):
            x = torch.randn(n, WIDTH, generator=generator, dtype=dtype)
            x[:, parameter] += sign * SHIFT
            condition.append(x)
    return ff.FiniteDifference(minus, plus, [DTHETA * unit for unit in units])


def double_conditions(n: int = 400, **options) -> ff.FiniteDifference:
    """`two_conditions` in float64."""
    return ff.FiniteDifference(*(x.double() for x in samples(n)), DTHETA, **options)


# --- the numbers ---


def folds_of(samples):
    """The fold [n] of each of so many samples."""
    return (Dealing.of(samples, FOLDS).cells_from(0, samples) % FOLDS).numpy()


def brute_force(minus: np.ndarray, plus: np.ndarray, ridge: float) -> tuple[float, float]:
    """Debiased and naive linear information by the formulas of docs/theory.md, 4, 5 and 22, one
    parameter."""
    d = minus.shape[1]
    cells = [x[folds_of(len(x)) == fold] for x in (minus, plus) for fold in range(FOLDS)]
    nu = len(minus) + len(plus) - len(cells)
    within = sum((cell - cell.mean(0)).T @ (cell - cell.mean(0)) for cell in cells) / nu
    scale = np.sqrt(np.diag(within))
    correlation = within / np.outer(scale, scale) + ridge * np.eye(d)
    derivative = (plus.mean(0) - minus.mean(0)) / DTHETA / scale
    inverse = np.linalg.inv(correlation)
    naive = derivative @ inverse @ derivative
    k_eff = d - ridge * np.trace(inverse)
    noise = (1 / len(minus) + 1 / len(plus)) / DTHETA**2
    alone = [(cell - cell.mean(0)) * np.sqrt(len(cell) / (len(cell) - 1)) for cell in cells]
    samples = np.concatenate(alone) / scale
    g = 1 / (1 - np.einsum("ni,ij,nj->n", samples, inverse, samples) / nu)
    u = samples @ inverse @ derivative
    leverages = (g * u**2).sum() / (g**2 * u**2).sum() * (nu - 2) / (nu - k_eff - 4)
    return leverages * ((nu - k_eff - 1) / nu * naive - noise * k_eff), naive


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_linear_information_against_the_formula(ridge):
    """Catches a covariance with fold means in it, another nu, a ridge on raw units, a half step."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    minus, plus = (x.double() @ mix for x in samples(300))
    data = ff.FiniteDifference(minus, plus[:250], DTHETA)
    debiased, naive = brute_force(minus.numpy(), plus[:250].numpy(), ridge)
    info = ff.fisher_information(data, max_features=1, ridge=ridge)
    assert info.linear.item() == pytest.approx(debiased, rel=1e-9)
    if info.feature_kind == "raw":
        assert info.naive.item() == pytest.approx(naive, rel=1e-9)


def test_truth_of_a_gaussian_shift():
    """J = 6 within 4 sigma (false alarm 1 in 16000); power: J/2 and 2 J fail."""
    info = ff.fisher_information(two_conditions(4000), max_features=16)
    assert info.stderr.item() < 0.7
    assert info.value == pytest.approx(WIDTH, abs=4 * info.stderr.item())
    assert info.lower.item() == pytest.approx(WIDTH, abs=4 * info.lower_stderr.item())
    assert info.naive > info.J


def test_no_information_is_not_clipped():
    """Catches J clipped at 0, which is biased: about every second one must be negative."""
    values = []
    for seed in range(6):
        minus, plus = samples(seed=seed)
        data = ff.FiniteDifference(minus + SHIFT, plus - SHIFT, DTHETA)
        values.append(ff.fisher_information(data, max_features=16).linear.item())
    assert min(values) < 0


def test_finite_step_warns_once_with_the_layers():
    """Catches a warning per layer, one at any step, or none: 0.3 is the limit."""
    minus, plus = samples()
    wide = ff.FiniteDifference(minus - 0.5, plus + 0.5, dtheta=1.2)
    with pytest.warns(ff.FisherWarning, match=r"^dtheta sqrt\(J\) / 2 = \d\.\d+ > 0\.3") as caught:
        flow = measure(seeded(mlp), wide)
    assert len(caught) == 1
    assert "input" in str(caught[0].message)
    assert flow["input"].finite_step.item() == pytest.approx(
        1.2 * math.sqrt(flow["input"].value) / 2
    )
    assert any("finite step" in note for note in flow["input"].notes)


# --- properties ---


def test_results_are_symmetric_and_plain():
    """Catches a J that is only one half of a matrix, and results on another device or dtype."""
    flow = measure(seeded(mlp).double(), three_parameters())
    for layer in flow:
        for name in MATRICES:
            matrix = getattr(layer, name)
            assert matrix.shape == (3, 3)
            assert matrix.dtype == torch.float64
            assert not matrix.requires_grad
            torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-12)
        assert layer.curve_J.shape == layer.curve_stderr.shape == (len(layer.curve_k), 3, 3)
        assert layer.curve_k.dtype == torch.int64
        assert (layer.curve_k[1:] > layer.curve_k[:-1]).all()
        assert layer.curve_k[-1] >= layer.features
        assert (torch.linalg.eigvalsh(layer.naive) > -1e-9).all()
        assert (layer.stderr.diagonal() >= 0).all()


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_invertible_affine_map_keeps_linear_information(ridge):
    """Catches a whitening or a standardisation that is not undone.

    Without ridge to rounding (1e-13 seen); with it the features' noise differs: 1e-4 times the
    condition number of the correlations.
    """
    model = seeded(lambda: nn.Linear(WIDTH, WIDTH), seed=2).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(WIDTH) + 0.3 * model.weight)
        model.bias.fill_(5.0)
    flow = measure(model, double_conditions(), ridge=ridge, max_features=1)
    tolerance = 1e-9 if ridge == 0 else 2e-3
    torch.testing.assert_close(flow["output"].linear, flow["input"].linear, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("scale", "offset"), [(1e-12, 0.0), (1e12, 0.0), (1.0, 1e3), (1.0, 1e8)])
def test_units_and_offset_of_the_data_do_not_matter(scale, offset):
    """Catches an absolute threshold (volts or microvolts, J is the same to rounding), a plain sum
    of squares, and features called constant that are resolved in float64: 1e8 to 1e-8 standard
    deviations."""
    minus, plus = (x.double() for x in samples())
    expected = ff.fisher_information(ff.FiniteDifference(minus, plus, DTHETA), max_features=16)
    moved = ff.FiniteDifference(minus * scale + offset, plus * scale + offset, DTHETA)
    info = ff.fisher_information(moved, max_features=16)
    assert info.dropped == 0
    torch.testing.assert_close(info.linear, expected.linear, rtol=1e-6, atol=0)
    if offset == 0:
        torch.testing.assert_close(info.curve_J, expected.curve_J, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["independent", "paired", "several"])
def test_units_of_theta(kind):
    """theta in mm, not m: J, stderr, lower, all by 1e-6, J_ij by both units, fractions not at all.
    Catches a step left out somewhere."""
    units = torch.tensor([1000.0] if kind != "several" else [1.0, 1000.0, 0.01]).double()
    minus, plus = (x.double() for x in samples(4000))  # J of the input is 3 errors above 0

    def measured(units: torch.Tensor) -> ff.FisherFlow:
        if kind == "several":
            data = three_parameters(8000, units=units.tolist())
        else:
            data = ff.FiniteDifference(minus, plus, DTHETA * units, paired=kind == "paired")
        return measure(seeded(mlp).double(), data)

    plain, scaled = measured(torch.ones_like(units)), measured(units)
    for layer in plain:
        other = scaled[layer.name]
        for name in (*MATRICES, "curve_J", "curve_stderr"):
            matrix = getattr(other, name) * torch.outer(units, units)
            # the bound of the output inverts a matrix of rank 1: 1e-8 of its size seen
            tolerance = 1e-6 if kind == "several" and name.startswith("lower") else 1e-9
            torch.testing.assert_close(matrix, getattr(layer, name), rtol=tolerance, atol=tolerance)
        assert other.features == layer.features
        torch.testing.assert_close(other.finite_step, layer.finite_step, rtol=1e-9, atol=0)
        if kind != "several":  # of rank 1 there is no bound
            torch.testing.assert_close(other.crlb, layer.crlb * units, rtol=1e-9, atol=0)
    for name, fraction in plain.fractions().items():
        assert scaled.fractions()[name] == pytest.approx(fraction, rel=1e-8, abs=1e-10)
        error = plain.fraction_errors()[name]
        assert scaled.fraction_errors()[name] == pytest.approx(error, rel=1e-8)


def test_same_seed_same_bits():
    """Catches a random state of the process that gets in, also where the network draws numbers,
    folds or pilots that are drawn, and a seed that the lift does not use."""
    model = seeded(noisy)
    first = measure(model)
    torch.manual_seed(99)
    np.random.seed(99)
    second = measure(model)
    other = measure(model, seed=1)["input"]
    for layer in first:
        for name in (*MATRICES, "curve_J", "curve_stderr"):
            assert torch.equal(getattr(layer, name), getattr(second[layer.name], name))
    assert torch.equal(other.linear, first["input"].linear)
    assert torch.equal(other.linear_stderr, first["input"].linear_stderr)
    assert not torch.equal(other.curve_J, first["input"].curve_J)


@pytest.mark.parametrize("batch_size", [1, 399])
def test_batch_size_changes_results_to_rounding(batch_size):
    """Catches samples that are dealt to folds, or standardised, by the batches they come in."""
    model = seeded(mlp).double()
    data = double_conditions(400 if batch_size > 1 else 64)
    expected = measure(model, data, settings=ff.Settings(batch_size=4096))
    flow = measure(model, data, settings=ff.Settings(batch_size=batch_size))
    for layer in flow:
        other = expected[layer.name]
        for name in ("linear", "linear_stderr"):
            torch.testing.assert_close(
                getattr(layer, name), getattr(other, name), rtol=1e-9, atol=1e-9
            )
        assert layer.features == other.features
        for name in ("J", "lower", "naive", "curve_J", "curve_stderr"):
            torch.testing.assert_close(
                getattr(layer, name), getattr(other, name), rtol=1e-6, atol=1e-6
            )


def test_settings_are_kept():
    """Catches a result that does not say how it was measured."""
    flow = measure(seeded(mlp), seed=3, settings=ff.Settings(folds=8, batch_size=100), ridge=1e-3)
    for name, value in {"seed": 3, "folds": 8, "batch_size": 100, "ridge": 1e-3}.items():
        assert flow.settings[name] == value
    assert flow.settings["max_features"] == 16
    assert flow.settings["dtheta"] == [DTHETA]
    assert flow.settings["paired"] is False
    assert flow.version == ff.__version__


# --- values that cannot be used ---


@pytest.mark.parametrize(("batch", "value"), [(0, math.nan), (7, -math.inf)])
def test_bad_samples_name_input_batch_and_condition(batch, value):
    """Catches NaN that reaches J, or is blamed on the first layer instead of the data."""
    minus, plus = samples()
    plus[50 * batch + 49, 2] = value
    model = seeded(mlp).train()
    text = (
        "activations of layer 'input' must be finite, got NaN or infinity in "
        f"batch {batch} of condition 'plus[1]'"
    )
    data = ff.FiniteDifference([minus, minus], [minus, plus], DTHETA)
    with untouched(model), pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        measure(model, data, settings=ff.Settings(batch_size=50))


@pytest.mark.parametrize("place", [20, 333])
def test_bad_activations_name_the_first_layer_in_order_of_execution(place):
    """Catches the last layer, or the first of a dict, that is blamed; in the pilot and later."""

    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(torch.where(x[:, :1] > 9, torch.nan, x))

    minus, plus = samples()
    plus[place, 0] = 10
    model = nn.Sequential(OrderedDict(z_first=nn.Identity(), breaks=Breaks(), a_last=nn.Tanh()))
    text = (
        "activations of layer 'z_first/sigmoid' must be finite, got NaN or infinity in "
        f"batch {place // 50} of condition 'plus'"
    )
    data = ff.FiniteDifference(minus, plus, DTHETA)
    with untouched(model), pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        measure(model, data, settings=ff.Settings(batch_size=50))


def test_overflow_of_the_statistics():
    """1e30 is finite, its square is not in float32: catches a NaN that comes out as J."""
    minus, plus = (x * 1e30 for x in samples())
    expected = ff.fisher_information(two_conditions(), max_features=16)
    info = ff.fisher_information(ff.FiniteDifference(minus, plus, DTHETA), max_features=16)
    torch.testing.assert_close(info.linear, expected.linear, rtol=1e-4, atol=0)


# --- how many samples ---


def wide_information(n: int, width: int, parameters: int, paired: bool) -> ff.LayerFisher:
    """Information of n samples per condition, in all activations whatever their number."""
    minus, plus = samples(n * parameters, width=width)
    data = ff.FiniteDifference(list(minus.split(n)), list(plus.split(n)), DTHETA, paired=paired)
    return ff.fisher_information(data, max_features=512)


def needed(*arguments) -> int:
    """The number of samples that the message asks for."""
    text = r"^layer 'input' must see at least (\d+) samples per condition"
    with pytest.raises(ValueError, match=text) as caught:
        wide_information(*arguments)
    return int(re.search(text, str(caught.value))[1])


@pytest.mark.filterwarnings("ignore::fisherfast.FisherWarning")
@pytest.mark.parametrize("case", [(3, 1, False), (3, 2, True), (100, 2, False), (257, 1, False)])
def test_number_of_samples_that_is_asked_for_is_enough(case):
    """Catches a number that is too small, and one that is too large (two less must fail)."""
    width, parameters, _ = case
    enough = needed(FOLDS, *case)
    info = wide_information(enough, *case)
    assert info.samples == 2 * parameters * enough
    assert info.compressed == (width > 3)
    assert torch.isfinite(info.linear).all()
    assert torch.isfinite(info.lower).all()
    assert needed(enough - 2, *case) == pytest.approx(enough, abs=1)


# --- features without information ---


class Dead(nn.Module):
    """The first and third of four activations never vary; `all_dead` silences the rest."""

    def __init__(self, all_dead: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 4)
        self.out = nn.Linear(4, 1)
        self.all_dead = all_dead
        with torch.no_grad():
            self.fc.weight[0] = 0
            self.fc.bias[2] = -1e6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.fc(x) - 1e9 * self.all_dead))


@pytest.mark.parametrize("dead", [2, 4])
def test_constant_features_are_dropped_counted_and_noted(dead):
    """Catches a division by a standard deviation of 0; and where all are constant NaN, an error, or
    a layer that is missing from the results."""
    model = seeded(lambda: Dead(all_dead=dead == 4))
    with untouched(model):
        flow = measure(model, two_conditions(4000))
    relu = flow["fc/relu"]
    assert relu.dim == 4
    assert relu.dropped >= dead
    assert any("constant" in note for note in relu.notes)
    assert "fc/relu" in str(flow)
    if dead == 2:
        assert flow["fc"].dropped >= 1
        assert relu.value < WIDTH + 4 * relu.stderr.item()
        return
    for layer in (relu, flow["output"]):
        assert layer.dropped == layer.dim
        for matrix in MATRICES:
            assert torch.equal(getattr(layer, matrix), torch.zeros(1, 1, dtype=torch.float64))
        assert flow.fractions()[layer.name] == 0
        assert math.isinf(layer.crlb.item())


@pytest.mark.filterwarnings("ignore::fisherfast.FisherWarning")
@pytest.mark.parametrize(("where", "batch_size"), [("minus", 25), ("plus", 4096)])
def test_activations_that_fire_late_count(where, batch_size):
    """Catches a feature that is dropped because it was silent in the first batches.

    Zero for the first 1600 samples of both conditions, then noise, shifted by 1 in one of them.
    """
    minus, plus = samples(2000)
    silent = 1600
    for x in (minus, plus):
        x[:silent, 5] = 0
        x[silent:, 5] += SHIFT if x is minus else -SHIFT
    (minus if where == "minus" else plus)[silent:, 5] += 1.0
    data = ff.FiniteDifference(minus, plus, DTHETA)
    info = ff.fisher_information(data, max_features=16, settings=ff.Settings(batch_size=batch_size))
    expected, _ = brute_force(minus.double().numpy(), plus.double().numpy(), 0.0)
    assert info.dropped == 0
    assert info.linear.item() == pytest.approx(expected, rel=1e-4)


# --- arguments ---


REFUSED = {
    "no features": ({"max_features": 0}, "max_features must be at least 1, got 0"),
    "seed": ({"seed": 2**63}, f"seed must be at least -2**63 and below 2**63, got {2**63}"),
    "ridge": ({"ridge": 1}, 'ridge must be "auto" or in [0, 1), got 1.0'),
    "NaN": ({"ridge": math.nan}, 'ridge must be "auto" or in [0, 1), got nan'),
    **{
        f"{name} {value!r}": ({name: value}, f"{name} must ")
        for name in ("max_features", "ridge", "seed", "settings")
        for value in ({} if name == "settings" else None, "many", [1], 16.5)
    },
    **{
        f"data {data!r}": (
            {"data": data},
            "data must be a FiniteDifference, Pathwise, Score, Labelled or Simulator, got "
            + type(data).__name__,
        )
        for data in (None, (torch.zeros(3), 1), nn.ReLU())
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments(case):
    """Catches a number that fails deep inside, or not at all, messages that do not say which
    argument, 16.5 features that are silently 16, and samples given without their step. Both
    functions check alike."""
    options, text = REFUSED[case]
    options = {"data": two_conditions()} | options
    model = seeded(mlp)
    with untouched(model), pytest.raises((TypeError, ValueError), match=f"^{re.escape(text)}"):
        ff.fisher_flow(model, **options)
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(text)}"):
        ff.fisher_information(**options)


def test_things_that_are_no_model():
    """Catches an error about missing attributes."""
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got NoneType$"):
        ff.fisher_flow(None, two_conditions())


# --- interruptions, progress, chains ---


@pytest.mark.parametrize(("batches", "error"), [(0, MemoryError), (8, KeyboardInterrupt)])
def test_interrupted_sources_leave_nothing_behind(batches, error):
    """Catches hooks, eval mode or a seeded stream that stay after Ctrl-C while data are read."""
    minus, plus = samples()

    def interrupted():
        yield from plus.split(50)[:batches]
        raise error

    model = seeded(mlp).train()
    data = ff.FiniteDifference(lambda: minus.split(50), interrupted, DTHETA)
    with untouched(model), pytest.raises(error):
        measure(model, data)
    # and it still measures
    assert measure(model)["input"].samples == 800


@pytest.mark.parametrize("source", ["finite-difference", "pathwise"])
def test_a_measurement_frees_its_samples_at_once(source):
    """Catches statistics and process groups that live on in a reference cycle until the garbage
    collector comes by."""
    x = samples()[0]
    data = ff.Pathwise(x, torch.ones_like(x)) if source == "pathwise" else two_conditions(400)
    model = seeded(mlp)
    measure(model, data)  # what is made once per process
    gc.collect()
    gc.disable()
    try:
        measure(model, data)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_source_that_uses_the_random_stream():
    """A source may draw from the global stream: its draws are kept there, or all are put back."""
    model = seeded(mlp)

    def draw() -> list[torch.Tensor]:
        return [torch.randn(400, WIDTH)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        draw(), draw()
        drawn = torch.get_rng_state()
        torch.manual_seed(5)
        measure(model, ff.FiniteDifference(draw, draw, DTHETA))
        after = torch.get_rng_state()
    assert torch.equal(after, drawn) or torch.equal(after, before)


def test_a_layer_that_runs_only_sometimes():
    """Catches an output that is read from its other name, which runs in every second batch."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, 3)
            self.rare = nn.Linear(3, 3)
            self.batches = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.batches += 1
            y = self.fc(x)
            return self.rare(y) if self.batches % 2 else y + 1

    flow = measure(seeded(Sometimes), settings=ff.Settings(batch_size=50))
    assert flow.names == ["input", "fc", "output"]
    assert flow["output"].samples == 800
