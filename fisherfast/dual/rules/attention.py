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

from fisherfast.dual.dispatch import Operator, directions_of, rule
from fisherfast.dual.rules.product import batched_product
from fisherfast.dual.stacks import lifted
from fisherfast.dual.tensor import DualTensor, apply_softmax

BLOCK_NUMBERS = 2**22
"""Scores of primal and tangents that exist at the same time: 16 MB in float32."""


@rule("scaled_dot_product_attention")
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
    mask = _mask(attn_mask, is_causal, q, shape, (q.shape[2], k.shape[2]))
    k = k.transpose(-2, -1)
    result = q.new_empty((*q.shape[:-1], v.shape[-1]))
    rows = max(BLOCK_NUMBERS // max(q.shape[0] * q.shape[1] * k.shape[3], 1), 1)
    for start in range(0, q.shape[2], rows):
        block = slice(start, start + rows)
        scores = batched_product(q[:, :, block], k).mul_(scale)
        if mask is not None:
            scores[: len(mask)] += mask[:, :, block]
        result[:, :, block] = batched_product(_softmax(scores), v)
    return DualTensor(result.unflatten(1, shape) if shape else result[:, 0])


def _softmax(scores: Tensor) -> Tensor:
    """Stack of the weights; those of a query whose keys are all masked are zero."""
    weights = apply_softmax(scores, scores.dim() - 1)
    blind = (scores[0] == -torch.inf).all(-1, keepdim=True)
    return weights.masked_fill_(blind, 0.0)


def _mask(
    attn_mask: Any, is_causal: bool, like: Tensor, shape: torch.Size, lengths: tuple[int, int]
) -> Tensor | None:
    """Return what is added to the scores, [1 or 1 + P, B or 1, L, L'], with its tangents if any."""
    if is_causal:
        attn_mask = torch.ones(lengths, dtype=torch.bool, device=like.device).tril()
    if attn_mask is None:
        return None
    if isinstance(attn_mask, DualTensor):
        stack = attn_mask.stack[:1] if attn_mask.memory.constant else attn_mask.stack
    elif attn_mask.dtype == torch.bool:
        stack = like.new_zeros(1, *attn_mask.shape).masked_fill_(~attn_mask, -torch.inf)
    else:
        stack = attn_mask[None]
    batch = torch.Size([1] * (len(shape) + 3 - stack.dim()) + list(stack.shape[1:-2]))
    stack = stack.reshape(len(stack), *batch, *stack.shape[-2:])
    if batch.numel() > 1:
        batch = shape
    return stack.expand(len(stack), *batch, *lengths).reshape(len(stack), batch.numel(), *lengths)
