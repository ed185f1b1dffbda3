"""Likelihoods: scores, draws and the root of the Fisher matrix of the outputs."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import MultivariateNormal
from torch.distributions import Normal as TorchNormal
from torch.distributions import Poisson as TorchPoisson

from fisherfast.parameters import Bernoulli, Categorical, Gaussian, Likelihood, Poisson

SAMPLES = 5
DRAWS = 40_000
SIGMAS = 4.0
"""False alarm below 6e-5 per comparison. What a wrong factor of 1.1 would do: the relative standard
error of a second moment is sqrt(2 / DRAWS) = 0.7 %, or 14 sigma."""


COVARIANCE = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
LOG_SCALE = math.log(2 * math.pi) + 0.5 * float(torch.logdet(COVARIANCE))


def correlated() -> Likelihood:
    """Gaussian noise with a covariance [2, 2]: a root that is not diagonal, by functions."""
    factor, precision = torch.linalg.cholesky(COVARIANCE), torch.linalg.inv(COVARIANCE)

    def log_prob(f, y):
        return -0.5 * torch.einsum("ni,ij,nj->n", y - f, precision.to(f), y - f)

    def sample(f, generator):
        noise = torch.empty_like(f).normal_(generator=generator)
        return f + noise @ factor.to(f).T

    return Likelihood(log_prob, sample, lambda f: precision.expand(len(f), 2, 2))


VARIANCE = torch.tensor([0.3, 1.0, 4.0])
LIKELIHOODS = {
    "Gaussian": (Gaussian(0.25), (), lambda f: TorchNormal(f, 0.5)),
    "Gaussian by output": (
        Gaussian(VARIANCE),
        (2, 3),
        lambda f: TorchNormal(f, VARIANCE.double().sqrt()),
    ),
    "Categorical": (Categorical(), (4,), lambda f: TorchCategorical(logits=f)),
    "Categorical of a map": (
        Categorical(),
        (3, 2, 2),
        lambda f: TorchCategorical(logits=f.movedim(1, -1)),
    ),
    "Bernoulli": (Bernoulli(), (3,), lambda f: TorchBernoulli(logits=f)),
    "Poisson": (Poisson(), (3,), lambda f: TorchPoisson(f.exp())),
    "Poisson of the rate": (Poisson(log_rate=False), (3,), TorchPoisson),
    "functions": (correlated(), (2,), lambda f: MultivariateNormal(f, COVARIANCE)),
}
"""The likelihood, the shape of a sample's outputs, and the distribution of torch."""
CASES = pytest.mark.parametrize("case", LIKELIHOODS)


def outputs(case: str, samples: int = SAMPLES) -> tuple[Likelihood, Tensor]:
    """A likelihood and outputs of a network."""
    likelihood, shape, _ = LIKELIHOODS[case]
    g = torch.Generator().manual_seed(3)
    f = torch.randn(samples, *shape, generator=g, dtype=torch.float64)
    return likelihood, (f.exp() if case == "Poisson of the rate" else f)


def labels(likelihood: Likelihood, f: Tensor, samples: int = 1, seed: int = 5) -> Tensor:
    return likelihood.draw(f, samples, torch.Generator().manual_seed(seed))


def information(likelihood: Likelihood, f: Tensor) -> Tensor:
    """[n, N, N] from the root."""
    columns = torch.stack([column.reshape(len(f), -1) for column in likelihood.root(f)], 2)
    return columns @ columns.mT


@CASES
def test_log_probabilities_scores_and_roots_are_those_of_torch(case):
    """Catches a lost constant, a mean over outputs instead of the sum, a wrong sign, a lost
    1 / sigma^2, a softmax over the wrong dimension, diag(p) without p p^T, classes that are counted
    twice, and positions that see each other. Nats. The root is that of the curvature of log p,
    which does not depend on y but for the rate itself: 1 / rate."""
    likelihood, f = outputs(case)
    y, moving = labels(likelihood, f)[0], f.clone().requires_grad_()
    expected = LIKELIHOODS[case][2](moving).log_prob(y).reshape(SAMPLES, -1).sum(1)
    offset = LOG_SCALE if case == "functions" else 0.0  # which that log_prob leaves out
    torch.testing.assert_close(likelihood.log_prob(f, y), expected + offset, rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(expected.sum(), moving, create_graph=True)
    torch.testing.assert_close(likelihood.score(f, y), slope.detach(), rtol=1e-6, atol=1e-9)
    rows = [torch.autograd.grad(each, moving, retain_graph=True)[0] for each in slope.flatten()]
    between = -torch.stack(rows).reshape(SAMPLES, -1, SAMPLES, f[0].numel())
    curvature = between.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    if case == "Poisson of the rate":
        curvature = torch.diag_embed(1 / f)
    torch.testing.assert_close(information(likelihood, f), curvature, rtol=1e-6, atol=1e-12)


@CASES
def test_scores_of_draws_have_mean_zero_and_the_roots_covariance(case):
    """Catches labels from another distribution than log_prob's (a standard deviation for the
    variance, a rate for its logarithm), and a root of something else. 4 sigma of the mean over
    draws, for each entry: false alarm below 6e-5 for each, 0.02 over all 300 with fixed seeds."""
    likelihood, f = outputs(case, samples=2)
    drawn = labels(likelihood, f, DRAWS)
    assert drawn.shape[:2] == (DRAWS, 2)
    flat = drawn.flatten(0, 1)
    many = f.expand(DRAWS, *f.shape).flatten(0, 1)
    likelihood.check(many, flat)
    scores = likelihood.score(many, flat).reshape(DRAWS, 2, -1)
    products = scores[..., :, None] * scores[..., None, :]
    for values, expected in ((scores, 0 * scores[0]), (products, information(likelihood, f))):
        error = values.std(0) / math.sqrt(DRAWS)
        assert bool(((values.mean(0) - expected).abs() <= SIGMAS * error + 1e-12).all())


@CASES
def test_a_sample_gets_the_same_labels_however_it_is_batched(case):
    """Catches labels that depend on the batch size, on the dtype of the outputs (another stream for
    float32), on the global generator or on the user's device."""
    likelihood, f = outputs(case, samples=23)
    state = torch.get_rng_state()
    whole = labels(likelihood, f, 3)
    for size in (1, 17):
        generator = torch.Generator().manual_seed(5)
        parts = [likelihood.draw(part, 3, generator) for part in f.split(size)]
        assert torch.equal(torch.cat(parts, 1), whole)
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(torch.get_rng_state(), state)
    if case == "functions":  # of the user, who may draw as he likes
        return
    single = labels(likelihood, f.float(), 3)
    torch.testing.assert_close(single.double(), whole.double(), rtol=1e-5, atol=1e-5)
    with torch.device("meta"):
        generator = torch.Generator("cpu").manual_seed(5)
        assert torch.equal(likelihood.draw(f, 3, generator), whole)
        assert information(likelihood, f).device.type == "cpu"
        likelihood.score(f, whole[0])


def test_counts_of_any_rate():
    """Catches a bracket that is too narrow for large or small rates, and a bisection that ends one
    too early: the quantile against the distribution function, both sides, and its mean."""
    rate = torch.tensor([[1e-6, 0.3, 7.0, 900.0, 1e8]], dtype=torch.float64)
    drawn = labels(Poisson(log_rate=False), rate, 2000)[:, 0]
    assert torch.equal(drawn, drawn.round().abs())
    error, seed = (rate[0] / 2000).sqrt(), torch.Generator().manual_seed(5)
    assert bool(((drawn.mean(0) - rate[0]).abs() < SIGMAS * error + 1e-12).all())
    uniform = torch.rand(1, 2000, 5, dtype=torch.float64, generator=seed)
    # P(count <= k) >= u > P(count <= k - 1)
    assert bool((torch.special.gammaincc(drawn + 1, rate) >= uniform[0]).all())
    below = torch.special.gammaincc(drawn.clamp_min(1), rate)
    assert bool(((below < uniform[0]) | (drawn == 0)).all())


def test_roots_of_sure_networks_are_finite():
    """Catches 0 / 0 where the later classes, or all but one, have no probability left."""
    f = torch.tensor([[0.0, 200, 400], [400, 200, 0], [0, 0, 0], [1e4, -1e4, 1e4]])
    for dtype in (torch.float32, torch.float64):
        for values in (f.to(dtype), f.to(dtype).flip(1)):
            found = information(Categorical(), values).double()
            p = values.double().softmax(1)
            truth = torch.diag_embed(p) - p[:, :, None] * p[:, None]
            torch.testing.assert_close(found, truth, rtol=0, atol=1e-7)
    extreme = torch.tensor([[-200.0, 200.0, 0.0]])
    assert bool(torch.isfinite(information(Bernoulli(), extreme)).all())


def test_categorical_takes_one_column_less_than_classes():
    """Catches a backward pass that is not needed."""
    assert len(list(Categorical().root(torch.zeros(2, 7)))) == 6
    assert len(list(Categorical().root(torch.zeros(2, 3, 4)))) == 8


SHAPE = "have the shape of the outputs, [2, 3], got [2]"
WHOLE = "be whole numbers of classes, got torch.{}"
WRONG_LABELS = [
    (Gaussian(), (2, 3), torch.zeros(2), ValueError, SHAPE),
    (Gaussian(), (1, 1), torch.tensor([[math.nan]]), ValueError, "be finite, got nan"),
    (Gaussian(), (1, 1), torch.tensor([[1j]]), TypeError, "be real numbers, got torch.complex64"),
    (Categorical(), (2, 3), torch.zeros(2), TypeError, WHOLE.format("float32")),
    (Categorical(), (2, 3), torch.tensor([-100, 1]), ValueError, "lie in [0, 3), got -100 to 1"),
    (Categorical(), (2, 3, 4), torch.zeros(2).long(), ValueError, "have shape [2, 4], got [2]"),
    (Categorical(), (2, 3), torch.tensor([True, False]), TypeError, WHOLE.format("bool")),
    (Bernoulli(), (1, 2), torch.tensor([[0.0, 0.5]]), ValueError, "be 0 or 1, got 0.5"),
    (Bernoulli(), (1, 1), torch.tensor([[1j]]), TypeError, "be 0 or 1, got torch.complex64"),
    (Poisson(), (1, 1), torch.tensor([[-1]]), ValueError, "be counts 0, 1, 2, ..., got -1"),
    (Poisson(), (1, 1), torch.tensor([[1.5]]), ValueError, "be counts 0, 1, 2, ..., got 1.5"),
    (Poisson(), (1, 1), torch.tensor([[True]]), TypeError, "be real numbers, got torch.bool"),
    (correlated(), (2, 2), torch.zeros(3, 2), ValueError, "be one per sample (2), got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("likelihood", "shape", "y", "error", "text"), WRONG_LABELS)
def test_wrong_labels(likelihood, shape, y, error, text):
    """Catches labels that broadcast silently, that are cut to a class, or that index elsewhere."""
    with pytest.raises(error, match=f"^{re.escape(f'labels must {text}')}$"):
        likelihood.check(torch.zeros(shape), y)


@pytest.mark.parametrize(
    ("likelihood", "y", "dtype"),
    [
        (Gaussian(), torch.tensor([[1], [2]]), torch.float32),
        (Categorical(), torch.tensor([1, 0], dtype=torch.uint8), torch.long),
        (Bernoulli(), torch.tensor([[True], [False]]), torch.float32),
        (Poisson(), torch.tensor([[3], [0]]), torch.float32),
    ],
)
def test_labels_of_other_dtypes(likelihood, y, dtype):
    """Catches refusing labels that are right but for their dtype."""
    found = likelihood.check(torch.zeros(2, 2 if dtype == torch.long else 1), y)
    assert found.dtype == dtype
    assert torch.equal(found, y.to(dtype))


RATES = Poisson(log_rate=False)


NOT_ALLOWED = [
    *((each, math.inf) for each in (Gaussian(), Categorical(), Bernoulli(), Poisson(), RATES)),
    *((each, math.nan) for each in (Gaussian(), RATES)),
    *((RATES, value) for value in (0.0, -1.0)),
    *((Poisson(), value) for value in (100.0, -200.0)),  # whose rate is not finite, or zero
]


@pytest.mark.parametrize(("likelihood", "value"), NOT_ALLOWED)
def test_outputs_that_are_not_allowed(likelihood, value):
    """Catches a Fisher matrix of NaN that looks like one, a rate of zero or less, and the logarithm
    of one that overflows."""
    f = torch.full((2, 3), 1e-3)
    assert bool(likelihood.valid(f))
    f[1, 2] = value
    assert not bool(likelihood.valid(f))


def test_functions_that_are_not_there_name_the_way_out():
    """Catches an exact Fisher matrix of zeros, and an error without a way on."""
    f = torch.zeros(2, 2)
    bare = Likelihood(lambda f, y: -(f - y).square().sum(1))
    with pytest.raises(ValueError, match=r'information= for .*"exact".* draw labels .*"mc"'):
        bare.root(f)
    with pytest.raises(ValueError, match="must have sample= for"):
        bare.draw(f, 1, torch.Generator())
    with pytest.raises(NotImplementedError, match="Likelihood must override log_prob or score"):
        Likelihood().score(f, f)
    with pytest.raises(TypeError, match="log_prob must be a function, got 3"):
        Likelihood(3)


def test_functions_that_return_something_else():
    """Catches a mean over the batch as a log-probability, and a wrong covariance."""
    f = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"log_prob must return shape \[n\] = \[2\], got \[\]"):
        Likelihood(lambda f, y: -(f - y).square().mean()).score(f, f)
    with pytest.raises(ValueError, match="log_prob must depend on the outputs"):
        Likelihood(lambda f, y: y.sum(1)).score(f, f)
    with pytest.raises(ValueError, match=r"one label for each row of f \(4\), got shape \[1, 3\]"):
        Likelihood(None, lambda f, g: f[:1]).draw(f, 4, torch.Generator())
    for wrong in (torch.eye(3), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"information must return shape \[n, N, N\]"):
            Likelihood(None, None, lambda f, wrong=wrong: wrong).root(f)
    with pytest.raises(ValueError, match="positive semi-definite, got the eigenvalue -1"):
        Likelihood(None, None, lambda f: -torch.eye(3).expand(2, 3, 3)).root(f)


WRONG_VARIANCES = {
    (ValueError, "finite and positive"): [0.0, -1.0, math.nan, math.inf, torch.tensor([1.0, 0.0])],
    (TypeError, "(a number|real numbers)"): ["1", None, True, torch.tensor(1j)],
}


@pytest.mark.parametrize(("error", "text"), WRONG_VARIANCES)
def test_wrong_variances(error, text):
    """Catches a variance that makes the Fisher matrix infinite or NaN, or is one per sample of a
    batch."""
    for variance in WRONG_VARIANCES[error, text]:
        with pytest.raises(error, match=f"variance must be {text}"):
            Gaussian(variance)
    with pytest.raises(ValueError, match=r"must broadcast to .* sample, \[3\], got shape \[5, 3\]"):
        Gaussian(torch.ones(5, 3)).check_outputs(torch.zeros(5, 3))


def test_a_variance_is_a_copy_with_its_digits():
    """Catches a likelihood that changes with the user's tensor, a number that passes through the
    default dtype, float32, and a variance that does not show."""
    variance = VARIANCE.double()
    likelihood = Gaussian(variance)
    variance.zero_()
    assert torch.equal(likelihood.variance, VARIANCE.double())
    assert Gaussian(0.1).variance.item() == 0.1
    assert repr(Gaussian(0.5)) == "Gaussian(variance=0.5)"
    assert repr(likelihood) == "Gaussian(variance=[0.3 to 4], [3])"
    assert repr(Poisson()) == "Poisson(log_rate=True)"
