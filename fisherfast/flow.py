"""`fisher_flow`: the Fisher information of every layer in one streaming pass.

A `Measurement` joins the parts: data are streamed through the model, `taps` hands over activations,
`features` turns them into features, `moments` keeps their fold moments, `estimators` reads J from
those.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from fisherfast import dual, taps
from fisherfast._progress import progress_bar
from fisherfast.data import Batch, Data
from fisherfast.estimators import RIDGE
from fisherfast.maps import estimate_map
from fisherfast.meters import LayerMeter, score_note
from fisherfast.results import FisherFlow, FisherWarning, LayerFisher, warn_of
from fisherfast.settings import BATCH_SIZE, FOLDS, MAX_FEATURES, check_passes, check_settings
from fisherfast.streams import Streams
from fisherfast.wide import WideMeter, too_wide

__all__ = ["fisher_flow", "fisher_information"]

SURVEY_SAMPLES = 64
"""Samples of each condition in the forward pass that lists the layers."""


def fisher_flow(
    model: nn.Module,
    data: Data,
    *,
    layers: taps.Layers = "auto",
    max_features: int = MAX_FEATURES,
    probe: None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: bool = False,
    ridge: float = RIDGE,
    folds: int = FOLDS,
    grow: bool = False,
    maps: bool = False,
) -> FisherFlow:
    r"""Fisher information about theta in the activations of every layer.

    For each layer, :math:`J = D^T S^{-1} D` of its activations and a random lift of them, free of
    finite-sample bias, with standard error and an honest lower bound. The model runs in eval mode
    without gradients; parameters, mode, hooks and random state are afterwards as they were, also
    after an error.

    Args:
        model: any module that maps a batch [n, ...] to anything.
        data: samples at theta: `FiniteDifference`, `Pathwise`, `Score` or `Simulator`. Batches are
            copied to the device and dtype of the model. For `Pathwise` the tangents go through the
            model beside the samples, at the cost of 1 + P forward passes.
        layers: "auto" (every layer, without dropout, flatten and identity), a name, a list of
            names, a regular expression searched for in the names, or a function (name, module or
            None) -> bool. Names are those of ``model.named_modules()``, with "#2" for a second call
            and "fc1/relu" for ``F.relu`` after fc1. "input" and "output" are always there
            (an output that is a tuple or dict shows as "output[0]", "output[key]").
        max_features: features per layer aimed at. A layer wider than that uses all its activations;
            with more than 4096 of them, or too few samples for so many, it is compressed in 16 more
            passes over data that can be read again (docs/theory.md, 15).
        probe: None; "network" is not available in this version.
        batch_size: samples per batch, for data that are not batched already.
        seed: of the random lift. The global random state is neither used nor changed.
        progress: show a progress bar (needs tqdm).
        ridge: noise variance added to each feature, relative to its own.
        folds: number of folds, even, at least 4 (6 for paired conditions and tangents).
        grow: begin with 64 lifted features and double their number, in another pass over the data,
            only for layers whose curve still rises at its end, up to max_features. Each pass
            computes the new features alone. For data that repeat: tensors, arrays, Datasets,
            loaders that do not shuffle.
        maps: also measure the information of the channels at each position of layers [C, H, W],
            see `FisherFlow.map`.

    Returns:
        `FisherFlow`: J, stderr, lower, ... of each layer, float64 [P, P] in 1/theta^2.

    Raises:
        ValueError: NaN or infinite activations (names the layer and the batch), too few samples
            (says how many are needed), an empty source, an unknown layer (names the nearest) or one
            that never runs.
        TypeError: integer or complex data.

    Warns:
        FisherWarning: the finite step is too wide for a derivative: dtheta sqrt(J) / 2 > 0.3; the
            mean of a score is more than 5 standard errors from zero.

    Cost: one forward pass over the data (1 + P with tangents) plus n k^2 operations and 16 k^2
        bytes per layer; memory does not grow with the number of samples.

    Reference: Weimar et al., Phys. Rev. X 15, 031072 (2025); corrections derived in docs/theory.md.

    Example:
        >>> import torch, fisherfast as ff
        >>> layers = torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)
        >>> model = torch.nn.Sequential(*layers)
        >>> x = torch.randn(2, 5000, 8)
        >>> flow = ff.fisher_flow(model, ff.FiniteDifference(x[0] - 0.05, x[1] + 0.05, dtheta=0.1))
        >>> flow.names
        ['input', '0', '1', 'output']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    settings = check_settings(data, max_features, probe, batch_size, seed, ridge, folds)
    settings |= check_passes(data, grow, maps)
    return Measurement(model, data, layers, settings).run(progress)


def fisher_information(
    data: Data,
    *,
    max_features: int = MAX_FEATURES,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: bool = False,
    ridge: float = RIDGE,
    folds: int = FOLDS,
    grow: bool = False,
) -> LayerFisher:
    """Fisher information about theta in the data themselves, without a model.

    Arguments, errors and cost as for `fisher_flow`.

    Returns:
        `LayerFisher` named "input": J, stderr, lower, ... float64 [P, P] in 1/theta^2.

    Example:
        >>> import torch, fisherfast as ff
        >>> x = torch.randn(2, 20000, 4)
        >>> info = ff.fisher_information(ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2))
        >>> abs(info.value - 4) < 0.8
        True
    """
    settings = check_settings(data, max_features, None, batch_size, seed, ridge, folds)
    settings |= check_passes(data, grow, maps=False)
    return Measurement(None, data, "auto", settings).run(progress).layers[0]


class Measurement:
    """One measurement of a model (or of the data alone) on given data."""

    def __init__(
        self,
        model: nn.Module | None,
        data: Data,
        layers: taps.Layers,
        settings: dict[str, Any],
    ) -> None:
        self._model = model
        self._data = data
        self._layers = layers
        self._settings = settings
        self._meters: dict[str, LayerMeter] = {}
        self._active: list[LayerMeter] = []
        self._finite: list[tuple[str, int, int, torch.Tensor]] = []
        self._condition = 0
        self._batch = 0
        self._score: torch.Tensor | None = None
        self._pilot = True

    @property
    def _layer_meters(self) -> list[LayerMeter]:
        """One meter per layer in execution order; `_meters` has it under every alias."""
        return list(dict.fromkeys(self._meters.values()))

    def run(self, progress: bool = False) -> FisherFlow:
        """Stream all samples, again for layers that grow, and estimate."""
        contrast, ridge = self._data.contrast(), self._settings["ridge"]
        with self._evaluation():
            self._stream(progress)
        while True:
            with torch.no_grad():
                growing = [m for m in self._layer_meters if m.grow(contrast, ridge)]
            if not growing:
                break
            self._active = growing
            with self._evaluation():
                self._stream_again(progress)
        with torch.no_grad():
            layers = tuple(m.estimate(self._data, contrast, ridge) for m in self._layer_meters)
            maps = {
                m.site.name: estimate_map(m.site.name, m.map, contrast, ridge)
                for m in self._layer_meters
                if m.map is not None
            }
            warning = score_note(self._layer_meters[0])
        if warning is not None:
            layers = (replace(layers[0], notes=(*layers[0].notes, warning)), *layers[1:])
            warnings.warn(warning, FisherWarning, stacklevel=3)
        warn_of(layers)
        return FisherFlow(layers, self._settings, maps=maps)

    def _evaluation(self) -> AbstractContextManager[Any]:
        """The model in eval mode, without gradients, with random numbers of its own."""
        if self._model is not None:
            return taps.evaluation(self._model, self._settings["seed"])
        stack = ExitStack()
        stack.enter_context(taps.own_random_state(None, self._settings["seed"]))
        stack.enter_context(torch.no_grad())
        return stack

    def _streams(self) -> Streams:
        device, dtype = _place_of(self._model)
        return Streams(
            self._data,
            self._settings["batch_size"],
            device=device,
            dtype=dtype,
            copy=self._model is not None,
        )

    def _stream(self, progress: bool) -> None:
        streams = self._streams()
        pilot = streams.pilot()
        first = torch.cat([batches[0].x[:SURVEY_SAMPLES] for batches in pilot])
        self._survey(first)
        self._active = self._layer_meters
        with self._forward() as forward:
            for self._condition, batches in enumerate(pilot):
                for self._batch, batch in enumerate(batches):
                    forward.run(batch.x)
            for meter in self._layer_meters:
                meter.prepare(self._data, self._settings)
            self._pilot = False
            self._run_all(streams, forward, progress)

    def _stream_again(self, progress: bool) -> None:
        """Another pass over the same samples, for the meters that are active."""
        streams = self._streams()
        streams.pilot()
        only_input = all(meter.site.name == taps.INPUT for meter in self._active)
        with _NoModel(self._consume) if only_input else self._forward() as forward:
            self._run_all(streams, forward, progress)

    def _run_all(self, streams: Streams, forward: Any, progress: bool) -> None:
        counts = [self._data.samples(c) for c in range(self._data.conditions)]
        total = None if None in counts else sum(n for n in counts if n is not None)
        with progress_bar(progress, total=total, title="Fisher flow") as bar:
            for self._condition, self._batch, batch in streams:
                self._score = batch.score
                self._run(forward, batch)
                if batch.x.device.type == "cpu":
                    self._raise_if_not_finite()
                bar.update(len(batch))
        self._raise_if_not_finite()
        self._raise_if_skipped()

    def _run(self, forward: Any, batch: Batch) -> None:
        """One forward pass, with tangents where the samples have them."""
        if batch.tangents is None:
            forward.run(batch.x)
        elif self._model is None:
            forward.run(batch)
        else:
            with dual.propagation(self._model, len(batch.tangents)):
                forward.run(dual.DualTensor.pack(batch.x, batch.tangents))

    def _survey(self, batch: torch.Tensor) -> None:
        if self._model is None:
            sites = [taps.Site(taps.INPUT, "data", tuple(batch.shape[1:]))]
        else:
            sites = taps.select(taps.survey(self._model, batch), self._layers, self._model)
            self._find_chains(sites, batch)
        for site in sites:
            wide = too_wide(site.dim, self._data, self._settings["max_features"])
            meter = WideMeter(site) if wide else LayerMeter(site)
            self._meters.update(dict.fromkeys(site.names, meter))

    def _find_chains(self, sites: list[taps.Site], batch: torch.Tensor) -> None:
        """Replay the model once per layer, on so few samples that it costs half a pass at most."""
        if self._model is None:
            return
        counts = [self._data.samples(c) for c in range(self._data.conditions)]
        affordable = len(batch)
        if None not in counts:
            affordable = sum(n for n in counts if n is not None) // (2 * len(sites))
        taps.chains(self._model, batch[: max(taps.CHAIN_SAMPLES, affordable)], sites)

    def _forward(self) -> Any:
        if self._model is None:
            return _NoModel(self._consume)
        return taps.Forward(self._model, self._consume)

    def _consume(
        self, name: str, kind: str, module: nn.Module | None, output: torch.Tensor | Batch
    ) -> None:
        meter = self._meters.get(name)
        if meter is None or name != meter.site.event or not (self._pilot or meter in self._active):
            return
        # what the statistics make has no tangents, and they never run under autocast or with
        # gradients, as the network may
        with _disable_current_modes(), torch.no_grad():
            activations, tangents = _parts(output)
            if tuple(activations.shape[1:]) != meter.site.shape:
                raise ValueError(
                    f"layer {name!r} must have the same shape for all samples,"
                    f" got {tuple(activations.shape[1:])} after {meter.site.shape}"
                )
            with torch.autocast(activations.device.type, enabled=False):
                if self._pilot:
                    meter.observe_pilot(activations.detach())
                    finite = torch.isfinite(activations).all()
                else:
                    finite = meter.observe(
                        self._condition,
                        activations.detach(),
                        tangents=tangents,
                        score=self._score,
                    )
        self._finite.append((meter.site.name, self._condition, self._batch, finite))
        if self._pilot and activations.device.type == "cpu":
            self._raise_if_not_finite()

    def _raise_if_not_finite(self) -> None:
        flags, self._finite = self._finite, []
        if not flags or bool(torch.stack([flag for *_, flag in flags]).all()):
            return
        name, condition, batch, _ = next(entry for entry in flags if not bool(entry[-1]))
        pathwise = self._data.source == "pathwise"
        what = "activations and their tangents" if pathwise else "activations"
        raise ValueError(
            f"{what} of layer {name!r} must be finite, got NaN or infinity in batch {batch} of"
            f" condition {self._data.condition_name(condition)!r}"
        )

    def _raise_if_skipped(self) -> None:
        """A layer that runs for some batches only has no moments that can be compared."""
        meters = self._active
        for meter in meters:
            if meter.seen != meters[0].seen:
                raise ValueError(
                    f"layer {meter.site.event!r} must run for every batch, got"
                    f" {sum(meter.seen)} of {sum(meters[0].seen)} samples"
                )


class _NoModel:
    """Stands in for a forward pass when only the data are measured."""

    def __init__(self, consume: Callable[[str, str, None, torch.Tensor | Batch], None]) -> None:
        self._consume = consume

    def __enter__(self) -> _NoModel:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, batch: torch.Tensor | Batch) -> None:
        self._consume(taps.INPUT, taps.INPUT, None, batch)


def _parts(
    output: torch.Tensor | Batch | dual.DualTensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Activations and their tangents; None for those of a plain tensor, which are zero."""
    if isinstance(output, Batch):
        return output.x, output.tangents
    if isinstance(output, dual.DualTensor):
        return output.primal, output.tangents
    return output, None


def _place_of(model: nn.Module | None) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype of the model's first parameter or buffer of floating dtype."""
    if model is None:
        return None, None
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return None, None
