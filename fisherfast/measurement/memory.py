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

import numbers
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fisherfast.data import Batch, Data
from fisherfast.dual.memory import KEPT_BYTES, LARGE_BYTES
from fisherfast.estimation.features import BLOCK_ROWS, MAX_WIDTH, MIN_LIFT_SHARE
from fisherfast.estimation.krylov import KRYLOV_VECTORS, TILE_NUMBERS, TILE_ROWS
from fisherfast.measurement.replicates import KEPT_SAMPLES, kept_samples
from fisherfast.model.sites import Site
from fisherfast.results.information_map import has_map, is_mapped

__all__ = ["LivePeak", "Plan", "Shares", "check_budget", "layer_bytes", "plan", "shares"]

UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
"""Bytes of "kB", "MiB", ..., in lower case."""

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


def check_budget(memory_budget: int | str | None) -> dict[str, int | None]:
    """The setting memory_budget in bytes; None for no bound.

    Raises:
        TypeError: neither a whole number, nor a string, nor None.
        ValueError: not positive, or a string that is no number with a unit of bytes.

    Example:
        >>> check_budget("1.5 GB"), check_budget("512 MiB")
        ({'memory_budget': 1500000000}, {'memory_budget': 536870912})
    """
    if memory_budget is None:
        return {"memory_budget": None}
    if isinstance(memory_budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", memory_budget)
        if match is None or match[2].lower() not in UNITS:
            raise ValueError(
                f'memory_budget must be like "2 GB" or "512 MiB", got {memory_budget!r}'
            )
        size = int(float(match[1]) * UNITS[match[2].lower()])
    elif isinstance(memory_budget, numbers.Integral) and not isinstance(memory_budget, bool):
        size = int(memory_budget)
    else:
        raise TypeError(
            'memory_budget must be a whole number of bytes, a string like "2 GB", or None, got'
            f" {memory_budget!r}"
        )
    if size < 1:
        raise ValueError(f"memory_budget must be positive, got {memory_budget!r}")
    return {"memory_budget": size}


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


def layer_bytes(
    site: Site, wide: bool, data: Data, settings: dict[str, Any], number: int
) -> tuple[int, int]:
    """What is kept of one layer, and what else its estimate takes, in bytes.

    Args:
        site: the layer.
        wide: it is compressed.
        data: where the samples come from.
        settings: of the measurement.
        number: bytes of a number of the statistics, 4 or 8.
    """
    P, C, F, d = data.parameters, data.conditions, settings["folds"], site.dim
    streams = C * F + (F * P if data.source in ("pathwise", "score") else 0)
    streams += C * C if data.paired else 0
    pilot = (2 * DOUBLE + DOUBLE + 1) * d  # mean, variance, scale, whether it varies
    if wide:
        q = max(min(KRYLOV_VECTORS, settings["max_features"] // P), 1)
        k = q * P
        vectors = 2 * 2 * k * d * number  # of both halves, and once more scaled
        sums = 2 * DOUBLE * d * (C + 2 * P + 3)  # means, products with S, scales
        tiles = 3 * number * max(TILE_NUMBERS, TILE_ROWS * d)
        kept = pilot + vectors + sums + tiles
        extra = DOUBLE * d * (3 * P + C + 4)  # new vectors before they are orthonormal
    else:
        most = max(settings["max_features"] - d, settings["max_features"] // MIN_LIFT_SHARE)
        lifted = most if d <= MAX_WIDTH else settings["max_features"] - d
        raw = d if d <= MAX_WIDTH else settings["max_features"]
        k = raw + max(lifted, 0)
        lift = (k - raw) * d * number
        carried = P if data.source == "pathwise" else 0
        held = number * (KEPT_SAMPLES + kept_samples(raw, data.source)) * raw * (1 + carried)
        kept = pilot + lift + held + 3 * number * d
        extra = max(lift // number + BLOCK_ROWS * d, 0) * DOUBLE  # drawn in float64
    moments = 2 * DOUBLE * k * k + DOUBLE * streams * k
    kept += moments
    if settings["probe"] is not None and not wide:  # the same of each half, with another lift
        kept += 2 * (moments + lift)
    extra = max(extra, DOUBLE * (ESTIMATE_MATRICES * k * k + 4 * k * (F + 1) * P * P))
    if is_mapped(settings["maps"], site.names) and has_map(site.shape):
        covariance = DOUBLE * d * site.shape[0]
        kept += covariance + DOUBLE * d * streams
        solved, folds = d * (F + 1) * P, d // site.shape[0] * F * P * P
        extra = max(extra, MAP_COPIES * (covariance + DOUBLE * (solved + folds)))
    return kept, extra


def plan(
    budget: int,
    layers: list[tuple[Site, bool]],
    per_sample: Shares,
    kept: int,
    data: Data,
    settings: dict[str, Any],
    number: int,
) -> Plan:
    """The largest batches that stay within a budget of so many bytes.

    Args:
        budget: bytes.
        layers: those that are measured, and whether they are compressed.
        per_sample: what a sample takes.
        kept: bytes of batches that are kept already.
        data: where the samples come from.
        settings: of the measurement; no batch is larger than its batch_size.
        number: bytes of a number of the statistics, 4 or 8.

    Raises:
        ValueError: not even one sample fits. Says how much is needed, and which layer takes most.
    """
    costs = [layer_bytes(site, wide, data, settings, number) for site, wide in layers]
    lent = not data.repeatable
    fixed = kept + LIBRARIES + sum(own for own, _ in costs) + max(extra for _, extra in costs)
    needed = fixed + per_sample.of(1)
    if needed > budget:
        largest = max(range(len(costs)), key=lambda i: sum(costs[i]))
        site, wide = layers[largest]
        what = "Krylov vectors" if wide else "moments"
        raise ValueError(
            f"memory_budget must be at least {in_words(needed)} for these samples and layers, got"
            f" {in_words(budget)}: a sample takes {in_words(per_sample.of(1))} and layer"
            f" {site.name!r} with {site.dim} activations {in_words(sum(costs[largest]))} for its"
            f" {what}; a smaller max_features takes less"
        )
    pilot = min(budget // PILOT_SHARE, budget - needed) if lent else 0
    fixed += pilot
    low, high = 1, settings["batch_size"]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fixed + per_sample.of(middle) <= budget else (low, middle - 1)
    every = number * sum(site.dim for site, _ in layers)
    replay = 3 * every + WORKSPACE * per_sample.network + per_sample.source
    room = (budget - LIBRARIES - kept) // max(replay * data.conditions, 1)
    return Plan(low, max(room, 1), pilot)


def in_words(nbytes: int) -> str:
    """A number of bytes for a reader, rounded up."""
    unit, name = (10**9, "GB") if nbytes >= 10**9 else (10**6, "MB")
    return f"{-(-nbytes * 100 // unit) / 100:g} {name}"
