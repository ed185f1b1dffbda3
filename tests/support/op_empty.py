"""Calls of the ops without a number in one dimension or another."""

from __future__ import annotations

from typing import Any

import torch

ONES, NO = [1, 1], [0, 0]

# Shapes of the tensors, then the other arguments.
_CALLS: dict[str, tuple[list[tuple[tuple[int, ...], ...]], tuple[Any, ...]]] = {
    "fisher_solve_backward": ([((0, 2, 2), (0, 4, 2)), ((3, 2, 2), (3, 0, 2))], (0.5,)),
    "moments": ([((0, 3),), ((5, 0),), ((0, 0),)], (None, 1, None)),
    "spatial_moments": (
        [((0, 3, 2, 2),), ((4, 0, 2, 2),), ((4, 3, 0, 2),), ((4, 3, 2, 0),), ((0, 0, 0, 0),)],
        (None,),
    ),
    "patch_moments": ([((0, 4, 3, 3),), ((2, 0, 3, 3),)], ([2, 2], ONES, NO, ONES, 2)),
    "gradient_gram": (
        [
            ((0, 2, 3), (0, 1, 2, 4)), ((2, 2, 3), (2, 0, 2, 4)), ((2, 0, 3), (2, 1, 0, 4)),
            ((2, 2, 0), (2, 1, 2, 4)), ((2, 2, 3), (2, 1, 2, 0)),
            ((2, 2, 3), (2, 1, 2, 4), (0, 2, 3), (0, 1, 2, 4)),
        ],
        (None, None),
    ),
    "gradient_squares": (
        [((0, 6, 4, 4), (0, 4, 4, 4)), ((4, 0, 2, 3), (4, 4, 2, 3)), ((4, 6, 2, 3), (4, 0, 2, 3))],
        (ONES, ONES, NO, ONES, 2),
    ),
    "dual_softmax": ([((3, 0, 3, 2),), ((3, 3, 0, 1),), ((3, 3, 2, 0),)], (2, False)),
    "dual_norm": ([((3, 0, 3),), ((3, 3, 0),)], (None, None, 0.125, 1, 1, True)),
    "dual_pool": ([((3, 0, 3, 8, 6),), ((3, 3, 0, 8, 6),)], ([2, 2], [2, 2], NO, ONES, False)),
    "dual_activation": (
        [((3, 0, 2, 3),), ((3, 2, 0, 3),), ((3, 2, 3, 0),)], ("relu", [], None, None, None, 2),
    ),
}  # fmt: skip
EMPTY = [(op, shapes) for op, (cases, _) in _CALLS.items() for shapes in cases]


def empty_call(op: str, shapes: tuple, **kind: object) -> tuple[Any, ...]:
    """The arguments of the op by position."""
    others = _CALLS[op][1]
    if op == "gradient_gram" and len(shapes) == 4:
        others = ()
    return (*(torch.ones(shape, **kind) for shape in shapes), *others)
