"""The spectrum of the Fisher matrix: how many directions of the parameters the data see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fisherfast.measurement.settings import bytes_of
from fisherfast.model.unwrap import unwrapped
from fisherfast.parameters.analysis.figures import plot_spectrum
from fisherfast.parameters.analysis.lanczos import lanczos
from fisherfast.parameters.analysis.streamed import StreamedFisher
from fisherfast.parameters.backward.batches import Data
from fisherfast.parameters.backward.columns import FisherType
from fisherfast.parameters.checks import check_count, check_seed
from fisherfast.parameters.fisher import fisher
from fisherfast.parameters.layout import ParameterLayout, Selection
from fisherfast.parameters.likelihoods import Likelihood
from fisherfast.parameters.structures.base import ParameterFisher
from fisherfast.parameters.structures.gram import GramFisher, rounding_noise
from fisherfast.parameters.structures.lowrank import LowRankFisher

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Spectrum", "spectrum"]

TOLERANCE = 1e-6
"""Residual of the eigenvalues that Lanczos' method finds, relative to the largest."""

PRODUCTS_PER_VALUE = 4
"""Products with F, for each eigenvalue wanted, after which one search stops at the latest."""

SHARES = (0.5, 0.9, 0.99)
"""Of the trace, in the table."""

SHARE_ROUNDING = 1e-12
"""Of a sum of eigenvalues relative to the trace, so that share=1 is reached."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    r"""Eigenvalues of F, descending, and what they say of the number of parameters in use.

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
        """Directions that the data do not see: P - rank, at most so many where not `complete`."""
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
            number: 0 for the stiffest; -1 for the sloppiest of those that are seen at all.
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


def spectrum(
    source: ParameterFisher | nn.Module,
    likelihood: Likelihood | None = None,
    data: Data = None,
    fisher_type: FisherType = "exact",
    samples: int = 1,
    *,
    count: int | None = None,
    parameters: Selection = None,
    batch_size: int = 256,
    seed: int = 0,
    memory_budget: int | str = "8 GiB",
) -> Spectrum:
    """The spectrum of a Fisher matrix, or of a network's.

    Args:
        source: a matrix of any structure, or a network in eval mode with likelihood and data.
        likelihood: of the outputs.
        data: inputs, or (inputs, labels) for fisher_type="empirical".
        fisher_type: as of `fisher`.
        samples: labels drawn for each input, for fisher_type="mc".
        count: None for all eigenvalues, through the Gram matrix [N, N], N = samples x columns. A
            number for so many of the largest, by Lanczos' method, whose products read the data
            again each time and keep nothing of them.
        parameters: those measured, see `fisher`.
        batch_size: samples at a time.
        seed: of the labels drawn and of the start of Lanczos' method.
        memory_budget: bytes for the Gram matrix, or for the vectors of Lanczos' method, a number or
            like "8 GiB".

    Returns:
        `Spectrum`.

    Raises:
        TypeError: a network without likelihood, a matrix with likelihood, data or count; data that
            can be read once only where count is given, a count that is no whole number.
        ValueError: count is not positive.
        MemoryError: more than memory_budget would be needed.

    Cost: eigenvalues of [N, N] take N^3 operations: 4 s for N = 4500 on two cores. Lanczos' method
    takes up to 4 (count + 1) products, a pass over the data each, and so many vectors of P numbers;
    then about as many as for one eigenvalue to see that none was missed, and again for each time
    that equal eigenvalues come.

    Example:
        >>> import torch, fisherfast as ff
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(9, 30), nn.Tanh(), nn.Linear(30, 3))
        >>> found = ff.parameters.spectrum(model, ff.parameters.Categorical(), torch.randn(20, 9))
        >>> found.parameters, found.rank
        (393, 40)
    """
    if isinstance(source, ParameterFisher):
        if likelihood is not None or data is not None or count is not None:
            raise TypeError(
                "likelihood, data and count must be left out with a Fisher matrix, which has its"
                " eigenvalues already"
            )
        return _of_matrix(source)
    if not isinstance(source, nn.Module):
        raise TypeError(f"source must be a network or a Fisher matrix, got {type(source).__name__}")
    if likelihood is None or data is None:
        raise TypeError("likelihood and data must be given with a network, got None")
    if count is None:
        matrix = fisher(
            source,
            likelihood,
            data,
            "gram",
            fisher_type,
            samples,
            parameters=parameters,
            batch_size=batch_size,
            seed=seed,
            memory_budget=memory_budget,
        )
        return _of_matrix(matrix)
    check_count("count", count)
    check_seed(seed)
    model = unwrapped(source)
    product = StreamedFisher(
        model,
        likelihood,
        data,
        ParameterLayout.of(model, parameters),
        fisher_type=fisher_type,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
    )
    return _by_products(product, count, next(model.parameters()).device, seed, memory_budget)


def _of_matrix(matrix: ParameterFisher) -> Spectrum:
    values = matrix.eigenvalues().flip(0).clamp_min(0)
    size = matrix.layout.size
    trace, most, rest = matrix.trace(), size, 0.0
    precision = torch.finfo(torch.float64).eps
    if isinstance(matrix, LowRankFisher):
        trace, rest = trace + matrix.missing_trace, matrix.error_bound
    elif isinstance(matrix, GramFisher):
        most, precision = min(size, matrix.rows), matrix.precision
    largest = float(values[0]) if len(values) else 0.0
    if not largest > 0:
        raise ValueError(f"F must not be zero, got a largest eigenvalue of {largest}")
    noise = rounding_noise(len(values), largest, precision)
    values = values[values > noise]
    return Spectrum(
        eigenvalues=values,
        residuals=torch.full_like(values, rest),
        layout=matrix.layout,
        samples=matrix.samples,
        trace=trace,
        complete=rest <= noise,
        most=most,
        rest_at_most=rest,
        directions=_directions_of(matrix),
    )


def _directions_of(matrix: ParameterFisher) -> Callable[[Sequence[int]], Tensor]:
    if isinstance(matrix, GramFisher):
        return matrix.directions
    if isinstance(matrix, LowRankFisher):
        return lambda chosen: matrix.directions[:, list(chosen)]
    kept: dict[str, Any] = {}

    def directions(chosen: Sequence[int]) -> Tensor:
        if not kept:
            kept["vectors"] = torch.linalg.eigh(matrix.to_dense()).eigenvectors.flip(1)
        found: Tensor = kept["vectors"][:, list(chosen)]
        return found

    return directions


def _by_products(
    product: StreamedFisher,
    count: int,
    device: torch.device,
    seed: int,
    memory_budget: int | str,
) -> Spectrum:
    size = product.layout.size
    steps = min(PRODUCTS_PER_VALUE * count + PRODUCTS_PER_VALUE, size)
    budget = bytes_of(memory_budget)
    assert budget is not None
    # the vectors, once more side by side, and the results of one search and of all
    needed = 8 * size * (2 * steps + 2 * count)
    if needed > budget:
        raise MemoryError(
            f"{steps} vectors of {size} parameters must fit into memory_budget = {budget} bytes,"
            f" got {needed}: ask for a smaller count=, or choose some parameters="
        )
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator, device="cpu").to(device)

    found = lanczos(product, draw, count, tolerance=TOLERANCE, most_products=steps)
    largest = float(found.values[0])
    if not largest > 0:
        raise ValueError(f"F must not be zero, got a largest eigenvalue of {largest}")
    most = min(size, product.rows)
    noise = rounding_noise(most, largest, product.precision)
    kept = found.values > noise
    values = found.values[kept]
    missing = product.trace - float(values.sum())
    return Spectrum(
        eigenvalues=values,
        residuals=found.residuals[kept],
        layout=product.layout,
        samples=product.samples,
        trace=product.trace,
        complete=missing <= most * noise,
        most=most,
        rest_at_most=float(values[-1]),
        directions=lambda chosen: found.directions[:, list(chosen)],
    )
