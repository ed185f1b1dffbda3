"""A measurement within a stated memory: what it keeps of each layer, what each sample of a batch
takes on its way, and how many samples a batch may have.

    fixed + n (source + network + statistics) <= budget

*Fixed* is what moments, dictionaries, Krylov vectors and maps take, whatever the number of samples.
The rest grows with the samples n of a batch: what the source hands over, the activations that are
alive at the same time (measured on a few samples by `LivePeak`), each 1 + P times with tangents,
and the temporary copies of the statistics of one layer. Folds are dealt by the number of a sample,
so the result does not depend on n but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fisherfast.data import Batch, Data
from fisherfast.dual.memory import KEPT_BYTES, LARGE_BYTES
from fisherfast.estimation.features import MAX_WIDTH
from fisherfast.measurement.settings import MeasurementSettings
from fisherfast.model.sites import Site

__all__ = [
    "DOUBLE",
    "MAP_COPIES",
    "LayerCost",
    "LivePeak",
    "Plan",
    "Shares",
    "moment_bytes",
    "pilot_bytes",
    "plan",
    "shares",
    "streamed_sums",
]


DOUBLE = 8
"""Bytes of a float64 number."""

WORKSPACE = 2
"""Activations that are alive, and as much again: oneDNN reorders what a convolution reads and
writes, and stacks lie in blocks that may be twice as large."""

SOURCE_COPIES = 3
"""Batches of a source that makes them: the one in use, the next one, and what that is made of."""

ESTIMATE_MATRICES = 10
"""Matrices [k, k] float64 that exist while J of one layer is estimated."""

MAP_COPIES = 12
"""Arrays of each size that exist while a map is estimated, freed ones among them."""

LIBRARIES = 2**25
"""What torch, its threads and the kernels' tiles take besides, 32 MB."""

FEW_SAMPLES = 4
"""Samples of each condition in the pass that tells what a sample takes."""

PILOT_SHARE = 8
"""The pilot of a source that is read once keeps an eighth of the budget at most, of what is
left."""


class LivePeak(TorchDispatchMode):
    """Most bytes of new tensors that are alive at the same time inside.

    Attributes:
        nbytes: that number so far. What an operation allocates for itself does not show.

    Example:
        >>> import torch
        >>> with LivePeak() as live:
        ...     y = torch.ones(1000).exp().exp()
        >>> live.nbytes                     # of the three tensors two exist at a time, 4 bytes each
        8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self._live: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {storage._cdata for storage in _storages((args, kwargs))}
        known |= {reference.cdata for reference, _ in self._live}
        for storage in _storages(result):
            if storage._cdata not in known:
                known.add(storage._cdata)
                self._live.append((StorageWeakRef(storage), storage.nbytes()))
        self._live = [entry for entry in self._live if not entry[0].expired()]
        self.nbytes = max(self.nbytes, sum(size for _, size in self._live))
        return result


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """Of the tensors in nested containers; of those that have one."""
    dense = (
        value
        for value in tree_leaves(values)
        if isinstance(value, torch.Tensor) and value.layout is torch.strided
    )
    return [tensor.untyped_storage() for tensor in dense]


@dataclass(frozen=True)
class Shares:
    """What the samples of a batch take, in bytes per sample.

    Attributes:
        carried: stacks of each activation: 1 + P with tangents.
        source: what the source hands over, with its copies.
        network: activations of the network, without tangents.
        statistics: copies that the statistics of the layer with most of them make.
        pilot: the same in the pilot, which has no tangents but float64.
    """

    carried: int
    source: int
    network: int
    statistics: int
    pilot: int

    def of(self, samples: int) -> int:
        """Bytes of a batch."""
        stacks = self.network * self.carried
        measured = self.source + WORKSPACE * stacks + self.statistics
        pilot = self.source + WORKSPACE * self.network + self.pilot
        kept = KEPT_BYTES if self.carried > 1 and samples * stacks >= LARGE_BYTES else 0
        return samples * max(measured, pilot) + kept


@dataclass(frozen=True)
class Plan:
    """How a measurement stays within its budget.

    Attributes:
        batch_size: samples of a batch at most.
        survey_samples: samples of each condition that tell which layer depends on which.
        pilot_bytes: what the pilot keeps at most of a source that is read once.
    """

    batch_size: int
    survey_samples: int
    pilot_bytes: int


def shares(first: Batch, live: int, sites: Iterable[Site], data: Data, owned: bool) -> Shares:
    """What a sample takes.

    Args:
        first: the first samples.
        live: bytes of activations alive at the same time, of one sample without tangents.
        sites: the layers that are measured.
        data: where the samples come from.
        owned: batches are made by the source, and no views of what the user holds.
    """
    n = max(len(first), 1)
    carried = 1 if first.tangents is None else 1 + len(first.tangents)
    number = max(first.x.element_size(), torch.float32.itemsize)
    together = data.conditions if data.paired else 1
    batch = -(-first.nbytes // n)
    source = together * (batch * (SOURCE_COPIES if owned else 0) + batch)
    widest = max(site.dim for site in sites)
    narrow = max((site.dim for site in sites if site.dim <= MAX_WIDTH), default=0)
    # a copy of rows that lie channel by channel; standardised ones; their tangents
    statistics = carried * widest + (1 + carried + together) * narrow
    return Shares(carried, source, live, number * statistics, 3 * DOUBLE * widest)


@dataclass(frozen=True)
class LayerCost:
    """What one layer takes, in bytes.

    Attributes:
        name: of the layer.
        dim: d, its activations.
        what: takes most of it.
        kept: while samples stream by.
        extra: once more while it is estimated.
    """

    name: str
    dim: int
    what: str
    kept: int
    extra: int


def pilot_bytes(d: int) -> int:
    """Bytes of mean, variance and scale of d activations, and whether each varies."""
    return (2 * DOUBLE + DOUBLE + 1) * d


def moment_bytes(k: int, data: Data, folds: int) -> tuple[int, int]:
    """Bytes of the moments of k features, and bytes more while J is estimated from them."""
    P = data.parameters
    kept = 2 * DOUBLE * k * k + DOUBLE * streamed_sums(data, folds) * k
    return kept, DOUBLE * (ESTIMATE_MATRICES * k * k + 4 * k * (folds + 1) * P * P)


def streamed_sums(data: Data, folds: int) -> int:
    """Sums that are kept of each feature: by condition and fold, of what samples carry, of
    pairs."""
    P, C = data.parameters, data.conditions
    carried = folds * P if data.source in ("pathwise", "score") else 0
    return C * folds + carried + (C * C if data.paired else 0)


def plan(
    budget: int,
    costs: Sequence[LayerCost],
    per_sample: Shares,
    kept: int,
    data: Data,
    settings: MeasurementSettings,
    number: int,
) -> Plan:
    """The largest batches that stay within a budget of so many bytes.

    Args:
        budget: bytes.
        costs: of the layers that are measured.
        per_sample: what a sample takes.
        kept: bytes of batches that are kept already.
        data: where the samples come from.
        settings: of the measurement; no batch is larger than its batch_size.
        number: bytes of a number of the statistics, 4 or 8.

    Raises:
        ValueError: not even one sample fits. Says how much is needed, and which layer takes most.
    """
    lent = not data.repeatable
    fixed = kept + LIBRARIES + sum(cost.kept for cost in costs) + max(cost.extra for cost in costs)
    needed = fixed + per_sample.of(1)
    if needed > budget:
        largest = max(costs, key=lambda cost: cost.kept + cost.extra)
        raise ValueError(
            f"memory_budget must be at least {in_words(needed)} for these samples and layers, got"
            f" {in_words(budget)}: a sample takes {in_words(per_sample.of(1))} and layer"
            f" {largest.name!r} with {largest.dim} activations"
            f" {in_words(largest.kept + largest.extra)} for its {largest.what}; a smaller"
            " max_features takes less"
        )
    pilot = min(budget // PILOT_SHARE, budget - needed) if lent else 0
    fixed += pilot
    low, high = 1, settings.batch_size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fixed + per_sample.of(middle) <= budget else (low, middle - 1)
    every = number * sum(cost.dim for cost in costs)
    replay = 3 * every + WORKSPACE * per_sample.network + per_sample.source
    room = (budget - LIBRARIES - kept) // max(replay * data.conditions, 1)
    return Plan(low, max(room, 1), pilot)


def in_words(nbytes: int) -> str:
    """A number of bytes for a reader, rounded up."""
    unit, name = (10**9, "GB") if nbytes >= 10**9 else (10**6, "MB")
    return f"{-(-nbytes * 100 // unit) / 100:g} {name}"
