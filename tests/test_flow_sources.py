"""The flow on tangents, scores and simulators: layers, maps, growth, notes, files, nuisances."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.problems import GaussianShift, Poisson, mlp

N, D = 3000, 6


def problem(parameters: int = 2) -> GaussianShift:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(D, D, generator=generator, dtype=torch.float64) / D**0.5
    direction = torch.randn(D, parameters, generator=generator, dtype=torch.float64)
    return GaussianShift(direction, root @ root.T + 0.5 * torch.eye(D, dtype=torch.float64))


def source(kind: str, parameters: int = 2, n: int = N) -> ff.Pathwise | ff.Score | ff.Simulator:
    world, theta = problem(parameters), [0.0] * parameters
    if kind == "pathwise":
        return world.pathwise(theta, n)
    if kind == "score":
        return world.scored(theta, n)
    if kind == "simulator":
        return ff.Simulator(world.sample, theta, samples=n)
    return ff.Simulator(world.sample, theta, samples=n, derivative="paired", dtheta=0.1)


KINDS = ["pathwise", "score", "simulator", "paired"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_has_its_closed_form(kind):
    """Catches tangents of another layer, a parameter in the place of another: 4 standard errors of
    nine entries in three layers, a false alarm in 600 seeds."""
    model = mlp([D, 5, 3], nn.Identity, seed=0)
    flow = ff.fisher_flow(model, source(kind), layers=r"^fc", max_features=16)
    weight = torch.eye(D, dtype=torch.float64)
    for name, layer in (("input", None), ("fc1", model.fc1), ("fc2", model.fc2)):
        if layer is not None:
            weight = layer.weight.detach().double() @ weight
        off = (flow[name].J - problem().fisher_after(weight)) / flow[name].stderr
        assert float(off.abs().max()) < 4
        assert flow[name].linear.shape == (2, 2)


class Detached(nn.Module):
    """A smooth branch, and one whose derivative is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.smooth = nn.Linear(D, 3)
        self.sign = nn.Linear(D, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.tanh(self.smooth(x)), torch.relu(self.sign(x).round())], 1)


def test_a_layer_without_derivative_says_so():
    """Catches J = 0 without a word where information passes but no derivative does."""
    torch.manual_seed(0)
    flow = ff.fisher_flow(Detached(), source("pathwise"), max_features=16)
    rounded = next(layer for layer in flow if layer.name.endswith("relu"))
    assert float(rounded.J.abs().max()) == 0
    assert any(note.startswith("no derivative reaches this layer") for note in rounded.notes)
    assert not any(note.startswith("no derivative") for note in flow["smooth"].notes)
    score = ff.fisher_flow(Detached(), source("score"), max_features=16)
    assert float(score[rounded.name].J[0, 0]) > 0.1


def test_the_score_sees_photon_counts():
    """Catches a score that is taken at another theta than the samples: 4 standard errors."""
    light = Poisson(lambda t: 3 * t * torch.ones(8), lambda t: 3 * torch.ones(1, 8), dim=8)
    info = ff.fisher_information(light.scored(1.0, 4000), max_features=32)
    assert abs(info.value - 24) < 4 * float(info.stderr)
    assert abs(float(info.lower) - 24) < 4 * float(info.lower_stderr)


@pytest.mark.parametrize("shift", [0.3, -0.3])
def test_a_score_with_a_mean_is_none(shift):
    """Catches J from a wrong score without a word, and a warning at the mean of a true one."""
    data = source("score", 1)
    x, score = (t.clone() for t in (data._x, data._companion))
    ff.fisher_information(ff.Score(x, score), max_features=8)
    with pytest.warns(ff.FisherWarning, match="standard errors from zero: it is no score") as seen:
        info = ff.fisher_information(ff.Score(x, score + shift * score.std()), max_features=8)
    assert len(seen) == 1
    assert any("mean of the score" in note for note in info.notes)


@pytest.mark.parametrize("kind", ["pathwise", "score"])
def test_batches_do_not_matter(kind):
    """Catches folds that begin anew with each batch, of tensors and of loaders; these differ in the
    samples that fix the scale of the features."""
    data = source(kind)
    pairs = torch.utils.data.TensorDataset(data._x, data._companion)
    loaders = [torch.utils.data.DataLoader(pairs, batch_size=size) for size in (77, 1000)]
    loaders = [type(data)(loader, parameters=2) for loader in loaders]
    model = mlp([D, 5, 3], nn.ReLU, seed=0)
    for pair in (((data, 1000), (data, 77)), ((loaders[0], 40), (loaders[1], 40))):
        one, two = (
            ff.fisher_flow(model, given, max_features=16, settings=ff.Settings(batch_size=size))
            for given, size in pair
        )
        for layer in one:
            torch.testing.assert_close(layer.J, two[layer.name].J, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer.stderr, two[layer.name].stderr, rtol=1e-3, atol=1e-4)


def test_not_finite_tangents_name_the_layer():
    """Catches a NaN that arises in the derivative alone: sqrt at 0."""

    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sqrt(torch.relu(x)) * 1.0

    data = source("pathwise", 1)
    message = "activations and their tangents of layer 'output' must be finite, got NaN or infinity"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ff.fisher_flow(nn.Sequential(Root()), data, layers=[], max_features=8)


# maps -------------------------------------------------------------------------------------------

C, H, W = 2, 2, 3


@pytest.mark.parametrize("kind", ["pathwise", "score"])
def test_maps_have_the_closed_form_at_each_position(kind):
    """Catches positions or channels that are exchanged: 4 standard errors at 6 positions."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(C * H * W, 2, generator=generator, dtype=torch.float64)
    world = GaussianShift(direction)
    x, dx = world.sample_with_tangent([0.0, 0.0], N, generator)
    image = x.reshape(N, C, H, W)
    data = (
        ff.Pathwise(image, dx.reshape(N, 2, C, H, W))
        if kind == "pathwise"
        else ff.Score(image, world.score(x, [0.0, 0.0]))
    )
    flow = ff.fisher_flow(nn.Identity(), data, settings=ff.Settings(maps=True), max_features=8)
    places = direction.reshape(C, H, W, 2).permute(1, 2, 0, 3)
    truth = places.mT @ places
    got = flow.map("input")
    assert got.J.shape == (H, W, 2, 2)
    off = (got.J - truth) / got.stderr
    assert float(off.abs().max()) < 4
    assert 0.6 < float(off.square().mean().sqrt()) < 1.5


@pytest.mark.parametrize("kind", ["pathwise", "score"])
def test_a_map_of_one_position_is_the_layer(kind):
    """Catches another formula for maps than for layers. Of so few samples both keep all."""
    data = source(kind)
    image, companion = data._x[:250, :, None, None], data._companion[:250]
    companion = companion[..., None, None] if kind == "pathwise" else companion
    flow = ff.fisher_flow(
        nn.Identity(), type(data)(image, companion), settings=ff.Settings(maps=True), max_features=D
    )
    layer = flow["input"]
    at = int((layer.curve_k == D).nonzero()[0])
    torch.testing.assert_close(flow.map("input").J[0, 0], layer.curve_J[at], rtol=1e-5, atol=1e-5)
    error = layer.curve_stderr[at]
    torch.testing.assert_close(flow.map("input").stderr[0, 0], error, rtol=1e-4, atol=1e-5)


# results ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow() -> ff.FisherFlow:
    return ff.fisher_flow(mlp([D, 5, 3], nn.ReLU, seed=0), source("pathwise", 3), max_features=16)


def test_errors_that_are_not_known(flow):
    """Catches an error of zero where a layer does not know how its errors belong together."""
    layer = dataclasses.replace(flow["fc1"], error_covariance=None)
    torch.testing.assert_close(layer.marginal(1).J, flow["fc1"].marginal(1).J)
    assert math.isnan(float(layer.marginal(1).stderr))
    assert "error_covariance" not in layer.to_dict()


def test_dtheta_of_another_length_is_damage(flow):
    """Catches a file whose steps belong to other parameters."""
    content = flow.to_dict()
    content["layers"][0]["dtheta"] = [0.1]
    with pytest.raises(ValueError, match="dtheta must have 3 entries or none, got 1"):
        ff.FisherFlow.from_dict(content)


def test_marginal_is_the_inverse_of_a_block_of_the_inverse(flow):
    """Catches J_aa itself, or the block of the wrong parameters."""
    layer = flow["fc1"]
    inverse = torch.linalg.inv((layer.J + layer.J.T) / 2)
    for keep in ([0], [2], [0, 2], [2, 0], [0, 1, 2]):
        expected = torch.linalg.inv(inverse[keep][:, keep])
        torch.testing.assert_close(layer.marginal(keep).J, expected)
        torch.testing.assert_close(layer.marginal(keep).crlb, layer.crlb[keep])
    one = layer.marginal(-1)
    assert one.parameters == (2,)
    assert float(one) == one.value == pytest.approx(float(layer.crlb[2]) ** -2)
    assert repr(one).startswith("MarginalFisher(parameters=[2], J=")
    torch.testing.assert_close(layer.marginal([0, 1, 2]).stderr, layer.stderr)


def test_marginal_error_is_the_linear_one(flow):
    """Catches a wrong gradient with respect to the lower triangle of J."""
    layer = flow["fc1"]
    slope = torch.autograd.functional.jacobian(lambda J: 1 / torch.linalg.inv(J)[0, 0], layer.J)
    row, column = torch.tril_indices(3, 3)
    gradient = slope[row, column] + torch.where(row == column, 0, slope[column, row])
    variance = gradient @ layer.error_covariance @ gradient
    torch.testing.assert_close(layer.marginal(0).stderr[0, 0].square(), variance, rtol=1e-3, atol=0)


def test_marginal_of_wrong_parameters(flow):
    """Catches an index that wraps around, True as parameter 1, one entry in the place of a matrix,
    and whole numbers that are refused because NumPy made them."""
    layer = flow["fc1"]
    for keep in ([], [3], [-4], [0, -3], [0.5], [True]):
        with pytest.raises(
            (TypeError, ValueError), match=r"^keep must (name different|be a whole)"
        ):
            layer.marginal(keep)
    with pytest.raises(ValueError, match=r"value needs exactly one parameter, got 2: use \.J"):
        _ = layer.marginal([0, 1]).value
    for keep in (np.int64(0), np.arange(1), [np.int32(-3)]):
        assert torch.equal(layer.marginal(keep).J, layer.marginal(0).J)


@pytest.mark.parametrize("source", ["paired", "pathwise", "independent", "score"])
def test_fewest_folds(source):
    """Catches an error of the bound that divides by no pair of folds: NaN in silence."""
    problem = GaussianShift(torch.ones(3))
    if source in ("pathwise", "score"):
        data = (problem.pathwise if source == "pathwise" else problem.scored)(0.0, 400)
    else:
        data = problem.finite_difference(0.0, 0.2, 400, paired=source == "paired")
    least = 6 if source in ("paired", "pathwise") else 4
    info = ff.fisher_information(data, settings=ff.Settings(folds=least), max_features=16)
    assert torch.isfinite(info.stderr).all()
    assert torch.isfinite(info.lower_stderr).all()
    with pytest.raises(ValueError, match=f"folds must be even and at least {least}, got"):
        ff.fisher_information(data, settings=ff.Settings(folds=least - 2))


def test_units_of_two_scores_do_not_matter():
    """Catches a pseudo-inverse that drops the parameter with the small unit: the standard error was
    off by a sixth."""
    x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    score = torch.stack([x.sum(1), x @ torch.tensor([1.0, -1.0, 2.0, 0.0])], 1)
    units = torch.tensor([1e-5, 1e4])
    one, two = (ff.fisher_information(ff.Score(x[:, :3], s)) for s in (score, score * units))
    square = torch.outer(units, units).double()
    torch.testing.assert_close(two.J / square, one.J, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(two.stderr / square, one.stderr, rtol=1e-3, atol=1e-5)


def test_parameters_that_stand_for_each_other():
    """Catches bounds and errors made of rounding: of a parameter twice there is no bound, and as a
    nuisance it counts once, with the error that it has alone."""
    n = 2000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator)
    shift = torch.linspace(-1, 2, 6).expand(n, 6) + 0.3 * x
    dx = torch.stack([torch.ones(n, 6), 0.1 * shift, 7 * shift, torch.zeros(n, 6)], 1)
    model = mlp([6, 20, 5], nn.Tanh, seed=0)
    once = ff.fisher_flow(model, ff.Pathwise(x, dx[:, :2]), max_features=32)
    more = ff.fisher_flow(model, ff.Pathwise(x, dx), max_features=32)
    summed = torch.stack([dx[:, 0], dx[:, 1], dx[:, 0] + dx[:, 1]], 1)
    summed_flow = ff.fisher_flow(model, ff.Pathwise(x, summed), max_features=32)
    for layer in once:
        alone, beside = layer.marginal([0]), more[layer.name].marginal([0])
        # the readout of more parameters may choose another number of features
        assert abs(beside.value / alone.value - 1) < 0.1
        assert abs(float(beside.stderr / alone.stderr) - 1) < 0.1
        assert torch.isfinite(layer.crlb).all()
        assert torch.isinf(more[layer.name].crlb).all()
        assert torch.isinf(summed_flow[layer.name].crlb).all()
