"""The spectrum of the Fisher matrix: how many directions of the parameters the data determine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fisherfast.parameters.analysis.eigenpairs import Eigenpairs, check_not_zero
from fisherfast.parameters.analysis.figures import plot_spectrum
from fisherfast.parameters.layout import ParameterLayout

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROUNDING = 4.0
"""Rounding errors of a gradient that are allowed for, in units of its dtype's last place. In
networks of four layers, float32 ones too, zero eigenvalues came out at up to 3e-15 of the largest;
the threshold is 3e-13 in float32, and in float64 1e-14 for 50 rows."""

SHARES = (0.5, 0.9, 0.99)
"""Shares of the trace in the table."""

SHARE_ROUNDING = 1e-12
"""Rounding of a sum of eigenvalues relative to the trace, so that share=1 is reached."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    r"""Eigenvalues of F, descending, and numbers of parameters in use that follow from them.

    With p_i = lambda_i / trace(F)

    .. math:: \text{effective rank} = \exp(-\textstyle\sum p_i \log p_i), \qquad
              \text{participation ratio} = 1 / \textstyle\sum p_i^2

    both between 1 and the rank; the second gives small eigenvalues less weight.

    Attributes:
        eigenvalues: [k] float64 in 1 / w^2, those that are not zero, descending; the largest only
            where `complete` is false.
        residuals: [k] each value is as close to an eigenvalue of F; 0 but for rounding where all
            were computed.
        layout: the parameters.
        samples: n that F is averaged over.
        trace: of F, also where only the largest eigenvalues are known.
        complete: whether all eigenvalues that are not zero are here.
        most: the rank at most, samples x columns or P.
        rest_at_most: none of the eigenvalues that are not here is larger.

    References: Roy and Vetterli (2007), "The effective rank", EUSIPCO, definition 1; of stiff and
    sloppy directions Transtrum, Machta, Brown, Daniels, Myers, Sethna (2015), J. Chem. Phys. 143,
    010901.
    """

    eigenvalues: Tensor
    residuals: Tensor
    layout: ParameterLayout
    samples: int
    trace: float
    complete: bool
    most: int
    rest_at_most: float
    directions: Callable[[Sequence[int]], Tensor] = field(repr=False)

    @property
    def parameters(self) -> int:
        """P."""
        return self.layout.size

    @property
    def rank(self) -> int:
        """Eigenvalues above rounding; at least so many where not `complete`."""
        return len(self.eigenvalues)

    @property
    def zeros(self) -> int:
        """Directions that the data do not determine: P - rank, an upper bound unless `complete`."""
        return self.parameters - self.rank

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the eigenvalues' shares; NaN where not `complete`."""
        return self.effective_rank_bounds[0] if self.complete else math.nan

    @property
    def participation_ratio(self) -> float:
        """(sum lambda)^2 / sum lambda^2; NaN where not `complete`."""
        return self.participation_bounds[0] if self.complete else math.nan

    @property
    def effective_rank_bounds(self) -> tuple[float, float]:
        """(low, high): the trace that is not in the eigenvalues here may be in few or in many
        others; those here are taken as exact."""
        share = self.eigenvalues / self.trace
        entropy = float(torch.special.entr(share).sum())
        rest, few, many = self._rest()
        if not many:
            return math.exp(entropy), math.exp(entropy)
        return math.exp(entropy - rest * math.log(few)), math.exp(
            entropy - rest * math.log(rest / many)
        )

    @property
    def participation_bounds(self) -> tuple[float, float]:
        """(low, high), as `effective_rank_bounds`."""
        squares = float((self.eigenvalues / self.trace).square().sum())
        rest, few, many = self._rest()
        if not many:
            return 1 / squares, 1 / squares
        return 1 / (squares + rest * few), 1 / (squares + rest**2 / many)

    def _rest(self) -> tuple[float, float, int]:
        """Share of the trace that is not here, the largest share that one eigenvalue may have of
        it, and how many there may be (0 where there is none)."""
        rest = 1 - float(self.eigenvalues.sum()) / self.trace
        many = self.most - len(self.eigenvalues)
        if self.complete or many < 1 or rest <= 0:
            return 0.0, 1.0, 0
        return rest, max(min(self.rest_at_most / self.trace, rest), rest / many), many

    def count(self, share: float) -> int | None:
        """How many of the stiffest directions hold a share of the trace; None where those here do
        not."""
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        held = self.eigenvalues.cumsum(0) / self.trace
        found = int((held < share * (1 - SHARE_ROUNDING)).sum()) + 1
        return found if found <= len(held) else None

    def direction(self, number: int) -> dict[str, Tensor]:
        """Direction of an eigenvalue, one tensor per parameter by name, of unit length together.

        Args:
            number: 0 for the stiffest; -1 for the sloppiest of those with an eigenvalue here.
        """
        if not -self.rank <= number < self.rank:
            raise IndexError(f"number must lie in [{-self.rank}, {self.rank}), got {number}")
        return self.layout.unflatten(self.directions([number % self.rank])[:, 0])

    def stiff(self, count: int) -> Tensor:
        """The stiffest directions [P, count]: a step there changes p(y | x, w) most."""
        return self.directions(range(self._checked(count)))

    def sloppy(self, count: int) -> Tensor:
        """The sloppiest directions [P, count] of those that are not zero, the sloppiest first;
        beyond them come `zeros` directions that change nothing at all."""
        self._checked(count)
        return self.directions(range(self.rank - 1, self.rank - 1 - count, -1))

    def _checked(self, count: int) -> int:
        if not 1 <= count <= self.rank:
            raise ValueError(f"count must lie in [1, {self.rank}], got {count}")
        return count

    def plot(self, ax: Axes | None = None) -> Axes:
        """Eigenvalues against their number, both logarithmic."""
        label = f"{self.rank} of {self.parameters} eigenvalues"
        marks = (self.effective_rank, self.participation_ratio)
        return plot_spectrum(self.eigenvalues, *marks, label=label, ax=ax)

    def __repr__(self) -> str:
        low, high = self.effective_rank_bounds
        less, more = self.participation_bounds
        known = "" if self.complete else " at least"
        rows = [
            (f"eigenvalues not zero{known}", self._of_all(self.rank)),
            (f"zero eigenvalues{' at most' if known else ''}", self._of_all(self.zeros)),
            ("trace", f"{self.trace:.4g}"),
            ("largest eigenvalue", f"{float(self.eigenvalues[0]):.4g}" if self.rank else "-"),
            ("smallest here", f"{float(self.eigenvalues[-1]):.4g}" if self.rank else "-"),
            ("effective rank", self._between(low, high)),
            ("participation ratio", self._between(less, more)),
        ]
        for share in SHARES:
            count = self.count(share)
            many = f"more than {self.rank}" if count is None else self._of_all(count)
            rows.append((f"directions with {100 * share:g} % of the trace", many))
        title = f"Fisher spectrum: {self.parameters} parameters, {self.samples} samples"
        width = max(len(name) for name, _ in rows)
        return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])

    def _of_all(self, count: float) -> str:
        return f"{count:.6g} ({100 * count / self.parameters:.3g} % of the parameters)"

    def _between(self, low: float, high: float) -> str:
        if math.isclose(low, high):
            return self._of_all(low)
        return f"between {low:.4g} and {high:.4g}"


def all_eigenvalues(
    values: Tensor, rest_at_most: float, precision: float, **known: Any
) -> Spectrum:
    """The spectrum with eigenvalues [k], descending; those within rounding of zero are left out.

    Args:
        values: [k], all that are not zero but for those that `rest_at_most` bounds.
        rest_at_most: none of the others is larger.
        precision: relative rounding error of the gradients.
        **known: the other fields of `Spectrum`.

    Raises:
        ValueError: F is zero.
    """
    largest = float(values[0]) if len(values) else 0.0
    check_not_zero(largest)
    noise = rounding_noise(len(values), largest, precision)
    values = values[values > noise]
    return Spectrum(
        values,
        torch.full_like(values, rest_at_most),
        complete=rest_at_most <= noise,
        rest_at_most=rest_at_most,
        **known,
    )


def largest_eigenvalues(
    found: Eigenpairs, left_out: float, precision: float, *, trace: float, most: int, **known: Any
) -> Spectrum:
    """The spectrum of the largest eigenpairs alone; arguments as of `all_eigenvalues`, but for
    `left_out`, the largest eigenvalue, at most, of F less the matrix of these eigenpairs."""
    noise = rounding_noise(most, float(found.values[0]), precision)
    kept = found.values > noise
    values = found.values[kept]
    missing = trace - float(values.sum())
    return Spectrum(
        values,
        found.residuals[kept] + left_out,
        trace=trace,
        most=most,
        complete=missing <= most * noise,
        rest_at_most=float(values[-1]) + left_out,
        directions=lambda chosen: found.directions[:, list(chosen)],
        **known,
    )


def rounding_noise(size: int, largest: float, precision: float) -> float:
    """The size, about, that rounding gives zero eigenvalues of F = S^T S.

    Args:
        size: of the matrix that is decomposed.
        largest: its largest eigenvalue.
        precision: relative rounding error of the numbers of S. An error e in all of them moves zero
            eigenvalues by e^2.
    """
    arithmetic = size * torch.finfo(torch.float64).eps
    return (arithmetic + (ROUNDING * precision) ** 2) * largest


def numerical_rank(values: Tensor, precision: float) -> int:
    """Eigenvalues above what rounding leaves of zero ones."""
    if len(values) == 0:
        return 0
    return int((values > rounding_noise(len(values), float(values.max()), precision)).sum())
