"""Likelihoods against `torch.distributions`, by the sentences of their docstrings.

And Monte Carlo of each against the exact matrix: the labels really come from p(y | f).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support.networks_zoo import seeded
from support.parameters_oracle import brute_force
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Normal,
    Poisson,
)

import fisherfast as ff

ROUNDING = 1e-12
"""In float64, of numbers around 1; measured: below 2e-15."""

SIGMAS = 4.0
"""Bound of a statistical test: with normal errors a false alarm in 16 000, at a fixed seed."""

VARIANCE = torch.tensor([0.3, 2.0], dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A likelihood, the distribution that it must be, and outputs to read.

    Attributes:
        likelihood: of the library.
        distribution: of f; one event is what a sample's outputs say.
        outputs: f [n, ...] of a batch.
        labels: y [n, ...] of a batch.
    """

    likelihood: ff.parameters.Likelihood
    distribution: Callable[[Tensor], Distribution]
    outputs: Tensor
    labels: Tensor


def event(distribution: Distribution) -> Distribution:
    """All but the first dimension are one observation."""
    return Independent(distribution, len(distribution.batch_shape) - 1)


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


CASES = {
    "gaussian": Case(
        ff.parameters.Gaussian(0.3),
        lambda f: event(Normal(f, torch.full_like(f, 0.3**0.5))),
        normal(5, 2),
        normal(6, 2)[1:],
    ),
    "gaussian of images": Case(
        ff.parameters.Gaussian(VARIANCE[:, None, None]),
        lambda f: event(Normal(f, VARIANCE[:, None, None].sqrt().expand_as(f))),
        normal(3, 2, 2, 1),
        normal(4, 2, 2, 1)[1:],
    ),
    "categorical": Case(
        ff.parameters.Categorical(),
        lambda f: event(Categorical(logits=f)),
        2 * normal(5, 4),
        torch.tensor([0, 3, 1, 1, 2]),
    ),
    "categorical at positions": Case(
        ff.parameters.Categorical(),
        lambda f: event(Categorical(logits=f.movedim(1, -1))),
        normal(3, 3, 2),
        torch.tensor([[0, 2], [1, 1], [2, 0]]),
    ),
    "bernoulli": Case(
        ff.parameters.Bernoulli(),
        lambda f: event(Bernoulli(logits=f)),
        2 * normal(4, 3),
        torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]),
    ),
    "poisson": Case(
        ff.parameters.Poisson(),
        lambda f: event(Poisson(f.exp())),
        normal(4, 2),
        torch.tensor([[0, 1], [2, 7], [0, 0], [3, 1]]),
    ),
    "poisson of rates": Case(
        ff.parameters.Poisson(log_rate=False),
        lambda f: event(Poisson(f)),
        normal(4, 2).exp(),
        torch.tensor([[0, 1], [2, 7], [0, 0], [3, 1]]),
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_log_probability(case: Case) -> None:
    """A constant that is left out, a sum over samples, sigma for sigma^2."""
    expected = case.distribution(case.outputs).log_prob(case.labels.to(case.outputs))
    found = case.likelihood.log_prob(case.outputs, case.labels)
    assert found.shape == (len(case.outputs),)
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


def test_score_is_the_derivative_of_log_probability(case: Case) -> None:
    """A sign, a factor of the variance, the gradient of a mean."""
    f = case.outputs.clone().requires_grad_()
    log = case.distribution(f).log_prob(case.labels.to(f)).sum()
    (expected,) = torch.autograd.grad(log, f)
    found = case.likelihood.score(case.outputs, case.labels)
    assert found.shape == f.shape
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


def root_square(case: Case, f: Tensor) -> Tensor:
    """sum_r r r^T [n, N, N]."""
    columns = torch.stack([r.flatten(1) for r in case.likelihood.root(f)])
    return torch.einsum("rni,rnj->nij", columns, columns)


def test_drawn_scores_have_the_covariance_of_the_root(case: Case) -> None:
    """Labels of another distribution, or a root of another matrix: E[s] = 0 and E[s s^T] =
    sum r r^T over 20 000 draws, each entry within 4 standard errors of its own.

    Of the 200 or so entries of all cases none is outside at this seed; scores that are 10 % too
    large, or labels of a variance 10 % off, would be at 6 and more."""
    draws = 20_000
    f = case.outputs[:2]
    labels = case.likelihood.draw(f, draws, torch.Generator().manual_seed(0))
    assert labels.shape[:2] == (draws, 2)
    many = f.repeat(draws, *[1] * (f.ndim - 1))
    flat = labels.flatten(0, 1)
    case.likelihood.check(many, flat)
    scores = case.likelihood.score(many, flat).flatten(1).unflatten(0, (draws, 2))
    products = torch.einsum("dni,dnj->dnij", scores, scores)
    for found, expected in ((scores, torch.zeros(())), (products, root_square(case, f))):
        error = found.std(0) / draws**0.5
        assert bool(((found.mean(0) - expected).abs() <= SIGMAS * error + 1e-9).all())


def test_a_sample_draws_the_same_labels_in_any_batch(case: Case) -> None:
    """Labels drawn draw by draw over the batch: another batch size would give other labels."""
    generator, same = (torch.Generator().manual_seed(3) for _ in range(2))
    state = torch.get_rng_state()
    whole = case.likelihood.draw(case.outputs, 4, generator)
    parts = [case.likelihood.draw(f, 4, same) for f in (case.outputs[:1], case.outputs[1:])]
    assert torch.equal(whole, torch.cat(parts, 1))
    assert torch.equal(torch.get_rng_state(), state)


# --- labels that must be refused ---


@pytest.mark.parametrize(
    ("name", "labels", "error"),
    [
        ("gaussian", torch.zeros(5), ValueError),
        ("gaussian", torch.full((5, 2), torch.nan), ValueError),
        ("gaussian", torch.zeros(4, 2), ValueError),
        ("categorical", torch.tensor([0, 1, 2, 3, 4]), ValueError),
        ("categorical", torch.tensor([0, 1, 2, -1, 0]), ValueError),
        ("categorical", torch.tensor([0.0, 1, 2, 3, 0]), TypeError),
        ("categorical", torch.zeros(5, 4, dtype=torch.int64), ValueError),
        ("categorical at positions", torch.zeros(3, dtype=torch.int64), ValueError),
        ("bernoulli", torch.full((4, 3), 2), ValueError),
        ("bernoulli", torch.full((4, 3), 0.5), ValueError),
        ("poisson", torch.full((4, 2), -1), ValueError),
        ("poisson", torch.full((4, 2), 0.5), ValueError),
    ],
)
def test_wrong_labels(name: str, labels: Tensor, error: type[Exception]) -> None:
    """Labels that broadcast, wrap around or are rounded in silence."""
    case = CASES[name]
    with pytest.raises(error, match=r"must .*got"):
        case.likelihood.check(case.outputs, labels)


@pytest.mark.parametrize("variance", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_variance(variance: float) -> None:
    """A variance of which 1 / sigma^2 is no information."""
    with pytest.raises(ValueError, match=r"variance must .*got"):
        ff.parameters.Gaussian(variance)
    with pytest.raises(ValueError, match=r"variance must .*got"):
        ff.parameters.Gaussian(torch.tensor([1.0, variance]))


def test_a_likelihood_without_its_functions() -> None:
    """ "exact" or "mc" of a likelihood that lacks what they need: an error that names it."""
    model = seeded(lambda: nn.Linear(2, 1))
    x = torch.ones(3, 2)
    lonely = ff.parameters.Likelihood(lambda f, y: -(f - y).square().sum(1))
    for fisher_type, missing in (("exact", "information"), ("mc", "sample")):
        with pytest.raises(ValueError, match=missing):
            ff.parameters.fisher(model, lonely, x, fisher_type=fisher_type)  # type: ignore[arg-type]
    found = ff.parameters.fisher(model, lonely, (x, x[:, :1]), fisher_type="empirical")
    assert found.trace() > 0


# --- Monte Carlo ---


def labels_and_chances(kind: str, f: Tensor) -> tuple[Tensor, Tensor]:
    """Every label [L, 3] and its probability [L], for one sample's f [3]."""
    if kind == "categorical":
        return torch.eye(3, dtype=torch.float64), f.softmax(0)
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)
    p = f.sigmoid()
    return choices, (choices * p + (1 - choices) * (1 - p)).prod(1)


@pytest.mark.parametrize("structure", ["diag", "block", "full", "gram"])
@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_monte_carlo_is_an_unbiased_estimate(kind: str, structure: str) -> None:
    """v^T F v by 400 drawn labels of each input within 4 of its standard error, which is computed
    over all labels. A sum over draws in place of their mean, one label drawn for a whole batch,
    or labels of the data would be 10 and more away; the standard error is 3 % of v^T F v."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 3)).double()).eval()
    x, draws = normal(6, 3), 400
    likelihood = {
        "categorical": ff.parameters.Categorical(),
        "bernoulli": ff.parameters.Bernoulli(),
    }[kind]
    truth = brute_force(model, kind, x)
    estimate = ff.parameters.fisher(
        model, likelihood, x, structure=structure, fisher_type="mc", samples=draws, seed=1
    )  # type: ignore[arg-type]
    assert estimate.fisher_type == "mc"
    v = torch.zeros(12, dtype=torch.float64)
    v[0] = 1.0  # one weight, so that the diagonal answers too
    variance = 0.0
    for sample in x:
        f = model(sample[None])[0].detach()
        values, chances = labels_and_chances(kind, f)
        mean = f.softmax(0) if kind == "categorical" else f.sigmoid()
        squares = ((values[:, 0] - mean[0]) * sample[0]).square()  # (v . s)^2 of every label
        variance += float(chances @ squares.square() - (chances @ squares) ** 2)
    error = (variance / draws) ** 0.5 / len(x)
    assert error < 0.1 * float(v @ truth @ v)
    assert abs(float(v @ (estimate @ v)) - float(v @ truth @ v)) < SIGMAS * error


@pytest.mark.parametrize("structure", ["diag", "kfac", "block", "full", "gram", "lowrank"])
def test_monte_carlo_depends_on_its_seed_alone(structure: str) -> None:
    """Draws of the global generator, of the batch size, or of no seed at all."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 3)).double()).eval()
    x = normal(6, 3)
    settings = {"rank": 2} if structure == "lowrank" else {}
    state = torch.get_rng_state()

    def estimate(seed: int, batch_size: int) -> Tensor:
        return ff.parameters.fisher(
            model,
            ff.parameters.Categorical(),
            x,
            structure=structure,
            fisher_type="mc",
            samples=3,
            seed=seed,
            batch_size=batch_size,
            **settings,
        ).to_dense()

    first = estimate(0, 6)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(estimate(0, 4), first, rtol=1e-9, atol=1e-12)
    assert float((estimate(1, 6) - first).abs().max()) > 1e-3
