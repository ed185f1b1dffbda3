"""Inner products of per-sample gradients of a layer that multiplies by a matrix, in the cheapest of
three ways."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfast import ops

__all__ = ["column_gram"]

TILE_NUMBERS = 2**22
"""Numbers of gradients that are in memory at a time: 32 MB in float64."""

LINES, LANES = 8, 16
"""What `ops.gradient_gram` rounds its positions up to."""

PRODUCT_COST = {torch.float32: 0.5, torch.float64: 1.0}
"""Of a multiply-add of that op, in those of a float64 matrix product. Measured on one core of an
AVX-512 processor: 50 and 30 to 39 GFLOP/s, and 31."""


def column_gram(
    a: Tensor,
    b: Tensor,
    other_a: Tensor | None = None,
    other_b: Tensor | None = None,
    *,
    weight: bool = True,
    bias: bool = False,
) -> Tensor:
    """<G_ri, G'_qj> of gradients G_ri = sum_t b_rit a_it^T, and of the bias sum_t b_rit.

    Args:
        a: [n, G, T, D], what multiplies the weights in each of G groups at T positions.
        b: [R, n, G, T, M], gradients at the output, of R columns.
        other_a, other_b: the other samples; None for the products of the samples with each other.
        weight, bias: which of the two are measured.

    Returns:
        [R, n, R', n'] float64.

    Cost: n n' times the least of R R' M D (with the gradients, some of their numbers at a time) and
    T T' (D + R' M) + R R' T M (without); one product of D and one of M numbers where T = 1.
    """
    right_a, right_b = (a, b) if other_a is None or other_b is None else (other_a, other_b)
    gram = a.new_zeros((*b.shape[:2], *right_b.shape[:2]), dtype=torch.float64)
    for group in range(a.shape[1]):
        left = a[:, group], b[:, :, group]
        right = left if other_a is None else (right_a[:, group], right_b[:, :, group])
        if bias:
            gram += _inner(left[1].double().sum(2), right[1].double().sum(2))
        if not weight:
            continue
        if left[0].shape[1] == right[0].shape[1] == 1:
            gram += _of_single_positions(left, right)
        elif _cheaper_without_gradients(left, right):
            gram += _without_gradients(left, None if other_a is None else right)
        else:
            gram += _with_gradients(left, right)
    return gram


Side = tuple[Tensor, Tensor]
"""a [n, T, D] and b [R, n, T, M]."""


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """[R, n, R', n'] of rows [R, n, k] and [R', n', k]."""
    return (left.flatten(0, 1) @ right.flatten(0, 1).T).reshape(*left.shape[:2], *right.shape[:2])


def _of_single_positions(left: Side, right: Side) -> Tensor:
    """(a_i . a'_j) (b_ri . b'_qj)."""
    inputs = left[0][:, 0].double() @ right[0][:, 0].double().T
    gram = _inner(left[1][:, :, 0].double(), right[1][:, :, 0].double())
    return gram.mul_(inputs[None, :, None, :])


def _cheaper_without_gradients(left: Side, right: Side) -> bool:
    (_, positions, inputs), (columns, _, _, outputs) = left[0].shape, left[1].shape
    rows = -(-positions // LANES) * LANES
    others = -(-right[0].shape[1] // LINES) * LINES
    pairs = columns * right[1].shape[0]
    without = rows * others * (inputs + right[1].shape[0] * outputs) + pairs * rows * outputs
    return without * PRODUCT_COST[left[0].dtype] < pairs * outputs * inputs


def _without_gradients(left: Side, right: Side | None) -> Tensor:
    sides = [side for side in (left, right) if side is not None]
    given = [part for a, b in sides for part in (a, b.transpose(0, 1))]
    gram: Tensor = ops.gradient_gram(*given)
    return gram.permute(1, 0, 3, 2)


def _with_gradients(left: Side, right: Side) -> Tensor:
    """Products of gradients, some of their entries at a time."""
    gram = left[0].new_zeros((*left[1].shape[:2], *right[1].shape[:2]), dtype=torch.float64)
    rows = max(b.shape[0] * b.shape[1] for _, b in (left, right))
    entries = max(1, TILE_NUMBERS // max(1, rows))
    outputs, inputs = left[1].shape[-1], left[0].shape[-1]
    wide = min(inputs, entries)
    high = max(1, entries // max(1, wide))
    for m in range(0, outputs, high):
        for d in range(0, inputs, max(1, wide)):
            block = slice(m, m + high), slice(d, d + wide)
            here = _gradients(left, *block)
            gram += _inner(here, here if right is left else _gradients(right, *block))
    return gram


def _gradients(side: Side, outputs: slice, inputs: slice) -> Tensor:
    """Some entries of the gradients: [R, n, entries]."""
    a, b = side[0][..., inputs].double(), side[1][..., outputs].double()
    return (b.mT @ a).flatten(2)
