"""Networks that derivatives must pass through whole: small, seeded, of every kind that users build.

`NETWORKS` are architectures; single operations are in `dual_zoo_layers`.
"""

from __future__ import annotations

from support.dual_oracle import Network
from support.dual_zoo_sequences import SEQUENCES
from support.dual_zoo_spectral import SPECTRAL
from torch import Tensor, nn

# --- image networks ---


def lenet() -> nn.Module:
    """Convolutions with tanh and average pooling (LeCun 1998)."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 12),
        nn.Tanh(),
        nn.Linear(12, 5),
    )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a skip connection; one in-place ReLU module for both."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += skip
        return self.relu(out)


def resnet(width: int = 4, channels: int = 3) -> nn.Sequential:
    """Stem, two blocks and readout of a ResNet-18 (He et al. 2016)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        BasicBlock(width, width, 1),
        BasicBlock(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(2 * width, 5),
    )


NETWORKS: dict[str, Network] = {
    "lenet": Network(lenet, (1, 16, 16)),
    "resnet": Network(resnet, (3, 24, 24), samples=2),
    **SEQUENCES,
    **SPECTRAL,
}
