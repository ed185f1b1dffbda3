"""Parameters of a test such that any two values of two axes occur together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pytest
import torch

DTYPES = [torch.float32, torch.float64]


def pairwise(**axes: Sequence[object]) -> pytest.MarkDecorator:
    """Parametrises a test over a part of the product of the axes.

    Every pair of values of two axes is in at least one case, so that a fault that needs two
    settings shows. The number of cases is about that of the two longest axes alone.

    Example:
        >>> @pairwise(dtype=[torch.float32, torch.float64], size=[1, 5], last=[False, True])
        ... def test(dtype, size, last): ...  # 4 cases, not 8
    """
    sizes = [len(values) for values in axes.values()]
    missing = {
        ((i, a), (j, b))
        for i, j in combinations(range(len(sizes)), 2)
        for a in range(sizes[i])
        for b in range(sizes[j])
    }
    cases = []
    while missing:
        chosen = dict(min(missing))
        for axis in range(len(sizes)):
            if axis not in chosen:
                chosen[axis] = max(
                    range(sizes[axis]),
                    key=lambda value, axis=axis: sum(
                        _pair((axis, value), other) in missing for other in chosen.items()
                    ),
                )
        missing -= set(combinations(sorted(chosen.items()), 2))
        cases.append([values[chosen[i]] for i, values in enumerate(axes.values())])
    ids = ["-".join(str(value).removeprefix("torch.") for value in case) for case in cases]
    return pytest.mark.parametrize(list(axes), cases, ids=ids)


def _pair(left: tuple[int, int], right: tuple[int, int]) -> tuple:
    return (left, right) if left < right else (right, left)
