"""Arguments of every op, by position, for the kernels of the CPU and of CUDA: sizes around their
vectors, tiles and parts of the work, and numbers that are not finite or badly scaled.

Each function takes `normal` (a drawing of normal numbers), and the dtype and device as options.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from support.solve_failures import COUNT, with_failures
from torch import Tensor

ONES, ZEROS, TWOS = [1, 1], [0, 0], [2, 2]
Calls = dict[str, Callable[..., list[tuple[Any, ...]]]]


def solved(normal, batch, dim, params, inverse_rows=True, **kind):
    """The arguments of `fisher_solve`."""
    samples = normal(*batch, dim, 2 * dim + 3, **kind)
    deriv = normal(*batch, dim, params, **kind)
    return samples @ samples.mT / (2 * dim + 3), deriv, 2.0**-13, inverse_rows, True


def added(normal, rows, dim, lifted, folds=5, halves=2, start=0, slope=0.75, room=0, **kind):
    """The arguments of `lift_moments_`: folds of many lengths, the fourth empty, and accumulators
    that hold something already and have room for more features."""
    z, weight = normal(rows, dim, **kind), normal(lifted, dim, **kind) / max(dim, 1) ** 0.5
    size, device = dim + lifted + room, z.device
    share = torch.tensor([0.0 if g == 3 else 1.0 + g % 3 for g in range(folds)])
    ends = (share.cumsum(0) / share.sum() * rows).round().long()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(device)
    sums, cross = normal(folds, size, device=device), normal(halves, size, size, device=device)
    bias, pilot = normal(lifted, **kind), normal(lifted, **kind)
    return sums, cross, z, weight, bias, pilot, offsets, slope, start


def grouped(normal, rows, dim, groups=3, **kind):
    """The arguments of `moments`."""
    x = normal(rows, dim, **kind)
    return x, torch.arange(rows, device=x.device) * 7 % groups, groups, normal(dim, **kind)


def pair(normal, n, columns, positions, inputs, outputs, **kind):
    """One side of `gradient_gram`."""
    b = normal(n, columns, positions, outputs, **kind)
    return normal(n, positions, inputs, **kind), b


def squared(normal, x, outputs, kernel, stride=ONES, padding=ZEROS, dilation=ONES, groups=1, **k):
    """The arguments of `gradient_squares`."""
    sizes = zip(x[2:], kernel, stride, padding, dilation, strict=True)
    out = [(size + 2 * p - d * (c - 1) - 1) // s + 1 for size, c, s, p, d in sizes]
    g = normal(x[0], outputs, *out, **k)
    return normal(*x, **k), g, kernel, stride, padding, dilation, groups


def normed(normal, shape, entries, eps=1.0, groups=1, inner=1, centre=True, **kind):
    """The arguments of `dual_norm`, weights away from zero."""
    weight, bias = 1 + normal(entries, **kind) / 2, normal(entries, **kind)
    return normal(*shape, **kind) + 0.5, weight, bias, eps, groups, inner, centre


def channels_last(x: Tensor) -> Tensor:
    """The same numbers, every slice of a dual buffer with its channels next to each other."""
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


def images_last(x: Tensor) -> Tensor:
    """The same images, each with its channels next to each other."""
    return x.contiguous(memory_format=torch.channels_last)


CASES: Calls = {
    "fisher_solve": lambda n, **k: [
        solved(n, batch, dim, params, rows, **k)
        for batch, dim, params in (
            ((), 1, 1), ((3,), 2, 1), ((2, 9), 5, 2), ((5,), 8, 16), ((3,), 31, 3), ((9,), 33, 1),
            ((2,), 66, 2), ((2, 0), 4, 2), ((3,), 0, 2), ((3,), 4, 0),
        )
        for rows in (False, True)
    ],
    "fisher_solve_backward": lambda n, **k: [
        (n(b, P, P, **k), n(b, d, P, **k), 0.125)
        for b, d, P in ((1, 1, 1), (70, 5, 2), (5, 8, 16), (3, 33, 3), (2, 130, 2))
    ],
    "moments": lambda n, **k: [
        (n(1, 1, **k), None, 1, None), grouped(n, 63, 4, 16, **k), grouped(n, 130, 17, 1, **k),
        grouped(n, 2001, 3, **k), grouped(n, 70, 100, 5, **k),
    ],
    "spatial_moments": lambda n, **k: [
        (n(*shape, **k), pilot)
        for shape in ((1, 1, 1, 1), (3, 17, 20, 50), (70, 17, 3, 3), (130, 2, 1, 65), (9, 40, 2, 2))
        for pilot in (None, n(*shape[1:], **k))
    ],
    "patch_moments": lambda n, **k: [
        (n(1, 1, 1, 1, **k), ONES, ONES, ZEROS, ONES, 1),
        (n(2, 1, 3, 2, **k), TWOS, ONES, [4, 5], ONES, 1),  # borders wider than the kernel
        (n(2, 4, 5, 7, **k), [3, 2], [2, 1], [1, 3], [1, 2], 2),
        (n(2, 9, 6, 5, **k), [3, 3], ONES, ONES, ONES, 1),
        (n(3, 5, 4, 40, **k), [1, 3], [4, 5], [0, 1], ONES, 5),  # strides over positions
        (n(2, 1, 60, 50, **k), TWOS, ONES, [0, 1], ONES, 1),  # more than 4096 patches
    ],
    "lift_moments_": lambda n, **k: [
        added(n, rows, dim, lifted, *parts, **k)
        for (rows, dim, lifted), parts in (
            ((1, 1, 1), (1, 1)), ((3, 2, 5), (16, 2)), ((600, 7, 30), (16, 1)),
            ((40, 70, 62), (5, 2)), ((65, 5, 140), (4, 2, 64, 3.0)), ((50, 6, 34), (4, 2, 6, -1.0)),
            ((50, 6, 0), (1, 2)), ((50, 6, 30), (4, 2, 3, 0.0, 5)),
            ((0, 3, 2), (2, 1)), ((4, 0, 3), (2, 1)),
        )
    ] + [
        (*call[:6], torch.tensor(ends, device=call[2].device), *call[7:])
        for call in (added(n, 50, 6, 9, 4, **k),)
        for ends in ([0, 50, 50, 50, 50], [0, 0, 0, 50, 50])  # a half without rows
    ],
    "gradient_gram": lambda n, **k: [
        (*pair(n, i, C, T, D, M, **k), *right)
        for i, C, T, D, M in (
            (1, 1, 1, 1, 1), (3, 2, 5, 17, 9), (2, 1, 70, 20, 33), (2, 3, 17, 65, 5),
        )
        for right in ((None, None), pair(n, i + 2, C + 1, 2 * T + 1, D, M, **k))
    ],
    "gradient_squares": lambda n, **k: [
        squared(n, (1, 1, 1, 1), 1, ONES, **k),
        squared(n, (3, 3, 5, 6), 5, [3, 2], [2, 1], [1, 0], [1, 2], **k),
        squared(n, (2, 9, 4, 5), 18, [1, 2], padding=[0, 1], **k),
        squared(n, (2, 8, 4, 3), 70, [3, 3], padding=ONES, **k),
        squared(n, (4, 6, 5, 3), 4, [3, 1], [1, 2], [1, 0], groups=2, **k),
        squared(n, (3, 5, 4, 4), 10, TWOS, groups=5, **k),
        squared(n, (2, 2, 9, 11), 3, TWOS, padding=ONES, **k),
        squared(n, (2, 2, 2, 3), 3, TWOS, [2, 3], [4, 5], **k),  # wide margins
    ],
    "dual_activation": lambda n, **k: [
        (order(n(*shape, **k)), kind, numbers, *n(2, C, **k).mT.contiguous().mT,
         n(C, **k) if kind == "prelu" else None, 2)
        for shape in ((2, 1, 1, 1), (1, 3, 5, 7), (5, 2, 3, 64), (10, 5, 16, 4), (2, 40, 3, 1))
        for C in shape[2:3]
        for order in (Tensor.contiguous, channels_last)
        for kind, numbers in (("prelu", []), ("silu", []), ("identity", []))
    ] + [
        (n(3, 5, 42, **k), "gelu", [], n(5, **k), None, None, 1),
        (n(3, 2, 3, 5, 9, **k), "relu", [], None, n(5, **k), None, 3),
    ],
    # Rows of a warp of CUDA; of a block, in registers; walked along.
    "dual_norm": lambda n, **k: [
        *(normed(n, (1 + P, 5, width), width, 1.0 if width < 9 else 2.0**-10, centre=centre, **k)
          for P, width, centre in ((1, 1, False), (0, 3, True), (5, 32, False), (2, 127, True),
                                   (1, 513, True), (5, 1500, False), (1, 2500, True),
                                   (1, 4097, True))),
        *(normed(n, (4, 3 * groups, width), groups * width // inner, 1.0, groups, inner, **k)
          for groups, inner, width in ((4, 5, 10), (4, 1, 7), (3, 6, 18), (4, 8, 6), (6, 3, 5),
                                       (2, 37, 370), (1, 45, 4500))),
        (n(3, 4, 20, **k), n(8, **k), None, 1.0, 2, 5, True),
        (n(3, 4, 20, **k), None, n(20, **k), 1.0, 1, 1, True),
    ],
    "dual_softmax": lambda n, **k: [
        (3 * n(1 + P, *shape, **k), 2, log)
        for P, shape in ((0, (9, 3, 1)), (5, (5, 32, 1)), (1, (3, 127, 1)), (2, (2, 513, 1)),
                         (1, (2, 2048, 1)), (9, (2, 4097, 1)), (5, (3, 5, 7)), (1, (2, 100, 33)),
                         (4, (4, 3, 300)))
        for log in (False, True)
    ],
    "dual_pool": lambda n, **k: [
        (order(n(1 + P, 2, C, *size, **k)), *window, ceil)
        for P, C, ceil, (size, *window) in zip(
            (0, 1, 5, 2, 1, 3, 1, 9), (1, 3, 16, 21, 2, 5, 64, 3), (False, True) * 4, WINDOWS,
            strict=True,
        )
        for order in (Tensor.contiguous, channels_last)
    ],
}  # fmt: skip

# Size, kernel, stride, padding, dilation.
WINDOWS = [
    ([301], [3], [2], [1], [1]),
    ([9, 7], [3, 3], [2, 2], [1, 1], [1, 1]),
    ([6, 11], [4, 3], [1, 2], [2, 0], [1, 1]),
    ([12, 9], [3, 2], [2, 1], [1, 1], [2, 3]),
    ([11, 10], [1, 2], [3, 4], [0, 1], [1, 1]),
    ([5, 4], [5, 4], [1, 1], [0, 0], [1, 1]),
    ([8, 36], [2, 2], [2, 2], [0, 0], [1, 1]),
    ([5, 6, 7], [2, 3, 2], [2, 2, 1], [1, 1, 0], [1, 1, 2]),
]


def with_nan(x: Tensor) -> Tensor:
    """NaN in one number in the middle of the first slice, another in the last slice."""
    x = x.clone()
    x[0].view(-1)[x[0].numel() // 2] = x[-1].view(-1)[-2] = math.nan
    return x


def _failing(normal, dim, inverse_rows, **kind):
    cov, deriv, *_ = solved(normal, (COUNT,), dim, 2, **kind)
    upper = torch.ones_like(cov, dtype=torch.bool).triu(1)  # it is not read
    return with_failures(cov)[0].masked_fill(upper, math.nan), deriv, 0.0, inverse_rows, True


def _masked(normal, *shape, **kind):
    """Single entries and whole rows of -inf; NaN or inf in a row."""
    x = normal(3, *shape, **kind)
    x[0, :, 1:3] = x[0, 0] = x[0, 1, :, 0] = -math.inf
    x[0, 1, 4, 0] = math.nan
    x[0, -1, 5, -1] = math.inf
    return x


def _ties(normal, *shape, **kind):
    """Few different numbers, infinities and NaN among them; a slice of nothing but -inf."""
    x = normal(3, 4, *shape, **kind)
    x[0, :2] = x[0, :2].round().clamp(-1, 1)
    x[0, 1][x[0, 1] > 0] = math.nan
    x[0, 2][x[0, 2] < 0.8] = -math.inf
    x[0, 3] = -math.inf
    return x


def _far(x: Tensor, shift: float) -> Tensor:
    x[0] += shift
    return x


# One of each way that the kernels of CUDA take.
ROWS = ((3, 40, 1), (3, 600, 1), (3, 4500, 1), (2, 6, 5))

HOSTILE: Calls = {
    "fisher_solve": lambda n, **k: [
        _failing(n, dim, rows, **k) for dim in (5, 36) for rows in (False, True)
    ],
    "fisher_solve_backward": lambda n, **k: [(n(3, 2, 2, **k), with_nan(n(3, 4, 2, **k)), 0.0)],
    "moments": lambda n, **k: [
        (with_nan(x), *others) for x, *others in (grouped(n, 100, 3, **k), grouped(n, 70, 70, **k))
    ],
    "spatial_moments": lambda n, **k: [
        (order(with_nan(n(30, 5, 3, 9, **k))), None) for order in (Tensor.contiguous, images_last)
    ],
    "patch_moments": lambda n, **k: [(with_nan(n(3, 4, 6, 6, **k)), TWOS, ONES, ONES, ONES, 2)],
    "lift_moments_": lambda n, **k: [
        (sums, cross, with_nan(z), *others)
        for rows in (20, 1500)
        for sums, cross, z, *others in (added(n, rows, 5, 8, **k),)
    ],
    "gradient_gram": lambda n, **k: [
        (with_nan(a), b, None, None)
        for a, b in (pair(n, 5, 2, 9, 11, 10, **k), pair(n, 3, 1, 70, 3, 2, **k))
    ],
    "gradient_squares": lambda n, **k: [
        (order(with_nan(x)), order(g), *others)
        for x, g, *others in (squared(n, (5, 3, 6, 7), 4, [3, 3], padding=ONES, **k),)
        for order in (Tensor.contiguous, images_last)
    ],
    "dual_activation": lambda n, **k: [
        (with_nan(n(3, 2, 5, 41, **k)), kind, [], None, None, None, 2) for kind in ("relu", "gelu")
    ],
    "dual_norm": lambda n, **k: [
        (with_nan(n(5, 4, width, **k)), None, None, 0.125, 1, 1, True) for width in (40, 600, 4500)
    ],
    "dual_softmax": lambda n, **k: [
        (x, 2, log)
        for shape in ROWS
        for log in (False, True)
        for x in (_masked(n, *shape, **k), *(_far(n(3, *shape, **k), far) for far in (-1e4, 1e4)))
    ],
    "dual_pool": lambda n, **k: [
        (order(_ties(n, 3, *size, **k)), *window, False)
        for size, *window in WINDOWS
        for order in (Tensor.contiguous, channels_last)
    ],
}
