"""The score of a network's own parameters, sample by sample: d log p(y | x, w) / dw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisherfast._validation import check_seed, check_whole
from fisherfast.data.inputs import Inputs
from fisherfast.model.unwrap import unwrapped
from fisherfast.parameters.analysis.hotelling import Moments, TSquared, t_squared
from fisherfast.parameters.backward.batches import Data
from fisherfast.parameters.backward.columns import Source, Sweep
from fisherfast.parameters.checks import untouched
from fisherfast.parameters.layers.base import Rows, Rule
from fisherfast.parameters.layout import ParameterLayout, Selection, module_of
from fisherfast.parameters.likelihood import Likelihood
from fisherfast.parameters.likelihoods import as_likelihood
from fisherfast.parameters.structures.base import DENSE_BYTES
from fisherfast.results.table import aligned

DIRECTIONS = 4
"""Directions on which the scores of a layer are projected: the parameters themselves, and three at
random."""

LEAST_PER_DIRECTION = 10
"""Samples that a direction needs for its mean to be normal."""


def score(
    model: nn.Module,
    likelihood: Likelihood | str,
    x: Data,
    y: Tensor | np.ndarray | None = None,
    *,
    parameters: Selection = None,
    batch_size: int = 256,
) -> Scores:
    r"""The score of every sample: gradients of log p(y | x, w) with respect to the parameters w.

    .. math:: s_i = \frac{\partial \log p(y_i | x_i, w)}{\partial w}

    Args:
        model: f(x, w), in evaluation mode, every sample by itself: [n, ...] to outputs [n, ...].
        likelihood: p(y | f), a name or an instance, as of `ff.parameters.fisher`.
        x: inputs [n, ...], several of them in a tuple or dict; or, without y, a pair (x, y), a
            Dataset or DataLoader of (x, y), or an iterable of such batches.
        y: labels [n, ...], as the likelihood reads them.
        parameters: which are measured: None for all that require grad, a regular expression, names,
            or a function of the name.
        batch_size: samples per batch, of tensors and Datasets.

    Returns:
        The scores, computed as they are read: batches in a loop, their matrix, their mean, and a
        test whether that is zero. In nats and the unit 1 / w.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: labels missing; nothing to measure. Errors of the data or of the mode of the
            model come when the scores are read.

    Cost: none before the first reading; each takes one forward and one backward pass, and keeps
    one batch at a time.

    Example:
        >>> import torch, fisherfast as ff
        >>> model = torch.nn.Linear(2, 1)
        >>> x, y = torch.randn(100, 2), torch.randn(100, 1)
        >>> scores = ff.parameters.score(model, ff.parameters.Gaussian(), x, y, batch_size=60)
        >>> [batch["weight"].shape for batch in scores]
        [torch.Size([60, 1, 2]), torch.Size([40, 1, 2])]
        >>> scores.matrix().shape
        torch.Size([100, 3])
    """
    likelihood = as_likelihood(likelihood)
    check_whole("batch_size", batch_size, least=1)
    given = isinstance(x, Tensor | np.ndarray)
    several = y is not None and isinstance(x, tuple | Mapping) and bool(Inputs.of(x).samples)
    if given and y is None:
        raise ValueError("y must be given where x is a tensor of inputs, got none")
    if not (given or several) and y is not None:
        raise TypeError(
            "y must be left out where x holds the labels too, got labels and a"
            f" {type(x).__name__} of data"
        )
    model = unwrapped(model)
    layout = ParameterLayout.of(model, parameters)
    data = (x, y) if given or several else x
    return Scores(Source(model, likelihood, data, layout, "empirical", batch_size=batch_size))


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """Per-sample gradients of log p(y | x, w), computed when they are read.

    Attributes:
        source: network, likelihood and data; data that can be read once give their scores once.
    """

    source: Source

    @property
    def layout(self) -> ParameterLayout:
        """The parameters and their order."""
        return self.source.layout

    def __repr__(self) -> str:
        return f"<Scores of {self.layout.size} parameters, {self.source.likelihood!r}>"

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batch by batch, the scores of b samples by parameter: {name: [b, *shape]}."""
        for sweep in self.source.sweeps():
            found: dict[str, Tensor] = {}

            def keep(
                column: int, rule: Rule, x: Tensor, g: Tensor, found: dict[str, Tensor] = found
            ) -> None:
                found.update(zip(rule.names, rule.gradients(x, g), strict=True))

            with untouched(self.source.model):
                sweep.visit(keep)
            yield {name: found[name] for name in self.layout.names}

    def matrix(self) -> Tensor:
        """All scores [n, P] float64, parameters side by side as in `layout`.

        Raises:
            MemoryError: they would take more than 8 GiB.
        """
        rows: list[Tensor] = []
        samples = 0
        with untouched(self.source.model):
            for batch in self:
                samples += len(next(iter(batch.values())))
                if 8 * samples * self.layout.size > DENSE_BYTES:
                    raise MemoryError(
                        f"matrix must fit into 8 GiB, got {samples} samples and more of"
                        f" P = {self.layout.size} numbers: read the scores batch by batch"
                    )
                rows.append(
                    torch.cat([part.reshape(len(part), -1).double() for part in batch.values()], 1)
                )
        return torch.cat(rows)

    def mean(self) -> Tensor:
        """The mean score [P] float64: the gradient of the mean log-likelihood. The scores of single
        samples are not built."""
        sums: dict[str, Any] = defaultdict(float)

        def add(column: int, rule: Rule, x: Tensor, g: Tensor) -> None:
            parts = rule.weighted_sum(x, g, torch.ones(len(g), dtype=g.dtype, device=g.device))
            for name, part in zip(rule.names, parts, strict=True):
                sums[name] += part.double()

        samples = self.source.read(lambda sweep: sweep.visit(add))
        return self.layout.flatten(sums) / samples

    def mean_zero_test(self, *, directions: int = DIRECTIONS, seed: int = 0) -> MeanZeroTest:
        r"""Test whether the mean score is zero, as it is where the labels come from p(y | x, w).

        The scores of each layer are projected on its parameters w themselves (is the network too
        sure, or not enough?) and on random directions; Hotelling's T^2 measures the distance of the
        mean of the projections from zero. For all layers together, the directions of the layers are
        added up, each in the unit of its root mean square.

        A small p-value: the network is not calibrated to these labels. A large one proves little:

        - every expectation of the score is zero at the data that the network was trained on to the
          end, so that held-out data are needed;
        - a Gaussian of a wrong variance has scores of mean zero all the same (their covariance is
          wrong: the empirical trace is not the exact one);
        - the error may be orthogonal to the directions: take more, or another seed.

        Args:
            directions: of each layer, at most a tenth of the samples.
            seed: of the random directions, in [-2^63, 2^63); the global random state is not
                touched.

        Raises:
            TypeError: no whole number.
            ValueError: too few samples for the directions.

        The p-value is uniform to the extent that the projections' means are normal: in the limit of
        many samples. Cost: one forward and one backward pass, and [n, directions] numbers of each
        layer's batch.
        """
        check_whole("directions", directions, least=1)
        check_seed(seed)
        layers = list(dict.fromkeys(map(module_of, self.layout.names)))
        aim = self._directions(directions, seed)
        moments = Moments(len(layers) * directions, next(iter(aim.values())).device)
        self.source.read(lambda sweep: moments.add(_projected(sweep, layers, aim).flatten(1)))
        if moments.samples < LEAST_PER_DIRECTION * directions:
            raise ValueError(
                f"data must hold at least {LEAST_PER_DIRECTION} samples per direction"
                f" ({LEAST_PER_DIRECTION * directions}), got {moments.samples}"
            )
        return _tested(moments, layers, directions)

    def _directions(self, directions: int, seed: int) -> dict[str, Tensor]:
        """[directions, *shape] of each parameter, each of length 1, but for a zero parameter."""
        generator = torch.Generator("cpu").manual_seed(seed)
        parameters = dict(self.source.model.named_parameters())
        found = {}
        for name, shape in zip(self.layout.names, self.layout.shapes, strict=True):
            value = parameters[name].detach()
            aim = torch.randn(
                directions, shape.numel(), generator=generator, dtype=torch.float64, device="cpu"
            )
            aim[0] = value.flatten().cpu()
            aim = torch.nn.functional.normalize(aim, dim=1)
            found[name] = aim.reshape(directions, *shape).to(value)
        return found


def _projected(sweep: Sweep, layers: list[str], aim: Mapping[str, Tensor]) -> Tensor:
    """<score, direction> of each sample in the directions of each layer, [n, layers, directions]
    float64."""
    like = next(iter(aim.values()))
    directions = len(like)
    rows = like.new_zeros(sweep.samples, len(layers), directions, dtype=torch.float64)

    def project(column: int, rule: Rule, x: Tensor, g: Tensor) -> None:
        if isinstance(rule, Rows):  # parameters of several layers
            for name, part in zip(rule.names, rule.gradients(x, g), strict=True):
                own, part = (r.reshape(len(r), -1).to(part.dtype) for r in (aim[name], part))
                rows[:, layers.index(module_of(name))] += part @ own.T
            return
        here = rows[:, layers.index(module_of(rule.names[0]))]
        for k in range(directions):
            here[:, k] += rule.products(x, g, [aim[name][k] for name in rule.names])

    sweep.visit(project)
    return rows


def _tested(moments: Moments, layers: list[str], directions: int) -> MeanZeroTest:
    n, mean, covariance = moments.samples, moments.mean, moments.covariance
    single = []
    for number in range(len(layers)):
        own = slice(number * directions, (number + 1) * directions)
        single.append(t_squared(mean[own], covariance[own, own], n))
    size = (covariance.diagonal() + mean.square()).sqrt()
    weights = torch.where(size > 0, size.reciprocal(), 0)
    each = torch.eye(directions, dtype=mean.dtype, device=mean.device).repeat(len(layers), 1)
    each *= weights[:, None]
    whole = t_squared(each.T @ mean, each.T @ covariance @ each, n)
    by_layer = dict(zip(layers, single, strict=True))
    return MeanZeroTest(whole.statistic, whole.degrees, whole.p_value, n, by_layer)


@dataclass(frozen=True, repr=False)
class MeanZeroTest(TSquared):
    """Test of a mean score of zero, over all layers and for each.

    Attributes:
        statistic: Hotelling's T^2 of all layers together.
        degrees: (q, n - q) of the F distribution that it is held against.
        p_value: chance of a statistic at least as large if the mean score is zero.
        samples: n.
        layers: the same of each layer, by its name; their p-values depend on each other.
    """

    samples: int
    layers: dict[str, TSquared]

    def __repr__(self) -> str:
        rows = [("layer", "T^2", "degrees", "p"), _row("all", self)]
        rows += [_row(name or "(model)", layer) for name, layer in self.layers.items()]
        title = f"MeanZeroTest: p = {self.p_value:.3g}, {self.samples} samples"
        return "\n".join([title, *aligned(rows)])


def _row(name: str, test: TSquared) -> tuple[str, str, str, str]:
    first, second = test.degrees
    return name, f"{test.statistic:.4g}", f"{first}, {second}", f"{test.p_value:.3g}"
