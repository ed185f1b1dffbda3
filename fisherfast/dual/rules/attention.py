"""The dual form of attention, computed for one block of queries at a time.

    A = softmax(s q k^T + mask),   o = A v
    dS = s (dq k^T + q dk^T),   dA = A (dS - sum(A dS)),   do = dA v + A dv

Scores and their tangents exist for one block only, whose size `BLOCK_NUMBERS` limits: temporary
memory does not grow with L^2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fisherfast.dual.dispatch import Operator, directions_of, overloads, rule
from fisherfast.dual.stacks import lifted
from fisherfast.dual.tensor import DualTensor, apply_softmax

BLOCK_NUMBERS = 2**22
"""Scores of primal and tangents that exist at the same time: 16 MB in float32."""


@rule(*overloads("scaled_dot_product_attention"))
def _attention(
    func: Operator,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p > 0:
        return NotImplemented
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None when is_causal is set, got both")
    directions = directions_of([query, key, value, attn_mask])
    q, k, v = (lifted(item, directions) for item in (query, key, value))
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    shape = torch.broadcast_shapes(q.shape[1:-2], k.shape[1:-2], v.shape[1:-2])
    q, k, v = (t.expand(len(t), *shape, *t.shape[-2:]).flatten(1, -3) for t in (q, k, v))
    mask, mask_tangents = _mask(attn_mask, is_causal, q, k, shape)
    result = q.new_empty((*q.shape[:-1], v.shape[-1]))
    rows = max(BLOCK_NUMBERS // max(q.shape[0] * q.shape[1] * k.shape[2], 1), 1)
    for start in range(0, q.shape[2], rows):
        block = slice(start, start + rows)
        scores = _scores(q[:, :, block], k, scale)
        if mask is not None:
            scores[0] += mask[:, block]
        if mask_tangents is not None:
            scores[1:] += mask_tangents[:, :, block]
        _weighted_sum(_softmax(scores), v, result[:, :, block])
    return DualTensor(result.unflatten(1, shape) if shape else result[:, 0])


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Stack of s q k^T [1 + P, B, l, L]."""
    keys = k.transpose(-2, -1)
    scores = q.new_empty((*q.shape[:-1], keys.shape[-1]))
    for slice_, (out, left) in enumerate(zip(scores, q, strict=True)):
        torch.bmm(left, keys[0], out=out)
        if slice_ > 0:
            out.baddbmm_(q[0], keys[slice_])
    return scores.mul_(scale)


def _softmax(scores: Tensor) -> Tensor:
    """Stack of the weights; those of a query whose keys are all masked are zero."""
    weights = apply_softmax(scores, scores.dim() - 1)
    blind = (scores[0] == -torch.inf).all(-1, keepdim=True)
    return weights.masked_fill_(blind, 0.0)


def _weighted_sum(weights: Tensor, v: Tensor, result: Tensor) -> None:
    """Write the stack of A v [1 + P, B, l, e] into result."""
    for slice_, out in enumerate(result):
        product = torch.bmm(weights[slice_], v[0])
        if slice_ > 0:
            product.baddbmm_(weights[0], v[slice_])
        out.copy_(product)


def _mask(
    attn_mask: Any, is_causal: bool, q: Tensor, k: Tensor, shape: torch.Size
) -> tuple[Tensor | None, Tensor | None]:
    """Return the mask to add to the scores [B, L, L'], and its tangents if it has any."""
    lengths = (q.shape[2], k.shape[2])
    if is_causal:
        allowed = torch.ones(lengths, dtype=torch.bool, device=q.device).tril()
        return _forbidding(allowed, q)[None], None
    if attn_mask is None:
        return None, None
    if not isinstance(attn_mask, DualTensor):
        mask = _forbidding(attn_mask, q) if attn_mask.dtype == torch.bool else attn_mask
        return _as_batch(mask, shape, lengths), None
    stack = attn_mask.stack
    tangents = None
    if not attn_mask.memory.constant:
        tangents = torch.stack([_as_batch(part, shape, lengths) for part in stack[1:]])
    return _as_batch(stack[0], shape, lengths), tangents


def _as_batch(mask: Tensor, shape: torch.Size, lengths: tuple[int, int]) -> Tensor:
    """Reshape a mask that broadcasts to [*shape, L, L'] to [B or 1, L, L']."""
    if mask.dim() <= 2 or mask.shape[:-2].numel() == 1:
        return mask.expand(*mask.shape[:-2], *lengths).reshape(1, *lengths)
    return mask.expand(*shape, *lengths).reshape(-1, *lengths)


def _forbidding(allowed: Tensor, like: Tensor) -> Tensor:
    """Convert a mask of allowed keys to 0 where allowed and -inf elsewhere."""
    zero = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
    return zero.masked_fill_(allowed.logical_not(), -torch.inf)
