"""Forty architectures of seven libraries at small sizes, each with the shape of one sample.

Versions by `architectures.txt`. Networks that take tokens take vectors here: integers have no
derivative. `fields` makes complex numbers of double width, which neuraloperator fixes at single.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

PACKAGES = {
    "timm": "timm",
    "x-transformers": "x_transformers",
    "vit-pytorch": "vit_pytorch",
    "segmentation-models-pytorch": "segmentation_models_pytorch",
    "MONAI": "monai",
    "e3nn": "e3nn",
    "neuraloperator": "neuralop",
}
"""Name of a library -> name of its module."""

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Architecture:
    """One network: its library, how to build it, and the shape of one sample."""

    library: str
    build: Build
    shape: tuple[int, ...]


def missing() -> list[str]:
    """Libraries that are not installed."""
    return [name for name, module in PACKAGES.items() if importlib.util.find_spec(module) is None]


@contextlib.contextmanager
def fields(dtype: torch.dtype) -> Iterator[None]:
    """Let `torch.cfloat` be the complex dtype of dtype inside."""
    with mock.patch.object(torch, "cfloat", dtype.to_complex()):
        yield


def _without_compiled_vision() -> None:
    """Declare the operators that torchvision looks for when it is imported, where its own do not
    load: its wheels are built for CUDA. Nothing here calls them."""
    if importlib.util.find_spec("torchvision") is None or hasattr(torch.ops.torchvision, "nms"):
        return
    with contextlib.suppress(OSError):
        path = importlib.util.find_spec("torchvision").submodule_search_locations[0]  # type: ignore
        torch.ops.load_library(f"{path}/_C.so")
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


_KEPT: list[torch.library.Library] = []


class Calls(nn.Module):
    """A network called in another way than net(x)."""

    def __init__(self, net: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.net = net
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.net, x)


# --- timm ----------------------------------------------------------------------------------------


def _timm(name: str, size: int = 32, **options: Any) -> Architecture:
    def build() -> nn.Module:
        _without_compiled_vision()
        timm = importlib.import_module("timm")
        return timm.create_model(name, pretrained=False, num_classes=5, in_chans=1, **options)

    return Architecture("timm", build, (1, size, size))


_TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}

TIMM = {
    "resnet10t": _timm("resnet10t"),
    "resnet18": _timm("resnet18"),
    "efficientnet_b0": _timm("efficientnet_b0"),
    "mobilenetv3_small": _timm("mobilenetv3_small_050"),
    "convnext_atto": _timm("convnext_atto"),
    "regnety_002": _timm("regnety_002"),
    "ghostnet": _timm("ghostnet_050"),
    "densenet": _timm("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
    "vit": _timm("vit_tiny_patch16_224", **_TINY_VIT),
    "deit": _timm("deit_tiny_patch16_224", **_TINY_VIT),
    "mixer": _timm("mixer_s32_224", 64, img_size=64),
    "swin": _timm(
        "swin_tiny_patch4_window7_224",
        32,
        img_size=32,
        window_size=4,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(2, 4),
    ),
    "poolformer": _timm("poolformer_s12"),
}

# --- x-transformers and vit-pytorch --------------------------------------------------------------


def _x_transformer(kind: str, **options: Any) -> Architecture:
    def build() -> nn.Module:
        library = importlib.import_module("x_transformers")
        layers = getattr(library, kind)(dim=16, depth=2, heads=2, attn_dim_head=8, **options)
        return library.ContinuousTransformerWrapper(
            dim_in=3, dim_out=2, max_seq_len=8, attn_layers=layers
        )

    return Architecture("x-transformers", build, (8, 3))


X_TRANSFORMERS = {
    "x encoder": _x_transformer("Encoder"),
    "x decoder": _x_transformer("Decoder"),
    "x rotary": _x_transformer("Encoder", rotary_pos_emb=True),
    "x alibi": _x_transformer("Decoder", alibi_pos_bias=True),
    "x glu rmsnorm": _x_transformer("Encoder", ff_glu=True, use_rmsnorm=True),
}


def _vit(module: str, name: str, size: int = 32, **options: Any) -> Architecture:
    def build() -> nn.Module:
        _without_compiled_vision()
        return getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(**options)

    return Architecture("vit-pytorch", build, (3, size, size))


_VIT = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 16, "depth": 2, "heads": 2}

VIT_PYTORCH = {
    "vit-pytorch ViT": _vit("vit", "ViT", mlp_dim=32, **_VIT),
    "SimpleViT": _vit("simple_vit", "SimpleViT", mlp_dim=32, **_VIT),
    "CaiT": _vit("cait", "CaiT", mlp_dim=32, cls_depth=1, **_VIT),
    "DeepViT": _vit("deepvit", "DeepViT", mlp_dim=32, **_VIT),
    "CCT": _vit(
        "cct",
        "CCT",
        img_size=32,
        embedding_dim=16,
        n_conv_layers=1,
        kernel_size=3,
        stride=2,
        padding=1,
        pooling_kernel_size=3,
        pooling_stride=2,
        pooling_padding=1,
        num_layers=2,
        num_heads=2,
        mlp_ratio=2.0,
        num_classes=5,
        positional_embedding="learnable",
    ),
}

# --- segmentation-models-pytorch and MONAI -------------------------------------------------------


def _segmentation(name: str, **options: Any) -> Architecture:
    def build() -> nn.Module:
        _without_compiled_vision()
        library = importlib.import_module("segmentation_models_pytorch")
        options.setdefault("encoder_depth", 3)
        return getattr(library, name)(
            "resnet18", encoder_weights=None, in_channels=1, classes=2, **options
        )

    return Architecture("segmentation-models-pytorch", build, (1, 32, 32))


SEGMENTATION = {
    "smp Unet": _segmentation("Unet", decoder_channels=(16, 8, 8)),
    "smp Linknet": _segmentation("Linknet"),
    "smp FPN": _segmentation("FPN", encoder_depth=5, decoder_pyramid_channels=16),
    "smp PSPNet": _segmentation("PSPNet", psp_out_channels=16),
    "smp MAnet": _segmentation("MAnet", decoder_channels=(16, 8, 8), decoder_pab_channels=8),
}


def _monai(name: str, shape: tuple[int, ...], **options: Any) -> Architecture:
    def build() -> nn.Module:
        nets = importlib.import_module("monai.networks.nets")
        return getattr(nets, name)(**options)

    return Architecture("MONAI", build, shape)


_PLANE = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}

MONAI = {
    "monai UNet": _monai("UNet", (1, 32, 32), **_PLANE, channels=(4, 8, 16), strides=(2, 2)),
    "monai AttentionUnet": _monai(
        "AttentionUnet", (1, 32, 32), **_PLANE, channels=(4, 8, 16), strides=(2, 2)
    ),
    "monai SegResNet": _monai("SegResNet", (1, 32, 32), **_PLANE, init_filters=8),
    "monai VNet": _monai("VNet", (1, 32, 32), **_PLANE),
    "monai DynUNet 3-D": _monai(
        "DynUNet",
        (1, 8, 8, 8),
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        kernel_size=[3, 3, 3],
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
        filters=[4, 8, 16],
    ),
    "monai HighResNet": _monai("HighResNet", (1, 16, 16), **_PLANE),
}

# --- e3nn and neuraloperator ---------------------------------------------------------------------


def _tensor_product() -> nn.Module:
    o3 = importlib.import_module("e3nn.o3")
    net = o3.FullyConnectedTensorProduct("4x0e + 2x1o", "4x0e + 2x1o", "3x0e + 2x1o")
    return Calls(net, lambda net, x: net(x, x))


def _gate() -> nn.Module:
    o3, nets = importlib.import_module("e3nn.o3"), importlib.import_module("e3nn.nn")
    gate = nets.Gate("4x0e", [torch.tanh], "2x0e", [torch.sigmoid], "2x1o")
    linear = o3.Linear("4x0e + 2x1o", gate.irreps_in)
    return nn.Sequential(linear, gate, o3.Linear(gate.irreps_out, "2x0e"))


E3NN = {
    "e3nn tensor product": Architecture("e3nn", _tensor_product, (10,)),
    "e3nn gate": Architecture("e3nn", _gate, (10,)),
}


def _operator(name: str, shape: tuple[int, ...], **options: Any) -> Architecture:
    def build() -> nn.Module:
        return getattr(importlib.import_module("neuralop.models"), name)(**options)

    return Architecture("neuraloperator", build, shape)


_FIELD = {"in_channels": 2, "out_channels": 1, "hidden_channels": 8, "n_layers": 2}

OPERATORS = {
    "FNO1d": _operator("FNO", (2, 16), n_modes=(5,), **_FIELD),
    "FNO2d": _operator("FNO", (2, 12, 12), n_modes=(4, 4), **_FIELD),
    "TFNO": _operator("TFNO", (2, 12, 12), n_modes=(4, 4), rank=0.5, **_FIELD),
    "CODANO": _operator(
        "CODANO",
        (3, 16, 16),
        hidden_variable_codimension=2,
        lifting_channels=4,
        projection_channels=4,
        n_layers=3,
        n_heads=[2] * 3,
        n_modes=[[4, 4]] * 3,
        attention_scaling_factors=[0.5] * 3,
        per_layer_scaling_factors=[[1, 1]] * 3,
    ),
}

ARCHITECTURES: dict[str, Architecture] = (
    TIMM | X_TRANSFORMERS | VIT_PYTORCH | SEGMENTATION | MONAI | E3NN | OPERATORS
)
