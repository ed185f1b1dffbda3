"""The networks whose parameters' Fisher matrix is compared with that of other libraries.

Small ones in float64, of the layers that all of them know, and residual networks for images of
3 x 32 x 32, as in CIFAR: 3 x 3 stem, stages that halve the map and double the channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CHANNELS, SIZE = 3, 32


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a skip connection. The sum is not in place, as BackPACK's hooks
    allow none."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.first_relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.second_relu = nn.ReLU(inplace=True)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            skip = nn.Conv2d(before, after, 1, stride, bias=False)
            self.skip = nn.Sequential(skip, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, before, H, W] -> [n, after, H / stride, W / stride]."""
        y = self.first_relu(self.first_norm(self.first(x)))
        return self.second_relu(self.second_norm(self.second(y)) + self.skip(x))


def residual(width: int, stages: int, blocks: int, classes: int = 10) -> nn.Module:
    """A stem, stages of residual blocks, the mean over positions, a linear layer."""
    layers: list[nn.Module] = [
        nn.Conv2d(CHANNELS, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    before = width
    for stage in range(stages):
        after = width << stage
        for block in range(blocks):
            layers.append(Block(before, after, 2 if stage and not block else 1))
            before = after
    # of a fixed size, as vmap has no rule for every adaptive pooling
    mean = nn.AvgPool2d(SIZE >> (stages - 1))
    return nn.Sequential(*layers, mean, nn.Flatten(), nn.Linear(before, classes))


def perceptron(inputs: int = 6, outputs: int = 4) -> nn.Module:
    """Three linear layers, one without a bias."""
    return nn.Sequential(
        nn.Linear(inputs, 7),
        nn.Tanh(),
        nn.Linear(7, 5, bias=False),
        nn.ReLU(),
        nn.Linear(5, outputs),
    )


def convolutional(outputs: int = 4) -> nn.Module:
    """Convolutions, padded, strided and dilated, and a linear layer, for images of 2 x 9 x 9."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, stride=2, bias=False),
        nn.Tanh(),
        nn.Conv2d(3, 5, 2, dilation=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, outputs),
    )


def normalised(outputs: int = 4) -> nn.Module:
    """Batch norm that uses its running statistics, behind a convolution and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.BatchNorm1d(6),
        nn.Tanh(),
        nn.Linear(6, outputs),
    )


NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (6,)),
    "convolutional": (convolutional, (2, 9, 9)),
    "normalised": (normalised, (2, 9, 9)),
}
"""How it is built, and the shape of one input."""


def drawn(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network in eval mode with fixed random weights, its batch norms not trivial.

    The random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
    return model.to(dtype)


def data(
    shape: tuple[int, ...], classes: int, samples: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [samples, *shape] of standard normal numbers, and labels [samples]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, (samples,), generator=generator)
