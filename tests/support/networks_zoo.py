"""Small networks of every kind that users write, data for them, and a watch over what is theirs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as global_hooks

import fisherfast as ff

WIDTH = 6  # activations of the input that all networks here take
SHIFT = 0.1  # half of the separation of the two conditions
DTHETA = 2 * SHIFT


def samples(n: int = 400, *, seed: int = 0, width: int = WIDTH) -> tuple[torch.Tensor, ...]:
    """n samples at each of two conditions: white noise, all means shifted by DTHETA. J = width."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, n, width, generator=generator)
    return noise[0] - SHIFT, noise[1] + SHIFT


def two_conditions(n: int = 400, **options: Any) -> ff.FiniteDifference:
    """The same as data."""
    return ff.FiniteDifference(*samples(n, **options), dtheta=DTHETA)


def measure(model: nn.Module, data: ff.FiniteDifference | None = None, **options: Any):
    """`fisher_flow` with few features."""
    options = {"max_features": 16} | options
    return ff.fisher_flow(model, two_conditions() if data is None else data, **options)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model with the same parameters each time; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


class Written(nn.Module):
    """Layers and parameters by name, and the function forward(self, x) of them."""

    def __init__(self, function: Callable[[Any, torch.Tensor], Any], **parts: object) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def functional(activation: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """An activation that is a function, between two layers."""
    layers = {"fc1": nn.Linear(WIDTH, 5), "fc2": nn.Linear(5, 2)}
    return Written(lambda m, x: m.fc2(activation(m.fc1(x))), **layers)


def twice() -> nn.Module:
    """Every module but the last is called twice."""
    layers = {"fc": nn.Linear(WIDTH, WIDTH), "act": nn.Tanh(), "out": nn.Linear(WIDTH, 1)}
    return Written(lambda m, x: m.out(m.act(m.fc(m.act(m.fc(x))))), **layers)


def shared() -> nn.Module:
    """One module under two names."""
    layer, out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
    return Written(lambda m, x: m.out(m.b(torch.tanh(m.a(x)))), a=layer, b=layer, out=out)


def residual() -> nn.Module:
    """A branch a -> act -> b that is added to its input."""
    branch = {"a": nn.Linear(WIDTH, 3), "act": nn.ReLU(), "b": nn.Linear(3, WIDTH)}
    out = nn.Linear(WIDTH, 1)
    return Written(lambda m, x: m.out(x + m.b(m.act(m.a(x)))), **branch, out=out)


def recurrent() -> nn.Module:
    """An LSTM, which returns nested tuples, read at its last step."""
    layers = {"lstm": nn.LSTM(3, 4, batch_first=True), "fc": nn.Linear(4, 1)}
    return Written(lambda m, x: m.fc(m.lstm(x.view(-1, 2, 3))[0][:, -1]), **layers)


def input_output() -> nn.Module:
    """Submodules that are called like the ends of the network."""
    layers = {"input": nn.Linear(WIDTH, 3), "output": nn.Linear(3, 2)}
    return Written(lambda m, x: torch.tanh(m.output(m.input(x))), **layers)


def noisy() -> nn.Module:
    """Draws random numbers in eval mode too, from torch's global stream."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.fc(x)
        return y + torch.randn_like(y) + F.dropout(y)

    return Written(forward, fc=nn.Linear(WIDTH, 4))


def attention() -> nn.Module:
    """Self-attention over two tokens; `heads` returns the weights too."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        tokens = m.embed(x.view(-1, 2, 3))
        return m.fc(m.heads(tokens, tokens, tokens)[0].mean(1))

    heads = {"embed": nn.Linear(3, 4), "heads": nn.MultiheadAttention(4, 2, batch_first=True)}
    return Written(forward, **heads, fc=nn.Linear(4, 1))


def transformer() -> nn.Module:
    """An encoder layer, which has a fused path of its own in eval mode."""
    embed, layer = nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return Written(
        lambda m, x: m.fc(m.encoder(m.embed(x.view(-1, 2, 3))).mean(1)),
        embed=embed,
        encoder=nn.TransformerEncoder(layer, 1),
        fc=nn.Linear(4, 1),
    )


def unused() -> nn.Module:
    """A layer that never runs."""
    layers = {"fc1": nn.Linear(WIDTH, 4), "fc2": nn.Linear(4, 1), "aux": nn.Linear(4, 1)}
    return Written(lambda m, x: m.fc2(F.relu(m.fc1(x))), **layers)


class Failing(nn.Module):
    """Raises `error` in the middle of the forward pass, from the `calls`-th batch on."""

    def __init__(self, error: BaseException, calls: int = 1) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4)
        self.norm = nn.BatchNorm1d(4)
        self.fc2 = nn.Linear(4, 1)
        self.error, self.calls, self.seen = error, calls, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        y = self.norm(self.fc1(x))
        if self.seen >= self.calls:
            raise self.error
        return self.fc2(y)


def mlp(width: int = 4) -> nn.Sequential:
    """Linear, ReLU, Linear."""
    return nn.Sequential(nn.Linear(WIDTH, width), nn.ReLU(), nn.Linear(width, 1))


def convolutional() -> nn.Sequential:
    """The layers of an image network: convolution, BatchNorm, dropout, flatten."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 3, 2),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(6, 1),
    )


FUNCTIONS = (F.relu, F.relu_, F.gelu, torch.relu, torch.tanh, torch.Tensor.relu, torch.sigmoid)


def _of_model(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a measurement must not touch."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modules = dict(model.named_modules())
    hooks = {
        f"{name}.{kind}": tuple(vars(module)[kind].items())
        for name, module in modules.items()
        for kind in vars(module)
        if kind.endswith("_hooks") or "_hooks_" in kind
    }
    return {
        "tensor identities": {name: id(tensor) for name, tensor in tensors.items()},
        "tensor storages": {name: tensor.data_ptr() for name, tensor in tensors.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "gradients": {
            name: None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
            for name, tensor in tensors.items()
        },
        "values": {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()},
        "training flags": {name: module.training for name, module in modules.items()},
        "hooks": hooks,
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
    }


def _of_process() -> dict[str, Any]:
    """Every global setting that a measurement must not touch."""
    subnormal = torch.tensor([1e-310], dtype=torch.float64) * 1
    return {
        "torch random state": torch.get_rng_state().numpy().tobytes(),
        "numpy random state": repr(np.random.get_state(legacy=False)),
        "python random state": random.getstate(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "attention fast path": torch.backends.mha.get_fastpath_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "denormals": subnormal.item(),
        "torch function modes": torch._C._len_torch_function_stack(),
        "functions": tuple(id(function) for function in FUNCTIONS),
        "functions now": (id(F.relu), id(F.relu_), id(torch.relu), id(torch.Tensor.relu)),
        "global hooks": tuple(
            tuple(hooks.items())
            for name, hooks in vars(global_hooks).items()
            if name.startswith("_global_") and name.endswith("_hooks")
        ),
    }


@contextmanager
def untouched(model: nn.Module, *more: nn.Module) -> Iterator[None]:
    """Fails when the body changes anything of the models or of the process."""
    models = (model, *more)
    before = [_of_process()] + [_of_model(each) for each in models]
    yield
    after = [_of_process()] + [_of_model(each) for each in models]
    for old, new in zip(before, after, strict=True):
        changed = [key for key in old if old[key] != new[key]]
        assert not changed, f"changed by the measurement: {changed}"
