"""The memory of a measurement, and how many samples a batch may have within a budget.

    fixed + n (source + network + statistics) <= budget

*Fixed* is the memory of moments, dictionaries, Krylov vectors and maps, which does not depend on
the number of samples. The rest grows with the samples n of a batch: what the source yields, the
activations that are alive at the same time (measured on a few samples by `LivePeak`), each 1 + P
times with tangents, and the temporary copies of the statistics of one layer. Samples are dealt to
folds by their numbers, so the result depends on n by rounding only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fisherfast.data import Batch, Data
from fisherfast.data.inputs import joined
from fisherfast.dual.memory import KEPT_BYTES, LARGE_BYTES
from fisherfast.estimation.features import MAX_WIDTH
from fisherfast.model.sites import Site

DOUBLE = 8
"""Bytes of a float64 number."""

WORKSPACE = 2
"""Multiple of the live activations: oneDNN copies what a convolution reads and writes into another
layout, and stacks lie in blocks that may be twice as large."""

SOURCE_COPIES = 3
"""Batches alive in a source that makes them: the current one, the next one, and its parts."""

ESTIMATE_MATRICES = 10
"""Matrices [k, k] float64 that exist while J of one layer is estimated."""

MAP_COPIES = 12
"""Arrays of each size that exist while a map is estimated, including freed ones."""

LIBRARIES = 2**25
"""Memory of torch, its threads and the tiles of the kernels, 32 MB."""

FEW_SAMPLES = 4
"""Samples of each condition in the pass that measures the memory of a sample."""

PILOT_SHARE = 8
"""The pilot of a source that is read once keeps at most an eighth of the budget."""


class LivePeak(TorchDispatchMode):
    """Count the bytes of new tensors that are alive at the same time inside the block.

    Attributes:
        nbytes: the largest count so far, without what an operation allocates internally.

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
    """List the storages of the dense tensors in nested containers."""
    dense = (
        value
        for value in tree_leaves(values)
        if isinstance(value, Tensor) and value.layout is torch.strided
    )
    return [tensor.untyped_storage() for tensor in dense]


@dataclass(frozen=True)
class Shares:
    """The memory of the samples of a batch, in bytes per sample.

    Attributes:
        carried: stacks of each activation: 1 + P with tangents.
        source: what the source yields, with its copies.
        network: activations of the network, without tangents.
        statistics: copies made by the statistics of the layer that makes most.
        pilot: the same in the pilot, without tangents and in float64.
    """

    carried: int
    source: int
    network: int
    statistics: int
    pilot: int

    def of(self, samples: int) -> int:
        """Return the bytes of a batch."""
        stacks = self.network * self.carried
        measured = self.source + WORKSPACE * stacks + self.statistics
        pilot = self.source + WORKSPACE * self.network + self.pilot
        kept = KEPT_BYTES if self.carried > 1 and samples * stacks >= LARGE_BYTES else 0
        return samples * max(measured, pilot) + kept


class Plan(NamedTuple):
    """How a measurement stays within its budget.

    Attributes:
        batch_size: most samples of a batch.
        pilot_bytes: most bytes that the pilot keeps of a source that is read once.
    """

    batch_size: int
    pilot_bytes: int


def shares(first: Batch, live: int, costs: Iterable[LayerCost], data: Data, owned: bool) -> Shares:
    """Compute the memory of a sample.

    Args:
        first: the first samples.
        live: bytes of activations alive at the same time, of one sample without tangents.
        costs: of the layers that are measured.
        data: the source of the samples.
        owned: batches are made by the source, not views of the user's tensors.
    """
    n = max(len(first), 1)
    carried = 1 if first.tangents is None else 1 + len(first.tangents)
    number = max(joined(first.x).element_size(), torch.float32.itemsize)
    together = data.conditions if data.paired else 1
    batch = -(-first.nbytes // n)
    source = together * (batch * (SOURCE_COPIES if owned else 0) + batch)
    dims = [cost.site.dim for cost in costs]
    widest = max(dims)
    narrow = max((dim for dim in dims if dim <= MAX_WIDTH), default=0)
    # a copy of rows that lie channel by channel; standardised ones; their tangents
    statistics = carried * widest + (1 + carried + together) * narrow
    return Shares(carried, source, live, number * statistics, 3 * DOUBLE * widest)


class LayerCost(NamedTuple):
    """The memory of one layer, in bytes.

    Attributes:
        site: the layer.
        what: name of what takes most of it.
        kept: while samples stream by.
        extra: in addition while it is estimated.
    """

    site: Site
    what: str
    kept: int
    extra: int


def pilot_bytes(d: int) -> int:
    """Return the bytes of mean, variance and scale of d activations, and whether each varies."""
    return (2 * DOUBLE + DOUBLE + 1) * d


def moment_bytes(k: int, data: Data, folds: int) -> tuple[int, int]:
    """Return the bytes of the moments of k features, and the additional bytes of an estimate."""
    P = data.parameters
    kept = 2 * DOUBLE * k * k + DOUBLE * streamed_sums(data, folds) * k
    return kept, DOUBLE * (ESTIMATE_MATRICES * k * k + 4 * k * (folds + 1) * P * P)


def streamed_sums(data: Data, folds: int) -> int:
    """Return how many sums are kept of each feature: by condition and fold, of tangents or score,
    and of pairs."""
    P, C = data.parameters, data.conditions
    columns = {"pathwise": P, "score": P, "labelled": P + P * (P + 1) // 2}
    carried = folds * columns.get(data.source, 0)
    return C * folds + carried + (C * C if data.paired else 0)


def plan(
    budget: int,
    batch_size: int,
    costs: Sequence[LayerCost],
    per_sample: Shares,
    kept: int,
    data: Data,
    number: int,
) -> Plan:
    """Plan the largest batches that stay within a budget.

    Args:
        budget: bytes.
        batch_size: most samples of a batch.
        costs: of the layers that are measured.
        per_sample: memory of a sample.
        kept: bytes of batches that are kept already.
        data: the source of the samples.
        number: bytes of a number of the statistics, 4 or 8.

    Raises:
        ValueError: not even one sample fits (says how much is needed and which layer takes most).
    """
    fixed = kept + LIBRARIES + sum(cost.kept for cost in costs) + max(cost.extra for cost in costs)
    needed = fixed + per_sample.of(1)
    if needed > budget:
        cost = max(costs, key=lambda cost: cost.kept + cost.extra)
        raise ValueError(
            f"memory_budget must be at least {in_words(needed)} for these samples and layers, got"
            f" {in_words(budget)}: a sample takes {in_words(per_sample.of(1))} and layer"
            f" {cost.site.name!r} with {cost.site.dim} activations"
            f" {in_words(cost.kept + cost.extra)} for its {cost.what}; a smaller"
            " max_features takes less"
        )
    pilot = min(budget // PILOT_SHARE, budget - needed) if not data.repeatable else 0
    fixed += pilot
    largest = bisect_right(range(1, batch_size + 1), budget - fixed, key=per_sample.of)
    return Plan(largest, pilot)


def in_words(nbytes: int) -> str:
    """Write a number of bytes as text, rounded up."""
    unit, name = (10**9, "GB") if nbytes >= 10**9 else (10**6, "MB")
    return f"{-(-nbytes * 100 // unit) / 100:g} {name}"
