"""Tangents of rounded values: counts, files of few digits, half precision (docs/theory.md, 21)."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.estimation import dither as ditherer
from fisherfast.estimation.dither import CHUNK, StepMeter, dither

N = 8000


def numbers(n: int, dim: int) -> torch.Tensor:
    """The same standard normal numbers each time."""
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0))


def values(step: float, dim: int = 1) -> torch.Tensor:
    """Standard normal values [N, dim] on a lattice."""
    x = numbers(N, dim)
    return (x / step).round() * step if step else x


def shifted(step: float, dim: int = 1) -> ff.Pathwise:
    """With I = 1 before they were rounded."""
    return ff.Pathwise(values(step, dim), torch.full((N, dim), dim**-0.5))


def chain(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def not_above(layer: ff.LayerFisher, truth: float) -> bool:
    """J and the bound within 2 % and 4 errors (false alarm 3e-4 each, one-sided, 15 folds)."""
    return layer.value <= 1.02 * truth + 4 * float(layer.stderr) and float(
        layer.lower
    ) <= 1.02 * truth + 4 * float(layer.lower_stderr)


@pytest.mark.parametrize(("step", "kept"), [(0.001, 0.99), (0.1, 0.98), (1.0, 0.7)])
def test_a_lattice_is_no_information(step, kept, monkeypatch):
    """J / I of design 4.8. Power: without the noise a step of 0.1 gives 3031, because the kinks of
    the lift resolve the steps."""
    info = ff.fisher_information(shifted(step))
    assert not_above(info, 1.0)
    assert info.value > kept - 4 * float(info.stderr)
    assert any("rounded" in note for note in info.notes)
    monkeypatch.setattr(ditherer, "dither", lambda like, *_: torch.zeros_like(like))
    assert step != 0.1 or ff.fisher_information(shifted(step)).value > 10


def test_counts_of_a_camera_behind_a_network():
    """64 pixels with noise of 2 counts, I = 16; the first layer was 341."""
    generator = torch.Generator().manual_seed(1)
    signal = torch.linspace(-1, 1, 64)
    signal *= 8 / signal.norm()
    x = (100 + 2 * torch.randn(N, 64, generator=generator)).round()
    data = ff.Pathwise(x, signal.expand(N, 64).contiguous())
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))
    flow = ff.fisher_flow(model, data)
    assert all(not_above(layer, 16.0) for layer in flow)
    assert any("rounded" in note for note in flow["input"].notes)
    assert flow["input"].value > 0.88 * 16


def test_narrow_layers_behind_rounded_values():
    """One lattice is seen by ten units at once: noise of each alone would average out."""
    flow = ff.fisher_flow(chain(1, 10, 5, 1), shifted(0.1))
    assert all(not_above(layer, 1.0) for layer in flow)


def test_float32_far_from_zero():
    """A mean of 1e4 and a spread of 0.1: numbers that float32 itself rounds to steps of 0.01
    spreads, between which nothing fits. It was 1389 of 200."""
    x = 1e4 + 0.1 * numbers(N, 100)
    info = ff.fisher_information(ff.Pathwise(x, torch.full((N, 100), 0.1 * 2**0.5)))
    assert not_above(info, 200.0)
    assert info.value > 0.95 * 200


class Rounds(nn.Module):
    """Rounds to steps, with the derivative of what it rounds."""

    def forward(self, x):
        return x + ((x / 0.1).round() * 0.1 - x).detach()


def test_a_layer_that_rounds_is_found():
    """Straight through: the tangents move, the values are on a lattice."""
    flow = ff.fisher_flow(nn.Sequential(nn.Linear(1, 1), Rounds()), shifted(0.0))
    assert not any("rounded" in note for note in flow["0"].notes)
    assert any("rounded" in note for note in flow["output"].notes)
    assert not_above(flow["output"], 1.0)


def test_half_precision():
    """A network under autocast, one of half parameters and one that rounds inside transmit what it
    does in float32, within 3 %. Under bfloat16 autocast it was 835 times that."""
    model, dtype = chain(20, 32, 8, 1), torch.bfloat16
    x, data = values(0.0, 20), shifted(0.0, 20)
    truth = ff.fisher_flow(model, data).fractions()
    with torch.autocast("cpu", dtype=dtype):
        cast = ff.fisher_flow(model, data).fractions()
        scores = ff.fisher_flow(model, ff.Score(x, x.double().sum(1) / 20**0.5))
    assert cast["output"] == pytest.approx(truth["output"], rel=0.03)
    half = ff.fisher_flow(copy.deepcopy(model).to(dtype), data)
    assert half.fractions()["output"] == pytest.approx(truth["output"], rel=0.03)
    assert all(not_above(layer, 1.0) for layer in half)
    assert scores.fractions()["output"] == pytest.approx(truth["output"], rel=0.1)


def test_what_does_not_move_is_not_touched():
    """An integer beside a rounded value: the model sees it as it is, and its values where they
    have no derivative."""
    seen = []

    class Model(nn.Module):
        def forward(self, x):
            seen.append(getattr(x, "primal", x)[:, 1].clone())
            return x[:, :1] * 2

    code = torch.arange(N, dtype=torch.float32)[:, None] % 3
    x = torch.cat([values(0.1), code], 1)
    moved = torch.tensor([1.0, 0.0]).expand(N, 2)
    flow = ff.fisher_flow(Model(), ff.Pathwise(x, moved))
    assert set(torch.cat(seen).tolist()) == {0.0, 1.0, 2.0}
    assert not_above(flow["output"], 1.0)


def test_batches_and_random_state_do_not_matter():
    """The noise belongs to the sample; the user's generators are not touched."""
    model, data = chain(1, 4, 1), shifted(0.1)
    state = torch.get_rng_state()
    flows = [
        ff.fisher_flow(model, data, settings=ff.Settings(batch_size=size)) for size in (N, 3000)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(*flows, strict=True):
        torch.testing.assert_close(a.J, b.J, rtol=1e-4, atol=0)


def test_continuous_values_stay():
    """No noise where nothing is tied, nor for a ReLU's zeros, a clamp and repeated samples."""
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Hardtanh(0, 1))
    flow = ff.fisher_flow(model, shifted(0.0, 5))
    assert not any("rounded" in note for layer in flow for note in layer.notes)


def test_step_meter():
    """Catches an atom taken for a lattice, and steps of what does not move."""
    x = numbers(300, 4)
    x[:, 1] = x[:, 1].relu()
    x[:, 2] = (x[:, 2] / 0.25).round() * 0.25
    x[:, 3] = x[:, 2]
    moving = torch.ones_like(x, dtype=torch.bool)
    moving[:, 3] = False
    meter = StepMeter()
    assert meter.steps() is None
    for rows, moves in zip(x.split(70), moving.split(70), strict=True):
        meter.update(rows, moves)
    assert meter.steps().tolist() == [0.0, 0.0, 0.25, 0.0]
    assert meter.half_steps().tolist() == [0.0, 0.0, 0.125, 0.0]
    far = StepMeter()
    far.update(1e6 + x)
    assert far.steps()[2] > 0  # but float32 has no room for noise of half of it
    assert far.half_steps()[0] == 0


def test_noise_belongs_to_the_sample():
    """Catches noise that starts anew with each batch, goes by the order of the rows, or is the same
    in two streams."""
    whole = dither(torch.empty(3 * CHUNK, 2), torch.arange(3 * CHUNK), 7, "a")
    start = CHUNK - 5
    numbers = torch.arange(start, start + CHUNK).flip(0)[::3]
    part = dither(torch.empty(len(numbers), 2), numbers, 7, "a")
    assert torch.equal(part, whole[numbers])
    other = dither(torch.empty(CHUNK, 2), torch.arange(CHUNK), 7, "b")
    assert float((other * whole[:CHUNK]).mean().abs()) < 4 / (2 * CHUNK) ** 0.5
    assert float(whole.var()) == pytest.approx(1, abs=5 * (2 / whole.numel()) ** 0.5)
    assert dither(torch.empty(0, 2), numbers[:0], 0).shape == (0, 2)


@pytest.mark.parametrize(("step", "unit"), [(0.01, 1.0), (0.5, 1.0), (0.01, 1e4 / 3)])
def test_the_step_is_that_of_the_lattice(step, unit):
    """Catches a quantile of the gaps: of few samples on a fine lattice they span several steps; and
    a rounding error that does not grow with the values."""
    meter = StepMeter()
    meter.update((numbers(256, 2) / step).round() * step * unit)
    expected = torch.full((2,), step * unit, dtype=torch.float64)
    torch.testing.assert_close(meter.steps(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("copies", "d", "lattice"), [(2, 1, 0), (3, 2, 0), (3, 1, 1)])
def test_copies_of_samples_are_no_lattice(copies, d, lattice):
    """Catches noise that takes the information of samples that are stored several times; three
    copies of a single number look like an uneven lattice."""
    meter = StepMeter()
    meter.update(numbers(100, d).repeat(copies, 1))
    assert int(meter.steps().any()) == lattice


def test_groups_of_copies_keep_their_information():
    """A direction that varies by a thousandth of the activations: noise of half a step of anything
    would leave 1 % of it."""
    z = numbers(2000, 2)
    mix = torch.tensor([[1.0, 0.0], [1.0, 1e-3]])
    x = (z @ mix.T).repeat(2, 1)
    dx = (mix @ torch.tensor([0.0, 1.0])).expand(4000, 2)
    info = ff.fisher_information(ff.Pathwise(x, dx, groups=torch.arange(2000).repeat(2)))
    assert info.value == pytest.approx(1, abs=4 * float(info.stderr))
    assert float(info.stderr) < 0.1


@pytest.mark.parametrize(("second", "noisy"), [(0.05, True), (1.0, False)])
def test_information_in_small_differences_is_not_resolved(second, noisy):
    """x = (z1, z1 + c z2) rounded to 0.1, of which the second moves. With c = 0.05 rounding and the
    noise hide most of J."""
    z = numbers(20_000, 2)
    x = torch.stack([z[:, 0], z[:, 0] + second * z[:, 1]], 1)
    x = (x * 10).round() / 10
    dx = torch.tensor([0.0, second]).expand(len(x), 2)
    info = ff.fisher_information(ff.Pathwise(x, dx))
    assert (info.status == "noisy") is noisy
    assert any("noise against rounding takes" in note for note in info.notes) is noisy
