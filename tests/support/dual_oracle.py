"""What exact derivatives are compared with: PyTorch's forward mode, in float64.

It runs the network one direction after the other and reads every layer with the taps that
`fisher_flow` uses.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from support.networks_zoo import seeded
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherfast.model.hooks import Forward

Activations = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Network:
    """How to build a network and what to feed it.

    Attributes:
        build: makes the module; its parameters are drawn again by `make`.
        shape: of one sample.
        samples: in a batch.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int = 3

    def make(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The network in training mode, drawn in float64 so that every dtype has the same one."""
        return seeded(lambda: randomised(self.build().double())).to(dtype)

    def inputs(self, parameters: int = 3, samples: int | None = None) -> tuple[Tensor, Tensor]:
        """x [n, ...] and dx [P, n, ...], white noise."""
        generator = torch.Generator().manual_seed(1)
        shape = (samples or self.samples, *self.shape)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        dx = torch.randn(parameters, *shape, generator=generator, dtype=torch.float64)
        return x, dx


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Draw biases, scales and running statistics: at 0 and 1 a wrong use of them does not show."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.5)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(7)
    return model


class Function(nn.Module):
    """A forward method that is a function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def calls(function: Callable[[Tensor], Any], shape: tuple[int, ...] = (5, 7)) -> Network:
    """A network that is one function of an input of this shape."""
    return Network(lambda: Function(function), shape)


@contextlib.contextmanager
def _plain_evaluation() -> Iterator[None]:
    """No gradients, and attention by the operations that have a forward derivative."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # PyTorch 2.13 compiles its decompositions at the first use of forward mode
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def run(model: nn.Module, x: Tensor, read: Callable[[Tensor], Any]) -> tuple[Any, dict[str, Any]]:
    """The output, and `read` of every layer by name. Runs a copy of the model, in eval mode."""
    model = copy.deepcopy(model).eval()
    layers: dict[str, Any] = {}

    def consume(name: str, kind: str, module: nn.Module | None, output: Tensor) -> None:
        layers[name] = read(output)

    with Forward(model, consume) as forward:
        output = forward.run(x.clone())
    heads: list[Tensor] = []
    map_tensors(heads.append, output)
    heads = [h for h in heads if h.is_floating_point() and h.shape[:1] == x.shape[:1]]
    if "output" not in layers and heads:
        flat = [head.reshape(len(x), -1) for head in heads]
        layers["output"] = read(heads[0] if len(heads) == 1 else torch.cat(flat, 1))
    return output, layers


def oracle(network: Network, x: Tensor, dx: Tensor) -> tuple[Activations, Any, list[Any]]:
    """Every layer's primal and tangents; the output's structure, and the same for each tangent; in
    float64, for one entry of the zoo."""
    model = network.make()

    def unpack(value: Tensor) -> tuple[Tensor, Tensor]:
        if not value.is_floating_point():
            return value.clone(), torch.zeros_like(value)
        primal, tangent = forward_ad.unpack_dual(value)
        return primal.clone(), torch.zeros_like(primal) if tangent is None else tangent.clone()

    runs = []
    with _plain_evaluation():
        for direction in dx:
            with forward_ad.dual_level():
                output, layers = run(model, forward_ad.make_dual(x, direction), unpack)
                primal = map_tensors(lambda t: unpack(t)[0], output)
                tangent = map_tensors(lambda t: unpack(t)[1], output)
            runs.append((layers, primal, tangent))
    layers = {
        name: (primal, torch.stack([each[name][1] for each, _, _ in runs]))
        for name, (primal, _) in runs[0][0].items()
    }
    return layers, runs[0][1], [tangent for _, _, tangent in runs]


def map_tensors(function: Callable[..., Any], *structures: Any) -> Any:
    """Apply a function to the tensors at the same place of nested outputs."""
    first = structures[0]
    if isinstance(first, Tensor):
        return function(*structures)
    if isinstance(first, dict):
        return {key: map_tensors(function, *(each[key] for each in structures)) for key in first}
    if isinstance(first, tuple | list):
        entries = [map_tensors(function, *each) for each in zip(*structures, strict=True)]
        return type(first)(*entries) if hasattr(first, "_fields") else type(first)(entries)
    return first


def distance(seen: Tensor, truth: Tensor) -> float:
    """Largest deviation relative to the largest entry of the truth."""
    assert seen.shape == truth.shape, (seen.shape, truth.shape)
    if truth.numel() == 0:
        return 0.0
    scale = truth.abs().max().clamp_min(1e-3)
    return float(((seen.double() - truth).abs().max() / scale).nan_to_num(nan=float("inf")))
