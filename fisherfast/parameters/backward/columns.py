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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fisherfast._progress import Progress
from fisherfast.data.inputs import joined
from fisherfast.model.default_device import each_as_outside, outside
from fisherfast.model.isolation import forgetting
from fisherfast.parameters.backward.backpropagation import Backpropagation
from fisherfast.parameters.backward.batches import Data, batches, count
from fisherfast.parameters.backward.layer_check import check_one_alone, samples_apart
from fisherfast.parameters.checks import check_evaluation, forward_alone, untouched
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.likelihood import Likelihood

FisherType = Literal["exact", "mc", "empirical"]


class Sweep:
    """One batch with its columns.

    Attributes:
        samples: n.
        matrices_without_tap: parameters of linear and convolution layers that come as rows.
    """

    def __init__(self, backpropagation: Backpropagation, columns: Iterator[Tensor]) -> None:
        self._backpropagation = backpropagation
        self._columns = columns
        self.samples = backpropagation.samples
        self.matrices_without_tap = backpropagation.matrices_without_tap

    def visit(self, visitor: Callable[[int, Rule, Tensor, Tensor], None]) -> None:
        """Send all columns back; visitor(column, rule, x, g) is called for each layer of each.

        Can be called once.
        """
        vector = next(self._columns, None)
        number = 0
        while vector is not None:
            following = next(self._columns, None)
            self._backpropagation.visit(
                vector,
                lambda rule, x, g, number=number: visitor(number, rule, x, g),  # type: ignore[misc]
                last=following is None,
            )
            vector, number = following, number + 1


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


@dataclass(frozen=True, eq=False)
class Source:
    """A network, its data and how the columns are made: everything that a pass over them needs.

    Attributes:
        model, likelihood, data, fisher_type, samples, batch_size, seed, progress: as of
            `ff.parameters.fisher`.
        layout: the parameters measured.
    """

    model: nn.Module
    likelihood: Likelihood
    data: Data
    layout: ParameterLayout
    fisher_type: FisherType
    samples: int = 1
    batch_size: int = 256
    seed: int = 0
    progress: bool | None = False
    _versions: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_versions", self._current_versions())

    def _current_versions(self) -> list[int]:
        every = dict(self.model.named_parameters())
        return [every[name]._version for name in self.layout.names]

    def read(self, add: Callable[[Sweep], None]) -> int:
        """Call `add` with every batch; return the number of samples."""
        seen = 0
        with (
            untouched(self.model, self.seed),
            Progress(self.progress, "Fisher matrix").bar(count(self.data)) as bar,
        ):
            for sweep in self.sweeps():
                add(sweep)
                seen += sweep.samples
                bar.update(sweep.samples)
        return seen

    def read_again(self, add: Callable[[Sweep], None], samples: int) -> None:
        """`read` in a later pass over the same network and data of so many samples.

        Raises:
            TypeError: data that can be read once only.
            ValueError: parameters that have changed since, or another number of samples.
        """
        if isinstance(self.data, Iterator):
            raise TypeError(
                f"data must be readable more than once, got {type(self.data).__name__}: pass a"
                " tensor, a Dataset or a DataLoader"
            )
        self.check_unchanged()
        seen = self.read(add)
        if seen != samples:
            raise ValueError(
                f"data must be the same every time, got {seen} samples after {samples}"
            )

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

    def sweeps(self) -> Iterator[Sweep]:
        """Run the network forward on every batch of the data.

        Raises:
            TypeError: data, outputs or labels of a kind that cannot be read.
            ValueError: no data; outputs or labels that the likelihood cannot have; a model that
                mixes samples or is not the same twice. Outputs on a GPU are judged after the last
                batch.
        """
        check_evaluation(self.model)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        apart, single = None, False
        allowed = _Allowed()
        read = batches(
            self.data, self.model, self.batch_size, labels=self.fisher_type == "empirical"
        )
        for number, (x, y) in enumerate(each_as_outside(read)):
            finite = torch.isfinite(joined(x)).all()
            allowed.add(finite, f"data must be finite, got others in batch {number}")
            checked = apart is None or not apart.shown or (single and len(x) > 1)
            if checked:
                with forward_alone(self.model):
                    apart, single = samples_apart(self.model, self.layout, x), len(x) == 1
            with forgetting(self.model):
                batch = Backpropagation(self.model, self.layout, x, apart)
            f = batch.outputs
            if checked:
                check_one_alone(self.model, x, f)
            self.likelihood.check_outputs(f)
            f = f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
            allowed.add(
                self.likelihood.valid(f),
                f"outputs of the model must be {self.likelihood.allowed}, got others in batch"
                f" {number}",
            )
            y = None if y is None else self.likelihood.check(f, y).to(f.device)
            yield Sweep(batch, self._columns(f, y, generator))
        allowed.check()

    def _columns(self, f: Tensor, y: Tensor | None, generator: torch.Generator) -> Iterator[Tensor]:
        if self.fisher_type == "exact":
            return each_as_outside(self.likelihood.root(f))
        labels: Iterable[Tensor]
        if y is not None:
            labels = [y]
        else:
            with outside():
                labels = self.likelihood.draw(f, self.samples, generator)
        return each_as_outside(
            self.likelihood.score(f, each) / self.samples**0.5 for each in labels
        )
