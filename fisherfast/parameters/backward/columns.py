"""Columns of a root of the Fisher matrix, which each batch sends back through the network.

For sample i with outputs f_i, the Fisher matrix of the parameters is sum_r (J_i^T r)(J_i^T r)^T,
where J_i = df_i/dw and the columns r are such that

    exact       sum_r r r^T = E_{y ~ p(y | f_i)}[s s^T],  s = d log p(y | f_i) / df_i
    mc          r = s(y) / sqrt(samples), y drawn from p(y | f_i)
    empirical   r = s(y), y the label in the data: the second moment of the training gradients,
                not the Fisher matrix

All structures use the same columns, one backward pass each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fisherfast._progress import progress_bar
from fisherfast.model.default_device import each_as_outside, on_host, outside
from fisherfast.model.isolation import forgetting, own_random_state
from fisherfast.parameters.backward.backpropagation import Backpropagation
from fisherfast.parameters.backward.batches import Data, batches, count
from fisherfast.parameters.backward.layer_check import check_one_alone, samples_apart
from fisherfast.parameters.checks import check_evaluation, forward_alone
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.likelihoods import Likelihood

__all__ = ["FisherType", "Forward", "Source", "Sums", "Sweep", "forwards"]

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
    """A completed forward pass, with outputs and labels for the likelihood.

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
    """Yield the forward pass of every batch of the data.

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
        checked = apart is None or not apart.shown or (single and len(x) > 1)
        if checked:
            with forward_alone(model):
                apart, single = samples_apart(model, layout, x), len(x) == 1
        with forgetting(model):
            batch = Backpropagation(model, layout, x, apart)
        if checked:
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
    """Checks that numbers are allowed: those in host memory at once, others at the end, so that no
    batch waits for a device."""

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


Summed = TypeVar("Summed", covariant=True)


class Sums(Protocol[Summed]):
    """Sums over batches, such as those of each structure."""

    def add(self, sweep: Sweep) -> None: ...
    def result(self, samples: int) -> Summed: ...


@dataclass(frozen=True, eq=False)
class Source:
    """A network, its data and how the columns are made: everything that a pass over them needs.

    Attributes:
        model, likelihood, data, layout: as of `forwards`.
        fisher_type, samples, batch_size, seed, progress: as of `ff.parameters.fisher`.
    """

    model: nn.Module
    likelihood: Likelihood
    data: Data
    layout: ParameterLayout
    fisher_type: FisherType
    samples: int
    batch_size: int
    seed: int
    progress: bool
    _versions: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_versions", self._current_versions())

    def _current_versions(self) -> list[int]:
        every = dict(self.model.named_parameters())
        return [every[name]._version for name in self.layout.names]

    def total(self, sums: Sums[Summed], *, expected: int | None = None) -> Summed:
        """Add the sweeps of all batches to `sums`; return its result.

        Raises:
            ValueError: the data hold another number of samples than expected.
        """
        with (
            on_host(),
            own_random_state(self.model, self.seed),
            progress_bar(self.progress, total=count(self.data), title="Fisher matrix") as bar,
        ):
            seen = 0
            for sweep in self._sweeps():
                sums.add(sweep)
                seen += sweep.samples
                bar.update(sweep.samples)
            if expected not in (None, seen):
                raise ValueError(
                    f"data must be the same every time, got {seen} samples after {expected}"
                )
            return sums.result(seen)

    def total_again(self, sums: Sums[Summed], samples: int) -> Summed:
        """`total` in a later pass over the same network and data of so many samples.

        Raises:
            TypeError: data that can be read once only.
            ValueError: parameters that have changed since.
        """
        if isinstance(self.data, Iterator):
            raise TypeError(
                f"data must be readable more than once, got {type(self.data).__name__}: pass a"
                " tensor, a Dataset or a DataLoader"
            )
        self.check_unchanged()
        return self.total(sums, expected=samples)

    def check_unchanged(self) -> None:
        """Raise ValueError if a parameter was written to since the measurement."""
        for name, now, then in zip(
            self.layout.names, self._current_versions(), self._versions, strict=True
        ):
            if now != then:
                raise ValueError(
                    f"model must be as it was when F was measured, got {name!r} that has changed;"
                    " measure F again"
                )

    def _sweeps(self) -> Iterator[Sweep]:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        for forward in forwards(
            self.model,
            self.likelihood,
            self.data,
            self.layout,
            batch_size=self.batch_size,
            labels=self.fisher_type == "empirical",
        ):
            columns = _columns(self.likelihood, forward, self.fisher_type, self.samples, generator)
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
