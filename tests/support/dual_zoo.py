"""Networks that derivatives must pass through whole: small, seeded, of every kind that users build.

`NETWORKS` are architectures; single operations are in `dual_zoo_layers`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.dual_oracle import Network
from support.dual_zoo_sequences import SEQUENCES
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


class UNet(nn.Module):
    """Two levels down and up: one by a transposed convolution, one by interpolation; skips."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.down1 = self._block(1, width)
        self.down2 = self._block(width, 2 * width)
        self.bottom = self._block(2 * width, 2 * width)
        self.up2 = nn.ConvTranspose2d(2 * width, 2 * width, 2, stride=2)
        self.merge2 = self._block(4 * width, width)
        self.merge1 = self._block(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    @staticmethod
    def _block(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.down1(x)
        skip2 = self.down2(F.max_pool2d(skip1, 2))
        low = self.bottom(F.max_pool2d(skip2, 2))
        x = self.merge2(torch.cat([self.up2(low), skip2], dim=1))
        x = F.interpolate(x, size=skip1.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(self.merge1(torch.cat((x, skip1), 1)))


# --- what a forward method may do by itself ---


class FunctionalOnly(nn.Module):
    """No submodules: every operation is a call."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(0.3 * torch.randn(4, 2, 3, 3))
        self.mixing = nn.Parameter(torch.randn(3, 2, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, self.bias, padding=1))
        x = torch.cat([F.max_pool2d(x, 2), x[:, :, ::2, 1::2] ** 2], dim=1)
        a, b = x.chunk(2, dim=1)
        x = torch.stack([a, b], dim=1)
        x = torch.einsum("nschw,tsc->nthw", x, self.mixing)
        x = torch.where(x > 0, x, x.pow(3) / 10)
        x = x / x.norm(dim=1, keepdim=True)
        y = x.mean((2, 3))
        y += 0.5 * y.sin()
        y[:, 0] += x[:, 1].amax(dim=(1, 2))
        y.mul_(2).sub_(y.mean(1, keepdim=True))
        return y @ y.new_ones(3, 2).triu()


NETWORKS: dict[str, Network] = {
    "lenet": Network(lenet, (1, 16, 16)),
    "resnet": Network(resnet, (3, 24, 24), samples=2),
    "unet": Network(UNet, (1, 8, 8)),
    **SEQUENCES,
    "functional": Network(FunctionalOnly, (2, 6, 6)),
}
