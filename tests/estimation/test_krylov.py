"""Wide layers: the Krylov space against a dense oracle, and what is measured in it."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from support.wide_layers import dense_krylov, estimated, measured
from torch import nn

import fisherfast as ff
from fisherfast.data import FiniteDifference, Pathwise, Score
from fisherfast.data.dealing import Place
from fisherfast.estimation import krylov
from fisherfast.estimation.curve import fisher_curve
from fisherfast.estimation.features import MAX_WIDTH
from fisherfast.estimation.fold_moments import FoldMoments
from fisherfast.estimation.krylov import KRYLOV_VECTORS, WARM_PASSES, KrylovSpace
from fisherfast.estimation.pilot import PilotMoments
from fisherfast.measurement.compressed_layer import LEAST_DOF, CompressedMeter, too_wide
from fisherfast.measurement.layer import NO_TANGENTS
from fisherfast.measurement.settings import MeasurementSettings
from fisherfast.model.sites import Site
from fisherfast.problems import CorrelatedImage, GaussianShift, RectifiedGaussian

D, N = 40, 600


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(n: int = N, d: int = D, seed: int = 0) -> torch.Tensor:
    """Samples whose activations differ in mean and scale and share their noise, float32 [n, d]."""
    g = generator(seed)
    mixing = torch.randn(d, d, generator=g) / d**0.5 + torch.eye(d)
    scale = torch.logspace(-1, 1, d)
    return (torch.randn(n, d, generator=g) @ mixing + 3) * scale


def directions(parameters: int, d: int = D) -> torch.Tensor:
    """Derivatives of the mean [P, d]."""
    return torch.randn(parameters, d, generator=generator(1)) * torch.logspace(-1, 1, d)


def pathwise(x: torch.Tensor, derivative: torch.Tensor) -> Pathwise:
    """Samples [n, ...] that all move alike, by [P, ...]."""
    return Pathwise(x, derivative.expand(len(x), *derivative.shape))


def learned(
    data: Pathwise | Score | FiniteDifference,
    steps: int,
    batch_size: int,
    start: torch.Tensor | None = None,
) -> KrylovSpace:
    """The space of all samples of a source."""
    pilot = PilotMoments()
    pilot.update(next(data.read(0, 20)).x)
    space = KrylovSpace(
        pilot.standardisation(),
        conditions=data.conditions,
        parameters=data.parameters,
        steps=steps,
        scored=isinstance(data, Score),
        start=start,
    )
    more = True
    while more:
        for condition in range(data.conditions):
            for batch in data.read(condition, batch_size):
                space.observe(condition, batch.x, batch.tangents, batch.score)
        more = space.advance(data.contrast())
    return space


def smallest_cosine(basis: torch.Tensor, oracle: torch.Tensor) -> float:
    """Of the angles between two spaces of orthonormal vectors [k, d]: 1 for the same space."""
    return float(torch.linalg.svdvals(basis.double() @ oracle.T).min())


@pytest.mark.parametrize("parameters", [1, 3])
def test_space_is_that_of_the_dense_oracle(parameters):
    """For every leading number of steps. Catches a product with another matrix (not centred, not
    standardised), vectors in a wrong order or lost, or a space of noise after many steps."""
    steps, x, derivative = 6, correlated(), directions(parameters)
    space = learned(pathwise(x, derivative), steps, batch_size=170)
    assert len(space) == steps * parameters
    gram = space.basis.double() @ space.basis.double().T
    torch.testing.assert_close(gram, torch.eye(len(gram)).double(), rtol=0, atol=1e-6)
    for j in range(1, steps + 1):
        oracle = dense_krylov(x, derivative.T.double(), j)[0]
        assert smallest_cosine(space.basis[: j * parameters], oracle) > 1 - 1e-6  # 2e-8 measured


@pytest.mark.parametrize("source", ["conditions", "score"])
def test_derivative_is_that_of_the_source(source):
    """The difference of the means of two conditions, and the covariance with a score whose mean is
    not zero in the sample. Catches the noise of a condition taken about the mean of both, a swapped
    contrast, the plain mean of x s."""
    x = correlated()
    if source == "conditions":
        derivative = directions(1).T.double()
        data = FiniteDifference(x, x + directions(1)[0], dtheta=2.0)
    else:
        score = torch.randn(N, 2, generator=generator(5), dtype=torch.float64) + 0.5
        score[:, 0] += x[:, 3]
        derivative = (x - x.mean(0)).double().T @ score / (N - 1)
        data = Score(x, score)
    oracle = dense_krylov(x, derivative, 3)[0]
    assert smallest_cosine(learned(data, 3, batch_size=100).basis, oracle) > 1 - 1e-6


def test_features_are_the_standardised_activations_along_the_vectors():
    """Catches a projection that forgets the scale, or keeps the pilot's."""
    x, derivative = correlated(), directions(1)
    space = learned(pathwise(x, derivative), 3, batch_size=N)
    std = dense_krylov(x, derivative.T.double(), 1)[1]
    expected = space.basis.double() / std
    torch.testing.assert_close(space.projection().double(), expected, rtol=1e-5, atol=1e-7)
    rows = krylov.projected(x, space.projection(), x.mean(0))
    torch.testing.assert_close(
        rows.double(), (x - x.mean(0)).double() @ expected.T, rtol=1e-4, atol=1e-4
    )


EACH_SOURCE = pytest.mark.parametrize(
    ("source", "parameters"), [("pathwise", 3), ("score", 1), ("independent", 1), ("paired", 3)]
)


def data_of(source: str, n: int, parameters: int) -> Pathwise | Score | FiniteDifference:
    x, derivative = correlated(n), directions(parameters)
    if source == "pathwise":
        return pathwise(x, derivative)
    if source == "score":
        return Score(x, (x.double() - 3) @ derivative.T.double() / 40)
    others = [correlated(n, seed=7) if source == "independent" else x] * parameters
    plus = [other + 0.1 * shift for other, shift in zip(others, derivative, strict=True)]
    return FiniteDifference([x] * parameters, plus, dtheta=0.1, paired=source == "paired")


@EACH_SOURCE
def test_result_does_not_depend_on_the_batches(source, parameters):
    """Catches halves dealt by batch instead of by sample, a product summed over the last batch
    only."""
    data = data_of(source, 240, parameters)
    whole, other = (estimated(data, batch_size=size) for size in (240, 77))
    assert other.features == whole.features
    torch.testing.assert_close(other.J, whole.J, rtol=1e-3, atol=1e-3)  # 2e-5 measured
    torch.testing.assert_close(other.lower, whole.lower, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("source", ["pathwise", "score"])
def test_result_does_not_depend_on_the_tiles(source, monkeypatch):
    """Catches a vector that is orthogonalised in its first tile only, scores cut elsewhere than
    their activations, and a standardised copy of a whole batch of a very wide layer."""
    data = data_of(source, N, 2)
    whole = estimated(data)
    wide = torch.zeros(1, 1).expand(100, krylov.TILE_NUMBERS)
    assert {len(tile) for tile in krylov.tiles(wide)} == {krylov.TILE_ROWS}
    monkeypatch.setattr(krylov, "TILE_NUMBERS", 7 * D)
    assert [len(tile) for tile in krylov.tiles(wide[:, :D])] == [7] * 14 + [2]
    torch.testing.assert_close(estimated(data).J, whole.J, rtol=1e-3, atol=1e-3)


def test_rare_activations_do_not_drown_the_others():
    """Half of 800 rectified activations fire in 1 of 160 samples: what 150 samples tell of their
    derivatives is chance. J of the others alone is 400 times that of one, known in closed form.
    Catches a scale without a floor: 0.03 of it; 0.91 to 1.06 measured over 4 seeds."""
    thresholds = torch.tensor([0.0, 2.5]).repeat(400)
    u = torch.randn(300, 800, generator=generator()) - thresholds
    layer = estimated(Pathwise(u.relu(), (u > 0).float()))
    truth = 400 * float(RectifiedGaussian(1).linear_fisher(0.0))
    assert layer.value > 0.7 * truth


def test_a_space_continues_that_of_an_earlier_measurement():
    """With other samples: the new vectors first, then the old ones. Catches old vectors that are
    lost, and as many passes as without them."""
    data, other = (pathwise(correlated(seed=seed), directions(2)) for seed in (0, 1))
    old, new = learned(data, 6, N), learned(other, WARM_PASSES, N)
    both = learned(other, 6, N, start=old.projection())
    assert len(both) == 2 * 6
    assert smallest_cosine(both.basis[: len(new)], new.basis.double()) > 1 - 1e-6
    room = len(both) - len(new)
    weights = old.projection().double()[:room]
    span = torch.linalg.qr(both.projection().double().T)[0]
    assert (weights.T - span @ (span.T @ weights.T)).norm() < 1e-4 * weights.norm()


def test_units_of_the_activations_do_not_matter():
    """Common-mode noise, and a tenth of the pixels in another unit. Catches a floor in the units of
    the activations, which loses 9 % of J here."""
    derivative = directions(1)
    common = torch.randn(N, 1, generator=generator(3))
    x = torch.randn(N, D, generator=generator(4)) + 3 * common
    units = torch.ones(D)
    units[::10], units[1::10] = 1e-3, 1e3
    one = estimated(pathwise(x, derivative))
    other = estimated(pathwise(x * units, derivative * units))
    torch.testing.assert_close(other.J, one.J, rtol=1e-3, atol=0)
    torch.testing.assert_close(other.lower, one.lower, rtol=1e-3, atol=0)


def test_halves_are_measured_on_each_other():
    """In the whole space, any basis gives the raw information of the half that is measured. Catches
    a measurement on the half that taught the space, or on all samples."""
    x, derivative = correlated(d=3), directions(1, 3)
    meter = measured(pathwise(x, derivative))
    assert [len(space) for space in meter.spaces] == [3, 3]  # it ends with the dimension
    contrast = torch.zeros(1, 1, dtype=torch.float64)
    for half, fit in enumerate(meter.halves()):
        own = FoldMoments(3, 1, folds=8, tangents=1)
        rows = x[1 - half :: 2]
        own.update(0, rows, carried=derivative[:, None].expand(1, len(rows), 3))
        expected = fisher_curve(own.statistics(contrast), 0.0)
        assert len(fit.curve) == 3
        torch.testing.assert_close(fit.curve.J[-1], expected.J[-1], rtol=1e-4, atol=0)


def test_space_ends_where_the_derivative_is_an_eigenvector():
    """A full factorial plan has the covariance 1 exactly. Catches noise taken for a direction, and
    J that goes wrong with it."""
    plan = torch.tensor(list(product((-1.0, 1.0), repeat=6)))
    order = torch.cat([torch.randperm(64, generator=generator(seed)) for seed in range(4)])
    plan = plan[order].repeat_interleave(2, 0)  # each half has every row four times
    derivative = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0, 3.0]])
    data = pathwise(plan, derivative)
    meter = measured(data, ridge=0.0)
    assert [len(space) for space in meter.spaces] == [1, 1]
    layer = meter.estimate()
    assert layer.features == 1
    assert abs(layer.value - 15.25) < 4 * float(layer.stderr)


def test_parameters_with_one_direction_share_a_vector():
    """Catches a block with a zero or doubled vector, which no covariance survives."""
    x, derivative = correlated(), directions(1)
    data = pathwise(x, torch.cat([derivative, 2 * derivative]))
    meter = measured(data, ridge=1e-4)
    assert [len(space) for space in meter.spaces] == [KRYLOV_VECTORS] * 2
    J = meter.estimate().J
    torch.testing.assert_close(J, J[0, 0] * torch.tensor([[1.0, 2.0], [2.0, 4.0]]).double())


def test_dead_activations_are_left_out():
    """Catches a division by a deviation of zero, rounding of a large constant that is scaled up,
    and a scale taken from the pilot alone."""
    x, derivative = correlated(), directions(1)
    x[:100, 3] = 0  # dead in the pilot alone: it counts
    alone = estimated(pathwise(x, derivative))
    assert alone.dropped == 0
    dead = torch.tensor([0.0, 5.0, 1e6]).expand(N, 3)
    beside = torch.cat([x, dead], 1)
    layer = estimated(pathwise(beside, torch.cat([derivative, torch.zeros(1, 3)], 1)))
    assert layer.dropped == 3
    assert layer.notes == ("3 constant activations left out",)
    torch.testing.assert_close(layer.J, alone.J, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("x", "derivative", "note"),
    [
        (torch.ones(N, D), torch.ones(1, D), f"all {D} activations are constant: J = 0"),
        (correlated(), torch.zeros(1, D), NO_TANGENTS),
    ],
)
def test_nothing_to_learn_is_no_information(x, derivative, note):
    """Catches an empty space that is factorised."""
    layer = estimated(pathwise(x, derivative))
    assert (layer.value, layer.feature_kind, layer.notes) == (0.0, "none", (note,))


def test_activations_that_vary_in_one_half_only():
    """Catches a feature without variance in the half where it is measured."""
    x = torch.zeros(N, 2)
    x[::2, 0] = torch.randn(N // 2, generator=generator())
    x[1::2, 1] = torch.randn(N // 2, generator=generator())
    layer = estimated(pathwise(x, torch.ones(1, 2)))
    assert layer.value == 0
    assert layer.notes == ("no activation varies in both halves: J = 0",)


@EACH_SOURCE
def test_few_samples_are_asked_for_exactly(source, parameters):
    """The stated number works, one less is refused. Catches a fold with one sample, an inverse of
    no degree of freedom in the honest bound."""

    def data(n: int) -> Pathwise | Score | FiniteDifference:
        return data_of(source, n, parameters)

    with pytest.raises(ValueError, match=r"must see at least \d+ samples") as error:
        estimated(data(10))
    needed = int(str(error.value).split("at least ")[1].split()[0])
    if source == "paired":  # what pairs share is estimated too: a tenth more is surely enough
        assert estimated(data(math.ceil(1.1 * needed))).samples > 0
        return
    with pytest.raises(ValueError, match=rf"must see at least \d+ samples .* got {needed - 1}"):
        estimated(data(needed - 1))
    assert estimated(data(needed)).samples >= needed


def test_passes_must_bring_the_same_samples():
    """Catches a space that mixes the products of different samples."""
    data = pathwise(correlated(), directions(1))
    meter = CompressedMeter(Site("input", "data", (D,)), data, MeasurementSettings.of(data))
    meter.observe_pilot(correlated())
    meter.prepare()
    for rows in (N, N - 1):
        batch = next(data.read(0, rows))
        meter.observe(0, batch.sorted(*Place.in_turn(0, rows, 16)))
        if rows == N:
            assert meter.end_pass()
    with pytest.raises(ValueError, match="samples must be the same at every pass"):
        meter.end_pass()


@pytest.mark.parametrize(
    ("dim", "samples", "paired", "expected"),
    [
        (MAX_WIDTH + 1, 10**6, False, True),  # no covariance of this size
        (MAX_WIDTH, 10**6, False, False),
        (1000, int(LEAST_DOF * 500) + 17, False, False),  # both conditions together, less 16 folds
        (1000, int(LEAST_DOF * 500) + 15, False, True),
        (1000, int(LEAST_DOF * 500) + 17, True, True),  # the same noise counts once
        (512, 100, False, True),  # narrow, but wide for its samples
        (30, 33, False, False),
        (30, 32, False, True),
        (30, 33, True, True),
    ],
)
def test_when_a_layer_is_compressed(dim, samples, paired, expected):
    """Catches a threshold on the samples of one condition, pairs counted as independent."""
    x = torch.zeros(1, 1).expand(samples, 1)
    data = FiniteDifference(x, x, dtheta=1.0, paired=paired)
    assert too_wide(dim, data, 512, 16) is expected


def test_samples_that_come_once_are_sketched():
    """Catches a stream that is read again, and a loose bound without a word."""
    wide = torch.randn(2, 200, MAX_WIDTH + 1, generator=generator())
    once = FiniteDifference(lambda: iter([wide[0]]), lambda: iter([wide[1]]), dtheta=0.1)
    layer = ff.fisher_information(once, max_features=16)
    assert layer.feature_kind == "sketch"
    assert "data that can be read again are compressed instead" in layer.notes[0]
    again = ff.fisher_information(FiniteDifference(wide[0], wide[1], dtheta=0.1))
    assert again.feature_kind == "krylov"


def test_wide_layers_of_a_network_share_their_passes():
    """Catches a pass for each layer, narrow layers that are measured again, and forward passes for
    a wide input that needs none. J = 64: images 8 x 8 of white noise that moves with theta."""
    torch.manual_seed(0)
    x = torch.randn(300, 1, 8, 8, generator=generator())
    data = FiniteDifference(x, x + 0.01, dtheta=0.01, paired=True)
    conv, head = nn.Conv2d(1, 10, 3, padding=1), nn.Linear(640, 4)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), head)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    few = FiniteDifference(x[:60], x[:60] + 0.01, dtheta=0.01, paired=True)
    flow = ff.fisher_flow(model, few, layers=["output"], max_features=32)
    assert flow["input"].feature_kind == "krylov"
    assert len(calls) < 2 * KRYLOV_VECTORS
    calls.clear()
    flow = ff.fisher_flow(model, data, max_features=128, settings=ff.Settings(maps=True))
    kinds = {layer.name: layer.feature_kind for layer in flow}
    assert (kinds["0"], kinds["1"]) == ("krylov", "krylov")
    assert kinds["input"] in ("raw", "lift")
    passes, setup = 2 * (KRYLOV_VECTORS + 1), 2 + 1 + 2 * len(flow)  # pilot, survey, chains
    assert passes <= len(calls) <= passes + setup
    assert 0.5 * 64 < flow["0"].value < 64 + 4 * float(flow["0"].stderr)
    assert flow.map("0").J.shape == (8, 8, 1, 1)
    assert f"krylov {flow['0'].features}" in str(flow)


def test_bad_activations_are_named():
    """Catches NaN that spoils a space in silence."""
    x = torch.randn(100, 64, generator=generator())
    x[70, 3] = torch.nan
    with pytest.raises(ValueError, match="layer 'input' must be finite"):
        ff.fisher_information(
            pathwise(x, torch.ones(1, 64)), max_features=32, settings=ff.Settings(batch_size=50)
        )


def test_white_noise_of_many_activations():
    """P = 3, d = 5000, 300 samples: D is the best readout already. Within 4 standard errors: a
    false alarm in 1 of 2500 for 6 entries. Catches a matrix that is not J, a wrong unit."""
    derivative = torch.randn(5000, 3, generator=generator(2)).double() / 50
    problem = GaussianShift(derivative)
    layer = ff.fisher_information(problem.pathwise(torch.zeros(3), 300))
    assert layer.feature_kind == "krylov"
    error = (layer.J - problem.fisher(torch.zeros(3))) / layer.stderr
    assert float(error.abs().max()) < 4


@pytest.mark.slow
def test_image_in_correlated_noise():
    """96 x 96 pixels, 2000 samples, exact tangents by position and amplitude: between 0.88 and
    1.02 of the closed form, where 0.94 +- 0.03 is expected; the matched filter D alone reaches
    0.8. Catches a space that stops at D, and a J measured on the samples from which the space was
    learned (1.6 and more)."""
    image, theta = CorrelatedImage((96, 96)), (0.0, 1.0)
    data = image.pathwise(theta, 2000)
    layer = ff.fisher_information(data, settings=ff.Settings(batch_size=500))
    truth = image.fisher(theta).diagonal()
    share = layer.J.diagonal() / truth
    assert bool(((share > 0.88) & (share < 1.02)).all())
    assert bool((layer.curve_J[0].diagonal() / truth < share - 0.05).all())


@pytest.mark.parametrize("source", ["pathwise", "score"])
def test_wide_layers_of_a_network_with_what_samples_carry(source):
    """A linear layer that is wider than its input keeps J = 64 of white noise, whatever space is
    learned: within 4 standard errors, a false alarm in 1 of 16 000. Catches tangents of the input
    taken for those of the layer, a score that is dealt to the wrong half."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 300, bias=False), nn.ReLU())
    with torch.no_grad():
        model[1].weight.copy_(torch.linalg.qr(torch.randn(300, 64, generator=generator()))[0])
    x = torch.randn(1000, 1, 8, 8, generator=generator(3))
    for n, kind in ((1000, "raw"), (300, "krylov")):  # 1000 samples carry 300 activations
        part = x[:n]
        score = Score(part, part.sum((1, 2, 3)))
        data = pathwise(part, torch.ones(1, 1, 8, 8)) if source == "pathwise" else score
        layer = ff.fisher_flow(model, data, max_features=256)["1"]
        assert layer.feature_kind == kind
        assert abs(layer.value - 64) < 4 * float(layer.stderr)


def test_tangents_go_through_the_network_where_they_are_read():
    """q + 1 passes, of which the first and the last read tangents. Catches a product with the
    covariance that costs 1 + P forward passes, and a last pass without derivative."""
    model = nn.Sequential(nn.Linear(600, 500), nn.Tanh(), nn.Linear(500, 1))
    x = torch.randn(200, 600, generator=generator(4))
    passes = []
    model[0].register_forward_pre_hook(lambda module, args: passes.append(type(args[0]).__name__))
    data = pathwise(x, torch.ones(1, 600))
    flow = ff.fisher_flow(
        model, data, layers=["1"], max_features=6, settings=ff.Settings(batch_size=200)
    )
    assert flow["1"].feature_kind == "krylov"
    assert float(flow["1"].J) > 0
    assert passes[-7:] == ["DualTensor", *["Tensor"] * 5, "DualTensor"]
