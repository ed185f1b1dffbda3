"""The oracle of the op tests: the reference in float64, and how far a result may be from it.

Errors are relative to the largest number of a result, of each slice in the dual ops. The measured
errors are four to twenty times below the bounds; a wrong kernel is off by far more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from support.closeness import assert_close
from torch import Tensor

from fisherfast import _native
from fisherfast.ops import reference, reference_dual
from fisherfast.ops.selfcheck import results_of

Bounds = Mapping[str, Mapping[torch.dtype, float]]

_FLOAT32_FLOAT64 = {
    "fisher_solve": (1e-5, 2e-14),
    "fisher_solve_backward": (2e-6, 1e-14),
    "moments": (4e-6, 2e-14),
    "spatial_moments": (4e-6, 2e-14),
    "patch_moments": (4e-6, 2e-14),
    "lift_moments_": (4e-6, 2e-14),
    "gradient_gram": (4e-6, 2e-14),
    "gradient_squares": (4e-6, 2e-14),
    "dual_activation": (2e-6, 1e-14),
    "dual_norm": (5e-7, 3e-15),
    "dual_softmax": (1e-6, 8e-15),
    "dual_pool": (0.0, 0.0),  # it moves numbers
}

BOUNDS: Bounds = {
    op: dict(zip((torch.float32, torch.float64), pair, strict=True))
    for op, pair in _FLOAT32_FLOAT64.items()
}


def truth_of(op: str, call: tuple[Any, ...]) -> Sequence[Tensor]:
    """The results of the reference in float64 for arguments by position, which are not changed."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in call]
    sums = [a.clone() for a in wide[:2]] if op.endswith("_") else []  # it adds to these two
    results = getattr(reference_dual if op.startswith("dual_") else reference, op)(
        *sums, *wide[len(sums) :]
    )
    return sums or ([results] if isinstance(results, Tensor) else results)


def assert_right(op: str, call: tuple[Any, ...], bounds: Bounds = BOUNDS) -> Sequence[Tensor]:
    """Asserts that an op gives the results of its reference, NaN and infinity where that has them.
    Returns the results."""
    given = call[2:] if op.endswith("_") else call
    bound = bounds[op][next(a.dtype for a in given if isinstance(a, Tensor))]
    if op == "dual_norm" and not _native.serves(call[0]):
        bound *= 2  # the means of plain torch are rounded to the dtype
    results = results_of(op, call)
    for got, truth in zip(results, truth_of(op, call), strict=True):
        scale = None
        if op.startswith("dual_") and truth.numel() > 0:
            scale = _largest(truth)
            if op == "dual_norm":  # before the mean is taken off a tangent, which may leave nothing
                scale = scale + scale[0] * _largest(call[0]) / _largest(call[0])[0]
            scale = scale.reshape([-1] + [1] * (truth.dim() - 1))
        assert_close(got, truth, bound, scale)
    return results


def _largest(x: Tensor) -> Tensor:
    """The largest finite magnitude of each slice."""
    return x.double().abs().where(x.isfinite(), 0.0).reshape(len(x), -1).amax(1)
