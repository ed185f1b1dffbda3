"""`Measurement` streams data through a model, passes the activations of each layer to its meter,
and collects the estimates of all meters in a `FisherFlow`."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fisherfast import dual
from fisherfast._errors import FisherWarning, explained
from fisherfast._progress import Progress
from fisherfast.data import Batch, Data
from fisherfast.data.dealing import Place
from fisherfast.data.inputs import (
    Samples,
    concatenated,
    described,
    floating,
    joined,
    left_out,
    spread,
    tensors_of,
)
from fisherfast.dual.errors import autograd_call
from fisherfast.estimation.dither import StepMeter, dithered
from fisherfast.estimation.maps import estimate_map
from fisherfast.measurement.agreement import Agreement
from fisherfast.measurement.batches import Streams
from fisherfast.measurement.compressed_layer import CompressedMeter, fewest_samples, too_wide
from fisherfast.measurement.layer import ROUNDED, LayerMeter
from fisherfast.measurement.memory import FEW_SAMPLES, LayerCost, LivePeak, Plan, plan, shares
from fisherfast.measurement.meter import Meter, rows_of
from fisherfast.measurement.moments import UnmeasuredError
from fisherfast.measurement.points import PointsMeter, Splitter
from fisherfast.measurement.probe_layer import PROBE_BYTES, ProbeMeter
from fisherfast.measurement.settings import MeasurementSettings
from fisherfast.measurement.without_estimate import not_measured, of_input, score_note
from fisherfast.model.default_device import on_host, outside
from fisherfast.model.graph import merged, survey
from fisherfast.model.hooks import Forward
from fisherfast.model.isolation import evaluation, own_random_state
from fisherfast.model.paths import follow
from fisherfast.model.sites import INPUT, Layers, Site, select
from fisherfast.parallel.ranks import Ranks
from fisherfast.results.flow import FisherFlow
from fisherfast.results.information_map import InformationMap, is_mapped
from fisherfast.results.layer import NOT_INDEPENDENT, LayerFisher, warn_of
from fisherfast.results.status import with_status

SURVEY_SAMPLES = 64
"""Samples of each condition in the forward pass that lists the layers."""

PROBE_SHARE = 8
"""Samples kept to train probes take at most an eighth of a memory budget."""


class NotFiniteError(ValueError):
    """Activations are NaN or infinite."""


@dataclass
class Recall:
    """Layers, and the information in the input, which training does not change.

    Attributes:
        sites: all layers of the model; empty before the first measurement.
        apart: names of layers that were no copy of another one in some measurement: they keep a
            row of their own, so that rows stay when a scale is no longer zero.
        input: the result for the input; None if each measurement may have other samples.
        input_map: its map, if any.
        spaces: by compressed layer, the weights learned from each half of its samples.
        gradients: whether the model runs only where graphs are recorded, because it calls
            `torch.autograd` itself (a force field).
    """

    sites: list[Site] = field(default_factory=list)
    apart: set[str] = field(default_factory=set)
    input: LayerFisher | None = None
    input_map: InformationMap | None = None
    spaces: dict[str, list[Tensor]] = field(default_factory=dict)
    gradients: bool = False

    def unknown(self, sites: list[Site]) -> list[Site]:
        """Return the sites that must be measured."""
        return [site for site in sites if site.name != INPUT or self.input is None]

    def complete(self, flow: FisherFlow, data: Data) -> FisherFlow:
        """Add what was not measured again to a flow, and keep what the next one can reuse."""
        if self.input is not None:
            maps = {} if self.input_map is None else {INPUT: self.input_map}
            return replace(flow, layers=(self.input, *flow.layers), maps=maps | flow.maps)
        if flow.names[0] == INPUT and data.repeatable:
            self.input, self.input_map = flow.layers[0], flow.maps.get(INPUT)
        return flow


class Measurement:
    """One measurement of a model (or of the data alone) on given data.

    Args:
        model: the model; None for the data alone.
        data: the samples.
        layers: which layers.
        settings: checked for these data.
        recall: results of an earlier measurement of this model on these data, to which this one
            adds its own.
        quiet: leave warnings to the notes of the layers.
        ranks: the processes that make this measurement together; None for this one alone. Only the
            first warns and shows the progress bar.
    """

    def __init__(
        self,
        model: nn.Module | None,
        data: Data,
        layers: Layers,
        settings: MeasurementSettings,
        *,
        recall: Recall | None = None,
        quiet: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._recall = Recall() if recall is None else recall
        self._agreement = Agreement(ranks)
        self._quiet = quiet or not self._agreement.leads
        self._model = model
        self._data = data
        self._layers = layers
        self._settings = settings
        self._sites: list[Site] = []
        self._meters: dict[str, Meter] = {}  # under every alias of a layer
        self._active: list[Meter] = []
        self._finite: list[tuple[str, int, int | Tensor, Tensor]] = []
        self._condition = 0
        self._number: int | Tensor = 0
        self._score: Tensor | None = None
        self._place: Place | None = None  # None while the pilot runs
        self._moving: Tensor | None = None
        self._ties = StepMeter()
        self._half_steps: Tensor | None = None
        self._left_out: str | None = None
        self._split = Splitter(data)

    @property
    def _layer_meters(self) -> list[Meter]:
        """One meter per layer, in execution order."""
        return list(dict.fromkeys(self._meters.values()))

    def run(self, progress: bool | None = False) -> FisherFlow:
        """Stream all samples, again for meters that need more passes, and estimate."""
        shown = Progress(progress if self._agreement.leads else False, "Fisher flow")
        with on_host():
            self._data = self._agreement.begin(
                self._model, self._data, self._layers, self._settings
            )
            self._split = Splitter(self._data)
            flow, warning = self._flow(self._measured(shown))
        if not self._quiet:
            if warning is not None:
                warnings.warn(warning, FisherWarning, stacklevel=3)
            warn_of(flow.layers, stacklevel=4)
        return flow

    def _measured(self, progress: Progress) -> dict[Meter, LayerFisher]:
        """Estimate all layers, in as many passes as their meters need."""
        with self._evaluation():
            streams = self._streams()
            self._stream(streams, progress)
        estimates: dict[Meter, LayerFisher] = {}
        failures: list[UnmeasuredError] = []
        while self._active:
            growing = []
            with torch.inference_mode(False), torch.no_grad(), self._exact():
                for meter in self._active:
                    try:
                        if meter.end_pass():
                            growing.append(meter)
                        else:
                            estimates[meter] = self._estimate(meter)
                    except UnmeasuredError as error:
                        failures.append(error)
                        samples, reason = sum(meter.seen), str(error)
                        estimates[meter] = not_measured(
                            meter.site, self._data, samples=samples, reason=reason
                        )
            self._active = growing
            if growing:
                with self._evaluation(), self._forward() as forward:
                    streams.restart()
                    self._run_all(streams, forward, progress)
        if failures and len(failures) == len(self._layer_meters):
            raise failures[0]
        return estimates

    def _estimate(self, meter: Meter) -> LayerFisher:
        layer = meter.estimate()
        notes, independent = list(layer.notes), meter.independent()
        if meter.largest_step > 0:
            notes.append(ROUNDED.format(meter.largest_step))
        if not independent:
            notes.append(NOT_INDEPENDENT)
        return replace(layer, independent=independent, notes=tuple(notes))

    def _flow(self, estimates: dict[Meter, LayerFisher]) -> tuple[FisherFlow, str | None]:
        """Assemble the flow from the estimates of all layers, with a warning about the score."""
        scored, meters = self._data.source == "score", self._layer_meters
        layers = [estimates[meter] for meter in meters]
        maps: dict[str, InformationMap] = {}
        warning = None
        with torch.no_grad(), self._exact():
            for number, meter in enumerate(meters):
                name = meter.site.name
                if name == INPUT:
                    layers[number] = of_input(layers[number], meter, self._data, self._left_out)
                if meter.map is not None:
                    contrast, ridge = self._data.contrast(), self._settings.ridge
                    maps[name] = InformationMap(
                        name, *estimate_map(name, meter.map, contrast, ridge)
                    )
                if name != INPUT and (projections := meter.for_next()):
                    self._recall.spaces[name] = projections
            if meters:
                warning = score_note(meters[0])
        remarks = [*self._data.notes(), *self._split.notes()]
        remarks += [] if warning is None else [warning]
        if meters and remarks:
            layers[0] = replace(layers[0], notes=(*layers[0].notes, *remarks))
        flow = FisherFlow(tuple(layers), self._settings.to_dict(), maps=maps)
        flow = self._recall.complete(flow, self._data)
        return replace(flow, layers=with_status(flow.layers, score=scored)), warning

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Set eval mode without gradients (unless the model calls for them), with random numbers of
        its own and the buffers of the first rank."""
        if self._model is None:
            with own_random_state(None, self._settings.seed), torch.no_grad():
                yield
            return
        pathwise = self._data.source == "pathwise"  # rounded values have no derivative
        with evaluation(self._model, self._settings.seed):
            self._agreement.copy_buffers(self._model)
            gradients = torch.set_grad_enabled(self._recall.gradients)
            with gradients, self._exact() if pathwise else nullcontext():
                yield

    @contextmanager
    def _exact(self) -> Iterator[None]:
        """Turn autocast off, on the host and on the device of the model."""
        device, _ = _place_of(self._model)
        with ExitStack() as stack:
            for place in {"cpu", "cpu" if device is None else device.type}:
                stack.enter_context(torch.autocast(place, enabled=False))
            yield

    def _streams(self) -> Streams:
        device, dtype = _place_of(self._model)
        return Streams(
            self._data,
            self._settings.batch_size,
            folds=self._settings.folds,
            share=self._agreement.share,
            device=device,
            dtype=dtype,
            copy=self._model is not None,
            bounded=self._settings.memory_budget is not None,
        )

    def _stream(self, streams: Streams, progress: Progress) -> None:
        """List the layers, run the pilot, and make the first pass."""
        self._survey(streams)
        self._active = self._layer_meters
        with self._forward() as forward:
            seen = 0
            for self._condition, self._number, batch in streams.pilot():
                self._score = batch.score
                with self._located(batch.x):
                    forward.run(self._pilot_input(batch))
                seen += len(batch)
            if not seen:  # the first samples are on other ranks: these only show a device
                forward.run(streams.first(2)[0].x)
            self._agreement.share_pilot(self._layer_meters, counts=seen > 0)
            for meter in self._layer_meters:
                meter.prepare()
            if self._half_steps is not None and INPUT in self._meters:
                self._meters[INPUT].note_steps(2 * self._half_steps)
            self._run_all(streams, forward, progress)

    def _run_all(self, streams: Streams, forward: Any, progress: Progress) -> None:
        self._agreement.begin_pass(self._active, self._settings.seed)
        self._split.outside = 0
        with progress.bar(streams.samples) as bar:
            for self._condition, self._number, batch in streams:
                self._score, self._place = batch.score, batch.place
                with self._located(batch.x):
                    self._run(forward, batch)
                if batch.x.device.type == "cpu":
                    self._raise_if_not_finite()
                bar.update(len(batch))
        self._raise_if_not_finite()
        self._raise_if_skipped()
        self._agreement.end_pass(self._active)

    def _located(self, x: Samples) -> Any:
        """Add to an error of the model which batch it was called with."""

        def where() -> str:
            name = self._data.condition_name(self._condition)
            # the pilot reads samples from all over the data
            numbers = torch.as_tensor(self._number, device="cpu").unique().tolist()
            batch = f"batch {numbers[0]}"
            if len(numbers) > 1:
                batch = f"one of the batches {numbers[0]} to {numbers[-1]}"
            return f"in {batch} of condition {name!r}: {described(x)}"

        return explained(where)

    def _run(self, forward: Any, batch: Batch) -> None:
        """Run the model, with tangents if the samples have them and a layer reads them."""
        if self._model is None:
            forward.run(batch)
            return
        x = self._dithered(batch)
        if batch.tangents is None or not any(meter.reads_carried for meter in self._active):
            forward.run(x)
        else:
            with dual.propagation(self._model, len(batch.tangents)):
                forward.run(spread(x, batch.tangents, dual.DualTensor.pack))

    def _pilot_input(self, batch: Batch) -> Samples:
        """Return the first samples as the model sees them, after a search for steps in those with
        tangents."""
        if batch.tangents is None:
            return batch.x
        self._moving = (batch.tangents != 0).any(0)
        if self._model is None:
            return batch.x
        self._ties.update(rows_of(joined(batch.x)), rows_of(self._moving))
        self._half_steps = self._ties.half_steps()
        return self._dithered(batch)

    def _dithered(self, batch: Batch) -> Samples:
        """Add noise of half a step to the samples [n, ...] where their tangents are not zero."""
        if self._half_steps is None or batch.tangents is None:
            return batch.x
        x = joined(batch.x)
        size = self._half_steps.to(x).reshape(x.shape[1:])
        key = self._settings.seed, self._condition
        numbers = torch.arange(len(batch)) if batch.place is None else batch.place.numbers
        noisy = dithered(x, size, batch.tangents, numbers, *key)
        return spread(batch.x, noisy, lambda entry, part: part)

    def _survey(self, streams: Streams) -> None:
        """List the layers on the first samples; with a budget, on just enough to show how much
        memory they take."""
        bounded = self._settings.memory_budget is not None
        first = streams.first(FEW_SAMPLES if bounded else SURVEY_SAMPLES)
        self._agreement.agree_on_samples(self._data, first)
        batch = concatenated([samples.x for samples in first])
        self._left_out = left_out(batch)
        with explained(lambda: f"on the first samples of all conditions: {described(batch)}"):
            self._sites = self._find_sites(batch)
        alone = all(site.name == INPUT for site in self._sites)
        if alone and not floating(batch) and self._data.source != "score":
            raise TypeError(
                f"x must have a floating dtype, got {tensors_of(batch)[0].dtype}; convert with"
                " .float(), or measure the layers of a model that takes integers"
            )
        unknown = self._recall.unknown(self._sites)
        for site in unknown:
            meter = self._meter(site, self._probe_bytes() // len(unknown))
            self._meters.update(dict.fromkeys(site.names, meter))
        self._check_maps()
        if bounded:
            fits = self._agreement.smallest(self._planned(streams, first[0], batch))
            streams.limit(fits.batch_size, fits.pilot_bytes)
        self._agreement.agree_on_layers(self._sites, self._layer_meters)

    def _check_maps(self) -> None:
        maps = self._settings.maps
        known = [name for site in self._sites for name in site.names]
        unknown = [] if isinstance(maps, bool) else [name for name in maps if name not in known]
        if unknown:
            raise ValueError(f"maps must name layers that are measured, {known}, got {unknown}")

    def _planned(self, streams: Streams, first: Batch, batch: Samples) -> Plan:
        """Plan batches that fit into the budget."""
        budget = self._settings.memory_budget
        assert budget is not None
        with LivePeak() as live, outside():
            if self._model is not None:
                with Forward(self._model, lambda *event: None, self._sites) as forward:
                    forward.run(batch.clone())
        data, settings = self._data, self._settings
        number = max(joined(batch).element_size(), torch.float32.itemsize)
        costs = [LayerCost(m.site, m.unit, *m.nbytes(number)) for m in self._layer_meters]
        alive = -(-live.nbytes // len(batch))
        per_sample = shares(first, alive, costs, data, owned=streams.owned)
        kept = streams.kept_bytes + 2 * self._probe_bytes()  # once more while a probe is trained
        return plan(budget, settings.batch_size, costs, per_sample, kept, data, number)

    def _probe_bytes(self) -> int:
        """Return the bytes of samples that may be kept to train probes."""
        if self._settings.probe is None:
            return 0
        budget = self._settings.memory_budget
        return PROBE_BYTES if budget is None else min(PROBE_BYTES, budget // PROBE_SHARE)

    def _meter(self, site: Site, budget: int) -> Meter:
        """Make the meter of a layer; with a probe, it keeps up to `budget` bytes of samples."""
        data, settings = self._data, self._settings
        start = self._recall.spaces.pop(site.name, [])
        if not data.points:
            return self._meter_at(site, data, settings, budget, start)
        share = len(start) // data.points

        def make(point: int, own: Data, asked: MeasurementSettings) -> Meter:
            known = start[point * share : (point + 1) * share]
            return self._meter_at(site, own, asked, budget // data.points, known)

        return PointsMeter(site, data, settings, make, self._split)

    def _meter_at(
        self,
        site: Site,
        data: Data,
        settings: MeasurementSettings,
        budget: int,
        start: Sequence[Tensor],
    ) -> Meter:
        """Make the meter of a layer at one theta."""
        if too_wide(site.dim, data, settings.max_features, settings.folds):
            _check_samples(site, data, fewest_samples(site.dim, data, settings.folds))
            return CompressedMeter(site, data, settings, start)
        _check_samples(site, data, 2 * settings.folds, " (two per fold)")
        if settings.probe is None:
            return LayerMeter(site, data, settings)
        return ProbeMeter(site, data, settings, budget)

    def _find_sites(self, batch: Samples) -> list[Site]:
        """List the layers to measure. The model is followed at every measurement, because a scale
        may have become zero: a layer that was a copy of another one is then measured again."""
        model, recall, maps = self._model, self._recall, self._settings.maps
        if model is None:
            return [Site(INPUT, "data", tuple(joined(batch).shape[1:]))]
        recall.sites = recall.sites or self._surveyed(model, batch)
        follow(model, batch, recall.sites)
        self._agreement.agree_on_paths(recall.sites)
        recall.apart |= {site.name for site in recall.sites if site.copy_of is None}

        def apart(site: Site, original: Site) -> bool:
            reordered = site.shape != original.shape and is_mapped(maps, site.names)
            return site.name in recall.apart or reordered

        sites = merged(recall.sites, apart)
        return select(sites, self._layers, model, self._settings.output)

    def _surveyed(self, model: nn.Module, batch: Samples) -> list[Site]:
        """List all layers; of a force field with graphs recorded."""
        try:
            return survey(model, batch)
        except RuntimeError as error:
            if autograd_call(error) is None:
                raise
            self._recall.gradients = True
            torch.set_grad_enabled(True)  # until the end of this evaluation
            return survey(model, batch)

    def _forward(self) -> Any:
        """Make the forward pass that reports to the active meters; the model does not run if they
        read only the input."""
        if self._model is None or all(meter.site.name == INPUT for meter in self._active):
            consume = partial(self._consume, INPUT, INPUT, None)
            return nullcontext(
                SimpleNamespace(run=lambda x: consume(x if isinstance(x, Batch) else joined(x)))
            )
        return Forward(self._model, self._consume, self._sites)

    def _consume(
        self, name: str, kind: str, module: nn.Module | None, output: Tensor | Batch
    ) -> None:
        """Pass the activations of a layer to its meter."""
        meter = self._meters.get(name)
        if meter is None or name != meter.site.event or meter not in self._active:
            return
        # the tensors of the statistics are neither dual tensors nor activations to report, and are
        # computed without the autocast and the gradients that the network may run with
        with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad(), on_host():
            activations, tangents = _parts(output)
            if tuple(activations.shape[1:]) != meter.site.shape:
                raise ValueError(
                    f"layer {name!r} must have the same shape for all samples,"
                    f" got {tuple(activations.shape[1:])} after {meter.site.shape}"
                )
            x = activations.detach()
            with torch.autocast(x.device.type, enabled=False):
                if self._place is None:
                    moving = self._moving if meter.site.name == INPUT else None
                    labels = self._score
                    meter.observe_pilot(x, moving, condition=self._condition, labels=labels)
                    finite = torch.isfinite(rows_of(x)).all(1)
                else:
                    batch = Batch(x, tangents, self._score, self._place)
                    finite = meter.observe(self._condition, batch)
        self._finite.append((meter.site.name, self._condition, self._number, finite))
        if self._place is None and x.device.type == "cpu":
            self._raise_if_not_finite()

    def _raise_if_not_finite(self) -> None:
        flags, self._finite = self._finite, []
        if not flags or bool(torch.stack([flag.all() for *_, flag in flags]).all()):
            return
        name, condition, batch, flag = next(entry for entry in flags if not bool(entry[-1].all()))
        if isinstance(batch, Tensor):
            batch = int(batch[~flag.cpu()].min())
        pathwise = self._data.source == "pathwise"
        what = "activations and their tangents" if pathwise else "activations"
        raise NotFiniteError(
            f"{what} of layer {name!r} must be finite, got NaN or infinity in batch {batch} of"
            f" condition {self._data.condition_name(condition)!r}"
        )

    def _raise_if_skipped(self) -> None:
        """Refuse a layer that did not run for every batch: its moments cannot be compared."""
        meters = self._active
        for meter in meters:
            if meter.seen != meters[0].seen:
                raise ValueError(
                    f"layer {meter.site.event!r} must run for every batch, got"
                    f" {sum(meter.seen)} of {sum(meters[0].seen)} samples"
                )


def _check_samples(site: Site, data: Data, needed: int, reason: str = "") -> None:
    """Refuse a layer that cannot be measured before all samples are read, if their number is
    known."""
    counts = [data.units(c) for c in range(data.conditions)]
    known = [n for n in counts if n is not None]
    if known and min(known) < needed and not data.sharded:
        units = "samples" if data.groups is None else "groups of samples"
        of = "bin" if data.source == "labelled" else "condition"
        raise ValueError(
            f"layer {site.name!r} must see at least {needed} {units} per {of}{reason}, got"
            f" {min(known)}"
        )


def _parts(output: Tensor | Batch | dual.DualTensor) -> tuple[Tensor, Tensor | None]:
    """Return activations and their tangents; None for a plain tensor, whose tangents are zero."""
    if isinstance(output, Batch):
        return joined(output.x), output.tangents
    if isinstance(output, dual.DualTensor):
        return output.primal, output.tangents
    return output, None


def _place_of(model: nn.Module | None) -> tuple[torch.device | None, torch.dtype | None]:
    """Return device and dtype of the model's first parameter or buffer of floating dtype."""
    if model is None:
        return None, None
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"model must hold numbers, got {name!r} on the meta device: give it memory with"
                " model.to_empty(device=...) and load its weights first"
            )
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return None, None
