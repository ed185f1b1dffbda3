"""Inner products of the weight gradients of samples, without storing the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference
from fisherfast.ops._common import check_like, check_no_grad, check_real, register


def gradient_gram(
    a: Tensor, b: Tensor, other_a: Tensor | None = None, other_b: Tensor | None = None
) -> Tensor:
    """Inner products of the weight gradients of samples, from the factors of those gradients.

        K[i, c, j, e] = <G_ic, G'_je> = sum_ts (a_it . a'_js) (b_ict . b'_jes),
        G_ic = sum_t b_ict a_it^T   (t: positions that share the weights, c: columns)

    Neither the gradients G [M, D] nor the products of all positions are ever in memory. The columns
    of a sample (classes, outputs) share its a, whose products are computed once for all of them.

    Args:
        a: [n, T, D] float32 or float64, inputs of the weights; any strides.
        b: [n, C, T, M], or [n, T, M] for C = 1, dtype and device of ``a``: gradients at the
            outputs; any strides.
        other_a: a' [n', T', D]; None with ``other_b`` None for the products of the samples with
            each other, at half of the cost.
        other_b: b' [n', C', T', M] or [n', T', M].

    Returns:
        K [n, C, n', C'] float64, unit of (a b)^2; [n, n'] where neither b has columns.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device, or one of ``other_a`` and ``other_b`` without the other.
        RuntimeError: an input requires grad.

    Cost: T T' (D + C' M) + C C' T M multiply-adds a pair of samples; less than the gradients
    themselves take where T T' is less than about D, and always without their memory. Float32
    products are summed in float32 over at most 256 numbers, then in float64. The bits do not depend
    on the number of threads.

    Reference: Dangel et al. 2022 (arXiv 2106.02624), for the products without gradients.

    Example:
        >>> a, b = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]), torch.tensor([[[1.0]], [[2.0]]])
        >>> gradient_gram(a, b).tolist()  # of the gradients [1, 2] and [6, 0]
        [[5.0, 6.0], [6.0, 36.0]]
    """
    if (other_a is None) != (other_b is None):
        missing = "other_a" if other_a is None else "other_b"
        raise ValueError(f"{missing} must be given with the other of the two, got None")
    check_no_grad("gradient_gram", a=a, b=b, other_a=other_a, other_b=other_b)
    gram: Tensor = torch.ops.fisherfast.gradient_gram.default(a, b, other_a, other_b)
    without_columns = b.dim() == 3 and (other_b is None or other_b.dim() == 3)
    return gram[:, 0, :, 0] if without_columns else gram


def _gradient_gram(a: Tensor, b: Tensor, other_a: Tensor | None, other_b: Tensor | None) -> Tensor:
    gram = _gradient_gram_fake(a, b, other_a, other_b)
    symmetric = other_a is None or other_b is None
    right_a, right_b = (a, b) if other_a is None or other_b is None else (other_a, other_b)
    b, right_b = _with_columns(b), _with_columns(right_b)
    inputs = a.shape[2]
    if gram.numel() == 0 or 0 in (inputs, *b.shape[2:], right_b.shape[2]):
        return gram.zero_()
    if not _native.serves(a):
        return reference.gradient_gram(a, b, right_a, right_b)
    _native.call(
        "gradient_gram",
        a,
        **_side("left", a, b),
        **_side("right", right_a, right_b),
        gram=gram,
        inputs=inputs,
        outputs=b.shape[3],
        symmetric=symmetric,
    )
    return gram


def _side(side: str, a: Tensor, b: Tensor) -> dict[str, Any]:
    """The fields of one side of the product."""
    fields = {"a": a, "a_strides": a.stride(), "b": b, "b_strides": b.stride()}
    fields |= dict(zip(("rows", "columns", "positions"), b.shape[:3], strict=True))
    return {f"{side}_{name}": value for name, value in fields.items()}


def _with_columns(b: Tensor) -> Tensor:
    return b.unsqueeze(1) if b.dim() == 3 else b


def _gradient_gram_fake(
    a: Tensor, b: Tensor, other_a: Tensor | None, other_b: Tensor | None
) -> Tensor:
    check_real("a", a)
    _check_side("", a, b, a)
    right_a, right_b = (a, b) if other_a is None or other_b is None else (other_a, other_b)
    if other_a is not None:
        _check_side("other_", right_a, right_b, a)
        if right_a.shape[2] != a.shape[2]:
            raise ValueError(f"other_a must have D = {a.shape[2]}, got {list(right_a.shape)}")
        if right_b.shape[-1] != b.shape[-1]:
            raise ValueError(f"other_b must have M = {b.shape[-1]}, got {list(right_b.shape)}")
    left, right = _with_columns(b), _with_columns(right_b)
    return a.new_empty((*left.shape[:2], *right.shape[:2]), dtype=torch.float64)


def _check_side(prefix: str, a: Tensor, b: Tensor, model: Tensor) -> None:
    if prefix:
        check_like(f"{prefix}a", a, "a", model)
    check_like(f"{prefix}b", b, "a", model)
    if a.dim() != 3:
        raise ValueError(f"{prefix}a must have shape [n, T, D], got {list(a.shape)}")
    rows, positions = a.shape[:2]
    if b.dim() not in (3, 4) or b.shape[0] != rows or b.shape[-2] != positions:
        raise ValueError(
            f"{prefix}b must have shape [n, C, T, M] or [n, T, M] with n = {rows} and"
            f" T = {positions}, got {list(b.shape)}"
        )


register(
    "gradient_gram(Tensor a, Tensor b, Tensor? other_a, Tensor? other_b) -> Tensor",
    _gradient_gram,
    _gradient_gram_fake,
)
