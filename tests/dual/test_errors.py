"""What exact derivatives say when they cannot be had: which layer, which operation, what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.dual_oracle import Function
from support.networks_zoo import seeded, untouched
from torch import Tensor, nn

import fisherfast as ff

PARAMETERS, SAMPLES, WIDTH = 2, 3, 5


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(SAMPLES, WIDTH, generator=GENERATOR)
DX = torch.randn(PARAMETERS, SAMPLES, WIDTH, generator=GENERATOR)


class Around(nn.Module):
    """Puts a forward method named `layer` into a `block` between two linear layers."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.block = nn.ModuleDict({"layer": Function(layer)})
        self.after = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.block["layer"](self.before(x)))


def around(layer: Any) -> nn.Module:
    return seeded(lambda: Around(layer))


CALLS = {"jvp": ff.jvp, "propagate": ff.propagate}


@pytest.fixture(params=CALLS)
def call(request) -> Any:
    """Both entrances."""
    return CALLS[request.param]


# --- arguments ---


SHAPE = r"dx must have shape [P, *x.shape] with x.shape = [3, 5], got "
DTYPE = "dx must have the dtype of x (torch.float32), got torch.float64"
COMPLEX = "x must have a floating dtype, got torch.complex64: give real and imaginary part as two"
WRONG = {
    "without parameters": (X, DX[0], ValueError, SHAPE + "[3, 5]"),
    "fewer samples": (X, DX[:, 1:], ValueError, SHAPE + "[2, 2, 5]"),
    "a width to broadcast": (X, DX[..., :1], ValueError, SHAPE + "[2, 3, 1]"),
    "an axis more": (X, DX[:, None], ValueError, SHAPE + "[2, 1, 3, 5]"),
    "double dx": (X, DX.double(), TypeError, DTYPE),
    "device": (X, DX.to("meta"), ValueError, "dx must be on the device of x (cpu), got meta"),
    "complex x": (X.to(torch.complex64), DX, TypeError, COMPLEX),
    "no x": (None, DX, TypeError, "x must be a torch.Tensor, got NoneType"),
    "a list": (X, DX.tolist(), TypeError, "dx must be a torch.Tensor, got list"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_before_the_model_runs(case):
    """Catches directions that are broadcast or rounded in silence, complex numbers half of whose
    derivative would be lost, attribute errors from deep inside, and checks after the work."""

    def refuse(x: Tensor) -> Tensor:
        raise AssertionError("the model ran")

    x, dx, error, message = WRONG[case]
    for call in CALLS.values():
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            call(around(refuse), x, dx)
    if x is not None:
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            ff.dual.DualTensor.pack(x, dx)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_integers_for_an_embedding(dtype):
    """Catches tokens that are refused, and derivatives that are zero in silence."""
    tokens = torch.randint(2, (SAMPLES, 4)).to(dtype)
    model = nn.Sequential(
        Function(torch.Tensor.long), nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 2)
    )
    dx = torch.ones(2, SAMPLES, 4)
    with pytest.warns(ff.FisherWarning, match=f"x has dtype {dtype}"):
        y, dy = ff.jvp(model, tokens, dx)
    assert torch.equal(y, model(tokens))
    assert not y.requires_grad
    assert torch.equal(dy, torch.zeros(2, SAMPLES, 2))
    with pytest.warns(ff.FisherWarning, match=f"x has dtype {dtype}"):
        acts = ff.propagate(model, tokens, dx)
    assert torch.equal(acts["1"][0], model[1](tokens.long()))
    assert acts["1"][1].shape == (2, SAMPLES, 4, 3)
    assert not any(tangents.any() for _, tangents in acts.values())
    with pytest.warns(ff.FisherWarning, match=f"x has dtype {dtype}"):
        assert ff.dual.coverage(model, tokens).executed == 0
    with pytest.raises(ValueError, match=r"dx must have shape \[P, \*x.shape\]"):
        ff.jvp(model, tokens, dx[..., :3])
    with pytest.raises(TypeError, match="x must have a floating dtype"):
        ff.dual.DualTensor.pack(tokens, dx)


def test_model_that_is_no_module(call):
    """Catches a function given as a model, which has no layers."""
    with pytest.raises(TypeError, match=r"model must .*got.*"):
        call(torch.sin, X, DX)


def test_errors_of_the_model_stay_what_they_are(call):
    """Catches a shape error of the user's own that is turned into an error of derivatives."""
    model = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(3, 2))
    with untouched(model), pytest.raises(RuntimeError, match="shape") as raised:
        call(model, X, DX)
    assert not isinstance(raised.value, ff.dual.DerivativeError)


# --- operations without a derivative ---


@pytest.fixture(scope="module", params=["no derivative", "a backward only"])
def foreign_operation(request) -> Any:
    """An operation of the user's own that PyTorch cannot look into."""
    name = f"fisherfast_tests::halve_{request.param.split()[0]}"

    @torch.library.custom_op(name, mutates_args=())
    def halve(x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() / 2)

    if request.param == "a backward only":
        halve.register_autograd(lambda context, gradient: gradient / 2)
    return halve


def assert_explains(call: Any, model: nn.Module, operation: str) -> None:
    """The error names the operation, the layer and the way out; nothing is left behind."""
    with untouched(model), pytest.raises(ff.dual.DerivativeError) as raised:
        call(model, X, DX)
    message = str(raised.value)
    assert isinstance(raised.value, RuntimeError)
    for part in (operation, "block.layer", "FiniteDifference", "paired=True"):
        assert part in message


@pytest.mark.parametrize(
    ("operation", "layer"),
    [
        ("zeta", lambda x: torch.special.zeta(x.abs() + 2, x.abs() + 1)),
        ("bessel_j0", torch.special.bessel_j0),
        ("pdist", lambda x: torch.pdist(x)[:, None] + x),
    ],
)
def test_operation_without_a_derivative(call, operation, layer):
    """Catches a derivative that is zero in silence, and an error that does not say where."""
    assert_explains(call, around(layer), operation)


def test_operation_of_a_library_without_a_derivative(call, foreign_operation):
    """Catches the same for an operation that PyTorch knows nothing of: its forward mode drops the
    tangents there without a word."""
    assert_explains(call, around(foreign_operation), "halve")


def test_operation_without_a_derivative_on_constants():
    """Catches an error where none is due: of a constant there is nothing to derive."""
    constant = torch.rand(WIDTH) + 2
    model = around(lambda x: x * torch.special.zeta(constant, constant))
    _, dy = ff.jvp(model, X, DX)
    with torch.no_grad():
        z = DX @ model.before.weight.T * torch.special.zeta(constant, constant)
        torch.testing.assert_close(dy, z @ model.after.weight.T)


# --- networks that do unusual things ---


def test_dropout_that_stays_switched_on():
    """Catches a new mask for each tangent, a silent one, and a random state that moves on."""
    model = around(lambda x: F.dropout(x, 0.5, training=True))
    model.before = model.after = nn.Identity()
    with untouched(model), pytest.warns(ff.FisherWarning, match=r"block\.layer"):
        y, dy = ff.jvp(model, X, DX)
    mask = y / X
    assert set(mask.round(decimals=4).unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(dy, mask * DX)


@pytest.mark.parametrize(
    "draw",
    [
        torch.randn_like,
        lambda x: torch.randn(x.shape),
        lambda x: x.new_empty(x.shape).normal_(),
        lambda x: F.dropout(torch.ones_like(x), 0.5, training=True),
    ],
    ids=["randn_like", "randn", "normal_", "mask"],
)
def test_random_numbers_are_constants(draw):
    """Catches random numbers that are given tangents, and layers that draw them unnoticed."""
    model = around(lambda x: x + 0 * draw(x))
    with untouched(model), pytest.warns(ff.FisherWarning, match=r"block\.layer"):
        _, dy = ff.jvp(model, X, DX)
    with torch.no_grad():
        z = DX @ model.before.weight.T
        torch.testing.assert_close(dy, z @ model.after.weight.T)


def test_dropout_modules_are_quiet():
    """Catches a warning about modules that eval mode switches off (warnings are errors here)."""
    model = nn.Sequential(nn.Dropout(), nn.Linear(WIDTH, 4), nn.AlphaDropout(), nn.RReLU())
    _, dy = ff.jvp(model.train(), X, DX)
    assert dy.shape == (PARAMETERS, SAMPLES, 4)


def test_model_that_moves_data_to_another_device(call):
    """Catches an error that does not say which layer did it, and a result without tangents."""
    model = around(lambda x: x.to("meta"))
    model.after = nn.Identity()
    with (
        untouched(model),
        pytest.raises(
            (RuntimeError, ValueError), match=r"block\.layer.*device|device.*block\.layer"
        ),
    ):
        call(model, X, DX)


@pytest.mark.parametrize("make", [lambda: torch.zeros(4, 3).clone(), lambda: torch.eye(4, 3)])
def test_what_the_model_makes_may_be_written(make):
    """Catches constants made inside of the forward pass that have no room for tangents."""

    def forward(x):
        y = make()
        y[:, 0] = x[:, 1]
        return y

    x, dx = torch.randn(4, 3), torch.randn(2, 4, 3)
    y, dy = ff.jvp(Function(forward), x, dx)
    assert torch.equal(y, forward(x))
    assert torch.equal(dy[..., 0], dx[..., 1])
    assert not dy[..., 1:].any()
