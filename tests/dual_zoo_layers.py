"""Single layers and operations that a dual batch must pass through, each a network of its own.

The input is the layer's own, so that nothing but the layer stands between it and the oracle. No
axis is as long as another one, the batch (3) or the stack of a primal and three tangents (4), so
that a mistaken axis does not pass, unless the operation needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from dual_oracle import Function, Network, Oracle
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LINE = (2, 9)
IMAGE = (2, 5, 7)
VOLUME = (2, 5, 6, 7)


def _entry(
    layer: nn.Module | Callable[[], nn.Module], shape: tuple[int, ...], oracle: Oracle = "forward"
) -> Network:
    """A layer without parameters may be given as it is, others as a function that builds them."""
    if isinstance(layer, nn.Module):
        return Network(lambda: layer, shape, oracle=oracle)
    return Network(layer, shape, oracle=oracle)


def _call(
    function: Callable[[Tensor], Any], shape: tuple[int, ...] = (5, 7), oracle: Oracle = "forward"
) -> Network:
    return Network(lambda: Function(function), shape, oracle=oracle)


NORMS = {
    "batch_norm_flat": _entry(lambda: nn.BatchNorm1d(5), (5,)),
    "batch_norm_1d": _entry(lambda: nn.BatchNorm1d(2), LINE),
    "batch_norm_2d": _entry(lambda: nn.BatchNorm2d(2), IMAGE),
    "batch_norm_3d": _entry(lambda: nn.BatchNorm3d(2), VOLUME),
    "batch_norm_plain": _entry(lambda: nn.BatchNorm2d(2, affine=False), IMAGE),
    "batch_norm_of_batch": _entry(lambda: nn.BatchNorm2d(2, track_running_stats=False), IMAGE),
    "layer_norm": _entry(lambda: nn.LayerNorm(7), (5, 7)),
    "layer_norm_2": _entry(lambda: nn.LayerNorm((5, 7)), (2, 5, 7)),
    "layer_norm_plain": _entry(lambda: nn.LayerNorm(7, elementwise_affine=False), (7,)),
    "layer_norm_no_bias": _entry(lambda: nn.LayerNorm(7, bias=False), (5, 7)),
    "group_norm": _entry(lambda: nn.GroupNorm(2, 6), (6, 5, 7)),
    "group_norm_flat": _entry(lambda: nn.GroupNorm(2, 6, affine=False), (6,)),
    "instance_norm_1d": _entry(lambda: nn.InstanceNorm1d(2), LINE),
    "instance_norm_2d": _entry(lambda: nn.InstanceNorm2d(2, affine=True), IMAGE),
    "instance_norm_tracked": _entry(
        lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True), IMAGE
    ),
    "rms_norm": _entry(lambda: nn.RMSNorm(7, eps=1e-5), (5, 7)),
    "rms_norm_plain": _entry(lambda: nn.RMSNorm((5, 7), elementwise_affine=False), (2, 5, 7)),
    "local_response": _entry(nn.LocalResponseNorm(2), (5, 3, 7)),
    "conv_batch_norm_relu": _entry(
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True)), IMAGE
    ),
    "batch_norm_gelu": _entry(lambda: nn.Sequential(nn.BatchNorm1d(2), nn.GELU()), LINE),
    "batch_norm_prelu": _entry(lambda: nn.Sequential(nn.BatchNorm1d(2), nn.PReLU(2)), LINE),
    "weight_norm": _entry(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(7, 6)), (5, 7)),
}

NORMS["spectral_norm"] = _entry(
    lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(7, 6)), (5, 7)
)

ACTIVATIONS = {
    **{
        layer._get_name().lower(): _entry(layer, (5, 7))
        for layer in (
            nn.ReLU(),
            nn.ReLU6(),
            nn.ELU(0.7),
            nn.SELU(),
            nn.CELU(1.3),
            nn.GELU(),
            nn.SiLU(),
            nn.Mish(),
            nn.Tanh(),
            nn.Sigmoid(),
            nn.Hardtanh(-0.5, 0.8),
            nn.Hardswish(),
            nn.Hardsigmoid(),
            nn.Hardshrink(),
            nn.Softshrink(),
            nn.Tanhshrink(),
            nn.Softsign(),
            nn.LogSigmoid(),
            nn.Softplus(),
            nn.LeakyReLU(0.2),
            nn.RReLU(),
            nn.Threshold(0.1, 20.0),
            nn.Softmax(-1),
            nn.LogSoftmax(1),
            nn.Softmin(2),
        )
    },
    "gelu_tanh": _entry(nn.GELU(approximate="tanh"), (5, 7)),
    "softplus_beta": _entry(nn.Softplus(beta=2.0, threshold=1.5), (5, 7)),
    "glu": _entry(nn.GLU(), (5, 8)),
    "glu_channels": _entry(nn.GLU(1), (6, 7)),
    "softmax_samples": _entry(nn.Softmax(0), (5, 7)),
    "softmax_2d": _entry(nn.Softmax2d(), IMAGE),
    "prelu": _entry(lambda: nn.PReLU(), (5, 7)),
    "prelu_channels": _entry(lambda: nn.PReLU(5), (5, 7)),
    "prelu_flat": _entry(lambda: nn.PReLU(5), (5,)),
    "channels_last": _call(lambda x: F.silu(x.to(memory_format=torch.channels_last)), IMAGE),
    "strided": _call(lambda x: F.gelu(x.transpose(1, 2)[:, ::2]), (5, 7)),
}

POOLS = {
    "avg_1d": _entry(nn.AvgPool1d(3, 2, 1), LINE),
    "avg_2d": _entry(nn.AvgPool2d((2, 3), (1, 2), (1, 1), ceil_mode=True), IMAGE),
    "avg_uncounted": _entry(nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "avg_3d": _entry(nn.AvgPool3d(2), VOLUME),
    "max_1d": _entry(nn.MaxPool1d(3, 2, 1), LINE),
    "max_2d": _entry(nn.MaxPool2d(3, 2, 1), IMAGE),
    "max_dilated": _entry(nn.MaxPool2d(2, 2, dilation=2, ceil_mode=True), IMAGE),
    "max_indices": _entry(nn.MaxPool2d(2, return_indices=True), IMAGE),
    "max_3d": _entry(nn.MaxPool3d(2, (1, 2, 2)), VOLUME),
    "adaptive_avg_1d": _entry(nn.AdaptiveAvgPool1d(4), LINE),
    "adaptive_avg_2d": _entry(nn.AdaptiveAvgPool2d((2, 3)), IMAGE),
    "adaptive_avg_3d": _entry(nn.AdaptiveAvgPool3d((2, 1, 3)), VOLUME),
    "adaptive_max_1d": _entry(nn.AdaptiveMaxPool1d(4), LINE),
    "adaptive_max_2d": _entry(nn.AdaptiveMaxPool2d((2, 3)), IMAGE),
    "adaptive_max_3d": _entry(nn.AdaptiveMaxPool3d(2), VOLUME),
    "lp_1d": _call(lambda x: F.lp_pool1d(x.abs() + 0.1, 3, 2), LINE),
    "lp_2d": _entry(nn.LPPool2d(2, 2), IMAGE),
    "max_unpool": _call(
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (2, 4, 6)
    ),
}

SHAPES = {
    "pixel_shuffle": _entry(nn.PixelShuffle(2), (8, 3, 5)),
    "pixel_unshuffle": _entry(nn.PixelUnshuffle(2), (2, 6, 4)),
    "channel_shuffle": _entry(nn.ChannelShuffle(2), (6, 5, 7)),
    "up_nearest_1d": _entry(nn.Upsample(scale_factor=2), LINE),
    "up_linear": _entry(nn.Upsample(scale_factor=1.5, mode="linear"), LINE),
    "up_nearest": _entry(nn.Upsample(size=(8, 9)), IMAGE),
    "up_nearest_exact": _entry(nn.Upsample(size=(8, 9), mode="nearest-exact"), IMAGE),
    "up_bilinear": _entry(nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "up_aligned": _entry(nn.Upsample(size=(8, 9), mode="bilinear", align_corners=True), IMAGE),
    "up_bicubic": _entry(nn.Upsample(scale_factor=2, mode="bicubic"), IMAGE),
    "up_nearest_3d": _entry(nn.Upsample(scale_factor=2), VOLUME),
    "up_trilinear": _entry(nn.Upsample(scale_factor=2, mode="trilinear"), VOLUME),
    "down_antialias": _call(
        lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True), IMAGE
    ),
    "down_area": _call(lambda x: F.interpolate(x, size=(2, 3), mode="area"), IMAGE),
    "reflect_1d": _entry(nn.ReflectionPad1d(2), LINE),
    "reflect_2d": _entry(nn.ReflectionPad2d((1, 2, 0, 3)), IMAGE),
    "reflect_3d": _entry(nn.ReflectionPad3d(1), VOLUME),
    "replicate_1d": _entry(nn.ReplicationPad1d((2, 1)), LINE),
    "replicate_2d": _entry(nn.ReplicationPad2d(2), IMAGE),
    "replicate_3d": _entry(nn.ReplicationPad3d(1), VOLUME),
    "circular_1d": _call(lambda x: F.pad(x, (2, 1), mode="circular"), LINE),
    "circular_2d": _call(lambda x: F.pad(x, (1, 2, 3, 0), mode="circular"), IMAGE),
    "constant": _entry(nn.ConstantPad2d((1, 2, 3, 0), 2.5), IMAGE),
    "cropped": _entry(nn.ZeroPad2d((1, -2, -1, 1)), IMAGE),
    "flatten": _entry(nn.Sequential(nn.Flatten(), nn.Unflatten(1, (7, 5, 2)), nn.Tanh()), IMAGE),
    "unfold": _entry(nn.Unfold((2, 3), dilation=2, padding=1, stride=(1, 2)), IMAGE),
    "fold": _entry(nn.Fold((5, 7), (2, 3), padding=1), (12, 42)),
    "roll": _call(lambda x: x.roll((1, 2), (1, 2))),
    "flip": _call(lambda x: x.flip(1, -1)),
    "permute": _call(lambda x: x.permute(2, 0, 1).contiguous().movedim(1, 0)),
    "view_of_batch": _call(lambda x: x.reshape(len(x) * 5, 7).view(-1, 5, 7).mT * 2),
    "view_as": _call(lambda x: x.flatten(1).view(x.size(0), -1).unflatten(-1, (7, 5)) + 1),
    "slices": _call(lambda x: x[:, 1:, ::2] + x[..., :4][:, :4] * x[:, None, 0, :4]),
    "steps_of_list": _call(lambda x: x[:, [3, 0, 0]] - x[:, torch.tensor([1, 2, 4])]),
    "two_indices": _call(lambda x: x[:, torch.tensor([1, 2]), torch.tensor([0, 6])]),
    "mask": _call(lambda x: x[:, torch.tensor([True, False, True, True, False])]),
    "new_axes": _call(lambda x: x[:, None].squeeze(1).unsqueeze(-1).expand(-1, -1, -1, 2)),
    "repeat": _call(lambda x: x.repeat(1, 2, 3) + x.tile(2, 3)),
    "repeat_interleave": _call(lambda x: x.repeat_interleave(2, dim=1)),
    "split": _call(lambda x: torch.cat(x.split([1, 4], 1)[::-1], 1) * x.split(2, 2)[0][..., :1]),
    "unbind": _call(lambda x: torch.stack([row.exp() for row in x.unbind(1)], -1)),
    "windows": _call(lambda x: x.unfold(2, 3, 2).narrow(1, 1, 3).select(2, 1)),
    "diagonal": _call(
        lambda x: torch.diagonal(x, dim1=1, dim2=2) + torch.diag_embed(x)[:, 0, :5, 0]
    ),
    "triangle": _call(lambda x: x.tril() + x.triu(1) * 2),
    "stacks": _call(lambda x: torch.hstack([x, x]) + torch.dstack([x, x]).flatten(2).mean()),
    "broadcast": _call(lambda x: torch.add(*torch.broadcast_tensors(x[:, :1], x[:, :, :1]))),
    "meshes": _call(lambda x: x.swapaxes(1, 2).ravel().reshape(len(x), -1)),
    "einops_like": _call(lambda x: torch.tensordot(x, torch.ones(7, 2).to(x), 1).transpose(-1, -2)),
}

CONVOLUTIONS = {
    "conv_1d": _entry(lambda: nn.Conv1d(2, 3, 3, 2, 1), LINE),
    "conv_3d": _entry(lambda: nn.Conv3d(2, 3, 2, padding=1), VOLUME),
    "conv_dilated": _entry(lambda: nn.Conv2d(2, 3, 2, dilation=(2, 3)), IMAGE),
    "conv_grouped": _entry(lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 7)),
    "conv_same": _entry(lambda: nn.Conv2d(2, 3, (3, 5), padding="same"), IMAGE),
    "conv_reflect": _entry(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), IMAGE),
    "conv_circular": _entry(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), IMAGE),
    "conv_replicate": _entry(lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="replicate"), LINE),
    "transposed_1d": _entry(lambda: nn.ConvTranspose1d(2, 3, 3, 2), LINE),
    "transposed_2d": _entry(
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), (4, 5, 7)
    ),
    "transposed_3d": _entry(lambda: nn.ConvTranspose3d(2, 3, 2, bias=False), VOLUME),
    "linear_of_tokens": _entry(lambda: nn.Linear(7, 4), (2, 5, 7)),
    "linear_no_bias": _entry(lambda: nn.Linear(7, 4, bias=False), (7,)),
    "conv_of_weight": _call(lambda x: F.conv1d(x, x.mean(0)[:, None, :3], groups=2), LINE),
    "conv_of_bias": _call(
        lambda x: F.conv1d(x, torch.ones(2, 2, 3).to(x), x.sum((0, 2)), padding=1), LINE
    ),
}


class Two(nn.Module):
    """A module of two arguments, fed with the two halves of the input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(*x.chunk(2, dim=1))


class OfArgmax(nn.Module):
    """Looks up a table at the index of the largest entry: no derivative goes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.fc = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        looked_up = self.table(x.argmax(-1))
        return looked_up * self.fc(x) + F.one_hot(x.argmin(-1), 7)[..., :4]


class Square(torch.autograd.Function):
    """A function of the user's own, with a backward and no forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradients[0]


PRODUCTS = {
    "bilinear": _entry(lambda: Two(nn.Bilinear(5, 5, 3)), (10,)),
    "cosine": _entry(Two(nn.CosineSimilarity(dim=1)), (6, 7)),
    "pairwise": _entry(Two(nn.PairwiseDistance()), (10,)),
    "matmul": _call(lambda x: x @ x.mT),
    "matmul_left": _call(lambda x: torch.linspace(0, 1, 10).to(x).view(2, 5) @ x),
    "matmul_vector": _call(lambda x: x @ torch.linspace(0, 1, 7).to(x)),
    "matmul_of_heads": _call(lambda x: x.view(-1, 2, 5, 7) @ x.view(-1, 2, 5, 7).mT, (10, 7)),
    "bmm": _call(lambda x: torch.bmm(x[:, :2], x.transpose(1, 2))),
    "addmm": _call(lambda x: torch.addmm(x[0, 0], x[:, 0], x[0, 1:4].mT @ x[0, 1:4], alpha=2)),
    "baddbmm": _call(lambda x: torch.baddbmm(x[:, :, :5], x, x.mT, beta=0.5, alpha=2)),
    "einsum_two": _call(lambda x: torch.einsum("nij,nkj->nik", x, x.sin())),
    "einsum_constant": _call(
        lambda x: torch.einsum("nij,kj->nk", x, torch.linspace(0, 1, 14).to(x).view(2, 7))
    ),
    "outer": _call(lambda x: x[:, :, None, 0] * x[:, None, 1] + torch.outer(x[0, 0], x[0, 1])[:5]),
    "dot": _call(lambda x: x[:, 0] * torch.dot(x[0, 0], x[1, 1])),
    "addcmul": _call(lambda x: torch.addcmul(x, x.sin(), x.cos(), value=0.3)),
    "addcdiv": _call(lambda x: torch.addcdiv(x, x.sin(), x.cosh(), value=0.3)),
    "lerp": _call(lambda x: torch.lerp(x, x.exp(), 0.3) + torch.lerp(x, x.sin(), x.sigmoid())),
    "rsub": _call(lambda x: 1 - 2 * x + 3 / (x * x + 1) - x / 4 + (-x) ** 2 + 2.0**x),
    "alpha": _call(lambda x: torch.add(x, x.sin(), alpha=2) + torch.sub(x, x.cos(), alpha=0.5)),
}

REDUCTIONS = {
    "sum": _call(lambda x: x.sum() + x.sum(1) + x.sum((1, 2), keepdim=True)[..., 0]),
    "mean": _call(lambda x: x.mean(-1, keepdim=True) * x - x.mean()),
    "mean_of_batch": _call(lambda x: x - x.mean(0)),
    "var": _call(lambda x: x.var(1) + x.var((1, 2), correction=0, keepdim=True)[:, 0]),
    "std": _call(lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)),
    "var_mean": _call(lambda x: torch.cat(torch.var_mean(x, -1), 1)),
    "norm": _call(
        lambda x: x.norm(dim=-1) + x.norm(p=3, dim=-1) + x.flatten(1).norm(1, 1)[:, None]
    ),
    "vector_norm": _call(
        lambda x: torch.linalg.vector_norm(x, 2, dim=(1, 2)).unsqueeze(1) + x.sum(2)
    ),
    "normalize": _call(lambda x: F.normalize(x, dim=1)),
    "max_all": _call(lambda x: x * x.max() - x.min()),
    "max_dim": _call(lambda x: x.max(dim=1)[0] + x.min(1, keepdim=True).values[:, 0]),
    "amax": _call(lambda x: x.amax((1, 2)) - x.amin(dim=2).sum(1)),
    "median": _call(lambda x: x.median(-1).values + x.kthvalue(2, -1).values),
    "prod": _call(lambda x: x.prod(-1) + x[:, 0].prod(1, keepdim=True)),
    "logsumexp": _call(lambda x: x.logsumexp(1)),
    "cumsum": _call(lambda x: x.cumsum(1) + x.cumsum(-1)),
    "cumprod": _call(lambda x: x.cumprod(2)),
    "cummax": _call(lambda x: x.cummax(1).values),
    "diff": _call(lambda x: x.diff(dim=-1)),
    "sort": _call(lambda x: x.sort(-1, descending=True).values),
    "argsort": _call(lambda x: x.gather(1, x.argsort(1))),
    "topk": _call(lambda x: x.topk(3, dim=1)[0] * 2),
    "gather": _call(lambda x: x.gather(2, torch.arange(6).view(1, 2, 3).expand(len(x), 2, 3))),
    "take_along": _call(lambda x: torch.take_along_dim(x, x.topk(2, -1).indices, -1)),
    "index_select": _call(lambda x: x.index_select(-1, torch.tensor([4, 0, 4]))),
    "embedding_of_argmax": _entry(OfArgmax, (5, 7)),
    "fft": _call(lambda x: torch.fft.rfft2(x).abs(), (4, 6)),
    "fft_and_back": _call(lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2j, n=7)),
}


def _with_graph(x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x.sin()
    with torch.no_grad():
        return y * x.cos()


def _asked(x: Tensor) -> Tensor:
    """What a forward method may ask a tensor before it does anything."""
    assert isinstance(x, Tensor)
    assert torch.is_tensor(x)
    assert x.ndim == x.dim() == len(x.shape) == 3
    assert (x.size(), x.stride(1), x.is_contiguous()) == (x.shape, x.shape[2], True)
    assert x.device.type == "cpu"
    assert not x.is_cuda
    assert x.is_floating_point()
    assert not torch.is_complex(x)
    assert x.dtype == x.new_empty(0).dtype == torch.empty_like(x).dtype
    assert len(repr(x)) > len(f"{x.sum().item():.1f}") > 0
    assert torch.isfinite(x).all()
    assert bool((x == x).all())
    assert torch.allclose(x, x)
    return x * 2


ELEMENTWISE = {
    "exponentials": _call(lambda x: x.exp() + x.expm1() + torch.exp2(x) + x.sinh() - x.cosh()),
    "logarithms": _call(lambda x: (x * x + 1).log() + x.abs().log1p() + (x.exp() + 1).log2()),
    "powers": _call(lambda x: x.abs().sqrt() + (x * x + 1).rsqrt() + x.exp().reciprocal() + x**3),
    "trigonometry": _call(lambda x: x.sin() * x.cos() + x.atan() - torch.tan(x / 4)),
    "atan2": _call(lambda x: torch.atan2(x, x.exp()) + torch.hypot(x, x + 4)),
    "erf": _call(lambda x: x.erf() + torch.special.erfc(x) + torch.lgamma(x.abs() + 1)),
    "abs": _call(lambda x: x.abs() * x.sign() - x.neg() + x.square()),
    "clamp": _call(lambda x: x.clamp(-0.5, 0.8) + x.clamp(min=0) + torch.clip(x, max=0.3)),
    "clamp_tensor": _call(lambda x: torch.clamp(x, x.sin() - 0.1, x.sin() + 0.1)),
    "maximum": _call(lambda x: torch.maximum(x, x.sin() - 0.1) - torch.minimum(x, x * x)),
    "where": _call(lambda x: torch.where(x > 0.3, x, x.exp()) + torch.where(x < 0, x, 0.0)),
    "masked_fill": _call(lambda x: x.masked_fill(x < 0, -2.0)),
    "nan_to_num": _call(lambda x: torch.nan_to_num(x) + torch.floor(x) + x.round() + x.frac()),
    "remainder": _call(lambda x: x % 1.5 + torch.fmod(x, 0.7)),
    "logical": _call(lambda x: x * (x > 0) + (x.abs() > 1).to(x.dtype) * x),
    "xlogy": _call(lambda x: torch.xlogy(x, x.abs() + 1) + torch.logaddexp(x, x.sin())),
    "pow_tensor": _call(lambda x: x.abs().pow(x) + torch.pow(x.abs(), 1.7)),
    "to_float": _call(lambda x: x.float().double() + x.to(torch.float64).type_as(x)),
    "constants": _call(lambda x: x + torch.ones_like(x) * torch.arange(7) + x.new_tensor(2.0)),
    "losses": _call(lambda x: F.mse_loss(x, x.sin(), reduction="none") + F.huber_loss(x, -x)),
    "own_function": _call(Square.apply, (5, 7), "differences"),
    "decision": _call(lambda x: x * 2 if x.mean() > 0 else x * 3),
    "detached": _call(lambda x: x * x.detach() + x.data.sin()),
    "number_of_tensor": _call(lambda x: x * x.mean().item() + float(x[0, 0, 0])),
    "graph_inside": _call(_with_graph),
    "asked": _call(_asked),
    "checkpoint": _call(lambda x: checkpoint(lambda t: t.sin() * t, x, use_reentrant=False)),
    "python_number": _call(lambda x: x * float(x.shape[0]) + x * 0.5 ** x.dim()),
}


def _overwritten(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = x[:, 1].sin()
    y[:, 1:3] *= 2
    y[:, 4] += y[:, 3] ** 2
    y[:, :, 6] = 1.5
    return y


def _filled(x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 6, 8, dtype=x.dtype)
    out[:, :5, :7] = x
    out[:, 5, 1:] += x.sum(1)
    return out


def _scattered(x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), 9, 7)
    out.index_add_(1, torch.tensor([8, 1, 3, 3, 0]), x)
    out.scatter_(2, torch.tensor([[[2], [0], [1]]]).expand(len(x), 3, 1), x[:, :3, :1])
    out.index_copy_(1, torch.tensor([6]), x[:, :1])
    return out.scatter_add(1, torch.zeros(len(x), 1, 7, dtype=torch.int64), x[:, 2:3])


def _in_place(x: Tensor) -> Tensor:
    y = x * 1.0
    y.add_(x, alpha=2).mul_(x).sub_(1).div_(3.0).neg_().clamp_(-2, 2)
    y.addcmul_(x, x, value=0.1).tanh_().exp_().sigmoid_().pow_(2)
    return y.masked_fill_(y < 0.3, 0.1).copy_(y * 2).squeeze_().transpose_(1, 2)


def _aliased(x: Tensor) -> Tensor:
    y = x + 0
    y.view(len(x), -1)[:, ::3].mul_(2)
    F.relu(y[:, 1], inplace=True)
    y.transpose(1, 2)[:, 0].fill_(0.5)
    row = y[:, 4]
    row.zero_()
    return y + row.sum()


def _accumulated(x: Tensor) -> Tensor:
    total = 0
    state = torch.zeros(len(x), 7, dtype=x.dtype)
    for index in range(x.shape[1]):
        state = torch.tanh(state * 0.5 + x[:, index])
        total = total + state
    return total


def _into(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.mul(x, 2, out=out)
    return out


WRITES = {
    "overwritten": _call(_overwritten),
    "filled": _call(_filled),
    "scattered": _call(_scattered),
    "in_place": _call(_in_place),
    "aliased": _call(_aliased),
    "accumulated": _call(_accumulated),
    "out": _call(_into, oracle="differences"),
    "index_put": _call(lambda x: x.index_put((torch.tensor([1, 0]),), x[:2].sin())),
}

LAYERS: dict[str, Network] = {
    **NORMS,
    **ACTIVATIONS,
    **POOLS,
    **SHAPES,
    **CONVOLUTIONS,
    **PRODUCTS,
    **REDUCTIONS,
    **ELEMENTWISE,
    **WRITES,
}
