"""Dither: add noise to rounded values, so that they have a density (docs/theory.md, section 21).

The derivative of a lifted feature's mean is estimated as the mean of its slope times the tangents.
That fails on a lattice (camera counts, files with few digits, half precision): the kink of the
feature lies between two steps, where there are no samples. Gaussian noise with a standard deviation
of half a step corrects the derivative to within 0.7 %, and can only lose information.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

ROWS = 256
"""Samples that are searched for ties: about nine are found for steps of 1/1000 of the spread."""

TIED_VALUES = 3
"""Distinct values that must repeat to count as a lattice; the zero of a ReLU is only one."""

GAP_QUANTILE = 0.75
"""Quantile of the gaps between neighbouring values that is used as the step: the spacing of
floating-point numbers is not uniform, and the median would be too small for large values."""

PARTS = 4
"""Fractions 1, 1/2, ... of the smallest gap that are tried as the step of an even lattice."""

UNEVEN = 0.05
"""Largest deviation of a gap from a multiple of the step, in steps: 100 random gaps pass it with a
probability of 1e-100."""

ROOM = 16
"""Units in the last place that a step must span for noise to be added to the values themselves;
otherwise it would be rounded away."""

LARGEST = 2**22
"""Most values that are searched for ties: 16 MB."""

CHUNK = 256
"""Samples whose noise is drawn from one seed."""

HALF_TYPES = (torch.bfloat16, torch.float16)


class StepMeter:
    """Find the step between tied values, for each activation."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._still: list[Tensor] = []
        self._steps: Tensor | None = None

    def update(self, values: Tensor, moving: Tensor | None = None) -> None:
        """Add values [n, d]; moving bool [n, d] marks those with a derivative, None if unknown."""
        most = min(ROWS, max(LARGEST // max(values.shape[1], 1), 1))
        missing = most - sum(map(len, self._rows))
        if missing <= 0 or values.dtype in HALF_TYPES:
            return
        rows = values[:missing].clone()
        still = torch.zeros_like(rows, dtype=torch.bool) if moving is None else ~moving[:missing]
        self._rows.append(rows)
        self._still.append(still)
        self._steps = None

    def half_steps(self) -> Tensor | None:
        """Return half of each step, [d] float64, if noise of that size is not rounded away, else
        0; None if all are 0."""
        steps = self.steps()
        if steps is None or not bool(steps.any()):
            return None
        values = torch.cat(self._rows)
        room = ROOM * torch.finfo(values.dtype).eps * values.abs().amax(0).double()
        return torch.where(steps >= room, steps / 2, 0.0)

    def steps(self) -> Tensor | None:
        """Return the step of each activation, [d] float64, 0 where values are not tied; None
        without values."""
        if self._steps is None and self._rows:
            self._steps = self._found()
        return self._steps

    def _found(self) -> Tensor:
        rows, still = torch.cat(self._rows), torch.cat(self._still)
        if rows.shape[1] > 1:  # copies of a sample are not steps
            _, number = rows.unique(dim=0, return_inverse=True)
            order = number.argsort(stable=True)
            copy = order[1:][number[order].diff() == 0]
            still[copy] = True
        values = rows.masked_fill(still, torch.nan).T.sort().values  # [d, n]; NaN sorts last
        gaps = values.diff()
        tied = gaps == 0
        several = tied.clone()  # the first of each run of equal values
        several[:, 1:] &= ~tied[:, :-1]
        thrice = (tied[:, 1:] & tied[:, :-1]).any(1)
        candidates = (several.sum(1) >= TIED_VALUES).nonzero()[:, 0]
        steps = values.new_zeros(len(values), dtype=torch.float64)
        if len(candidates):
            gaps = torch.where(gaps > 0, gaps, torch.nan)[candidates].double()
            size = values[candidates].abs().nan_to_num(0.0).amax(1, keepdim=True).double()
            exact = _even_steps(gaps, torch.zeros_like(size))  # steps without rounding error
            decimal = _even_steps(gaps, torch.finfo(rows.dtype).eps * size)
            even = torch.where(exact > 0, exact, decimal)
            uneven = gaps.nanquantile(GAP_QUANTILE, dim=1).nan_to_num(0.0)
            # gaps between copies of one activation are as uneven as its density
            uneven = torch.where(thrice[candidates], uneven, 0.0)
            steps[candidates] = torch.where(even > 0, even, uneven)
        return steps


def _even_steps(gaps: Tensor, noise: Tensor) -> Tensor:
    """Find the step [d] of which the gaps [d, n] (NaN for none) between values are multiples, 0 if
    there is none.

    The values may contain no two neighbours, so fractions of the smallest gap are tried. Values
    have an error of noise [d, 1].
    """
    gaps = torch.where(gaps > ROOM * noise, gaps, torch.nan)
    smallest = gaps.nan_to_num(torch.inf).amin(1, keepdim=True)
    found = torch.zeros_like(smallest[:, 0])
    for parts in range(PARTS, 0, -1):
        step = smallest / parts
        off = gaps / step
        off = (off - off.round()).abs()
        even = ((off <= UNEVEN + 2 * noise / step) | off.isnan()).all(1) & step[:, 0].isfinite()
        found = torch.where(even, step[:, 0], found)
    return found


def dithered(values: Tensor, size: Tensor, tangents: Tensor, numbers: Tensor, *key: Any) -> Tensor:
    """Add Gaussian noise to values [n, ...] that have a non-zero tangent; see `dither`.

    Args:
        values: rounded values.
        size: standard deviation of the noise, of any shape that broadcasts to that of the values.
        tangents: [P, n, ...] of the values.
        numbers, key: as in `dither`.
    """
    return values + size * dither(values, numbers, *key) * (tangents != 0).any(0)


def dither(like: Tensor, numbers: Tensor, *key: Any) -> Tensor:
    """Draw standard normal noise [n, ...] that depends on the numbers of the samples only, not on
    how they are batched.

    Args:
        like: [n, ...], gives shape, dtype and device.
        numbers: int64 [n] of the samples.
        key: different keys give independent noise.
    """
    if len(numbers) == 0:
        return torch.zeros_like(like)
    first, last = int(numbers.min()), int(numbers.max())
    begin, chunks = first // CHUNK, []
    for chunk in range(begin, last // CHUNK + 1):
        digest = hashlib.blake2b(repr((*key, chunk)).encode(), digest_size=7).digest()
        generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest, "big"))
        noise = torch.randn(
            CHUNK, *like.shape[1:], generator=generator, dtype=like.dtype, device=like.device
        )
        start = chunk * CHUNK
        chunks.append(noise[max(first - start, 0) : last + 1 - start])
    return torch.cat(chunks)[(numbers - first).to(like.device)]
