"""Scores of the parameters sample by sample, and the test whether their mean is zero."""

from __future__ import annotations

import copy
import gc
import math
import sys
import weakref

import pytest
import scipy.stats
import torch
from support.parameters_oracle import gradients
from support.parameters_zoo import NETWORKS
from torch import Tensor, nn

from fisherfast.parameters import Bernoulli, Categorical, Gaussian, Likelihood, Poisson, score
from fisherfast.parameters.analysis.hotelling import t_squared

N = 11
KOLMOGOROV = 2.28
"""sqrt(n) times the largest distance of n uniform numbers from their distribution: exceeded with
probability 2 exp(-2 * 2.28^2) = 6e-5."""


LIKELIHOODS = {
    "Gaussian": Gaussian(0.25),
    "Categorical": Categorical(),
    "Bernoulli": Bernoulli(),
    "Poisson": Poisson(),
    "own": Likelihood(lambda f, y: -(f - y).abs().sum(1), lambda f, g: torch.zeros_like(f)),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


def data(model: nn.Module, likelihood: Likelihood, n: int = N, seed: int = 1):
    """Inputs, and labels from the network's own distribution."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        return x, likelihood.draw(model(x), 1, g)[0]


def one_by_one(model: nn.Module, likelihood: Likelihood, x: Tensor, y: Tensor) -> Tensor:
    """[n, P] by autograd, each sample alone."""
    log_p = (likelihood.log_prob(model(x[i : i + 1]), y[i : i + 1]).sum() for i in range(len(x)))
    return torch.stack([gradients(each, list(model.parameters())) for each in log_p])


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("linear", kind) for kind in LIKELIHOODS), ("expression", "Categorical")],
)
def test_scores_are_the_gradients_of_single_samples(name, kind):
    """Catches gradients that are summed over the batch, parameters in another order, a selection
    that is ignored, and a layout that does not fit."""
    model, likelihood, x = NETWORKS[name].make(), LIKELIHOODS[kind], NETWORKS[name].inputs(N)
    y = likelihood.draw(model(x).detach(), 1, torch.Generator().manual_seed(1))[0]
    expected = one_by_one(model, likelihood, x, y)
    scores = score(model, likelihood, x, y, batch_size=4)
    torch.testing.assert_close(scores.matrix(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores.mean(), expected.mean(0), rtol=1e-11, atol=1e-12)
    named, start = dict(model.named_parameters()), 0
    for batch in scores:
        size = len(next(iter(batch.values())))
        shapes = {key: part.shape for key, part in batch.items()}
        assert shapes == {key: (size, *value.shape) for key, value in named.items()}
        flat = torch.cat([part.reshape(size, -1) for part in batch.values()], 1)
        torch.testing.assert_close(flat, expected[start : start + size], rtol=1e-12, atol=1e-12)
        start += size
    assert start == N
    first, *_, last = named
    part = score(model, likelihood, x, y, parameters=[last, first])
    assert [list(batch) for batch in part] == [[first, last]]
    places = scores.layout.slices()
    chosen = torch.cat([expected[:, places[key]] for key in (first, last)], 1)
    torch.testing.assert_close(part.matrix(), chosen, rtol=1e-12, atol=1e-12)
    assert repr(part) == f"<Scores of {chosen.shape[1]} parameters, {likelihood!r}>"


def test_batches_are_read_and_forgotten_one_by_one():
    """Catches scores of all samples that are kept, data that are read ahead, and a model that runs
    or data that are read when scores are asked for."""
    model, read = network(), []
    x, y = data(model, Gaussian())

    def source():
        for i in range(0, N, 3):
            read.append(i)
            yield x[i : i + 3], y[i : i + 3]

    scores, kept = score(model, Gaussian(), source()), []
    assert not read
    for number, batch in enumerate(scores):
        gc.collect()
        assert [former() for former in kept] == [None] * number
        assert len(read) == number + 1
        kept.append(weakref.ref(batch["0.weight"]))
        del batch
    assert len(read) == 4


def test_a_matrix_too_large_is_refused(monkeypatch):
    """Catches memory that runs out without a word."""
    model = network()
    x, y = data(model, Gaussian())
    where = sys.modules["fisherfast.parameters.analysis.score"]
    monkeypatch.setattr(where, "DENSE_BYTES", 8 * 43 * 6)
    with pytest.raises(MemoryError, match="got 8 samples and more of P = 43 numbers"):
        score(model, Gaussian(), x, y, batch_size=4).matrix()


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"likelihood": Gaussian}, TypeError, r"got the class Gaussian: write Gaussian\(\)"),
        ({"y": None}, ValueError, "y must be given where x is a tensor"),
        ({"x": (0, 0)}, TypeError, "y must be left out where x holds the labels too"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"y": torch.ones(10, 3)}, ValueError, r"labels must be as many as inputs \(11\), got 10"),
        ({"directions": 2.0}, TypeError, r"directions must be a whole number, got 2\.0"),
        ({"directions": 0}, ValueError, "directions must be at least 1, got 0"),
        ({}, ValueError, r"10 samples per direction \(40\), got 11"),
    ],
)
def test_wrong_arguments(changes, error, text):
    """Catches errors that come late, or are about something else."""
    model = network()
    x, y = data(model, Gaussian())
    given = {"likelihood": Gaussian(), "x": x, "y": y} | changes
    asked = {"directions": given.pop("directions")} if "directions" in given else {}
    with pytest.raises(error, match=text):
        score(model, **given).mean_zero_test(**asked)


# --- is the mean zero? ---


def test_t_squared_is_hotellings():
    """Catches chi^2 in the place of F, n in the place of n - q, and a covariance that is not
    centred."""
    n, q = 12, 4
    rows = torch.randn(n, q, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    mean, covariance = rows.mean(0), torch.cov(rows.T)
    found = t_squared(mean, covariance, n)
    expected = n * float(mean @ torch.linalg.solve(covariance, mean))
    assert found.statistic == pytest.approx(expected, rel=1e-9)
    p_value = scipy.stats.f.sf(expected * (n - q) / (q * (n - 1)), q, n - q)
    assert (found.p_value, found.degrees) == (pytest.approx(p_value, rel=1e-9), (q, n - q))


def test_labels_from_the_network_have_uniform_p_values():
    """Catches projections of the sum over a batch, a sum of layers that counts their directions as
    independent, labels of another distribution than the score's, other degrees of freedom than
    those of T^2, the wrong tail, and a seed that is ignored. False alarm 6e-5 for the p-values of
    all layers and for those of each. Power: T^2 twice as large as it should be, or half of it,
    is at a distance of 0.36, with a standard deviation of at most 0.05; the bound is 0.23."""
    model, likelihood = network(), Categorical()
    tests = 100
    found: dict[str, list[float]] = {}
    for seed in range(tests):
        x, y = data(model, likelihood, 150, seed)
        result = score(model, likelihood, x, y, batch_size=100).mean_zero_test(seed=seed)
        for layer, test in {"all": result, **result.layers}.items():
            found.setdefault(layer, []).append(test.p_value)
            q, rest = test.degrees
            assert q + rest == result.samples == 150
            ratio = test.statistic * rest / (q * 149)
            assert test.p_value == pytest.approx(scipy.stats.f.sf(ratio, q, rest), rel=1e-8)
    assert list(found) == ["all", "0", "2"]
    for p_values in found.values():
        distance = scipy.stats.kstest(p_values, "uniform").statistic
        assert distance < KOLMOGOROV / math.sqrt(tests)
    scores = score(model, likelihood, x, y)
    assert scores.mean_zero_test(seed=seed).statistic == pytest.approx(result.statistic)
    assert scores.mean_zero_test(seed=seed + 1).statistic != pytest.approx(result.statistic)


def sharper(model: nn.Module, factor: float) -> nn.Module:
    """All outputs times a factor."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model[-1].weight.mul_(factor)
        model[-1].bias.mul_(factor)
    return model


def confident() -> nn.Module:
    """A network whose classes are not all alike."""
    return sharper(network(), 6.0)


def test_labels_of_other_samples_are_seen():
    """Catches a test without power, on a network that is right about the true labels. Over 25 sets
    of data and directions T^2 was 364 +- 93, at least 226; p = 1e-6 is at 34."""
    x, y = data(confident(), Categorical(), 2000)
    wrong = y[torch.randperm(2000, generator=torch.Generator().manual_seed(2))]
    assert score(confident(), Categorical(), x, wrong).mean_zero_test().p_value < 1e-6


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_networks_too_sure_or_not_enough_are_seen(factor):
    """Catches directions at random alone: the parameters themselves are the direction in which a
    network becomes surer. T^2 of 1500 samples is 98 +- 23 and 68 +- 13 (measured over 40 sets of
    labels); p = 1e-3 is at 11, where a set fails with less than 1e-4."""
    model = confident()
    for seed in range(2):
        x, y = data(model, Categorical(), 1500, seed)
        claims = sharper(model, factor)
        found = score(claims, Categorical(), x, y).mean_zero_test(directions=1, seed=seed)
        assert found.layers["2"].p_value < 1e-3


@pytest.mark.parametrize("name", ["expression", "called twice"])
def test_the_first_direction_is_that_of_the_parameters(name):
    """Catches directions that are all random, or that run over the layers' parameters in another
    order than the scores, a merge that forgets the distance between the means of batches, layers
    that are not in the unit of their root mean square, and a table that leaves one out: T^2 of one
    direction is n mean^2 / variance of the projections."""
    model = NETWORKS[name].make()
    x, y = data(model, Categorical(), 100)
    scores = score(model, Categorical(), x, y, batch_size=60)
    columns = scores.layout.unflatten(scores.matrix())
    projected = {}
    for key, value in model.named_parameters():
        along = (columns[key] * value.detach() / value.detach().norm()).reshape(100, -1).sum(1)
        layer = key.rpartition(".")[0]
        projected[layer] = projected.get(layer, 0) + along
    together = sum(z / (z.var() + z.mean().square()).sqrt() for z in projected.values())
    found = scores.mean_zero_test(directions=1)
    for test, z in [(found, together), *((found.layers[k], z) for k, z in projected.items())]:
        expected = 100 * float(z.mean().square() / z.var())
        assert test.statistic == pytest.approx(expected, rel=1e-9)
    lines, names = repr(found).splitlines(), [layer or "(model)" for layer in projected]
    assert lines[0] == f"MeanZeroTest: p = {found.p_value:.3g}, 100 samples"
    assert [line.split()[0] for line in lines[1:]] == ["layer", "all", *names]


def test_directions_that_depend_on_each_other_count_once():
    """Catches a singular covariance: logits of three classes have scores that add up to zero, and a
    layer that nothing reaches has none at all."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100)
    x, y = data(model, Categorical(), 300)
    scores = score(model, Categorical(), x, y, parameters=["0.weight", "2.bias"])
    result = scores.mean_zero_test(directions=5)
    assert (result.layers["0"].degrees, result.layers["0"].p_value) == ((0, 300), 1)
    assert result.layers["2"].degrees == (2, 298)
    assert 1e-3 < result.p_value < 1


def test_a_mean_without_variance_is_certain():
    """Catches 0 / 0 where all samples are the same, and a certain error that is called zero."""
    model = nn.Linear(2, 1)
    x = torch.ones(50, 2)
    result = score(model, Gaussian(), x, torch.full((50, 1), 9.0)).mean_zero_test()
    assert (result.statistic, result.p_value) == (math.inf, 0)
    with torch.no_grad():
        y = model(x)
    assert score(model, Gaussian(), x, y).mean_zero_test().p_value == 1
