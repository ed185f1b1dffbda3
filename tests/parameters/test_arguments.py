"""What may be given to `fisher`, and what is refused and how."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.networks_zoo import untouched
from support.parameters_zoo import Written
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

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


def computed(function) -> nn.Module:
    """Any function of a linear layer's output."""
    return Written(lambda m, x: function(m.layer(x)), layer=nn.Linear(4, 3))


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
    ("parameters", [0], TypeError, "be names, a pattern or a function, got 0"),
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
    for wrong, names, text in (
        (model, ["0.weight"], r"must require grad, got '0\.weight' that does not; call"),
        (nn.ReLU(), None, "which has no parameters"),
        (network().requires_grad_(False), None, "which has none that requires grad"),
    ):
        with pytest.raises(ValueError, match=text):
            fisher(wrong, Categorical(), X, parameters=names)


# --- the data ---


class Stream(IterableDataset):
    """One sample after the other, of unknown number."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self):
        return zip(self.x, self.y, strict=True)


SOURCES = {
    "tensors": lambda x, y: (x, y),
    "Dataset of numbers": lambda x, y: Subset([*zip(x.numpy(), y.tolist())], range(N)),  # noqa: B905
    "IterableDataset": Stream,
    "DataLoader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=9),
    "list": lambda x, y: [(x[:5], y[:5]), [x[5:], y[5:]]],
    "generator": lambda x, y: ((x[i : i + 8], y[i : i + 8]) for i in range(0, N, 8)),
    "with empty batches": lambda x, y: [(x[:0], y[:0]), (x, y), (x[:0], y[:0])],
    "strided": lambda x, y: (x.repeat_interleave(2, 1)[:, ::2], y.repeat_interleave(2)[::2]),
}


SOURCES_OF_INPUTS = {
    "array": lambda x: x.numpy(),
    "tuple of one": lambda x: (x,),
    "pair without labels": lambda x: (x, None),
    "pair with labels of something else": lambda x: (x, torch.full((N, 7), float("nan"))),
    "Dataset": TensorDataset,
    "list of tuples": lambda x: [(x[:5],), (x[5:],)],
    "iterator": lambda x: iter([x[:5], x[5:]]),
}


@pytest.mark.parametrize(
    ("source", "fisher_type"),
    [*((s, "empirical") for s in SOURCES), *((s, "exact") for s in SOURCES_OF_INPUTS)],
)
def test_sources(source, fisher_type):
    """Catches labels that go to other samples, that are asked for or looked at where none are used,
    and batches that are left out."""
    model = network().double()
    data = SOURCES[source](X, Y) if fisher_type == "empirical" else SOURCES_OF_INPUTS[source](X)
    expected = fisher(model, Categorical(), (X, Y), fisher_type=fisher_type).diag()
    found = fisher(model, Categorical(), data, fisher_type=fisher_type, batch_size=7)
    assert found.samples == N
    torch.testing.assert_close(found.diag(), expected, rtol=1e-12, atol=1e-14)


def test_inputs_take_the_dtype_of_the_model():
    """Catches arrays of float64 that a float32 network refuses, and tokens that become floats."""
    assert fisher(network(), Categorical(), X.double().numpy()).samples == N
    tokens = torch.randint(0, 5, (N, 4), generator=torch.Generator().manual_seed(0))
    reader = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 3))
    assert fisher(reader, Categorical(), tokens.numpy()).samples == N


WRONG = [
    (X[:0], ValueError, "data must hold at least one sample, got none"),
    (iter(()), ValueError, "data must hold at least one sample, got none"),
    ([X, X], TypeError, "data must be a tuple for a pair (x, y), got a list of two, which may be"),
    (X, ValueError, "data must hold labels, got inputs alone: pass (x, y)"),
    ((X, Y[:-1]), ValueError, "labels must be as many as inputs (20), got 19"),
    ([(X, Y[:-1])], ValueError, "labels must be as many as inputs (20), got 19"),
    ((X, Y, Y), ValueError, "data must be a pair (x, y), got 3 entries"),
    ([(X, Y, Y)], ValueError, "data must be batches of x or (x, y), got one of 3 entries"),
    ((X, list(range(N))), TypeError, "labels must be tensors or arrays, got list"),
    ((X, torch.tensor(1)), ValueError, "labels must have shape [n, ...], got a single number"),
    ([{"x": X, "y": Y}], ValueError, "data must hold labels, got inputs alone: pass (x, y)"),
    ({"x": X}, ValueError, "data must hold labels, got inputs alone: pass (x, y)"),
    (({"x": X}, Y[:-1]), ValueError, "labels must be as many as inputs (20), got 19"),
    (({"x": X, "z": X[1:]}, Y), ValueError, "data['z'] must have 20 rows as data['x'] has, got 19"),
    (torch.tensor(1.0), ValueError, "data must have shape [n, ...], got a single number"),
    ([1.0, 2.0], TypeError, "data must be tensors or arrays, got float"),
    (X.to_sparse(), TypeError, "data must be dense, got torch.sparse_coo"),
    ((np.array(["a"]), Y[:1]), TypeError, "data must hold numbers, got an array of <U1"),
]


@pytest.mark.parametrize(("data", "error", "text"), WRONG)
def test_wrong_data(data, error, text):
    """Catches an empty mean (NaN), labels that are cut or repeated, and errors about something
    else."""
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        fisher(network(), Categorical(), data, fisher_type="empirical")


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


def counter() -> nn.Module:
    """Writes a buffer in its forward pass."""
    model = computed(lambda f: f + 0 * model.calls.add_(1))
    model.register_buffer("calls", torch.zeros(()))
    return model


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.BatchNorm1d(4, track_running_stats=False), "got BatchNorm1d '' without running"),
        (computed(lambda f: F.dropout(f, 0.5, training=True)), r"always alike.*Call model\.eval"),
        (computed(lambda f: f.squeeze()), "must treat every sample by itself"),
        (counter(), r"leave its buffers as they are .* got 'calls' changed"),
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
        (lambda f: (f, f + 1), TypeError, "model must return one floating tensor [n, ...], alone"),
        (lambda f: f[0, :2], ValueError, "model must return one row per sample (3), got shape [2]"),
        (lambda f: f.sum(), ValueError, "model must return one row per sample (3), got shape []"),
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
        fisher(computed(function), Categorical(), X)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value):
    """Catches NaN in the matrix from one sample of a later batch: infinity behind a ReLU that is
    off leaves finite outputs, and gradients of 0 times infinity."""
    x = X.clone()
    x[15, 2] = value
    given, size = (network(), Categorical(), (x, Y)), {"batch_size": 10}
    asked = [partial(fisher, *given, fisher_type=kind, **size) for kind in FISHER_TYPES]
    for ask in (*asked, score(*given, **size).mean):
        with pytest.raises(ValueError, match=r"^data must be finite, got others in batch 1$"):
            ask()


def test_labels_and_rates_that_the_likelihood_cannot_have():
    """Catches labels that are only checked where a likelihood is asked directly, and a Fisher
    matrix 1 / rate that is negative."""
    with pytest.raises(ValueError, match=r"^labels must lie in \[0, 3\), got 1 to 3"):
        fisher(network(), Categorical(), (X, Y + 1), fisher_type="empirical")
    assert fisher(network(), Categorical(), (X, Y + 1)).samples == N
    with pytest.raises(ValueError, match="must be rates, finite and positive, got others in bat"):
        fisher(computed(lambda f: f), Poisson(log_rate=False), X)
    assert fisher(computed(F.softplus), Poisson(log_rate=False), X).samples == N


def test_a_likelihood_by_functions():
    """Catches functions that are not asked for, or needed where they are not used."""
    model, squares = network(), lambda f, y: -(f - y).square().sum(1)
    informed = Likelihood(squares, None, lambda f: torch.eye(3).expand(len(f), 3, 3))
    expected = fisher(model, Gaussian(), X).diag()
    torch.testing.assert_close(fisher(model, informed, X).diag(), expected, rtol=1e-5, atol=0)
    bare = Likelihood(squares)
    assert fisher(model, bare, (X, X[:, :3]), fisher_type="empirical").samples == N


def test_states_that_are_none():
    """Catches a file of something else that is read as a matrix."""
    state = fisher(network(), Categorical(), X).state_dict()
    for wrong, text in (
        (state | {"structure": "cube"}, r"state\.structure must be one of 'diag', .*, got 'cube'"),
        (state | {"fisher_type": "true"}, r"state\.fisher_type must be one of 'exact', 'mc', "),
        (network().state_dict(), r"state\.structure must be one of 'diag', .*, got None"),
        (3, "state must be a mapping, got 3"),
    ):
        with pytest.raises(ValueError, match=f"^{text}"):
            from_state_dict(wrong)
