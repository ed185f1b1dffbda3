"""Networks with branches, small: ResNet-18, U-Net, vision transformer, DenseNet block, sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from support.networks_zoo import Written
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """conv, norm, relu, conv, norm, plus the input (projected where the shape changes), relu."""

    def __init__(self, inside: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride > 1 or inside != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet18(nn.Module):
    """The 18 layers of He et al. (2016), 2 to 5 channels wide, for pictures [3, 16, 16]."""

    def __init__(self, width: int = 2, outputs: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inside = width
        for stage in range(4):
            stride, channels = 1 if stage == 0 else 2, width + stage
            blocks = BasicBlock(inside, channels, stride), BasicBlock(channels, channels, 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            inside = channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inside, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def unet() -> nn.Module:
    """Two scales; the finer one goes around the coarser one."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        fine = m.fine(x)
        coarse = m.up(m.bottom(m.pool(fine)))
        return m.head(m.joined(torch.cat([fine, coarse], 1)))

    return Written(
        forward,
        fine=nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()),
        pool=nn.MaxPool2d(2),
        bottom=nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        up=nn.ConvTranspose2d(4, 4, 2, 2),
        joined=nn.Conv2d(8, 3, 3, padding=1),
        head=nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)),
    )


class Encoder(nn.Module):
    """A block of a transformer that normalises first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def vit() -> nn.Module:
    """Patches of 8 x 8 and a class token, which alone is read."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        tokens = m.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([m.token.expand(len(x), -1, -1), tokens], 1) + m.position
        return m.head(m.ln(m.blocks(tokens))[:, 0])

    return Written(
        forward,
        patches=nn.Conv2d(3, 6, 8, 8),
        token=nn.Parameter(torch.randn(1, 1, 6)),
        position=nn.Parameter(torch.randn(1, 5, 6)),
        blocks=nn.Sequential(Encoder(6), Encoder(6)),
        ln=nn.LayerNorm(6),
        head=nn.Linear(6, 1),
    )


def dense_block() -> nn.Module:
    """Each layer reads all before it, side by side; a transition follows."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        found = [m.stem(x)]
        for norm, conv in zip(m.norms, m.convs, strict=True):
            found.append(conv(F.relu(norm(torch.cat(found, 1)))))
        return m.head(m.transition(torch.cat(found, 1)).mean((2, 3)))

    return Written(
        forward,
        stem=nn.Conv2d(3, 2, 3, 2, 1),
        norms=nn.ModuleList(nn.BatchNorm2d(2 + 2 * i) for i in range(3)),
        convs=nn.ModuleList(nn.Conv2d(2 + 2 * i, 2, 3, padding=1) for i in range(3)),
        transition=nn.Conv2d(8, 4, 1),
        head=nn.Linear(4, 1),
    )


def two_branches() -> nn.Module:
    """Two branches of a stem that are added up, then one that goes around a layer."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x.flatten(1))
        x = m.act(m.left(x) + m.right(x))
        return m.head(m.act(m.inner(x) + x))

    parts = {name: nn.Linear(6, 6) for name in ("left", "right", "inner")}
    act, head = nn.ReLU(), nn.Linear(6, 2)
    return Written(forward, stem=nn.Linear(3 * 16 * 16, 6), **parts, act=act, head=head)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": ResNet18,
    "unet": unet,
    "vit": vit,
    "dense block": dense_block,
    "two branches": two_branches,
}


def randomised(model: nn.Module) -> nn.Module:
    """The same network with all parameters and running statistics drawn, none zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            elif name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def with_dead_paths(model: nn.Module) -> nn.Module:
    """The same network with many paths closed: norms and every second layer without a norm are
    zero, as some are at the start of a training."""
    with torch.no_grad():
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for layer in layers[1:-1:2]:
            layer.weight.zero_()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.zero_()
    return model
