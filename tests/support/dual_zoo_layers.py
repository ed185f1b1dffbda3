"""Single layers that a dual batch must pass through, each a network of its own.

The input is the layer's own, so that nothing but the layer stands between it and the oracle. No
axis is as long as another one, the batch (3) or the stack of a primal and three tangents (4), so
that a mistaken axis does not pass, unless the operation needs it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from support.dual_oracle import Network, calls
from support.networks_zoo import Written
from torch import Tensor, nn

LINE = (2, 9)
IMAGE = (2, 5, 7)
VOLUME = (2, 5, 6, 7)


def _entry(layer: nn.Module | Callable[[], nn.Module], shape: tuple[int, ...]) -> Network:
    """A layer without parameters may be given as it is, others as a function that builds them."""
    return Network((lambda: layer) if isinstance(layer, nn.Module) else layer, shape)


NORMS = {
    "batch_norm_flat": _entry(lambda: nn.BatchNorm1d(5), (5,)),
    "batch_norm_plain": _entry(lambda: nn.BatchNorm2d(2, affine=False), IMAGE),
    "batch_norm_of_batch": _entry(lambda: nn.BatchNorm2d(2, track_running_stats=False), IMAGE),
    "layer_norm_2": _entry(lambda: nn.LayerNorm((5, 7)), (2, 5, 7)),
    "layer_norm_no_bias": _entry(lambda: nn.LayerNorm(7, bias=False), (5, 7)),
    "group_norm": _entry(lambda: nn.GroupNorm(2, 6), (6, 5, 7)),
    "group_norm_flat": _entry(lambda: nn.GroupNorm(2, 6, affine=False), (6,)),
    "instance_norm_2d": _entry(lambda: nn.InstanceNorm2d(2, affine=True), IMAGE),
    "instance_norm_tracked": _entry(
        lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True), IMAGE
    ),
    "rms_norm": _entry(lambda: nn.RMSNorm(7, eps=1e-5), (5, 7)),
    "rms_norm_plain": _entry(lambda: nn.RMSNorm((5, 7), elementwise_affine=False), (2, 5, 7)),
    "local_response": _entry(nn.LocalResponseNorm(2), (5, 3, 7)),
    "batch_norm_gelu": _entry(lambda: nn.Sequential(nn.BatchNorm1d(2), nn.GELU()), LINE),
    "batch_norm_prelu": _entry(lambda: nn.Sequential(nn.BatchNorm1d(2), nn.PReLU(2)), LINE),
}


PARAMETRISED = (
    nn.ELU(0.7),
    nn.CELU(1.3),
    nn.Hardtanh(-0.5, 0.8),
    nn.LeakyReLU(0.2),
    nn.Threshold(0.1, 20.0),
    nn.Softmax(-1),
    nn.LogSoftmax(1),
)
OF_OTHER_SHAPES = {"GLU", "MultiheadAttention", "PReLU", "Softmax2d", "Softmin"}
PLAIN = (
    set(nn.modules.activation.__all__) - OF_OTHER_SHAPES - {type(a).__name__ for a in PARAMETRISED}
)

ACTIVATIONS = {
    **{type(layer).__name__.lower(): _entry(layer, (5, 7)) for layer in PARAMETRISED},
    **{name.lower(): _entry(getattr(nn, name)(), (5, 7)) for name in sorted(PLAIN)},
    "gelu_tanh": _entry(nn.GELU(approximate="tanh"), (5, 7)),
    "softplus_beta": _entry(nn.Softplus(beta=2.0, threshold=1.5), (5, 7)),
    "glu_channels": _entry(nn.GLU(1), (6, 7)),
    "softmax_samples": _entry(nn.Softmax(0), (5, 7)),
    "prelu": _entry(lambda: nn.PReLU(), (5, 7)),
    "prelu_channels": _entry(lambda: nn.PReLU(5), (5, 7)),
    "hardswish_": calls(lambda x: F.hardswish(x.clone(), inplace=True)),
    "channels_last": calls(lambda x: F.silu(x.to(memory_format=torch.channels_last)), IMAGE),
    "strided": calls(lambda x: F.gelu(x.transpose(1, 2)[:, ::2]), (5, 7)),
}

POOLS = {
    "avg_2d": _entry(nn.AvgPool2d((2, 3), (1, 2), (1, 1), ceil_mode=True), IMAGE),
    "max_1d": _entry(nn.MaxPool1d(3, 2, 1), LINE),
    "max_dilated": _entry(nn.MaxPool2d(2, 2, dilation=2, ceil_mode=True), IMAGE),
    "max_indices": _entry(nn.MaxPool2d(2, return_indices=True), IMAGE),
    "max_3d": _entry(nn.MaxPool3d([2], (1, 2, 2)), VOLUME),
    "adaptive_avg_1d": _entry(nn.AdaptiveAvgPool1d(4), LINE),
    "adaptive_max_1d": _entry(nn.AdaptiveMaxPool1d(4), LINE),
    "adaptive_max_3d": _entry(nn.AdaptiveMaxPool3d(2), VOLUME),
    "max_unpool": calls(
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (2, 4, 6)
    ),
}

SHAPES = {
    "pixel_shuffle": _entry(nn.PixelShuffle(2), (8, 3, 5)),
    "up_linear": _entry(nn.Upsample(scale_factor=1.5, mode="linear"), LINE),
    "up_nearest_exact": _entry(nn.Upsample(size=(8, 9), mode="nearest-exact"), IMAGE),
    "up_aligned": _entry(nn.Upsample(size=(8, 9), mode="bilinear", align_corners=True), IMAGE),
    "up_nearest_3d": _entry(nn.Upsample(scale_factor=2), VOLUME),
    "down_antialias": calls(
        lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True), IMAGE
    ),
    "reflect_2d": _entry(nn.ReflectionPad2d((1, 2, 0, 3)), IMAGE),
    "reflect_3d": _entry(nn.ReflectionPad3d(1), VOLUME),
    "replicate_2d": _entry(nn.ReplicationPad2d(2), IMAGE),
    "replicate_3d": _entry(nn.ReplicationPad3d(1), VOLUME),
    "circular_2d": calls(lambda x: F.pad(x, (1, 2, 3, 0), mode="circular"), IMAGE),
    "constant": _entry(nn.ConstantPad2d((1, 2, 3, 0), 2.5), IMAGE),
    "cropped": _entry(nn.ZeroPad2d((1, -2, -1, 1)), IMAGE),
    "unfold": _entry(nn.Unfold((2, 3), dilation=2, padding=1, stride=(1, 2)), IMAGE),
    "fold": _entry(nn.Fold((5, 7), (2, 3), padding=1), (12, 42)),
}

CONVOLUTIONS = {
    "conv_3d": _entry(lambda: nn.Conv3d(2, 3, 2, padding=1), VOLUME),
    "conv_dilated": _entry(lambda: nn.Conv2d(2, 3, 2, dilation=(2, 3)), IMAGE),
    "conv_grouped": _entry(lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 7)),
    "conv_depthwise": _entry(lambda: nn.Conv2d(4, 8, 3, 2, 1, groups=4), (4, 5, 7)),
    "conv_same": _entry(lambda: nn.Conv2d(2, 3, (3, 5), padding="same"), IMAGE),
    "conv_reflect": _entry(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), IMAGE),
    "transposed_2d": _entry(
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), (4, 5, 7)
    ),
    "linear_no_bias": _entry(lambda: nn.Linear(7, 4, bias=False), (7,)),
    "conv_of_weight": calls(
        lambda x: F.conv1d(x, x.mean(0)[:, None, :3], torch.ones(2).to(x), groups=2), LINE
    ),
    "conv_of_bias": calls(
        lambda x: F.conv1d(x, torch.ones(2, 2, 3).to(x), x.sum((0, 2)), padding=1), LINE
    ),
}


def of_halves(module: nn.Module) -> nn.Module:
    """A module of two arguments, fed with the two halves of the input."""
    return Written(lambda m, x: m.module(*x.chunk(2, dim=1)), module=module)


def of_argmax() -> nn.Module:
    """Looks up a table at the index of the largest entry: no derivative goes through it."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.table(x.argmax(-1)) * m.fc(x) + F.one_hot(x.argmin(-1), 7)[..., :4]

    return Written(forward, table=nn.Embedding(7, 4), fc=nn.Linear(7, 4))


OTHERS = {
    "bilinear": _entry(lambda: of_halves(nn.Bilinear(5, 5, 3)), (10,)),
    "cosine": _entry(of_halves(nn.CosineSimilarity(dim=1)), (6, 7)),
    "pairwise": _entry(of_halves(nn.PairwiseDistance()), (10,)),
    "embedding_of_argmax": _entry(of_argmax, (5, 7)),
}

LAYERS = NORMS | ACTIVATIONS | POOLS | SHAPES | CONVOLUTIONS | OTHERS
