"""Scores against autograd over single samples, and what the mean-zero test promises."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from support.networks_zoo import seeded
from support.parameters_oracle import distribution, gradients
from support.parameters_small import (
    CATEGORICAL,
    ROUNDING,
    dense_network,
    difference,
    inputs,
    network,
)
from torch import Tensor, nn

import fisherfast as ff


def labels(samples: int) -> Tensor:
    return torch.randint(3, (samples,), generator=torch.Generator().manual_seed(4))


def one_by_one(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[n, P], every sample alone."""
    parameters = list(model.parameters())
    rows = []
    for i in range(len(x)):
        p = distribution("categorical", model(x[i : i + 1]))
        rows.append(gradients(p.log_prob(y[i : i + 1]).sum(), parameters))
    return torch.stack(rows)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_scores_are_gradients_of_single_samples(batch_size: int) -> None:
    """A mean over the batch, a sign, -log p, parameters in another order."""
    model, x, y = network(), inputs(9), labels(9)
    expected = one_by_one(model, x, y)
    scores = ff.parameters.score(model, CATEGORICAL, x, y, batch_size=batch_size)
    matrix = scores.matrix()
    assert matrix.dtype == torch.float64
    assert difference(matrix, expected) < ROUNDING
    assert difference(scores.mean(), expected.mean(0)) < ROUNDING
    start = 0
    for batch in scores:
        length = min(batch_size, 9 - start)
        for name, w in model.named_parameters():
            assert batch[name].shape == (length, *w.shape)
        flat = torch.cat([batch[name].flatten(1) for name in scores.layout.names], 1)
        assert difference(flat, expected[start : start + length]) < ROUNDING
        start += length
    assert start == 9


def test_the_second_moment_of_scores_is_the_empirical_matrix() -> None:
    """Scores of another scale or order than those that the matrices are made of."""
    model, x, y = network(), inputs(9), labels(9)
    s = ff.parameters.score(model, CATEGORICAL, x, y).matrix()
    matrix = ff.parameters.fisher(
        model, CATEGORICAL, (x, y), structure="full", fisher_type="empirical"
    )
    assert difference(matrix.to_dense(), s.T @ s / 9) < ROUNDING


def test_pairs_are_as_good_as_two_arguments() -> None:
    """(x, y), a loader of it, and x with y."""
    model, x, y = network(), inputs(9), labels(9)
    expected = ff.parameters.score(model, CATEGORICAL, x, y).matrix()
    dataset = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    for data in ((x, y), dataset, loader, [(x[:5], y[:5]), (x[5:], y[5:])]):
        assert difference(ff.parameters.score(model, CATEGORICAL, data).matrix(), expected) < (
            ROUNDING
        )


def test_a_choice_of_parameters() -> None:
    """Columns of parameters that were left out, or of others."""
    model, x, y = network(), inputs(5), labels(5)
    whole = ff.parameters.score(model, CATEGORICAL, x, y)
    part = ff.parameters.score(model, CATEGORICAL, x, y, parameters=["4.bias", "0.weight"])
    assert set(part.layout.names) == {"4.bias", "0.weight"}
    slices = whole.layout.slices()
    for name, where in part.layout.slices().items():
        assert difference(part.matrix()[:, where], whole.matrix()[:, slices[name]]) < ROUNDING


def test_nothing_is_computed_before_it_is_read() -> None:
    """A model that is run when scores are asked for, or data that are read."""
    model = dense_network(4)
    model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    ff.parameters.score(model, CATEGORICAL, iter([(inputs(5)[:, 0, :4], labels(5))]))


def test_labels_are_needed() -> None:
    model, x = dense_network(4), inputs(5)[:, 0, :4]
    with pytest.raises(ValueError, match="y must be given"):
        ff.parameters.score(model, CATEGORICAL, x).matrix()


# --- is the mean zero? ---


def own_labels(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return CATEGORICAL.draw(model(x).detach(), 1, generator)[0]


def test_result_of_the_test() -> None:
    """Degrees of freedom that are not those of T^2, a p-value of the wrong tail, layers missed;
    the p-value is that of SciPy's F distribution."""
    model, x = network(), inputs(300)
    scores = ff.parameters.score(model, CATEGORICAL, x, own_labels(model, x, 0))
    found = scores.mean_zero_test(directions=3)
    assert found.samples == 300
    assert set(found.layers) == {"0", "3", "4"}
    for each in (found, *found.layers.values()):
        q, rest = each.degrees
        assert q + rest == 300
        assert q >= 1
        ratio = each.statistic * rest / (q * (300 - 1))
        assert each.p_value == pytest.approx(float(stats.f.sf(ratio, q, rest)), rel=1e-8)
    again = scores.mean_zero_test(directions=3)
    assert (again.statistic, again.p_value) == (found.statistic, found.p_value)
    assert scores.mean_zero_test(directions=3, seed=1).statistic != found.statistic


def test_unit_of_the_parameters_does_not_matter() -> None:
    """T^2 of a layer alone has no unit: a likelihood of another variance, on labels that keep
    their distance in sigma, has the same statistic."""
    model = seeded(lambda: nn.Linear(4, 2).double())
    x = inputs(200)[:, 0, :4]
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f = model(x).detach()
    one, other = (
        ff.parameters.score(
            model, ff.parameters.Gaussian(sigma**2), x, f + sigma * noise
        ).mean_zero_test()
        for sigma in (1.0, 0.01)
    )
    assert other.statistic == pytest.approx(one.statistic, rel=1e-8)


def test_false_alarms() -> None:
    """p-values are uniform where labels are the network's own: Kolmogorov-Smirnov's distance over
    200 seeds has p > 1e-4 (a false alarm in 10 000, at fixed seeds). A statistic that is a third
    too small, as of a covariance that is too large, fails the same test."""
    model, x = dense_network(3), inputs(250)[:, 0, :4]
    found = [
        ff.parameters.score(model, CATEGORICAL, x, own_labels(model, x, seed)).mean_zero_test(
            seed=seed
        )
        for seed in range(200)
    ]
    assert stats.kstest([f.p_value for f in found], "uniform").pvalue > 1e-4
    wrong = []
    for f in found:
        q, rest = f.degrees
        wrong.append(float(stats.f.sf(2 / 3 * f.statistic * rest / (q * 249), q, rest)))
    assert stats.kstest(wrong, "uniform").pvalue < 1e-4


def test_power() -> None:
    """Networks that are wrong: too sure of themselves by a factor of 3 in their logits, and labels
    of another class. Both are seen with 1000 samples, p < 1e-6 (a network that is right gives
    that once in a million)."""
    model, x = dense_network(5), inputs(1000)[:, 0, :4]
    with torch.no_grad():
        model[2].weight.mul_(3)
    y = own_labels(model, x, 0)
    assert ff.parameters.score(model, CATEGORICAL, x, y).mean_zero_test().p_value > 1e-3
    shifted = ff.parameters.score(model, CATEGORICAL, x, (y + 1) % 3).mean_zero_test()
    assert shifted.p_value < 1e-6
    with torch.no_grad():
        model[2].weight.mul_(3)
        model[2].bias.mul_(3)
    assert ff.parameters.score(model, CATEGORICAL, x, y).mean_zero_test().p_value < 1e-6


def test_wrong_directions() -> None:
    model, x = dense_network(3), inputs(40)[:, 0, :4]
    scores = ff.parameters.score(model, CATEGORICAL, x, labels(40))
    with pytest.raises(TypeError, match=r"directions must .*got"):
        scores.mean_zero_test(directions=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"directions must .*got"):
        scores.mean_zero_test(directions=0)
    few = ff.parameters.score(model, CATEGORICAL, x[:3], labels(3))
    with pytest.raises(ValueError, match="samples"):
        few.mean_zero_test()
