"""J along theta: labelled samples in bins, and simulators at several theta."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fisherfast as ff

N, D = 2400, 4


def labelled(n: int = N, seed: int = 0, **options) -> ff.Labelled:
    """Samples of N(3 sin(theta) 1, 1), theta in [-1, 1]."""
    g = torch.Generator().manual_seed(seed)
    theta = 2 * torch.rand(n, generator=g, dtype=torch.float64) - 1
    x = 3 * torch.sin(theta)[:, None].float() + torch.randn(n, D, generator=g)
    return ff.Labelled(x, theta * options.pop("unit", 1.0), bins=options.pop("bins", 3), **options)


def truth(theta: torch.Tensor) -> torch.Tensor:
    return 9 * D * torch.cos(theta).square()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 1))


def test_mean_of_the_bins(tmp_path):
    """J is the mean over samples, errors those of independent bins, ratios of layers known better
    than J; all survives a file. Catches a sum of errors in place of their squares."""
    flow = ff.fisher_flow(network(), labelled(edges=[-1, -0.6, 0.2, 1]))
    for layer in flow:
        profile = layer.profile
        weight = profile.samples.double() / profile.samples.sum()
        torch.testing.assert_close(layer.J, torch.einsum("q,qij->ij", weight, profile.J))
        errors = torch.einsum("q,qij->ij", weight.square(), profile.stderr.square()).sqrt()
        torch.testing.assert_close(layer.stderr, errors)
        assert bool((profile.theta.diff(dim=0) > 0).all())
        assert len(layer.replicates) == 16
    assert flow.compare("0", "input").ratio_stderr < 0.05
    profile = flow["input"].profile
    assert bool(((profile.J - truth(profile.theta)[..., None]).abs() < 4 * profile.stderr).all())
    assert flow.settings["source"] == "labelled"
    flow.save(tmp_path / "flow.json")
    loaded = ff.FisherFlow.load(tmp_path / "flow.json")
    torch.testing.assert_close(loaded["input"].profile.J, profile.J)


def test_unit_of_theta():
    """J is per unit of theta squared. Catches a tolerance in units of theta."""
    one, other = (ff.fisher_information(labelled(unit=unit)) for unit in (1.0, 1e-4))
    for name in ("J", "stderr", "lower"):
        torch.testing.assert_close(
            getattr(other, name), getattr(one, name) * 1e8, rtol=1e-6, atol=0
        )
    torch.testing.assert_close(other.profile.theta, one.profile.theta * 1e-4)


@pytest.mark.parametrize("derivative", ["pathwise", "paired", "independent"])
def test_simulator_at_many_theta(derivative):
    """The first point is the simulator at that theta alone; every one agrees with the closed form.
    Catches samples of one point counted at another, where J is half as large."""

    def draw(theta, n, g):
        return 3 * torch.sin(theta) + torch.randn(n, D, generator=g)

    options = {"samples": 2000, "derivative": derivative}
    options |= {} if derivative == "pathwise" else {"dtheta": 0.08}
    theta = torch.tensor([[-0.8], [0.0], [0.8]])
    info = ff.fisher_information(ff.Simulator(draw, theta, **options), max_features=1)
    profile = info.profile
    assert torch.equal(profile.theta, theta.double())
    assert bool(((profile.J - truth(theta)[..., None]).abs() < 4 * profile.stderr).all())
    alone = ff.fisher_information(ff.Simulator(draw, theta[0], **options), max_features=1)
    assert alone.profile is None
    torch.testing.assert_close(profile.J[0], alone.J, rtol=1e-3, atol=0)  # fewer kept samples


def test_two_parameters():
    """The closed form at the centres. Catches J of one parameter with the other held fixed."""
    g = torch.Generator().manual_seed(0)
    theta = torch.rand(6000, 2, generator=g) * torch.tensor([1.0, 100.0])
    a = torch.tensor([[2.0, 0.0], [1.0, 0.02], [0.0, 0.02]])
    x = theta @ a.T + 0.3 * torch.randn(6000, 3, generator=g)
    info = ff.fisher_information(ff.Labelled(x, theta, bins=4), max_features=1)
    want = (a.T @ a / 0.09).double()
    assert bool(((info.profile.J - want).abs() < 4.5 * info.profile.stderr).all())
    assert bool(((info.J - want).abs() < 4 * info.stderr).all())


def test_groups():
    """Every sample twice: the error of half as many samples. Catches copies that count as
    independent samples, whose error would be 0.7 of it."""
    single = labelled()
    x, theta = single._x.repeat_interleave(2, 0), single._companion.repeat_interleave(2, 0)
    groups = torch.arange(2 * N) // 2
    one = ff.fisher_information(single, max_features=1)
    two = ff.fisher_information(ff.Labelled(x, theta, bins=3, groups=groups), max_features=1)
    torch.testing.assert_close(two.J, one.J, rtol=0.05, atol=0)
    assert 0.85 < float(two.stderr / one.stderr) < 1.2
    assert two.independent


def test_wide_layer_is_compressed():
    """More activations than a bin has samples: J of the closed form within 4 errors."""
    g = torch.Generator().manual_seed(0)
    theta = torch.rand(800, generator=g)
    x = 2 * theta[:, None] + torch.randn(800, 500, generator=g)
    info = ff.fisher_information(ff.Labelled(x, theta, bins=2))
    assert info.feature_kind == "krylov"
    assert info.compressed
    assert bool(((info.profile.J - 2000).abs() < 4 * info.profile.stderr).all())


def test_a_layer_without_samples_in_a_bin():
    """A stream whose last bin holds too few samples: that bin alone is not measured."""
    x, theta = labelled()._x, labelled()._companion[:, 0]
    pairs = zip(x.split(400), theta.split(400), strict=True)
    info = ff.fisher_information(ff.Labelled(pairs, edges=[-1, 0, 0.995, 1.0]))
    assert torch.isfinite(info.profile.J).flatten().tolist() == [True, True, False]
    assert torch.isfinite(info.J).all()
    assert any("not measured" in note and "(bin 2)" in note for note in info.notes)


def test_monitor():
    """The input is measured once, its profile is in every record. Catches a profile that is lost
    between measurements."""
    monitor = ff.FisherMonitor(network(), labelled())
    for epoch in range(2):
        monitor.step(epoch=epoch)
    first, second = (record.flow for record in monitor.history)
    assert first["input"].profile is second["input"].profile
    assert len(second["output"].profile) == 3


@pytest.mark.parametrize(("bins", "amplitude", "bent"), [(2, 3.0, True), (8, 3.0, False)])
def test_a_bent_mean_is_noted(bins, amplitude, bent):
    """sin(3 theta) over 2 and over 8 bins. Catches a note about every curve that is seen at all."""
    g = torch.Generator().manual_seed(0)
    theta = torch.rand(8000, generator=g) - 0.5
    x = amplitude * torch.sin(3 * theta)[:, None] + torch.randn(8000, D, generator=g)
    info = ff.fisher_information(ff.Labelled(x, theta, bins=bins), max_features=1)
    assert any("the mean bends inside bins" in note for note in info.notes) == bent


def test_too_many_bins_are_noted():
    """Catches a profile of noise without a word."""
    g = torch.Generator().manual_seed(0)
    theta = torch.rand(4000, generator=g)
    x = 2 * theta[:, None] + torch.randn(4000, D, generator=g)
    many = ff.fisher_information(ff.Labelled(x, theta, bins=16), max_features=1)
    few = ff.fisher_information(ff.Labelled(x, theta, bins=2), max_features=1)
    assert any("the samples carry about" in note for note in many.notes)
    assert not any("the samples carry about" in note for note in few.notes)


def test_size_of_batches():
    """J depends on it by rounding only. Catches samples kept of a bin whose number depends on what
    other samples are in its batch."""
    one, other = (
        ff.fisher_information(labelled(), settings=ff.Settings(batch_size=size)).profile.J
        for size in (100, 4096)
    )
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
