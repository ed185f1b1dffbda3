"""The networks whose derivatives are timed: a small CNN, a ResNet-18, a vision transformer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def small_cnn(width: int = 16, channels: int = 1) -> nn.Module:
    """Three convolutions with batch norm, ReLU and GELU, max pooling, two linear layers."""
    hidden = 64
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * width, hidden),
        nn.GELU(),
        nn.Linear(hidden, 1),
    )


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a skip connection; in-place ReLU."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            skip = nn.Conv2d(before, after, 1, stride, bias=False)
            self.skip = nn.Sequential(skip, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, before, H, W] -> [n, after, H / stride, W / stride]."""
        y = self.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        y += self.skip(x)
        return self.relu(y)


def resnet18(width: int = 64, channels: int = 3, classes: int = 10) -> nn.Module:
    """Four stages of two blocks (He et al. 2016)."""
    widths = [width, width, 2 * width, 4 * width, 8 * width]
    blocks: list[nn.Module] = []
    for stage in range(1, len(widths)):
        before, after = widths[stage - 1], widths[stage]
        blocks += [Residual(before, after, min(stage, 2)), Residual(after, after, 1)]
    return nn.Sequential(
        nn.Conv2d(channels, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], classes),
    )


class AttentionBlock(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and beside a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [n, tokens, width] -> the same shape."""
        n, tokens, width = x.shape
        packed = self.queries_keys_values(self.before_attention(x))
        heads = packed.reshape(n, tokens, 3, self.heads, width // self.heads)
        seen = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4).unbind(0))
        x = x + self.mix(seen.transpose(1, 2).reshape(n, tokens, width))
        return x + self.perceptron(x)


class VisionTransformer(nn.Module):
    """Patches with positions, blocks of attention, the mean over tokens."""

    def __init__(
        self, image: int = 224, patch: int = 16, width: int = 192, heads: int = 3, depth: int = 4
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(0.1 * torch.randn(1, (image // patch) ** 2, width))
        self.blocks = nn.Sequential(*(AttentionBlock(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, 3, image, image] -> [n, 10]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(tokens).mean(1))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "small CNN": small_cnn,
    "ResNet-18": resnet18,
    "ViT": VisionTransformer,
}


def built(name: str, **sizes: int) -> nn.Module:
    """A network in eval mode with fixed weights, without gradients, its batch norms not trivial.

    The random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS[name](**sizes).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
    return model
