"""Dither: noise that gives rounded values a density again (docs/theory.md, section 21).

Tangents tell how values move, and a lifted feature averages its slope over them. On a lattice
(camera counts, files of few digits, half precision) its kink lies between two steps, and the mean
slope is no derivative of the mean. Gaussian noise of half a step restores it to 0.7 %, and can only
lose information.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

__all__ = ["HALF_TYPES", "StepMeter", "dither"]

ROWS = 256
"""Samples among which ties are sought: on steps of a thousandth of the spread nine are expected."""

TIED_VALUES = 3
"""Values that occur more than once on a lattice, at least; an atom, as a ReLU's zero, is one."""

GAP_QUANTILE = 0.75
"""Of the gaps between neighbouring values: steps of floating numbers differ by powers of two."""

ROOM = 16
"""Units in the last place that a step must have for noise to be added to the numbers themselves."""

LARGEST = 2**22
"""Values among which ties are sought, at most: 16 MB."""

CHUNK = 256
"""Samples whose noise comes from one seed, so that it does not depend on the batches."""

HALF_TYPES = (torch.bfloat16, torch.float16)


class StepMeter:
    """Finds the step between values that are tied, activation by activation."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self._count = 0
        self._steps: torch.Tensor | None = None

    def update(self, values: torch.Tensor, moving: torch.Tensor | None = None) -> None:
        """Add values [n, d]; moving bool [n, d]: those with a derivative, None where that is not
        known."""
        missing = min(ROWS, max(LARGEST // max(values.shape[1], 1), 1)) - self._count
        if missing <= 0 or values.dtype in HALF_TYPES:
            return
        rows = values[:missing].clone()
        if moving is not None:
            rows[~moving[:missing]] = torch.nan
        self._rows.append(rows)
        self._count += len(rows)
        self._steps = None

    def half_steps(self) -> torch.Tensor | None:
        """[d] float64 half of each step whose numbers have room for such noise, 0 for the others;
        None where there is none."""
        steps = self.steps()
        if steps is None or not bool(steps.any()):
            return None
        values = torch.cat(self._rows)
        room = ROOM * torch.finfo(values.dtype).eps * values.abs().nan_to_num(0.0).amax(0).double()
        return torch.where(steps >= room, steps / 2, 0.0)

    def steps(self) -> torch.Tensor | None:
        """[d] float64 step of each activation, 0 where values are not tied; None without values."""
        if self._steps is None and self._rows:
            self._steps = self._found()
        return self._steps

    def _found(self) -> torch.Tensor:
        values = torch.cat(self._rows).T.sort().values  # [d, n], NaN behind the others
        gaps = values.diff()
        tied = gaps == 0
        several = tied.clone()  # the first of each run of equal values
        several[:, 1:] &= ~tied[:, :-1]
        lattice = several.sum(1) >= TIED_VALUES
        steps = values.new_zeros(len(values), dtype=torch.float64)
        if bool(lattice.any()):
            gaps = torch.where(gaps[lattice] > 0, gaps[lattice], torch.nan)
            steps[lattice] = gaps.double().nanquantile(GAP_QUANTILE, dim=1).nan_to_num(0.0)
        return steps


def dither(like: torch.Tensor, first: int, *key: Any) -> torch.Tensor:
    """Standard normal noise [n, ...] for samples from a number on, the same in any batches.

    Args:
        like: [n, ...], shape, dtype and device.
        first: number of the first sample.
        key: tells streams of noise apart.
    """
    stop, chunks = first + len(like), []
    for chunk in range(first // CHUNK, -(-stop // CHUNK)):
        digest = hashlib.blake2b(repr((*key, chunk)).encode(), digest_size=7).digest()
        generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest, "big"))
        noise = torch.randn(
            CHUNK, *like.shape[1:], generator=generator, dtype=like.dtype, device=like.device
        )
        start = chunk * CHUNK
        chunks.append(noise[max(first - start, 0) : max(stop - start, 0)])
    return torch.cat(chunks) if chunks else torch.zeros_like(like)
