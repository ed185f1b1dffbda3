"""Networks whose parameters' Fisher matrix must be right: small, seeded, in float64 and eval mode.

`NETWORKS` have three outputs for each sample and few enough parameters for a dense matrix; each
uses its parameters in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from support.dual_oracle import randomised
from support.networks_zoo import Written, seeded
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

OUTPUTS = 3
TOKENS = 6
"""Words in the vocabulary of networks that read tokens."""


@dataclass(frozen=True)
class Network:
    """How to build a network and what to feed it.

    Attributes:
        build: makes the module; its biases, scales and running statistics are drawn again.
        shape: of one sample.
        tokens: samples are whole numbers below `TOKENS`.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: bool = False

    def make(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The network in eval mode, drawn in float64 so that every dtype has the same one."""
        return seeded(lambda: randomised(self.build().double())).to(dtype).eval()

    def inputs(self, samples: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
        """x [n, ...]: white noise, or tokens of which some repeat."""
        generator = torch.Generator().manual_seed(1)
        if self.tokens:
            return torch.randint(TOKENS, (samples, *self.shape), generator=generator)
        return torch.randn(samples, *self.shape, generator=generator, dtype=torch.float64).to(dtype)


def pooled(
    *layers: nn.Module, features: int = 4, dims: int | tuple[int, ...] = (2, 3)
) -> nn.Module:
    """Layers, a nonlinearity that sees every position, their mean, and a linear layer."""
    mean = Written(lambda m, h: h.mean(dims))
    return nn.Sequential(*layers, nn.Tanh(), mean, nn.Linear(features, OUTPUTS))


# --- layers with a rule ---


def linear(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5, bias), nn.Tanh(), nn.Linear(5, OUTPUTS, bias))


def convolution2d(**settings: object) -> nn.Module:
    """Two channels and any setting."""
    return pooled(nn.Conv2d(2, 4, **{"kernel_size": 3} | settings))  # type: ignore[arg-type]


def normed2d(norm: Callable[[], nn.Module]) -> nn.Module:
    """A norm of four channels between a convolution and an in-place nonlinearity."""
    return pooled(nn.Conv2d(2, 4, 3), norm(), nn.ReLU(inplace=True))


def normed_features(norm: Callable[[], nn.Module]) -> nn.Module:
    """A norm of the five features at each position of a sequence."""
    return pooled(nn.Linear(4, 5), norm(), features=5, dims=1)


def embedding() -> nn.Module:
    """A table whose padding row, which has no gradient, is not zero."""
    table = nn.Embedding(TOKENS, 4, padding_idx=2)
    nn.init.normal_(table.weight)
    return pooled(table, dims=1)


# --- ways through the network ---


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.1, batch_first=True)
    return pooled(layer, dims=1)


def recurrent() -> nn.Module:
    """The last state of a recurrent network."""
    return Written(
        lambda m, x: m.head(m.rnn(x)[0][:, -1]),
        rnn=nn.LSTM(2, 3, batch_first=True),
        head=nn.Linear(3, OUTPUTS),
    )


def windows(mixed: bool = False) -> nn.Module:
    """Windows of the signal become rows of the batch, and come back; mixed, the windows of all
    samples before the next: rows of one sample are apart."""

    def forward(m: Any, x: Tensor) -> Tensor:
        rows = x.unfold(1, 4, 2)  # [n, windows, 4]
        rows = rows.transpose(0, 1) if mixed else rows
        h = m.layers(rows.reshape(-1, 4)).reshape(*rows.shape[:2], 5)
        return m.head(h.mean(0 if mixed else 1))

    layers = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU())
    return Written(forward, layers=layers, head=nn.Linear(5, OUTPUTS))


# --- parameters used in ways of their own ---


def twice() -> nn.Module:
    """One layer called two times."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.layer(torch.tanh(m.layer(x))))

    return Written(forward, layer=nn.Linear(4, 4), head=nn.Linear(4, OUTPUTS))


def tied_head() -> nn.Module:
    """A language model: the embedding is also the matrix of the last layer."""
    table, head = nn.Embedding(OUTPUTS, 4), nn.Linear(4, OUTPUTS)
    head.weight = table.weight
    return Written(
        lambda m, x: m.head(torch.tanh(m.mix(m.embedding(x % OUTPUTS))).mean(1)),
        embedding=table,
        mix=nn.Linear(4, 4),
        head=head,
    )


def expression() -> nn.Module:
    """Parameters of one's own, in an expression."""
    return Written(
        lambda m, x: m.layer(x * m.scale.exp()) * torch.sigmoid(m.gate),
        scale=nn.Parameter(torch.linspace(0.5, 1.5, 4)),
        layer=nn.Linear(4, OUTPUTS),
        gate=nn.Parameter(torch.tensor(0.3)),
    )


def penalised() -> nn.Module:
    """A layer whose weights enter once more, next to the layer."""
    return Written(
        lambda m, x: m.layer(x) * m.layer.weight.square().sum(), layer=nn.Linear(4, OUTPUTS)
    )


def unused() -> nn.Module:
    """One layer that is never called, and one that is frozen."""
    return Written(
        lambda m, x: m.head(torch.tanh(m.first(x))),
        first=nn.Linear(4, 5).requires_grad_(False),
        idle=nn.Linear(2, 2),
        head=nn.Linear(5, OUTPUTS),
    )


def parametrized() -> nn.Module:
    """Weight norm: the weight is computed of two other parameters."""
    return nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, OUTPUTS))


def checkpointed() -> nn.Module:
    """A block whose activations are computed again on the way back, a layer called by keyword."""
    return Written(
        lambda m, x: m.head(input=torch.tanh(checkpoint(m.block, x, use_reentrant=False))),
        block=nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)),
        head=nn.Linear(4, OUTPUTS),
    )


def of_images(build: Callable[..., nn.Module], **settings: Any) -> Network:
    return Network(partial(build, **settings), (2, 5, 6))


SEQUENCE = (3, 4)

NETWORKS: dict[str, Network] = {
    "linear": Network(linear, (4,)),
    "shared linear": Network(lambda: pooled(nn.Linear(4, 5), features=5, dims=1), SEQUENCE),
    "conv2d strided": of_images(convolution2d, stride=(2, 1), padding=1, dilation=(1, 2)),
    "conv2d grouped": of_images(convolution2d, groups=2),
    "conv2d same": of_images(convolution2d, kernel_size=(2, 3), padding="same"),
    "conv2d reflect": of_images(convolution2d, padding=1, padding_mode="reflect", bias=False),
    "conv3d": Network(
        lambda: pooled(nn.Conv3d(1, 4, (2, 3, 1), (1, 2, 1), (1, 0, 0)), dims=(2, 3, 4)),
        (1, 3, 5, 2),
    ),
    "conv transpose": Network(
        lambda: pooled(nn.ConvTranspose2d(2, 4, 3, 2, 1, output_padding=1, groups=2)), (2, 3, 3)
    ),
    "batch norm": of_images(normed2d, norm=lambda: nn.BatchNorm2d(4)),
    "layer norm": Network(partial(normed_features, lambda: nn.LayerNorm(5)), SEQUENCE),
    "group norm": of_images(normed2d, norm=lambda: nn.GroupNorm(2, 4)),
    "embedding": Network(embedding, (5,), tokens=True),
    "transformer": Network(transformer, SEQUENCE),
    "LSTM": Network(recurrent, (3, 2)),
    "windows": Network(windows, (8,)),
    "windows mixed": Network(partial(windows, mixed=True), (8,)),
    "called twice": Network(twice, (4,)),
    "tied head": Network(tied_head, (5,), tokens=True),
    "expression": Network(expression, (4,)),
    "weights in an expression": Network(penalised, (4,)),
    "unused and frozen": Network(unused, (4,)),
    "weight norm": Network(parametrized, (4,)),
    "checkpoint": Network(checkpointed, (4,)),
}
