"""Products of a Fisher matrix with vectors, read off the data anew each time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast.parameters.backward.batches import Data
from fisherfast.parameters.backward.columns import FisherType, sweeps
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.likelihoods import Likelihood
from fisherfast.parameters.structures.jacobian import Jacobian, jacobian_of
from fisherfast.parameters.structures.layer_rows import LayerRows

__all__ = ["StreamedFisher"]

ROWS_AT_ONCE = 1024
"""Rows of the root that are kept at a time."""


class StreamedFisher:
    """F v for data of any size: nothing is kept but one batch.

    Attributes:
        layout: the parameters.
        samples: n; 0 before the first pass, as are the next two.
        rows: N = samples x columns.
        trace: of F, exact.

    Cost: of a product, a pass over the data with a backward pass for each column, and a forward and
    a backward pass of each layer.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        data: Data,
        layout: ParameterLayout,
        *,
        fisher_type: FisherType,
        samples: int,
        batch_size: int,
        seed: int,
    ) -> None:
        """The arguments of `sweeps`; data are read again for every product.

        Raises:
            TypeError: data that can be read once only.
        """
        if isinstance(data, Iterator):
            raise TypeError(
                f"data must be readable more than once, got {type(data).__name__}: pass a tensor, a"
                ' Dataset or a DataLoader, or take structure="lowrank", which reads once'
            )
        self._source: tuple[nn.Module, Likelihood, Data] = (model, likelihood, data)
        self.layout = layout
        self.samples = self.rows = 0
        self.trace = 0.0
        self._settings: dict[str, Any] = {
            "fisher_type": fisher_type,
            "samples": samples,
            "batch_size": batch_size,
            "seed": seed,
        }
        self.precision = torch.finfo(torch.float64).eps

    def __call__(self, v: Tensor) -> Tensor:
        """F v [P] of v [P] float64."""
        found = torch.zeros_like(v)
        samples = rows = 0
        trace = v.new_zeros(())

        def take(piece: Mapping[tuple[str, ...], LayerRows]) -> None:
            nonlocal found, rows
            part = Jacobian(self.layout, [piece])
            found += part.transposed(part.times(v[:, None]))[:, 0]
            rows += part.rows
            self.precision = max(self.precision, part.precision)
            if not self.samples:
                trace.add_(part.squares().sum())

        for sweep in sweeps(*self._source, self.layout, **self._settings):
            jacobian_of(sweep, take, most_rows=ROWS_AT_ONCE)
            samples += sweep.samples
        if self.samples and samples != self.samples:
            raise ValueError(
                f"data must be the same every time, got {samples} samples after {self.samples}"
            )
        if not self.samples:
            self.samples, self.rows, self.trace = samples, rows, float(trace) / samples
        return found / samples
