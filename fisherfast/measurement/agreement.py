"""`Agreement`: the ranks of a group compare and add up their values in one measurement.

Every rank runs the same measurement on its share of the samples. The ranks compare settings, data
and model at the start, and layers after the first samples. After each pass their sums are added up,
and from then on every rank has, and computes, the same. With one process nothing is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fisherfast.data import Batch, Data
from fisherfast.data.groups import joined_groups
from fisherfast.data.inputs import tensors_of
from fisherfast.estimation.pilot import PilotMoments
from fisherfast.measurement.memory import Plan
from fisherfast.measurement.meter import Meter
from fisherfast.measurement.settings import MeasurementSettings
from fisherfast.model.sites import Site
from fisherfast.parallel.ranks import Ranks, check_same
from fisherfast.parallel.share import Share, WholeData, shares_of

SEED_STRIDE = 7_919
"""Distance of the seeds of two ranks: a prime, so that seeds met in practice do not collide."""

SAME_DATA = (
    ": every rank must have the same samples, in the same order (a seed?), or its own share,"
    " ff.Shard(data)"
)

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype of each number of bytes, to add up the bits of numbers."""


class Agreement:
    """Exchange of one measurement with the other ranks.

    Args:
        ranks: of the group; None for this process alone.

    Attributes:
        share: the samples that this rank measures, after `begin`; None for all.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self._ranks = ranks
        self._buffers: dict[str, Tensor] = {}
        self._numbered = True  # samples, over all ranks
        self.share: Share | None = None

    @property
    def leads(self) -> bool:
        """True on the one rank that shows progress and warnings."""
        return self._ranks is None or self._ranks.rank == 0

    def begin(
        self, model: nn.Module | None, data: Data, layers: Any, settings: MeasurementSettings
    ) -> Data:
        """Agree on what is measured, and set `share`.

        Returns:
            The data of all ranks.

        Raises:
            ValueError: ranks disagree, or all have the same data and these do not repeat.
        """
        if self._ranks is None:
            return data
        counts = [data.samples(c) for c in range(data.conditions)]
        buffers = {} if model is None else dict(_with_numbers(model.named_buffers()))
        own = {
            "compared": _compared(model, data, layers, settings),
            "samples": counts,
            "groups": data.groups if data.sharded else None,
            "buffers": {name: checksum(buffer) for name, buffer in buffers.items()},
        }
        gathered = self._ranks.exchange("comparing settings, data and model", own)
        check_same([each["compared"] for each in gathered])
        differ = [n for n in buffers if len({each["buffers"][n] for each in gathered}) > 1]
        self._buffers = {name: buffers[name].clone() for name in differ}
        self._ranks.broadcast(list(self._buffers.values()))
        if not data.sharded:
            _check_repeats(data)
            self.share = Share(self._ranks.rank, self._ranks.size)
            return data
        everywhere = [each["samples"] for each in gathered]
        self.share, total = shares_of(everywhere, self._ranks.rank)
        self._numbered = total is not None
        if total is None and settings.probe is not None:
            raise ValueError(
                "data must tell how many samples each rank has, for a probe in a group, got"
                f" {everywhere} per rank and condition"
            )
        groups = None
        if data.groups is not None:
            groups = joined_groups([each["groups"] for each in gathered])
        return WholeData(data, total, groups)

    def copy_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of rank 0 into a model if those of the ranks differ. Call inside
        `evaluation`, which restores them."""
        for name, buffer in model.named_buffers():
            if name in self._buffers:
                buffer.copy_(self._buffers[name])

    def agree_on_samples(self, data: Data, heads: Sequence[Batch]) -> None:
        """Check that the first samples of data that all ranks have are the same on all."""
        if self._ranks is None or data.sharded:
            return
        names = [f"first samples of {data.condition_name(c)!r}" for c in range(data.conditions)]
        sums = [f"checksum {sum(map(checksum, tensors_of(head.x))):x}" for head in heads]
        values = dict(zip(names, sums, strict=True))
        self._ranks.agree("reading the first samples", values, SAME_DATA)

    def agree_on_paths(self, sites: Sequence[Site]) -> None:
        """Take cuts, chains and copies of rank 0: whether a shift is too wide for the numbers is
        judged by samples."""
        if self._ranks is None:
            return
        found = {s.name: (s.descendants, s.cut, s.copy_of, s.summed) for s in sites}
        of_first = self._ranks.exchange("following the model", found)[0]
        for site in sites:
            if site.name in of_first:
                site.descendants, site.cut, site.copy_of, site.summed = of_first[site.name]

    def agree_on_layers(self, sites: Sequence[Site], measured: Sequence[Meter]) -> None:
        """Check that the layers are the same on all ranks."""
        if self._ranks is None:
            return
        compared: dict[str, Any] = {"list of layers": [site.name for site in sites]}
        compared |= {f"layer {site.name!r}": [site.kind, list(site.shape)] for site in sites}
        compared["list of layers to measure"] = _kinds(measured)
        self._ranks.agree("listing the layers", compared)

    def smallest(self, plan: Plan) -> Plan:
        """Return the smallest batches that any rank has planned: they are dealt by number."""
        if self._ranks is None:
            return plan
        everywhere = self._ranks.exchange("planning batches", tuple(plan))
        return Plan(*map(min, zip(*everywhere, strict=True)))

    def share_pilot(self, meters: Sequence[Meter], counts: bool) -> None:
        """Merge the pilots of ranks that have different first samples.

        Args:
            meters: of all layers.
            counts: whether any of the first samples are on this rank.
        """
        if self._ranks is None or self.share is None or self.share.turns > 1:
            return
        meters = [leaf for meter in meters for leaf in meter.leaves]
        pilots = [meter.pilot for meter in meters] if counts else []
        own = [(p.count, p.parts().cpu(), p.rounding, p.noise, p.ill_conditioned()) for p in pilots]
        gathered = self._ranks.exchange("joining the first samples", own)
        for meter, *states in zip(meters, *filter(None, gathered), strict=True):
            device, meter.pilot = meter.pilot.parts().device, PilotMoments()
            for count, parts, *relative in states:
                if count:
                    meter.pilot.merge(count, parts.to(device), *relative)

    def begin_pass(self, meters: Sequence[Meter], seed: int) -> None:
        """Check that all ranks measure the same layers, take what rank 0 has learned, and give each
        rank its own random numbers, for a network that draws some."""
        if self._ranks is None:
            return
        self._ranks.agree("beginning a pass", {"layers of a pass": _kinds(meters)})
        self._ranks.broadcast([tensor for meter in meters for tensor in meter.learned()])
        if self._ranks.rank:
            torch.manual_seed((seed + SEED_STRIDE * self._ranks.rank) % 2**64)

    def end_pass(self, meters: Sequence[Meter]) -> None:
        """Add up the sums of all ranks, and join the samples that they have kept."""
        if self._ranks is None:
            return
        sums = [meter.shared_sums() for meter in meters]
        numbers = [sum(part.numel() for part in parts) for parts in sums]
        self._ranks.agree("ending a pass", {"numbers to add up": numbers})
        for meter, parts in zip(meters, sums, strict=True):
            self._ranks.add_up(parts)
            stores = meter.shared_samples()
            if not self._numbered:
                for store in stores:
                    store.forget()
            elif stores:
                own = [store.state() for store in stores]
                gathered = self._ranks.exchange("joining samples", own)
                for store, states in zip(stores, zip(*gathered, strict=True), strict=True):
                    store.join(states, parts[-1].device)


def _compared(
    model: nn.Module | None, data: Data, layers: Any, settings: MeasurementSettings
) -> dict[str, Any]:
    """List what must be the same on all ranks, by its name in messages."""
    conditions = range(data.conditions)
    compared: dict[str, Any] = {"model": "none" if model is None else type(model).__name__}
    compared |= settings.to_dict()
    compared |= {
        "data": "each rank's own share" if data.sharded else "the same data for all ranks",
        "parameters of the data": data.parameters,
        "conditions of the data": data.conditions,
        "points of theta": data.centres.tolist(),
        "repetition of the data": [data.repeats(c) for c in conditions],
        "layers": repr(layers) if not callable(layers) else "a function",
        "groups": "none" if data.groups is None else "some",
    }
    if not data.sharded:
        compared["samples per condition"] = [data.samples(c) for c in conditions]
        own = () if data.groups is None else data.groups.numbers
        compared["groups of the samples"] = [f"checksum {checksum(each):x}" for each in own]
    if model is not None:
        for name, tensor in _with_numbers(model.named_parameters()):
            compared[f"parameter {name}"] = f"{_form(tensor)} (checksum {checksum(tensor):x})"
        for name, tensor in _with_numbers(model.named_buffers()):
            compared[f"buffer {name}"] = _form(tensor)
    return compared


def checksum(tensor: Tensor) -> int:
    """Sum the bits of a tensor, read as integers: equal for equal numbers in any order of
    summation."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    integers = INTEGERS[tensor.element_size()]
    return int(tensor.contiguous().view(integers).sum(dtype=torch.int64)) & (2**64 - 1)


def _with_numbers(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """Select the named tensors that have bits to compare."""
    return (
        (name, tensor)
        for name, tensor in tensors
        if not (is_lazy(tensor) or tensor.is_meta) and tensor.layout is torch.strided
    )


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype)[6:]}"


def _kinds(meters: Sequence[Meter]) -> list[str]:
    return [f"{type(meter).__name__} {meter.site.name}" for meter in meters]


def _check_repeats(data: Data) -> None:
    if not data.repeatable:
        raise ValueError(
            "data must come in the same order at every pass to be dealt to ranks (tensors, arrays,"
            " Datasets, DataLoaders that do not shuffle, Simulator), or be each rank's own share,"
            f" ff.Shard(data), got {data!r}"
        )
