"""What may be given to `fisher`, what is refused and how, and what stays the user's."""

from __future__ import annotations

import copy
import random
import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fisherfast.parameters import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    Poisson,
    fisher,
    from_state_dict,
    score,
)
from fisherfast.parameters.fisher import ACCUMULATORS, FISHER_TYPES, RESULTS

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
    ({"structure": "diagonal"}, ValueError, "structure must be one of 'diag', "),
    ({"structure": None}, ValueError, "structure must be one of 'diag', "),
    ({"structure": ["diag"]}, ValueError, "structure must be one of 'diag', "),
    (
        {"fisher_type": "sampled"},
        ValueError,
        "fisher_type must be one of 'exact', 'mc', 'empirical', got 'sampled'",
    ),
    ({"samples": 0, "fisher_type": "mc"}, ValueError, "samples must be at least 1, got 0"),
    ({"samples": 1.0}, TypeError, "samples must be a whole number, got 1.0"),
    ({"samples": True}, TypeError, "samples must be a whole number, got True"),
    (
        {"samples": 5},
        ValueError,
        "samples must be 1 for fisher_type 'exact', which draws no labels, got 5; draw them with"
        ' fisher_type="mc"',
    ),
    ({"samples": 2, "fisher_type": "empirical"}, ValueError, "samples must be 1 for fisher_type"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ({"batch_size": "8"}, TypeError, "batch_size must be a whole number, got '8'"),
    (
        {"seed": 2**63},
        ValueError,
        "seed must be at least -2**63 and below 2**63, got",
    ),
    ({"seed": 0.5}, TypeError, "seed must be a whole number, got 0.5"),
    ({"likelihood": Categorical}, TypeError, "likelihood must be an instance, got the class"),
    (
        {"likelihood": Poisson},
        TypeError,
        "likelihood must be an instance, got the class Poisson: write Poisson()",
    ),
    (
        {"likelihood": "softmax"},
        ValueError,
        "likelihood must be one of 'gaussian', 'categorical', 'bernoulli', 'poisson' or an"
        " instance, got 'softmax'",
    ),
    ({"likelihood": 3}, TypeError, "likelihood must be a name or a Gaussian, Categorical,"),
    ({"model": "network"}, TypeError, "model must be a torch.nn.Module, got str"),
    ({"model": nn.ReLU()}, ValueError, "parameters must choose at least one of the model, which"),
    ({"parameters": "convolution"}, ValueError, "parameters must choose at least one of the"),
    ({"parameters": ["0.weigth"]}, ValueError, "parameters must be of the model, got '0.weigth'"),
    ({"parameters": [0]}, TypeError, "parameters must be names, a pattern or a function, got 0"),
    ({"parameters": 0}, TypeError, "parameters must be names, a pattern or a function, got 0"),
    (
        {"parameters": b"0"},
        TypeError,
        "parameters must be names, a pattern or a function, got b'0'",
    ),
    ({"parameters": "0("}, ValueError, "parameters must be a regular expression, got '0('"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), ARGUMENTS)
def test_wrong_arguments(arguments, error, text):
    """Catches an argument that is ignored, taken for another, or refused by PyTorch far inside."""
    given = {"model": network(), "likelihood": Categorical(), "data": (X, Y)} | arguments
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        fisher(**given)


@pytest.mark.parametrize(
    ("name", "likelihood"),
    [
        ("gaussian", Gaussian()),
        ("categorical", Categorical()),
        ("bernoulli", Bernoulli()),
        ("poisson", Poisson()),
    ],
)
def test_likelihoods_by_name(name, likelihood):
    """Catches a name that stands for another likelihood, in `fisher` or in `score`."""
    model, labels = network(), torch.ones(N, 3)
    y = Y if name == "categorical" else labels
    assert torch.equal(fisher(model, name, X).diag(), fisher(model, likelihood, X).diag())
    by_name, given = (score(model, each, X, y).mean() for each in (name, likelihood))
    assert torch.equal(by_name, given)


@pytest.mark.parametrize("structure", ACCUMULATORS)
def test_keywords_of_no_structure(structure):
    """Catches a misspelt setting that is swallowed."""
    with pytest.raises(TypeError, match=f"structure '{structure}', which takes .*, got 'dampnig'"):
        fisher(network(), Categorical(), X, structure=structure, dampnig=3)


def test_keywords_are_those_of_the_structure():
    """Catches settings that the message does not name, and arguments of the library's own that a
    user can overwrite."""
    names = {name for name in ACCUMULATORS}
    assert set(RESULTS) == names - {"streamed"}  # which cannot be stored
    for structure in names:
        with pytest.raises(TypeError) as caught:
            fisher(network(), Categorical(), X, structure=structure, layout=None)
        assert "got 'layout'" in str(caught.value)


def test_parameters_without_gradient():
    """Catches frozen parameters that are measured, or left out where they were asked for."""
    model = network()
    model[0].weight.requires_grad_(False)
    assert fisher(model, Categorical(), X).layout.names == ("0.bias", "2.weight", "2.bias")
    with pytest.raises(ValueError, match=r"must require grad, got '0\.weight' that does not; call"):
        fisher(model, Categorical(), X, parameters=["0.weight"])
    with pytest.raises(ValueError, match="which has none that requires grad"):
        fisher(network().requires_grad_(False), Categorical(), X)


# --- the model ---


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(4), nn.Dropout(0.5), nn.AlphaDropout(0.1), nn.RReLU()],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_in_training_mode(layer):
    """Catches a Fisher matrix of a network that is not the one in use, and running statistics that
    the measurement changes."""
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3)).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    text = f"evaluation mode, got {type(layer).__name__} '1' in training mode, .* call model.eval"
    with pytest.raises(ValueError, match=text):
        fisher(model, Categorical(), X)
    with pytest.raises(ValueError, match=text):
        score(model, Categorical(), X, Y).mean()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    fisher(model.eval(), Categorical(), X)


def test_training_mode_without_such_layers_is_none_of_our_business():
    """Catches refusing networks that are the same in both modes."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.Linear(4, 3)).train()
    expected = fisher(copy.deepcopy(model).eval(), Categorical(), X).diag()
    assert torch.equal(fisher(model, Categorical(), X).diag(), expected)


def test_batch_norm_without_running_statistics():
    """Catches samples that see each other in evaluation mode too."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="by itself, got BatchNorm1d '1' without running statis"):
        fisher(model, Categorical(), X)


def test_dropout_that_is_no_module():
    """Catches random numbers that no module shows, and a state that they change."""
    model = Computed(lambda f: F.dropout(f, 0.5, training=True))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"always alike.*Call model\.eval"):
        fisher(model, Categorical(), X)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_that_see_each_other():
    """Catches a normalisation over the batch that no module shows."""
    with pytest.raises(ValueError, match="must treat every sample by itself"):
        fisher(Computed(lambda f: f - f.mean(0)), Categorical(), X)


class Counter(nn.Module):
    """Writes a buffer in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


def test_buffers_that_change_are_put_back():
    """Catches running statistics of layers that are not PyTorch's."""
    model = Counter()
    with pytest.raises(ValueError, match=r"leave its buffers as they are .* got 'calls' changed"):
        fisher(model, Categorical(), X)
    assert float(model.calls) == 0


@pytest.mark.parametrize(
    ("function", "error", "text"),
    [
        (lambda f: (f, f), TypeError, "model must return one tensor [n, ...], got tuple; wrap it"),
        (lambda f: {"y": f}, TypeError, "model must return one tensor [n, ...], got dict; wrap it"),
        (lambda f: f[0, :2], ValueError, "model must return one row per sample (3), got shape [2]"),
        (lambda f: f.sum(), ValueError, "model must return one row per sample (3), got shape []"),
        (lambda f: f.argmax(1), TypeError, "outputs of the model must be real and floating, got"),
        (
            lambda f: f[:, 0],
            ValueError,
            "outputs of the model must have shape [n, C, ...], got [20]",
        ),
        (lambda f: f[:, :1], ValueError, "outputs of the model must be logits of two classes at"),
        (
            lambda f: f / torch.zeros(()),
            ValueError,
            "outputs of the model must be finite, got others in batch 0",
        ),
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
    for fisher_type in FISHER_TYPES:
        with pytest.raises(ValueError, match=r"^data must be finite, got others in batch 1$"):
            fisher(
                network(),
                Categorical(),
                (x, Y),
                structure="diag",
                fisher_type=fisher_type,
                batch_size=10,
            )
    with pytest.raises(ValueError, match=r"^data must be finite, got others in batch 1$"):
        score(network(), Categorical(), x, Y, batch_size=10).mean()


def test_rates_that_are_not_positive():
    """Catches a Fisher matrix 1 / rate that is negative."""
    model = Computed(lambda f: f)
    with pytest.raises(ValueError, match="must be rates, finite and positive, got others in bat"):
        fisher(model, Poisson(log_rate=False), X)
    assert fisher(Computed(F.softplus), Poisson(log_rate=False), X).samples == N


@pytest.mark.parametrize(
    ("likelihood", "y", "error", "text"),
    [
        (Categorical(), Y.float(), TypeError, "labels must be whole numbers of classes, got torch"),
        (Categorical(), Y + 1, ValueError, "labels must lie in [0, 3), got 1 to 3"),
        (
            Bernoulli(),
            Y,
            ValueError,
            "labels must have the shape of the outputs, [20, 3], got [",
        ),
        (Gaussian(), Y.float(), ValueError, "labels must have the shape of the outputs, [20, 3]"),
        (Poisson(), X[:, :3], ValueError, "labels must be counts 0, 1, 2, ..., got -"),
    ],
)
def test_labels_that_the_likelihood_cannot_have(likelihood, y, error, text):
    """Catches labels that are only checked where a likelihood is asked directly."""
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        fisher(network(), likelihood, (X, y), structure="diag", fisher_type="empirical")
    assert fisher(network(), likelihood, (X, y)).samples == N


def test_a_likelihood_by_functions():
    """Catches functions that are not asked, and an exact matrix where there is no information."""
    model = network()
    waiting = Likelihood(
        lambda f, y: (f - y * f.exp()).sum(1),
        lambda f, generator: torch.empty_like(f).exponential_(generator=generator) / f.exp(),
        lambda f: torch.eye(3).expand(len(f), 3, 3),
    )
    exact = fisher(model, waiting, X).diag()
    torch.testing.assert_close(exact, fisher(model, Gaussian(), X).diag(), rtol=1e-5, atol=1e-9)
    many = fisher(model, waiting, X, structure="diag", fisher_type="mc", samples=1000).diag()
    # (y - 1)^2 of an exponential y has variance 8: a standard error of 9 % of one score's mean
    # square over 1000 draws; the entries are sums over up to 20 samples and 3 outputs
    assert bool(((many / exact - 1).abs()[exact > 0] < 4 * 0.09).all())
    without = Likelihood(lambda f, y: -(f - y).square().sum(1))
    with pytest.raises(ValueError, match='draw labels with fisher_type="mc"'):
        fisher(model, without, X)
    with pytest.raises(ValueError, match="must have sample= for"):
        fisher(model, without, X, structure="diag", fisher_type="mc")
    assert (
        fisher(model, without, (X, X[:, :3]), structure="diag", fisher_type="empirical").samples
        == N
    )


# --- what is the user's ---


@contextmanager
def default_device(device: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before if before.type != "cpu" else None)


def random_states() -> list[bytes]:
    return [
        torch.get_rng_state().numpy().tobytes(),
        repr(np.random.get_state(legacy=False)).encode(),
        repr(random.getstate()).encode(),
    ]


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("structure", ACCUMULATORS)
def test_nothing_of_the_users_changes(structure, fisher_type):
    """Catches gradients left in .grad, random numbers taken (a DataLoader that shuffles takes
    some), modes, hooks and defaults that stay, parameters that move."""
    model = network()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    grads = [torch.full_like(value, 7) for value in model.parameters()]
    for value, grad in zip(model.parameters(), grads, strict=True):
        value.grad = grad
    model[2].train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    weights, states = copy.deepcopy(model.state_dict()), random_states()
    versions = [value._version for value in model.parameters()]
    x = X.clone().requires_grad_()
    loader = DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True)
    for data in ((x, Y), loader, TensorDataset(X, Y)):
        fisher(
            model, Categorical(), data, structure=structure, fisher_type=fisher_type, batch_size=8
        )
    assert random_states() == states
    assert x.grad is None
    for value, grad in zip(model.parameters(), grads, strict=True):
        assert value.grad is grad
        assert bool((grad == 7).all())
        assert value.requires_grad
    assert [value._version for value in model.parameters()] == versions
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks
    assert calls
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_an_error_leaves_everything_as_it_was():
    """Catches hooks and random states that stay behind an error of the model or the data."""
    model, states = network(), random_states()

    def source():
        yield X[:10]
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        fisher(model, Categorical(), source(), structure="diag", fisher_type="mc")
    assert random_states() == states
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        fisher(model, Categorical(), torch.zeros(4, 99))
    assert random_states() == states
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("structure", ACCUMULATORS)
def test_the_default_device_is_the_users(structure, fisher_type):
    """Catches statistics on the user's device, and a network or a source that sees another default
    than its author: the device "meta" holds no numbers."""
    seen = []

    def note(f: Tensor) -> Tensor:
        seen.append(torch.empty(0).device.type)
        return f

    torch.manual_seed(0)
    model = Computed(note)
    data = (X, Y)
    expected = fisher(model, Categorical(), data, structure=structure, fisher_type=fisher_type)

    def source():
        for i in range(0, N, 5):
            seen.append(torch.empty(0).device.type)
            yield X[i : i + 5], Y[i : i + 5]

    own = Likelihood(lambda f, y: note(f).log_softmax(1).gather(1, y[:, None])[:, 0])
    with default_device("meta"):
        seen.clear()
        found = fisher(model, Categorical(), source(), structure=structure, fisher_type=fisher_type)
        if fisher_type == "empirical":
            fisher(model, own, source(), structure=structure, fisher_type=fisher_type)
        assert set(seen) == {"meta"}
        assert torch.empty(0).device.type == "meta"
        diagonal = found.diag()
    torch.testing.assert_close(diagonal, expected.diag(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_the_caller(mode):
    """Catches gradients that are off because they are off outside."""
    model = network()
    expected = fisher(
        model, Categorical(), (X, Y), structure="diag", fisher_type="empirical"
    ).diag()
    mean = score(model, Categorical(), X, Y).mean()
    with mode():
        found = fisher(
            model, Categorical(), (X, Y), structure="diag", fisher_type="empirical"
        ).diag()
        assert torch.equal(found.clone(), expected)
        assert torch.equal(score(model, Categorical(), X, Y).mean(), mean)


def test_another_default_dtype():
    """Catches numbers that are made in the default dtype and meet others."""
    model = network()
    expected = fisher(model, Categorical(), X, structure="diag", fisher_type="mc", samples=3).diag()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(
            fisher(model, Categorical(), X, structure="diag", fisher_type="mc", samples=3).diag(),
            expected,
        )
        score(model, Categorical(), X, Y).mean_zero_test(directions=2)
    finally:
        torch.set_default_dtype(torch.float32)


def test_half_precision():
    """Catches probabilities in half precision, whose rounding the matrix would show, and labels
    that cannot be drawn."""
    model = network()
    half = copy.deepcopy(model).to(torch.bfloat16)
    for fisher_type in FISHER_TYPES:
        exact = fisher(model, Categorical(), (X, Y), structure="diag", fisher_type=fisher_type)
        rough = fisher(half, Categorical(), (X, Y), structure="diag", fisher_type=fisher_type)
        assert rough.diag().dtype == torch.float64
        # bfloat16 rounds to 0.4 %; the weights, the activations and the gradients are rounded
        assert abs(rough.trace() / exact.trace() - 1) < 0.1


# --- seeds, progress, files ---


def test_the_seed_chooses_the_labels():
    """Catches labels of the global random state, and the same labels for every seed."""
    model = network()
    first = fisher(model, Categorical(), X, structure="diag", fisher_type="mc", seed=1).diag()
    torch.manual_seed(99)
    assert torch.equal(
        fisher(model, Categorical(), X, structure="diag", fisher_type="mc", seed=1).diag(), first
    )
    assert not torch.equal(
        fisher(model, Categorical(), X, structure="diag", fisher_type="mc", seed=2).diag(), first
    )


def test_progress(monkeypatch):
    """Catches a bar that is shown unasked, counts batches for samples, or is not closed."""
    bars = []

    class Bar:
        def __init__(self, **settings) -> None:
            self.settings, self.done, self.closed = settings, 0, False
            bars.append(self)

        def update(self, n: int = 1) -> None:
            self.done += n

        def close(self) -> None:
            self.closed = True

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            self.close()

    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=Bar))
    model = network()
    fisher(model, Categorical(), X)
    assert not bars
    fisher(model, Categorical(), X, batch_size=6, progress=True)
    fisher(model, Categorical(), iter([X, X]), progress=True)
    assert [bar.done for bar in bars] == [N, 2 * N]
    assert [bar.settings["total"] for bar in bars] == [N, None]
    assert all(bar.closed for bar in bars)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda state: 3, TypeError, "state must be a mapping, got int"),
        (lambda state: {}, ValueError, "state must be that of a Fisher matrix, got none of ["),
        (
            lambda state: state | {"structure": "cube"},
            ValueError,
            "structure must be one of 'diag', ",
        ),
        (
            lambda state: state | {"fisher_type": "true"},
            ValueError,
            "fisher_type must be one of 'exact', 'mc', 'empirical', got 'true'",
        ),
    ],
)
def test_states_that_are_none(change, error, text):
    """Catches a file of something else that is read as a matrix."""
    state = fisher(network(), Categorical(), X).state_dict()
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        from_state_dict(change(state))
