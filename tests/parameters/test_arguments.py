"""What may be given to `fisher`, and what is refused and how."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from support.networks_zoo import untouched
from torch import nn

from fisherfast import parameters
from fisherfast.parameters import (
    Categorical,
    Gaussian,
    Likelihood,
    Poisson,
    fisher,
    from_state_dict,
    score,
)
from fisherfast.parameters.fisher import ACCUMULATORS, FISHER_TYPES

N = 20
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


class Computed(nn.Module):
    """Any function of a linear layer's output."""

    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 3), function

    def forward(self, x):
        return self.function(self.layer(x))


ARGUMENTS = [
    ("structure", "diagonal", ValueError, "be one of 'diag', "),
    ("fisher_type", "sampled", ValueError, "be one of 'exact', 'mc', 'empirical', got 'sampled'"),
    ("samples", 0, ValueError, "be at least 1, got 0"),
    ("samples", 1.0, TypeError, "be a whole number, got 1.0"),
    ("samples", 5, ValueError, "be 1 for fisher_type 'exact', which draws no labels, got 5; draw"),
    ("batch_size", 0, ValueError, "be at least 1, got 0"),
    ("seed", 2**63, ValueError, "be at least -2**63 and below 2**63, got 9223372036854775808"),
    ("seed", 0.5, TypeError, "be a whole number, got 0.5"),
    ("likelihood", Poisson, TypeError, "be an instance, got the class Poisson: write Poisson()"),
    ("likelihood", "softmax", ValueError, "be one of 'gaussian', 'categorical', 'bernoulli', 'p"),
    ("likelihood", 3, TypeError, "be a name or a Gaussian, Categorical,"),
    ("model", "network", TypeError, "be a torch.nn.Module, got str"),
    ("parameters", "convolution", ValueError, "choose at least one of the model, which has none"),
    ("parameters", ["0.weigth"], ValueError, "be of the model, got '0.weigth'; it has 0.weight"),
    ("parameters", b"0", TypeError, "be names, a pattern or a function, got b'0'"),
    ("parameters", "0(", ValueError, "be a regular expression, got '0('"),
]


@pytest.mark.parametrize(("name", "value", "error", "text"), ARGUMENTS)
def test_wrong_arguments(name, value, error, text):
    """Catches an argument that is ignored, taken for another, or refused by PyTorch far inside."""
    given = {"model": network(), "likelihood": Categorical(), "data": (X, Y)} | {name: value}
    with pytest.raises(error, match=f"^{name} must {re.escape(text)}"):
        fisher(**given)


@pytest.mark.parametrize("name", ["gaussian", "categorical", "bernoulli", "poisson"])
def test_likelihoods_by_name(name):
    """Catches a name that stands for another likelihood, in `fisher` or in `score`."""
    model, likelihood = network(), getattr(parameters, name.capitalize())()
    y = Y if name == "categorical" else torch.ones(N, 3)
    assert torch.equal(fisher(model, name, X).diag(), fisher(model, likelihood, X).diag())
    by_name, given = (score(model, each, X, y).mean() for each in (name, likelihood))
    assert torch.equal(by_name, given)


@pytest.mark.parametrize("structure", ACCUMULATORS)
def test_keywords_of_no_structure(structure):
    """Catches a misspelt setting that is swallowed, settings that the message does not name, and
    arguments of the library's own that a user can overwrite."""
    known = {"kfac": "takes sharing", "lowrank": "takes rank, memory_budget"}
    known |= dict.fromkeys(("block", "full", "gram"), "takes memory_budget")
    takes = known.get(structure, "takes none of its own")
    for wrong in ("dampnig", "layout"):
        text = f"settings must be those of structure '{structure}', which {takes}, got '{wrong}'"
        with pytest.raises(TypeError, match=f"^{text}$"):
            fisher(network(), Categorical(), X, structure=structure, **{wrong: 3})


def test_parameters_without_gradient():
    """Catches frozen parameters that are measured, or left out where they were asked for."""
    model = network()
    model[0].weight.requires_grad_(False)
    assert fisher(model, Categorical(), X).layout.names == ("0.bias", "2.weight", "2.bias")
    with pytest.raises(ValueError, match=r"must require grad, got '0\.weight' that does not; call"):
        fisher(model, Categorical(), X, parameters=["0.weight"])
    with pytest.raises(ValueError, match="which has no parameters"):
        fisher(nn.ReLU(), Categorical(), X)
    with pytest.raises(ValueError, match="which has none that requires grad"):
        fisher(network().requires_grad_(False), Categorical(), X)


# --- the model ---


IN_TRAINING = [nn.BatchNorm1d(4), nn.Dropout(0.5), nn.AlphaDropout(0.1), nn.RReLU()]


@pytest.mark.parametrize("layer", IN_TRAINING, ids=lambda layer: type(layer).__name__)
def test_layers_in_training_mode(layer):
    """Catches a Fisher matrix of a network that is not the one in use, running statistics that the
    measurement changes, and networks refused that are the same in both modes."""
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3)).train()
    text = f"evaluation mode, got {type(layer).__name__} '1' in training mode, .* call model.eval"
    with untouched(model):
        for measure in (fisher, lambda *given: score(*given).mean()):
            with pytest.raises(ValueError, match=text):
                measure(model, Categorical(), (X, Y))
    fisher(model.eval(), Categorical(), X)
    fisher(nn.Sequential(model[0], nn.Dropout(0.0), model[2]).train(), Categorical(), X)


class Counter(nn.Linear):
    """Writes a buffer in its forward pass."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            nn.BatchNorm1d(4, track_running_stats=False),
            "itself, got BatchNorm1d '' without running",
        ),
        (Computed(lambda f: F.dropout(f, 0.5, training=True)), r"always alike.*Call model\.eval"),
        (Computed(lambda f: f.squeeze()), "must treat every sample by itself"),
        (Counter(), r"leave its buffers as they are .* got 'calls' changed"),
    ],
)
def test_networks_that_are_not_the_same_twice(model, text):
    """Catches samples that see each other in evaluation mode too, random numbers and a
    normalisation over the batch that no module shows, a network that forgets the batch when it has
    one sample, and a count that stays, so that the second call finds another network."""
    with untouched(model.eval()):
        for _ in range(2):
            with pytest.raises(ValueError, match=text):
                fisher(model, Categorical(), X)


@pytest.mark.parametrize(
    ("function", "error", "text"),
    [
        (lambda f: (f, f), TypeError, "model must return one tensor [n, ...], got tuple; wrap it"),
        (lambda f: f[0, :2], ValueError, "model must return one row per sample (3), got shape [2]"),
        (lambda f: f.argmax(1), TypeError, "outputs of the model must be real and floating, got"),
        (lambda f: f[:, :0], ValueError, "model must return at least one number per sample, got"),
        (lambda f: f[:, 0], ValueError, "outputs of the model must have shape [n, C, ...], got ["),
        (lambda f: f[:, :1], ValueError, "outputs of the model must be logits of two classes at"),
        (lambda f: f / 0, ValueError, "outputs of the model must be finite, got others in batch 0"),
    ],
)
def test_outputs_that_no_likelihood_reads(function, error, text):
    """Catches a Fisher matrix of one of two outputs, of the sum over a batch, or of NaN."""
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        fisher(Computed(function), Categorical(), X)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value):
    """Catches NaN in the matrix from one sample of a later batch: infinity behind a ReLU that is
    off leaves finite outputs, and gradients of 0 times infinity."""
    x = X.clone()
    x[15, 2] = value
    for kind in FISHER_TYPES:
        with pytest.raises(ValueError, match=r"^data must be finite, got others in batch 1$"):
            fisher(network(), Categorical(), (x, Y), fisher_type=kind, batch_size=10)
    with pytest.raises(ValueError, match=r"^data must be finite, got others in batch 1$"):
        score(network(), Categorical(), x, Y, batch_size=10).mean()


def test_labels_and_rates_that_the_likelihood_cannot_have():
    """Catches labels that are only checked where a likelihood is asked directly, and a Fisher
    matrix 1 / rate that is negative."""
    with pytest.raises(ValueError, match=r"^labels must lie in \[0, 3\), got 1 to 3"):
        fisher(network(), Categorical(), (X, Y + 1), fisher_type="empirical")
    assert fisher(network(), Categorical(), (X, Y + 1)).samples == N
    with pytest.raises(ValueError, match="must be rates, finite and positive, got others in bat"):
        fisher(Computed(lambda f: f), Poisson(log_rate=False), X)
    assert fisher(Computed(F.softplus), Poisson(log_rate=False), X).samples == N


def test_a_likelihood_by_functions():
    """Catches functions that are not asked, and an exact matrix where there is no information."""
    model = network()
    waiting = Likelihood(
        lambda f, y: (f - y * f.exp()).sum(1),
        lambda f, generator: torch.empty_like(f).exponential_(generator=generator) / f.exp(),
        lambda f: torch.eye(3).expand(len(f), 3, 3),
    )
    exact = fisher(model, waiting, X)
    torch.testing.assert_close(exact.diag(), fisher(model, Gaussian(), X).diag(), rtol=1e-5, atol=0)
    many = fisher(model, waiting, X, fisher_type="mc", samples=400)
    # (y - 1)^2 of an exponential y has variance 8: over 400 draws of 20 samples, of which the
    # weights leave at least half, a standard error of 4.5 %; draws without the rate are 80 % off
    assert many.trace() == pytest.approx(exact.trace(), rel=4 * 0.045)
    without = Likelihood(lambda f, y: -(f - y).square().sum(1))
    assert fisher(model, without, (X, X[:, :3]), fisher_type="empirical").samples == N


def test_states_that_are_none():
    """Catches a file of something else that is read as a matrix."""
    state = fisher(network(), Categorical(), X).state_dict()
    for wrong, error, text in (
        (state | {"structure": "cube"}, ValueError, "structure must be one of 'diag', "),
        (state | {"fisher_type": "true"}, ValueError, "fisher_type must be one of 'exact', 'mc', "),
        (network().state_dict(), ValueError, r"state must be that of a Fisher matrix, got none of"),
        (3, TypeError, "state must be a mapping, got int"),
    ):
        with pytest.raises(error, match=f"^{text}"):
            from_state_dict(wrong)
