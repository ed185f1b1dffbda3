"""How far the result of an op may be from its truth, for each op and dtype.

Relative to what the test names: the largest result, unless it says otherwise. The measured errors
are four to twenty times below; a wrong kernel is off by far more.
"""

from __future__ import annotations

import torch

_FLOAT32_FLOAT64 = {
    "fisher_solve": (1e-5, 2e-14),
    "fisher_solve_backward": (1e-5, 2e-14),
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

BOUNDS = {
    op: dict(zip((torch.float32, torch.float64), pair, strict=True))
    for op, pair in _FLOAT32_FLOAT64.items()
}
