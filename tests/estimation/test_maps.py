"""`flow.map`: the linear Fisher information of the channels at each position, against its truth.

Images x = theta * pattern + noise, noise of known covariance over the channels at each position,
and a 1x1 convolution W: J(h, w) = a^T S^-1 a with a = W pattern(h, w), S = W Sigma(h, w) W^T.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.data.dealing import Place
from fisherfast.estimation.maps import MapMoments, estimate_map
from fisherfast.estimation.pilot import PilotMoments

# The conditions lie far apart compared with the information of a whole image, which these tests do
# not look at; for a Gaussian shift no step is too wide.
pytestmark = pytest.mark.filterwarnings("ignore:dtheta sqrt:fisherfast.FisherWarning")

HEIGHT, WIDTH = 5, 7
INPUTS, CHANNELS = 9, 8
DTHETA = 0.5


class World:
    """Patterns, noise and a convolution, drawn once; samples of it, and the truth."""

    def __init__(self, height: int, width: int, parameters: int = 1, seed: int = 1) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape = (INPUTS, height, width)
        # a gradient over the map: an exchanged H and W, or a mean over positions, fails
        rise = torch.linspace(0.3, 1.5, height * width, dtype=torch.float64).view(height, width)
        directions = nn.functional.normalize(self.normal(parameters, INPUTS, height, width), dim=1)
        self.patterns = 1.5 * rise * directions
        # well conditioned: the ridge, 1e-4 of each variance, changes no J by more than 1e-3
        self.mix = torch.eye(INPUTS, dtype=torch.float64) + 0.1 * self.normal(
            height, width, INPUTS, INPUTS
        )
        rotation = torch.linalg.qr(self.normal(INPUTS, INPUTS))[0]
        self.weight = rotation[:CHANNELS] + 0.1 * self.normal(CHANNELS, INPUTS)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def noise(self, n: int) -> torch.Tensor:
        """[n, INPUTS, H, W] with covariance mix mix^T at each position."""
        return torch.einsum("hwab,nbhw->nahw", self.mix, self.normal(n, *self.shape))

    def data(self, n: int, paired: bool = False, dtheta: float = DTHETA) -> ff.FiniteDifference:
        self.generator.manual_seed(100)  # the same at every call
        minus, plus = [], []
        for pattern in self.patterns:
            noise = self.noise(n)
            other = noise if paired else self.noise(n)
            minus.append(3.0 + noise - dtheta / 2 * pattern)
            plus.append(3.0 + other + dtheta / 2 * pattern)
        steps = [dtheta] * len(minus)
        return ff.FiniteDifference(minus, plus, steps, paired=paired)

    def model(self) -> nn.Sequential:
        conv = nn.Conv2d(INPUTS, CHANNELS, 1).double()
        with torch.no_grad():
            conv.weight.copy_(self.weight[:, :, None, None])
            conv.bias.fill_(0.5)
        height, width = self.shape[1:]
        fc = nn.Linear(CHANNELS * height * width, 1).double()
        with torch.no_grad():
            fc.weight.fill_(0.1)
        return nn.Sequential(OrderedDict(conv=conv, flat=nn.Flatten(), fc=fc))

    def truth(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """J [H, W, P, P]."""
        weight = self.weight if weight is None else weight
        slopes = torch.einsum("ca,pahw->hwcp", weight, self.patterns)
        covariance = weight @ self.mix @ self.mix.mT @ weight.T
        return slopes.mT @ torch.linalg.solve(covariance, slopes)


def measure(
    world: World, n: int, *, paired: bool = False, dtheta: float = DTHETA, **options: Any
) -> ff.FisherFlow:
    """`fisher_flow` with maps, without random features."""
    data = world.data(n, paired=paired, dtheta=dtheta)
    options = {"layers": ["conv"], "max_features": 1, "settings": ff.Settings(maps=True)} | options
    return ff.fisher_flow(world.model(), data, **options)


def z_scores(result: Any, truth: torch.Tensor) -> torch.Tensor:
    return (result.J - truth) / result.stderr


@pytest.fixture(scope="module")
def world() -> World:
    return World(HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def flow(world: World) -> ff.FisherFlow:
    return measure(world, 400)


# --- the truth -----------------------------------------------------------------------------------


def test_each_position(world, flow):
    """5 sigma at each of 35 positions (false alarm 2e-5 in all, for Gaussian errors).

    Catches H and W exchanged, J of another position, the diagonal of S alone, a half step. The
    input has nine channels, the convolution eight: the map falls nearly everywhere.
    """
    result = flow.map("conv")
    truth = world.truth()
    assert isinstance(result, ff.InformationMap)
    assert result.J.shape == result.stderr.shape == (HEIGHT, WIDTH, 1, 1)
    assert result.J.dtype == result.stderr.dtype == torch.float64
    assert torch.equal(torch.as_tensor(result.value), result.J[..., 0, 0])
    assert not result.J.requires_grad
    assert (result.stderr > 0).all()
    assert z_scores(result, truth).abs().max() < 5
    # power: J of the transposed layout, and 4 J of a half step
    exchanged = truth.flatten().view(WIDTH, HEIGHT).T[..., None, None]
    assert z_scores(result, exchanged).abs().max() > 10
    assert z_scores(result, 4 * truth).abs().max() > 10
    before = world.truth(torch.eye(INPUTS, dtype=torch.float64))
    assert z_scores(flow.map("input"), before).abs().max() < 5
    assert (before >= truth - 1e-12).all()
    assert torch.equal(flow.tightened().map("conv").J, result.J)


@pytest.mark.parametrize("paired", [False, True], ids=["independent", "paired"])
def test_the_mean_has_no_bias(paired):
    """Mean over 360 positions, which share nothing, of 60 (100) samples per condition: 4 sigma
    (false alarm 6e-5). Catches J without the finite-sample correction, and with one half of it
    alone: without h, or without the noise of the derivative. Each is far off here: the test shows
    it.
    """
    world = World(18, 20, seed=4)
    truth = world.truth()
    samples, dtheta = 100 if paired else 60, 1.0
    data, conv = world.data(samples, paired=paired, dtheta=dtheta), world.model().conv
    place, order = Place.in_turn(0, samples, 16)
    with torch.no_grad():
        layers = [conv(next(data.read(c, samples)).x)[order] for c in (0, 1)]
    pilot = PilotMoments()
    pilot.update(layers[0].flatten(1))
    shape = tuple(layers[0].shape[1:])
    moments = MapMoments(pilot.standardisation(), shape, 2, folds=16, paired=paired)
    for condition, layer in enumerate(layers):
        moments.update(condition, layer, None, place)
    J, stderr = estimate_map("conv", moments, data.contrast(), "auto")
    off = (J - truth) / truth.mean()
    error = off.std() / off.numel() ** 0.5
    assert off.mean().abs() < 4 * error
    assert error < 0.02
    # in the error bars: the mean of z^2 is 1 (sqrt(2) too much in stderr gives 1/2, too little 2)
    spread = ((J - truth) / stderr).square().mean()
    assert 0.75 < spread < 1.35

    # power: what the expectation is without correction, and with half of it
    dof = samples - 1 if paired else 2 * samples - 2
    shrink = (dof - CHANNELS - 1) / dof
    noise = 0.0 if paired else CHANNELS * 2 / samples / dtheta**2 / truth.mean()
    assert (1 + noise) / shrink - 1 > 4 * error  # naive
    assert (1 + noise) / shrink - noise - 1 > 4 * error  # without h
    if not paired:
        assert noise > 4 * error  # without the noise of the derivative


def test_paired_conditions_are_less_noisy(world, flow):
    """The same noise in both: the derivative is nearly exact, and the error bars say so."""
    result = measure(world, 400, paired=True).map("conv")
    assert z_scores(result, world.truth()).abs().max() < 5
    assert result.stderr.mean() < 0.6 * flow.map("conv").stderr.mean()


def test_no_information_is_not_clipped():
    """A pattern of zero: about every second J is negative. Catches J clipped at 0, which is
    biased, and naive J, which is never negative."""
    world = World(HEIGHT, WIDTH, seed=3)
    world.patterns.zero_()
    result = measure(world, 300).map("conv")
    assert (result.J < 0).sum() >= 5  # of 35
    assert (result.J / result.stderr).abs().max() < 5


def test_two_parameters():
    """Off-diagonal entries have their sign. Catches the P maps of one parameter each."""
    world = World(3, 4, parameters=2)
    result = measure(world, 400).map("conv")
    truth = world.truth()
    assert result.J.shape == result.stderr.shape == (3, 4, 2, 2)
    assert torch.equal(result.J, result.J.mT)
    assert z_scores(result, truth).abs().max() < 5
    assert z_scores(result, truth * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).abs().max() > 5
    text = "value needs exactly one parameter, got 2: use .J"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        _ = result.value


def test_maps_change_nothing_else(world, flow):
    """Catches statistics that are shared, or a random state that moves on; maps are off by
    default. An alias has the same map."""
    model = world.model()[:1]
    short = ff.fisher_flow(model, world.data(400), settings=ff.Settings(maps=True), max_features=1)
    assert torch.equal(short.map("output").J, short.map("conv").J)
    without = measure(world, 400, settings=ff.Settings())
    assert flow.names == without.names
    for left, right in zip(flow, without, strict=True):
        for name in ("J", "stderr", "lower"):
            assert torch.equal(getattr(left, name), getattr(right, name))
    with pytest.raises(ValueError, match=r"^flow must have been measured with maps, "):
        without.map("conv")


def test_batches_and_the_unit_of_theta_do_not_matter(world, flow):
    """Catches a last batch that counts as much as a full one, and folds that start anew. With theta
    in mm, not m, J and stderr are 1e-6 of it."""
    data, expected = world.data(400), flow.map("conv")
    minus, plus = (next(data.read(c, 400)).x for c in (0, 1))
    for scale, batch_size in ((1.0, 37), (1000.0, 4096)):
        data = ff.FiniteDifference(minus, plus, dtheta=DTHETA * scale)
        settings = ff.Settings(maps=True, batch_size=batch_size)
        options = {"layers": ["conv"], "max_features": 1, "settings": settings}
        found = ff.fisher_flow(world.model(), data, **options).map("conv")
        torch.testing.assert_close(found.J * scale**2, expected.J, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found.stderr * scale**2, expected.stderr, rtol=1e-9, atol=1e-11)


def test_float32_and_channels_last(world, flow):
    """The layouts that cameras and convolutions use; an offset of 1000 does not matter."""
    data, layout = world.data(400), {"memory_format": torch.channels_last}
    xs = ((next(data.read(c, 400)).x + 1000).float().contiguous(**layout) for c in (0, 1))
    model = world.model().float().to(**layout)
    options = {"layers": ["conv"], "max_features": 1, "settings": ff.Settings(maps=True)}
    result = ff.fisher_flow(model, ff.FiniteDifference(*xs, DTHETA), **options).map("conv")
    assert result.J.dtype == torch.float64
    # float32 resolves 1000 to 6e-5, against noise of 1
    torch.testing.assert_close(result.J, flow.map("conv").J, rtol=2e-3, atol=2e-3)


def test_dead_channels_are_left_out(world):
    """A channel that never varies, as after a ReLU: the J of the others, not NaN; none: J = 0."""
    model, data = world.model(), world.data(400)
    options = {"layers": ["conv"], "max_features": 1, "settings": ff.Settings(maps=True)}
    with torch.no_grad():
        model.conv.weight[3] = 0
        result = ff.fisher_flow(model, data, **options).map("conv")
        model.conv.weight.zero_()
        silent = ff.fisher_flow(model, data, **options).map("conv")
    alive = [c for c in range(CHANNELS) if c != 3]
    assert z_scores(result, world.truth(world.weight[alive])).abs().max() < 5
    assert not silent.J.any()
    assert not silent.stderr.any()


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "parameters"), [(".json", 1), (".npz", 2)])
def test_files_keep_the_maps(tmp_path, suffix, parameters):
    """To the last bit, and in the same shape."""
    flow = measure(World(2, 3, parameters=parameters), 300)
    path = tmp_path / f"flow{suffix}"
    flow.save(path)
    back = ff.FisherFlow.load(path)
    for name in ("conv", "input"):
        for field in ("J", "stderr"):
            left, right = (getattr(one.map(name), field) for one in (back, flow))
            assert left.dtype == torch.float64
            assert torch.equal(left, right)


# --- errors --------------------------------------------------------------------------------------


def test_maps_of_single_layers(world, flow):
    """Catches maps of all layers, which large pictures have no memory for, a name that is silently
    without a map, and a layer of [d], which has no positions, that is an error by itself."""
    for name in ("conv9", 0):
        with pytest.raises(KeyError, match=f"layer must be one of .*conv.*{name}"):
            flow.map(name)
    some, every = (
        measure(world, 400, layers=["conv", "fc"], settings=ff.Settings(maps=maps))
        for maps in (["conv"], True)
    )
    assert list(some.maps) == ["conv"]
    assert torch.equal(some.map("conv").J, every.map("conv").J)
    with pytest.raises(ValueError, match=r"^layer must be one of maps=\['conv'\], got 'input'"):
        some.map("input")
    with pytest.raises(ValueError, match=r"^layer 'fc' must have .*\[C, H, W\].*, got .*1"):
        every.map("fc")
    assert ff.FisherFlow.from_dict(some.to_dict()).settings["maps"] == ["conv"]
    with pytest.raises(ValueError, match=r"^maps must name layers that are measured, .*\['cnv'\]"):
        measure(world, 400, settings=ff.Settings(maps=["conv", "cnv"]))
