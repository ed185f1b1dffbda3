"""Inner products and squares of the weight gradients of samples, without storing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference
from fisherfast.ops._common import (
    Op,
    Window,
    check_groups,
    check_input,
    check_like,
    check_no_grad,
    check_window,
    register,
    window_counts,
)


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


@register("gradient_gram(Tensor a, Tensor b, Tensor? other_a, Tensor? other_b) -> Tensor")
def _gradient_gram(a: Tensor, b: Tensor, other_a: Tensor | None, other_b: Tensor | None) -> Op:
    check_input("a", a, "[n, T, D]")
    b = _checked_gradients("b", b, "a", a)
    right_a, right_b = a, b
    if other_a is not None and other_b is not None:
        check_like("other_a", other_a, "a", a)
        check_input("other_a", other_a, "[n, T, D]")
        right_a, right_b = other_a, _checked_gradients("other_b", other_b, "a", other_a)
        if right_a.shape[2] != a.shape[2]:
            raise ValueError(f"other_a must have D = {a.shape[2]}, got {list(other_a.shape)}")
        if right_b.shape[3] != b.shape[3]:
            raise ValueError(f"other_b must have M = {b.shape[3]}, got {list(other_b.shape)}")
    gram = a.new_empty((*b.shape[:2], *right_b.shape[:2]), dtype=torch.float64)
    inputs, outputs = a.shape[2], b.shape[3]

    def run() -> Tensor:
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
            outputs=outputs,
            symmetric=other_a is None,
        )
        return gram

    return gram, run


def _checked_gradients(name: str, b: Tensor, model_name: str, a: Tensor) -> Tensor:
    """Return b as [n, C, T, M], checked against its a [n, T, D]."""
    check_like(name, b, model_name, a)
    rows, positions = a.shape[:2]
    if b.dim() not in (3, 4) or b.shape[0] != rows or b.shape[-2] != positions:
        raise ValueError(
            f"{name} must have shape [n, C, T, M] or [n, T, M] with n = {rows} and"
            f" T = {positions}, got {list(b.shape)}"
        )
    return b.unsqueeze(1) if b.dim() == 3 else b


def _side(side: str, a: Tensor, b: Tensor) -> dict[str, Any]:
    """The fields of one side of the product."""
    fields = {"a": a, "a_strides": a.stride(), "b": b, "b_strides": b.stride()}
    fields |= dict(zip(("rows", "columns", "positions"), b.shape[:3], strict=True))
    return {f"{side}_{name}": value for name, value in fields.items()}


def gradient_squares(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int] = (1, 1),
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Sums over samples of the squared gradients of a convolution's weights.

        squares[m, c, u] = sum_i ( sum_t g[i, m, t] x[i, c, t stride - padding + u dilation] )^2

    u are the places of the kernel. The sum over positions t is inside the square: it is the
    gradient of one sample. Neither patches of x nor gradients of samples are stored, and x and g
    are read in place whatever their strides. A linear layer with positions x [n, T, D],
    g [n, T, M] is the case ``x.mT[..., None], g.mT[..., None]``; a transposed convolution that
    with x and g exchanged.

    Args:
        x: [n, C, H, W] float32 or float64, the input of the convolution; zero outside.
        g: [n, M, Ho, Wo], dtype and device of ``x``: gradients at its output.
        kernel: (kh, kw).
        stride: of the windows.
        padding: zeros on both sides.
        dilation: between the numbers of a window.
        groups: a divisor of C and M; channels of g are paired with those of x in their group.

    Returns:
        squares: [M, C / groups, kh, kw] float64, unit of x g squared.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device, or a setting that a convolution cannot have.
        RuntimeError: an input requires grad.

    Cost: n M (C / groups) kh kw Ho Wo multiply-adds. In float32 the products are summed in float32
    over the positions, in blocks of 256 (in groups of at most 4 outputs: of all positions, spread
    over the lanes of a vector), their squares in float32 over at most 64 samples and then in
    float64. The bits do not depend on the number of threads.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])[:, None, None]  # one sample, one channel, H = 1
        >>> g = torch.tensor([[1.0, 10.0]])[:, None, None]
        >>> gradient_squares(x, g, (1, 2)).flatten().tolist()  # (1 + 20)^2, (2 + 30)^2
        [441.0, 1024.0]
    """
    check_no_grad("gradient_squares", x=x, g=g)
    op = torch.ops.fisherfast.gradient_squares.default
    return op(x, g, list(kernel), list(stride), list(padding), list(dilation), groups)


@register(
    "gradient_squares(Tensor x, Tensor g, SymInt[] kernel, SymInt[] stride, SymInt[] padding,"
    " SymInt[] dilation, SymInt groups) -> Tensor"
)
def _gradient_squares(x: Tensor, g: Tensor, *settings: Any) -> Op:
    *window_settings, groups = settings
    window = Window(*window_settings)
    check_input("x", x, "[n, C, H, W]")
    check_like("g", g, "x", x)
    check_window(2, window)
    check_input("g", g, "[n, M, Ho, Wo]")
    samples, channels, *size = x.shape
    check_groups(groups, x=channels, g=g.shape[1])
    out = window_counts(size, window)
    check_like("g", g, "x", x, "[n, M, Ho, Wo]", [samples, g.shape[1], *out])
    inputs, outputs = channels // groups, g.shape[1] // groups
    squares = x.new_empty((g.shape[1], inputs, *window.kernel), dtype=torch.float64)

    def run() -> Tensor:
        if not _native.serves(x):
            return reference.gradient_squares(x, g, *window, groups)
        _native.call(
            "gradient_squares",
            x,
            x=x,
            g=g,
            x_strides=x.stride(),
            g_strides=g.stride(),
            squares=squares,
            workspace=None,
            samples=samples,
            groups=groups,
            inputs=inputs,
            outputs=outputs,
            **{"in": size},
            out=out,
            **window._asdict(),
        )
        return squares

    return squares, run
