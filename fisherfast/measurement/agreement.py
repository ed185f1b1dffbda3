"""How the ranks of a group make one measurement: what they must agree on, and what they add up.

Every rank runs the same measurement on its share of the samples. They agree on the settings, the
model and the layers before samples count; after each pass the sums of all are added up, and from
there on every rank has, and computes, the same. With one process all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fisherfast.data import Batch, Data
from fisherfast.data.dealing import Dealing
from fisherfast.data.groups import Groups, joined_groups
from fisherfast.estimation.pilot import PilotMoments
from fisherfast.measurement.memory import Plan
from fisherfast.measurement.meter import Meter
from fisherfast.measurement.settings import Settings
from fisherfast.model.sites import Site
from fisherfast.parallel.ranks import Ranks
from fisherfast.parallel.share import Share, WholeData, shares_of

__all__ = ["Agreement"]

SEED_STRIDE = 7_919
"""Between the seeds of two ranks: a prime, so that seeds met in practice do not collide."""

SAME_DATA = (
    ": every rank must have the same samples, in the same order (a seed?), or its own share,"
    " ff.Shard(data)"
)

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes, to add up the bits of numbers."""


class Agreement:
    """The other ranks, as one measurement deals with them.

    Args:
        ranks: None for this process alone.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self._ranks = ranks
        self._buffers: dict[str, torch.Tensor] = {}
        self._counted = True  # all know beforehand what lies before their samples
        self.share: Share | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that speaks to the user."""
        return self._ranks is None or self._ranks.rank == 0

    def begin(self, model: nn.Module | None, data: Data, layers: Any, settings: Settings) -> Data:
        """Agree on what is measured; sets `share`.

        Returns:
            The data as all ranks see them.

        Raises:
            ValueError: ranks disagree, or all have the same data and these do not repeat.
        """
        if self._ranks is None:
            return data
        conditions = range(data.conditions)
        counts = [data.samples(c) for c in conditions]
        asked: dict[str, Any] = {"model": "none" if model is None else type(model).__name__}
        asked |= settings.to_dict()
        asked |= {
            "data": "each rank's own share" if data.sharded else "the same data for all ranks",
            "parameters of the data": data.parameters,
            "conditions of the data": data.conditions,
            "repetition of the data": [data.repeats(c) for c in conditions],
            "layers": repr(layers) if not callable(layers) else "a function",
            "groups": "none" if data.groups is None else "some",
        }
        if not data.sharded:
            asked["samples per condition"] = counts
            own = () if data.groups is None else data.groups.numbers
            asked["groups of the samples"] = [f"checksum {checksum(each):x}" for each in own]
        self._ranks.agree("agreeing on data and settings", asked)
        if model is not None:
            self._agree_on(model, self._ranks)
        if data.sharded:
            everywhere = self._ranks.exchange("counting samples", counts)
            self.share, total = shares_of(everywhere, self._ranks.rank)
            self._counted = total is not None
            data = WholeData(data, total, self._groups_of_all(data.groups, self._ranks))
            if total is None and settings.probe is not None:
                raise ValueError(
                    "data must tell how many samples each rank has, for a probe in a group, got"
                    f" {everywhere} per rank and condition"
                )
        else:
            self.share = Share(self._ranks.rank, self._ranks.size)
            _check_repeats(data)
        self._ranks.doing = "reading the first samples"
        return data

    def _groups_of_all(self, own: Groups | None, ranks: Ranks) -> Groups | None:
        """The groups of the samples of all ranks, one share after the other."""
        if own is None:
            return None
        mine = [own.labels, [numbers.tolist() for numbers in own.numbers]]
        shares = [
            Groups(tuple(labels), tuple(torch.tensor(n, dtype=torch.int64) for n in numbers))
            for labels, numbers in ranks.exchange("joining groups", mine)
        ]
        return joined_groups(shares)

    def copy_buffers(self, model: nn.Module | None) -> None:
        """Give a model the buffers of rank 0 where the ranks had others; inside `evaluation`, which
        puts them back."""
        if self._buffers and model is not None:
            for name, buffer in model.named_buffers():
                if name in self._buffers:
                    buffer.copy_(self._buffers[name])

    def begin_pass(self, meters: Sequence[Meter], seed: int) -> None:
        """The same layers on all ranks, read by what rank 0 has learned; and other random numbers
        on each, for a network that draws some."""
        if self._ranks is None:
            return
        doing = "beginning a pass"
        self._ranks.agree(doing, {"layers of a pass": [meter.site.name for meter in meters]})
        learned = [tensor for meter in meters for tensor in meter.learned()]
        if learned:
            if self._ranks.rank:
                for tensor in learned:
                    tensor.zero_()
            self._ranks.add_up(doing, learned)
        self._ranks.doing = "measuring"
        if self._ranks.rank:
            torch.manual_seed(seed + SEED_STRIDE * self._ranks.rank)

    def agree_on_samples(self, data: Data, heads: Sequence[Batch]) -> None:
        """The first samples of data that all ranks have must be the same on all."""
        if self._ranks is None or data.sharded:
            return
        names = [f"first samples of {data.condition_name(c)!r}" for c in range(data.conditions)]
        sums = [f"checksum {checksum(head.x):x}" for head in heads]
        self._ranks.agree(
            "reading the first samples", dict(zip(names, sums, strict=True)), SAME_DATA
        )

    def agree_on_layers(self, sites: Sequence[Site], measured: Sequence[Meter]) -> None:
        """The same layers on all ranks, in chains as rank 0 has found them."""
        if self._ranks is None:
            return
        doing = "agreeing on layers"
        shapes = {f"layer {site.name!r}": [site.kind, list(site.shape)] for site in sites}
        order = [f"{type(meter).__name__} {meter.site.name}" for meter in measured]
        self._ranks.agree(doing, {"list of layers": [s.name for s in sites]} | shapes)
        self._ranks.agree(doing, {"list of layers to measure": order})
        chains = [sorted(site.descendants) for site in sites] if self.leads else None
        for site, descendants in zip(sites, self._ranks.exchange(doing, chains)[0], strict=True):
            site.descendants = set(descendants)

    def smallest(self, plan: Plan) -> Plan:
        """The smallest batches that any rank has planned: they are dealt by their number."""
        if self._ranks is None:
            return plan
        mine = [plan.batch_size, plan.survey_samples, plan.pilot_bytes]
        everywhere = self._ranks.exchange("planning batches", mine)
        return Plan(*map(min, zip(*everywhere, strict=True)))

    def share_pilot(self, meters: Sequence[Meter], counts: bool) -> None:
        """Merge what each rank has seen of the first samples, where they have different ones.

        Args:
            meters: of all layers.
            counts: whether some of the first samples are on this rank.
        """
        if self._ranks is None or self.share is None or self.share.turns > 1:
            return
        doing = "joining the first samples"
        own = [
            [
                meter.pilot.count * counts,
                meter.pilot.rounding,
                meter.pilot.noise,
                meter.pilot.ill_conditioned(),
            ]
            for meter in meters
        ]
        merged = [PilotMoments() for _ in meters]
        for rank, states in enumerate(self._ranks.exchange(doing, own)):
            if not any(count for count, *_ in states):
                continue
            parts = [meter.pilot.parts() * (rank == self._ranks.rank) for meter in meters]
            self._ranks.add_up(doing, parts)
            for pilot, part, (count, *relative) in zip(merged, parts, states, strict=True):
                if count:
                    pilot.merge(count, part, *relative)
        for meter, pilot in zip(meters, merged, strict=True):
            meter.pilot = pilot

    def end_pass(self, meters: Sequence[Meter], folds: int) -> None:
        """Add up what all ranks have seen in a pass, dealt to so many folds."""
        if self._ranks is None or self.share is None:
            return
        doing = "adding up the sums of a pass"
        if not self._counted:
            _count_others(meters, self._ranks, folds)
        seen = meters[0].seen if meters else []
        self._ranks.agree(doing, {"samples of a pass": seen})
        self._ranks.add_up(doing, [part for meter in meters for part in meter.shared_sums()])
        for meter in meters:
            meter.sums_were_shared()

    def glance(self) -> None:
        """Between batches: raise what has failed elsewhere."""
        if self._ranks is not None:
            self._ranks.glance()

    def _agree_on(self, model: nn.Module, ranks: Ranks) -> None:
        """The same parameters on all ranks; rank 0's buffers where they differ, as after training
        with batch norms whose statistics are those of each rank's own batches."""
        doing = "comparing the model"
        ranks.agree(doing, _states(model.named_parameters(), "parameter"))
        buffers = {name: buffer for name, buffer in model.named_buffers() if _has_numbers(buffer)}
        states = {f"buffer {name}": [list(b.shape), str(b.dtype)] for name, b in buffers.items()}
        ranks.agree(doing, states)
        own = [checksum(buffer) for buffer in buffers.values()]
        if ranks.same(doing, own):
            return
        sums = ranks.exchange(doing, own)
        differ = [name for name, *bits in zip(buffers, *sums, strict=True) if len(set(bits)) > 1]
        values = [_bytes_of(buffers[name]).double() * (ranks.rank == 0) for name in differ]
        ranks.add_up(doing, values)
        for name, value in zip(differ, values, strict=True):
            like = buffers[name]
            self._buffers[name] = value.to(torch.uint8).view(like.dtype).view(like.shape)


def _count_others(meters: Sequence[Meter], ranks: Ranks, folds: int) -> None:
    """Streams of unknown length: each rank has dealt its samples from the first on."""
    everywhere = ranks.exchange("counting samples", meters[0].seen if meters else [])
    for rank, seen in enumerate(everywhere):
        if rank == ranks.rank:
            continue
        dealing = Dealing.of(None, folds, rank=rank)
        for condition, n in enumerate(seen):
            tally = dealing.tally(0, n)
            for meter in meters:
                meter.skip(condition, tally, numbered=False)


def checksum(tensor: torch.Tensor) -> int:
    """Sum of the bits of a tensor, read as integers: the same for the same numbers in any order of
    summation."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    integers = INTEGERS[tensor.element_size()]
    return int(tensor.contiguous().view(integers).sum(dtype=torch.int64)) & (2**64 - 1)


def _has_numbers(tensor: torch.Tensor) -> bool:
    """Whether there are bits to compare."""
    return not (is_lazy(tensor) or tensor.is_meta) and tensor.layout is torch.strided


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _states(tensors: Any, kind: str) -> dict[str, Any]:
    """Shape, dtype and bits of named tensors, as messages show them."""
    return {
        f"{kind} {name}": f"{list(t.shape)} {str(t.dtype)[6:]} (checksum {checksum(t):x})"
        for name, t in tensors
        if _has_numbers(t)
    }


def _check_repeats(data: Data) -> None:
    if not data.repeatable:
        raise ValueError(
            "data must come in the same order at every pass to be dealt to ranks (tensors, arrays,"
            " Datasets, DataLoaders that do not shuffle, Simulator), or be each rank's own share,"
            f" ff.Shard(data), got {data!r}"
        )
