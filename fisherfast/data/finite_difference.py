"""Samples of two conditions per parameter, a finite step apart.

`FiniteDifference` holds 2 P conditions, one below and one above theta for each of the P parameters.
Nothing is loaded or copied before it is read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fisherfast._validation import check_names
from fisherfast.data import sources
from fisherfast.data.batch import Batch
from fisherfast.data.from_sources import FromSources
from fisherfast.data.groups import check_groups
from fisherfast.data.inputs import check_forms
from fisherfast.data.sources import Source


class FiniteDifference(FromSources):
    r"""Samples at theta - dtheta/2 and at theta + dtheta/2.

    The derivative of a mean is :math:`(\mu_+ - \mu_-) / d\theta`. **dtheta is the full separation
    of the two conditions**; codes that use half steps must double theirs.

    Args:
        minus: samples at theta - dtheta/2: a tensor or array [n, ...] of any real dtype, a
            ``Dataset``, a ``DataLoader``, an iterable of batches [n_batch, ...], or a function
            without arguments that returns such an iterable (for streams that can be replayed).
            For P parameters a **list** of P of these. Several inputs of a model are a **tuple**
            (``model(*x)``) or a dict (``model(**x)``) of tensors; a Dataset or loader yields them
            as its items, whose entries are all passed to the model: leave out labels.
        plus: samples at theta + dtheta/2, in the same form.
        dtheta: full separation in the unit of theta, positive; a sequence of P numbers for P
            parameters.
        paired: the i-th samples of both conditions were drawn with the same noise (a simulator with
            a common seed). The derivative is then far less noisy; measured data are never paired.
        groups: labels [n] of samples that depend on each other, as a tensor, array or sequence of
            whole numbers or strings: pictures of one object, repeated measurements, pieces of a
            time series. Samples with the same label are one group, which counts as one independent
            sample. One array for all conditions, or a **list** with one for each of them (minus and
            plus of the first parameter, then of the second); a label means the same group in all
            conditions.
        names: names of the P parameters, for tables and figures.

    Raises:
        ValueError: dtheta is not positive and finite; the lists differ in length; tensors differ in
            sample shape; paired tensors differ in their number of samples; groups differ in their
            number of samples, or the samples have no fixed order; names are not P different ones.
        TypeError: complex samples, or a source that cannot be read.

    Example:
        >>> import torch, fisherfast as ff
        >>> x = torch.randn(2, 100, 3)
        >>> data = ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2)
        >>> data.parameters
        1
        >>> objects = torch.arange(100) // 4                       # four pictures of each object
        >>> data = ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2, groups=objects)
    """

    def __init__(
        self,
        minus: Source | list[Source],
        plus: Source | list[Source],
        dtheta: float | Sequence[float],
        *,
        paired: bool = False,
        groups: Any = None,
        names: Sequence[str] | None = None,
    ) -> None:
        minus_list = _as_list(minus)
        plus_list = _as_list(plus)
        if not minus_list:
            raise ValueError("minus must hold at least one condition, got an empty list")
        if len(minus_list) != len(plus_list):
            raise ValueError(
                f"plus must hold as many conditions as minus,"
                f" got {len(plus_list)} and {len(minus_list)}"
            )
        self.dtheta = check_dtheta(dtheta, len(minus_list))
        self.parameters = len(minus_list)
        self.names = check_names(names, self.parameters)
        self.conditions = 2 * self.parameters
        self.paired = bool(paired)
        self.source = "paired" if self.paired else "independent"
        given = itertools.chain(*zip(minus_list, plus_list, strict=True))
        conditions = [self.condition_name(c) for c in range(self.conditions)]
        self._sources = list(map(sources.check_source, given, conditions))
        for source, name in zip(self._sources, conditions, strict=True):
            if self.paired:
                _check_order(source, name)
        _check_shapes(self._sources, self.paired)
        self.groups = check_groups(groups, self._sources, conditions, paired=self.paired)

    def _batch(self, condition: int, item: Any, rows: object, where: str) -> Batch:
        return Batch(sources.as_batch(item, self.condition_name(condition)))

    def __repr__(self) -> str:
        counts = [self.samples(c) for c in range(self.conditions)]
        return f"FiniteDifference({self.source}, dtheta={list(self.dtheta)}, samples={counts})"


def _as_list(source: Source | list[Source]) -> list[Source]:
    return source if isinstance(source, list) else [source]


def check_dtheta(dtheta: float | Sequence[float], parameters: int) -> tuple[float, ...]:
    """Return P positive full separations, given one number or P of them."""
    values = np.atleast_1d(np.asarray(dtheta))
    if values.dtype.kind not in "iuf":
        raise TypeError(f"dtheta must be a number or a sequence of numbers, got {dtheta!r}")
    steps = [float(value) for value in values.ravel()]
    if len(steps) == 1:
        steps *= parameters
    if len(steps) != parameters:
        raise ValueError(
            f"dtheta must hold one step or one per parameter ({parameters}), got {len(steps)}"
        )
    if not all(math.isfinite(step) and step > 0 for step in steps):
        raise ValueError(f"dtheta must be positive and finite, got {dtheta}")
    return tuple(steps)


def _check_shapes(conditions: list[Source], paired: bool) -> None:
    sized = [s for s in conditions if sources.resident(s)]
    check_forms(sized)
    counts = {len(s) for s in sized}
    if paired and len(counts) > 1:
        raise ValueError(
            f"paired conditions must have the same number of samples, got {sorted(counts)}"
        )


def _check_order(source: Source, name: str) -> None:
    """Raise for a shuffled loader, which would silently mix up pairs."""
    sampler = getattr(source, "sampler", None)
    if isinstance(sampler, torch.utils.data.RandomSampler):
        raise ValueError(f"{name} must keep its order when paired, got a shuffled DataLoader")
