"""Networks of tokens and time steps: attention in every dress, recurrence in every dress."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from support.dual_oracle import Function, Network
from support.networks_zoo import Written
from torch import Tensor, nn

# --- attention ---


def self_attention(width: int, heads: int) -> nn.Module:
    """Queries, keys and values from one product, then the fused function."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        qkv = m.qkv(x).reshape(*x.shape[:2], 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return m.proj(mixed.transpose(1, 2).reshape(x.shape))

    return Written(forward, qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))


class ViT(nn.Module):
    """Patches, class token, positions, a block with the norm first (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int = 8, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(0.5 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.5 * torch.randn(1, 5, width))
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = self_attention(width, 2)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a causal mask, and a mask of padded keys where asked for."""

    def __init__(self, padding: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 10, batch_first=True, norm_first=padding)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        n, length = x.shape[:2]
        padded = None
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=x.dtype)
        if self.padding:
            padded = torch.arange(length).expand(n, -1) > length - 1 - torch.arange(n)[:, None] % 2
            mask = mask < 0
        return self.encoder(x, mask=mask, src_key_padding_mask=padded, is_causal=True)


def every_option() -> nn.Module:
    """`nn.MultiheadAttention` with other widths of keys and values, extra keys, its weights."""

    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, 1)
        out, weights = m.heads(x[:2], x[2:, :, :4], x[2:, :, 3:], average_attn_weights=False)
        return out.transpose(0, 1), weights

    options = {"kdim": 4, "vdim": 3, "add_bias_kv": True, "add_zero_attn": True}
    return Written(forward, heads=nn.MultiheadAttention(6, 2, **options))


def _attend(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Network:
    """Fused attention of two queries to five keys, two heads: x holds all of them."""

    def forward(x: Tensor) -> Tensor:
        q, k, v = x.split([2, 5, 5], dim=2)
        return attend(q, k * 2, v[..., :3])

    return Network(lambda: Function(forward), (2, 12, 4))


KEPT = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
BIAS = torch.linspace(-1, 1, 10, dtype=torch.float64).view(2, 5)
fused = F.scaled_dot_product_attention

ATTENTION: dict[str, Network] = {
    "attention": _attend(fused),
    "attention_scaled": _attend(lambda q, k, v: fused(q, k, v, scale=0.3)),
    "attention_causal": _attend(lambda q, k, v: fused(q, k, v, is_causal=True)),
    "attention_kept": _attend(lambda q, k, v: fused(q, k, v, attn_mask=KEPT)),
    "attention_kept_of_sample": _attend(
        lambda q, k, v: fused(q, k, v, attn_mask=KEPT.expand(len(q), 1, 2, 5))
    ),
    "attention_bias": _attend(lambda q, k, v: fused(q, k, v, attn_mask=BIAS.to(q.dtype))),
    "attention_bias_of_input": _attend(lambda q, k, v: fused(q, k, v, attn_mask=q.sin() @ k.mT)),
    "attention_minus_infinity": _attend(
        lambda q, k, v: fused(
            q, k, v, attn_mask=torch.zeros(2, 5, dtype=q.dtype).masked_fill(~KEPT, -torch.inf)
        )
    ),
    "attention_constant_query": _attend(lambda q, k, v: fused(torch.ones_like(q), k, v)),
    "attention_constant_keys": _attend(lambda q, k, v: fused(q, k.detach(), v.detach())),
    "attention_constant_values": _attend(lambda q, k, v: fused(q, k, v.detach())),
    "attention_grouped": _attend(
        lambda q, k, v: fused(torch.cat([q, q.sin()], 1), k, v, enable_gqa=True)
    ),
    "attention_strided": _attend(
        lambda q, k, v: fused(
            q.transpose(1, 2), k[:, :, :2].mT.mT.transpose(1, 2), v[:, :, 3:].mT.mT.transpose(1, 2)
        )
    ),
    "attention_large_logits": Network(lambda: Function(lambda x: fused(20 * x, 20 * x, x)), (6, 4)),
    "attention_options": Network(every_option, (6, 6)),
}


# --- recurrent networks ---


class StepsFirst(nn.GRU):
    """Time steps before the samples, as recurrent modules take them by default."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps, state = super().forward(x.transpose(0, 1))
        return steps.transpose(0, 1), state


def cells() -> nn.Module:
    """Recurrence written out with cells, from zeros of the batch's size."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h, c = x.new_zeros(len(x), 4), x.new_zeros(len(x), 4)
        g, r = x.new_zeros(len(x), 3), x.new_zeros(len(x), 2)
        for step in x.unbind(1):
            h, c = m.lstm(step, (h, c))
            g = m.gru(h, g)
            r = m.rnn(g, r)
        return r

    return Written(forward, lstm=nn.LSTMCell(3, 4), gru=nn.GRUCell(4, 3), rnn=nn.RNNCell(3, 2))


SEQUENCES: dict[str, Network] = {
    "vit": Network(ViT, (3, 8, 8)),
    "encoder_causal": Network(lambda: Encoder(False), (4, 6)),
    "encoder_both_masks": Network(lambda: Encoder(True), (4, 6)),
    "lstm_deep": Network(lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True), (4, 3)),
    "gru": Network(lambda: StepsFirst(3, 4), (4, 3)),
    "rnn": Network(lambda: nn.RNN(3, 4, 2, batch_first=True), (4, 3)),
    "rnn_relu": Network(lambda: nn.RNN(3, 4, nonlinearity="relu", batch_first=True), (4, 3)),
    "cells": Network(cells, (3, 3)),
}
