"""What is sent back through the network for each batch: columns of a root of the Fisher matrix.

For sample i with outputs f_i, the Fisher matrix of the parameters is sum_r (J_i^T r)(J_i^T r)^T,
where J_i = df_i/dw and the columns r are such that

    exact       sum_r r r^T = E_{y ~ p(y | f_i)}[s s^T],  s = d log p(y | f_i) / df_i
    mc          r = s(y) / sqrt(samples), y drawn from p(y | f_i)
    empirical   r = s(y), y the label in the data: the second moment of the training gradients,
                not the Fisher matrix

Every structure sees the same columns, one backward pass each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from fisherfast.parameters.backpropagation import Backpropagation, samples_apart
from fisherfast.parameters.batches import Data, batches
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.likelihoods import Likelihood
from fisherfast.parameters.rules import Rule

__all__ = ["FisherType", "Sweep", "sweeps"]

FisherType = Literal["exact", "mc", "empirical"]


class Sweep:
    """One batch with its columns.

    Attributes:
        samples: n.
        layers: "rule" or "rows" for each parameter, by name.
        matrices_without_tap: parameters of linear and convolution layers that come as rows.
    """

    def __init__(
        self, backpropagation: Backpropagation, columns: Callable[[], Iterator[Tensor]]
    ) -> None:
        self._backpropagation = backpropagation
        self._columns = columns
        self.samples = backpropagation.samples
        self.layers = backpropagation.layers
        self.matrices_without_tap = backpropagation.matrices_without_tap

    def visit(self, visitor: Callable[[int, Rule, Tensor, Tensor], None]) -> None:
        """Send all columns back; visitor(column, rule, x, g) is called for each layer of each.

        Can be called once.
        """
        columns = self._columns()
        vector = next(columns, None)
        number = 0
        while vector is not None:
            following = next(columns, None)
            self._backpropagation.visit(
                vector,
                lambda rule, x, g, number=number: visitor(number, rule, x, g),  # type: ignore[misc]
                last=following is None,
            )
            vector, number = following, number + 1


def sweeps(
    model: nn.Module,
    likelihood: Likelihood,
    data: Data,
    layout: ParameterLayout,
    *,
    fisher_type: FisherType,
    samples: int,
    batch_size: int,
    seed: int,
) -> Iterator[Sweep]:
    """Yield a `Sweep` for every batch of the data."""
    generator = torch.Generator().manual_seed(seed)
    apart = None
    for x, y in batches(data, model, batch_size, labels=fisher_type == "empirical"):
        if apart is None:
            apart = samples_apart(model, layout, x)
        batch = Backpropagation(model, layout, x, apart)
        yield Sweep(batch, _columns(likelihood, batch.outputs, y, fisher_type, samples, generator))


def _columns(
    likelihood: Likelihood,
    f: Tensor,
    y: Tensor | None,
    fisher_type: FisherType,
    samples: int,
    generator: torch.Generator,
) -> Callable[[], Iterator[Tensor]]:
    if fisher_type == "exact":
        return lambda: likelihood.root(f)
    if fisher_type == "mc":
        drawn = likelihood.draw(f, samples, generator)
        return lambda: (likelihood.score(f, labels) / samples**0.5 for labels in drawn)
    assert y is not None
    labels = likelihood.check(f, y)
    return lambda: iter([likelihood.score(f, labels)])
