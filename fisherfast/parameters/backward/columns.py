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
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fisherfast.model.default_device import each_as_outside, outside
from fisherfast.model.isolation import forgetting
from fisherfast.parameters.backward.backpropagation import Backpropagation
from fisherfast.parameters.backward.batches import Data, batches
from fisherfast.parameters.backward.layer_check import check_one_alone, samples_apart
from fisherfast.parameters.checks import check_evaluation, forward_alone
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.likelihoods import Likelihood

__all__ = ["FisherType", "Forward", "Sweep", "forwards", "sweeps"]

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


@dataclass(frozen=True, eq=False)
class Forward:
    """A batch that has gone forward, with what the likelihood reads.

    Attributes:
        batch: the batch, to send vectors back.
        f: its outputs [n, ...], in float32 at least.
        y: its labels, checked, on the device of f; None where none are needed.
    """

    batch: Backpropagation
    f: Tensor
    y: Tensor | None


def forwards(
    model: nn.Module,
    likelihood: Likelihood,
    data: Data,
    layout: ParameterLayout,
    *,
    batch_size: int,
    labels: bool,
) -> Iterator[Forward]:
    """Yield every batch of the data, gone forward.

    Raises:
        TypeError: data, outputs or labels of a kind that cannot be read.
        ValueError: no data; outputs or labels that the likelihood cannot have; a model that mixes
            samples or is not the same twice. Outputs on a GPU are judged after the last batch.
    """
    check_evaluation(model)
    apart, single = None, False
    allowed = _Allowed()
    for number, (x, y) in enumerate(
        each_as_outside(batches(data, model, batch_size, labels=labels))
    ):
        allowed.add(torch.isfinite(x).all(), f"data must be finite, got others in batch {number}")
        looked_at = apart is None or not apart.shown or (single and len(x) > 1)
        if looked_at:
            with forward_alone(model):
                apart, single = samples_apart(model, layout, x), len(x) == 1
        with forgetting(model):
            batch = Backpropagation(model, layout, x, apart)
        if looked_at:
            check_one_alone(model, x, batch.outputs)
        likelihood.check_outputs(batch.outputs)
        f = batch.outputs
        f = f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
        allowed.add(
            likelihood.valid(f),
            f"outputs of the model must be {likelihood.allowed}, got others in batch {number}",
        )
        yield Forward(batch, f, None if y is None else likelihood.check(f, y).to(f.device))
    allowed.check()


class _Allowed:
    """Whether numbers are allowed: of those in host memory at once, of others at the end, so that
    no batch waits for a device."""

    def __init__(self) -> None:
        self._later: list[tuple[Tensor, str]] = []

    def add(self, allowed: Tensor, text: str) -> None:
        self._later.append((allowed, text))
        if allowed.device.type == "cpu":
            self.check()
            self._later.clear()

    def check(self) -> None:
        """Raise ValueError with the text of the first that is not allowed."""
        for allowed, text in self._later:
            if not bool(allowed):
                raise ValueError(text)


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
    generator = torch.Generator("cpu").manual_seed(seed)
    for forward in forwards(
        model,
        likelihood,
        data,
        layout,
        batch_size=batch_size,
        labels=fisher_type == "empirical",
    ):
        columns = _columns(likelihood, forward, fisher_type, samples, generator)
        yield Sweep(forward.batch, columns)


def _columns(
    likelihood: Likelihood,
    forward: Forward,
    fisher_type: FisherType,
    samples: int,
    generator: torch.Generator,
) -> Callable[[], Iterator[Tensor]]:
    f, y = forward.f, forward.y
    if fisher_type == "exact":
        return lambda: each_as_outside(likelihood.root(f))
    if fisher_type == "mc":
        with outside():
            drawn = likelihood.draw(f, samples, generator)
        scores = (likelihood.score(f, labels) / samples**0.5 for labels in drawn)
        return lambda: each_as_outside(scores)
    assert y is not None
    return lambda: each_as_outside(likelihood.score(f, labels) for labels in (y,))
