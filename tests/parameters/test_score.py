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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisherfast as ff
from fisherfast.parameters import Bernoulli, Categorical, Gaussian, Likelihood, Poisson, score
from fisherfast.parameters.analysis.hotelling import Moments, t_squared

N = 11
KOLMOGOROV = 2.28
"""sqrt(n) times the largest distance of n uniform numbers from their distribution: exceeded with
probability 2 exp(-2 * 2.28^2) = 6e-5."""


class Tied(nn.Module):
    """A weight that is used twice, and a parameter in an expression."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor([1.5, 0.5, 2.0]))
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.inside(torch.tanh(self.inside(x))))) * self.scale


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.LayerNorm(18), nn.Linear(18, 3),
    )  # fmt: skip


NETWORKS = {"dense": dense, "images": images, "tied": Tied}
LIKELIHOODS = {
    "Gaussian": Gaussian(0.25),
    "Categorical": Categorical(),
    "Bernoulli": Bernoulli(),
    "Poisson": Poisson(),
    "own": Likelihood(lambda f, y: -(f - y).abs().sum(1), lambda f, g: torch.zeros_like(f)),
}


def network(name: str = "dense", dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().to(dtype).eval()


def data(model: nn.Module, likelihood: Likelihood, n: int = N, seed: int = 1):
    """Inputs, and labels from the network's own distribution."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        return x, likelihood.draw(model(x), 1, g)[0]


def one_by_one(model: nn.Module, likelihood: Likelihood, x: Tensor, y: Tensor) -> Tensor:
    """[n, P] by autograd, each sample alone."""
    rows = []
    for i in range(len(x)):
        log_p = likelihood.log_prob(model(x[i : i + 1]), y[i : i + 1]).sum()
        parts = torch.autograd.grad(log_p, list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_scores_are_the_gradients_of_single_samples(name, kind):
    """Catches gradients that are summed over the batch, parameters in another order, and tied
    weights whose uses are not added up."""
    model, likelihood = network(name), LIKELIHOODS[kind]
    x, y = data(model, likelihood)
    expected = one_by_one(model, likelihood, x, y)
    scores = score(model, likelihood, x, y, batch_size=4)
    torch.testing.assert_close(scores.matrix(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores.mean(), expected.mean(0), rtol=1e-11, atol=1e-12)
    names, start = [key for key, _ in model.named_parameters()], 0
    for batch in scores:
        assert list(batch) == names
        size = len(batch[names[0]])
        for key, value in model.named_parameters():
            assert batch[key].shape == (size, *value.shape)
        flat = torch.cat([part.flatten(1) for part in batch.values()], 1)
        torch.testing.assert_close(flat, expected[start : start + size], rtol=1e-12, atol=1e-12)
        start += size
    assert start == N


def test_chosen_parameters_alone():
    """Catches a selection that is ignored, and a layout that does not fit."""
    model = network()
    x, y = data(model, Gaussian())
    scores = score(model, Gaussian(), x, y, parameters=["2.bias", "0.weight"])
    assert [list(batch) for batch in scores] == [["0.weight", "2.bias"]]
    expected = one_by_one(model, Gaussian(), x, y)
    torch.testing.assert_close(
        scores.matrix(), torch.cat([expected[:, :20], expected[:, -3:]], 1), rtol=1e-12, atol=1e-12
    )
    assert repr(scores) == "<Scores of 23 parameters, Gaussian(variance=1)>"


def test_any_source_of_pairs():
    """Catches a DataLoader whose labels are lost."""
    model = network()
    x, y = data(model, Categorical())
    expected = score(model, Categorical(), x, y).matrix()
    pairs = TensorDataset(x, y)
    for source in (
        (x, y),
        pairs,
        DataLoader(pairs, batch_size=3),
        [(x[:2], y[:2]), (x[2:], y[2:])],
    ):
        found = score(model, Categorical(), source, batch_size=5).matrix()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found = score(model, Categorical(), x.numpy(), y.numpy()).matrix()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_second_moment_of_scores_is_the_empirical_matrix():
    """Catches scores of another scale or order than those that the matrices are made of."""
    model = network("images")
    x, y = data(model, Categorical())
    s = score(model, Categorical(), x, y).matrix()
    F = ff.parameters.fisher(
        model, "categorical", (x, y), structure="full", fisher_type="empirical"
    )
    torch.testing.assert_close(F.to_dense(), s.T @ s / N, rtol=1e-12, atol=1e-13)


def test_nothing_is_computed_before_it_is_read():
    """Catches a model that runs when scores are asked for, or data that are read."""
    model = network()
    model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    score(model, Categorical(), iter([data(network(), Categorical())]))


def test_batches_are_read_and_forgotten_one_by_one():
    """Catches scores of all samples that are kept, and data that are read ahead."""
    model, read = network(), []
    x, y = data(model, Gaussian())

    def source():
        for i in range(0, N, 3):
            read.append(i)
            yield x[i : i + 3], y[i : i + 3]

    former = None
    for number, batch in enumerate(score(model, Gaussian(), source())):
        assert len(read) == number + 1
        if former is not None:
            gc.collect()
            assert former() is None
        former = weakref.ref(batch["0.weight"])
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


def test_wrong_arguments():
    """Catches errors that come late, or are about something else."""
    model = network()
    x, y = data(model, Gaussian())
    with pytest.raises(TypeError, match=r"got the class Gaussian: write Gaussian\(\)"):
        score(model, Gaussian, x, y)
    with pytest.raises(ValueError, match="y must be given where x is a tensor"):
        score(model, Gaussian(), x)
    with pytest.raises(TypeError, match="y must be left out where x holds the labels too"):
        score(model, Gaussian(), (x, y), y)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        score(model, Gaussian(), x, y, batch_size=0)
    with pytest.raises(ValueError, match=r"labels must be as many as inputs \(11\), got 10"):
        score(model, Gaussian(), x, y[:-1]).mean()
    with pytest.raises(ValueError, match="labels must have the shape of the outputs"):
        score(model, Gaussian(), x, y[:, 0]).mean()
    with pytest.raises(TypeError, match=r"directions must be a whole number, got 2\.0"):
        score(model, Gaussian(), x, y).mean_zero_test(directions=2.0)
    with pytest.raises(ValueError, match="directions must be at least 1, got 0"):
        score(model, Gaussian(), x, y).mean_zero_test(directions=0)
    with pytest.raises(ValueError, match=r"10 samples per direction \(40\), got 11"):
        score(model, Gaussian(), x, y).mean_zero_test()


def test_nothing_of_the_users_changes():
    """Catches gradients left in .grad, random numbers taken, hooks and modes that stay."""
    model = network()
    x, y = data(model, Gaussian(), 50)
    kept = [torch.full_like(value, 7) for value in model.parameters()]
    for value, grad in zip(model.parameters(), kept, strict=True):
        value.grad = grad
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    scores = score(model, Gaussian(), x, y)
    for _ in scores:
        pass
    scores.matrix(), scores.mean(), scores.mean_zero_test()
    assert torch.equal(torch.get_rng_state(), state)
    for value, grad in zip(model.parameters(), kept, strict=True):
        assert value.grad is grad
        assert bool((grad == 7).all())
        assert value.requires_grad
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module.training for module in model.modules())


class Remembers(nn.Module):
    """Keeps what it computed, and notes the default device."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last, self.seen = nn.Linear(4, 3), None, set()

    def forward(self, x):
        self.seen.add(torch.empty(0).device.type)
        self.last = self.layer(x)
        return self.last


def test_what_a_module_keeps_and_the_default_device_are_the_users():
    """Catches a graph that stays in the model, and numbers made on the user's device ("meta" holds
    none) or a network that sees another."""
    model = Remembers()
    x, y = torch.randn(50, 4), torch.randn(50, 3)
    scores = score(model, Gaussian(), x, y, batch_size=30)
    expected = scores.matrix(), scores.mean(), scores.mean_zero_test()
    model.seen.clear()
    torch.set_default_device("meta")
    try:
        found = scores.matrix(), scores.mean(), scores.mean_zero_test()
        assert [len(batch["layer.weight"]) for batch in scores] == [30, 20]
    finally:
        torch.set_default_device(None)
    assert model.seen == {"meta"}
    assert model.last is None
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[2] == expected[2]


# --- is the mean zero? ---


def test_t_squared_of_normal_numbers_has_uniform_p_values():
    """Catches chi^2 in the place of F, n in the place of n - q, and a covariance that is not
    centred: with 12 samples of 4 numbers each of these is 4 to 10 times the bound of the
    Kolmogorov distance. False alarm 6e-5."""
    g = torch.Generator().manual_seed(0)
    tests, n, q = 3000, 12, 4
    mix = torch.randn(q, q, generator=g, dtype=torch.float64)
    p_values, chi_squared = [], []
    for rows in torch.randn(tests, n, q, generator=g, dtype=torch.float64) @ mix:
        found = t_squared(rows.mean(0), torch.cov(rows.T), n)
        assert found.degrees == (4, 8)
        p_values.append(found.p_value)
        chi_squared.append(scipy.stats.chi2.sf(found.statistic, q))
    bound = KOLMOGOROV / math.sqrt(tests)
    assert scipy.stats.kstest(p_values, "uniform").statistic < bound
    assert scipy.stats.kstest(chi_squared, "uniform").statistic > 3 * bound


def test_p_values_are_those_of_scipy():
    """Catches other degrees of freedom than those of T^2, the wrong tail, a layer left out, and a
    seed that is ignored."""
    model = network()
    x, y = data(model, Categorical(), 300)
    scores = score(model, Categorical(), x, y)
    found = scores.mean_zero_test(directions=3)
    assert found.samples == 300
    assert list(found.layers) == ["0", "2"]
    for each in (found, *found.layers.values()):
        q, rest = each.degrees
        assert q + rest == 300
        assert q >= 1
        ratio = each.statistic * rest / (q * (300 - 1))
        assert each.p_value == pytest.approx(float(scipy.stats.f.sf(ratio, q, rest)), rel=1e-8)
    again = scores.mean_zero_test(directions=3)
    assert (again.statistic, again.p_value) == (found.statistic, found.p_value)
    assert scores.mean_zero_test(directions=3, seed=1).statistic != found.statistic


def test_the_statistic_has_no_unit():
    """A Gaussian of another variance, on labels that keep their distance in sigma."""
    model = nn.Linear(4, 2).double()
    x = data(network(), Gaussian(), 200)[0]
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f = model(x).detach()
    one, other = (
        score(model, Gaussian(sigma**2), x, f + sigma * noise).mean_zero_test().statistic
        for sigma in (1.0, 0.01)
    )
    assert other == pytest.approx(one, rel=1e-8)


def test_moments_batch_by_batch():
    """Catches a merge that forgets the distance between the means of batches."""
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double() + 1e3
    moments = Moments(3, torch.device("cpu"))
    for part in rows.split([1, 30, 19]):
        moments.add(part)
    torch.testing.assert_close(moments.mean, rows.mean(0))
    torch.testing.assert_close(moments.covariance, torch.cov(rows.T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dense", "Categorical"),
        pytest.param("dense", "Gaussian", marks=pytest.mark.slow),
        pytest.param("dense", "Bernoulli", marks=pytest.mark.slow),
        pytest.param("dense", "Poisson", marks=pytest.mark.slow),
        pytest.param("tied", "Categorical", marks=pytest.mark.slow),
    ],
)
def test_labels_from_the_network_have_uniform_p_values(name, kind):
    """Catches projections of the sum over a batch, a sum of layers that counts their directions as
    independent, and labels of another distribution than the score's. False alarm 6e-5 for the
    p-values of all layers and for those of each. Power: T^2 twice as large as it should be, or half
    of it, is at a distance of 0.36, the bound is 0.21."""
    model, likelihood = network(name), LIKELIHOODS[kind]
    tests = 120
    found: dict[str, list[float]] = {}
    for seed in range(tests):
        x, y = data(model, likelihood, 150, seed)
        result = score(model, likelihood, x, y, batch_size=100).mean_zero_test(seed=seed)
        found.setdefault("all", []).append(result.p_value)
        for layer, test in result.layers.items():
            found.setdefault(layer, []).append(test.p_value)
    assert (
        list(found)
        == {
            "dense": ["all", "0", "2"],
            "tied": ["all", "", "inside", "out"],
        }[name]
    )
    for p_values in found.values():
        distance = scipy.stats.kstest(p_values, "uniform").statistic
        assert distance < KOLMOGOROV / math.sqrt(tests)


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


def test_wrong_labels_are_seen():
    """Catches a test without power: labels of other samples, and labels that have nothing to do
    with the inputs, on a network that is right about the true ones. Over 25 sets of data and
    directions T^2 was 364 +- 93 for labels of other samples, at least 226; p = 1e-6 is at 34."""
    model = confident()
    x, y = data(model, Categorical(), 2000)
    assert score(model, Categorical(), x, y).mean_zero_test().p_value > 1e-3
    g = torch.Generator().manual_seed(2)
    others = torch.randint(0, 3, (2000,), generator=g)
    for wrong in (y[torch.randperm(2000, generator=g)], others, (y + 1) % 3):
        assert score(model, Categorical(), x, wrong).mean_zero_test().p_value < 1e-6


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_networks_too_sure_or_not_enough_are_seen(factor):
    """Catches directions at random alone: the parameters themselves are the direction in which a
    network becomes surer. T^2 of 1500 samples is 98 +- 23 and 68 +- 13 (measured over 40 sets of
    labels); p = 1e-3 is at 11, where a set fails with less than 1e-4."""
    model = confident()
    for seed in range(5):
        x, y = data(model, Categorical(), 1500, seed)
        claims = sharper(model, factor)
        found = score(claims, Categorical(), x, y).mean_zero_test(directions=1, seed=seed)
        assert found.layers["2"].p_value < 1e-3


def test_the_first_direction_is_that_of_the_parameters():
    """Catches directions that are all random, or that run over the layers' parameters in another
    order than the scores: T^2 of one direction is n mean^2 / variance of the projections."""
    model = confident()
    x, y = data(model, Categorical(), 100)
    scores = score(model, Categorical(), x, y, batch_size=60)
    columns = scores.layout.unflatten(scores.matrix())
    projected = {}
    for name, value in model.named_parameters():
        along = (columns[name] * value.detach() / value.detach().norm()).flatten(1).sum(1)
        layer = name.split(".")[0]
        projected[layer] = projected.get(layer, 0) + along
    together = sum(z / (z.var() + z.mean().square()).sqrt() for z in projected.values())
    found = scores.mean_zero_test(directions=1)
    for test, z in [(found, together), *((found.layers[k], z) for k, z in projected.items())]:
        expected = 100 * float(z.mean().square() / z.var())
        assert test.statistic == pytest.approx(expected, rel=1e-9)


def test_all_layers_of_one_are_that_one():
    """Catches directions that are counted as independent when the layers are added up: T^2 does not
    depend on the unit of each."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = data(model, Categorical(), 100)
    result = score(model, Categorical(), x + 0.3, y).mean_zero_test()
    assert result.statistic == pytest.approx(result.layers[""].statistic, rel=1e-9)
    assert result.degrees == result.layers[""].degrees == (4, 96)


def test_a_wrong_rate_is_seen():
    """Catches scores of the logarithm where the rate is meant. Over 25 sets of data and directions
    T^2 was 146 +- 43, at least 68; p = 1e-4 is at 24."""
    model = network()
    x, y = data(model, Poisson(), 500)
    with torch.no_grad():
        model[-1].bias += 0.3
    assert score(model, Poisson(), x, y).mean_zero_test().p_value < 1e-4


def test_a_wrong_variance_is_not_seen():
    """Holds the docstring to what it says: the scores of a wrong variance have mean zero too, and
    T^2 does not depend on their unit."""
    model = network()
    x, y = data(model, Gaussian(0.25), 300)
    right = score(model, Gaussian(0.25), x, y).mean_zero_test()
    wrong = score(model, Gaussian(9.0), x, y).mean_zero_test()
    assert wrong.p_value == pytest.approx(right.p_value, rel=1e-8)
    assert right.p_value > 1e-3


def test_training_data_of_a_fitted_network_prove_nothing():
    """Holds the docstring to what it says: the mean gradient is zero where training ends, whatever
    the labels."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=g, dtype=torch.float64)
    y = x.square().sum(1, keepdim=True)
    model = nn.Linear(3, 1).double()
    full = torch.cat([x, torch.ones(200, 1)], 1).double()
    fitted = torch.linalg.lstsq(full, y).solution
    with torch.no_grad():
        model.weight.copy_(fitted[:3].T)
        model.bias.copy_(fitted[3])
    assert score(model, Gaussian(), x, y).mean_zero_test().p_value > 0.999
    held_out = torch.randn(2000, 3, generator=g, dtype=torch.float64) + 1
    wrong = held_out.square().sum(1, keepdim=True)
    assert score(model, Gaussian(), held_out, wrong).mean_zero_test().p_value < 1e-12


def test_directions_that_depend_on_each_other_count_once():
    """Catches a singular covariance: logits of three classes have scores that add up to zero, and a
    layer that nothing reaches has none at all."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100)
    x, y = data(model, Categorical(), 300)
    result = score(model, Categorical(), x, y, parameters=["0.weight", "2.bias"]).mean_zero_test(
        directions=5
    )
    assert result.layers["0"].degrees == (0, 300)
    assert result.layers["0"].p_value == 1
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


def test_the_table():
    """Catches a layer that is left out, and names that are not those of the model."""
    model = network("tied")
    x, y = data(model, Gaussian(), 100)
    result = score(model, Gaussian(), x, y).mean_zero_test()
    lines = repr(result).splitlines()
    assert lines[0] == f"MeanZeroTest: p = {result.p_value:.3g}, 100 samples"
    assert [line.split()[0] for line in lines[1:]] == ["layer", "all", "(model)", "inside", "out"]
    assert lines[2].split()[2:4] == ["4,", "96"]
    assert ff.parameters.score is score
