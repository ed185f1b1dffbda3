"""`fisher_flow`: the Fisher information of every layer in one streaming pass.

A `Measurement` joins the parts: data are streamed through the model, `taps` hands over activations,
`features` turns them into features, `moments` keeps their fold moments, `estimators` reads J from
those.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fisherfast import taps
from fisherfast._progress import progress_bar
from fisherfast.data import FiniteDifference, lockstep
from fisherfast.estimators import (
    RIDGE,
    SPARE_DOF,
    choose_features,
    cross_fitted_bound,
    fisher_curve,
)
from fisherfast.features import ROUNDING, FeatureDictionary, PilotMoments
from fisherfast.moments import FoldMoments, FoldStatistics
from fisherfast.results import FisherFlow, LayerFisher, finite_step_note, warn_of

__all__ = ["fisher_flow", "fisher_information"]

FOLDS = 16
"""Folds of the U-statistic: 15 degrees of freedom for its jackknife error."""

PILOT_SAMPLES = 2048
"""Samples, over all conditions, that fix the scale of the activations (3 % accuracy of a scale is
plenty)."""

PILOT_BATCHES = 4
"""Batches per condition that are kept for the pilot at most: bounds memory when samples are
large."""

SURVEY_SAMPLES = 64
"""Samples of the forward pass that lists the layers."""

CURVE_POINTS = 64
"""Points at which a result keeps its curve."""

MAX_FEATURES = 512
"""Default number of features: raw activations and lift together."""

BATCH_SIZE = 4096
"""Default number of samples in a batch; fewer for large samples or networks."""


def fisher_flow(
    model: nn.Module,
    data: FiniteDifference,
    *,
    layers: taps.Layers = "auto",
    max_features: int = MAX_FEATURES,
    probe: None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: bool = False,
    ridge: float = RIDGE,
    folds: int = FOLDS,
) -> FisherFlow:
    r"""Fisher information about theta in the activations of every layer.

    For each layer, :math:`J = D^T S^{-1} D` of its activations and a random lift of them, free of
    finite-sample
    bias, with standard error and an honest lower bound. The model runs in eval mode without
    gradients;
    parameters, mode, hooks and random state are afterwards as they were, also after an error.

    Args:
        model: any module that maps a batch [n, ...] to anything.
        data: samples at theta, see `FiniteDifference`. Batches are moved to the device of the
            model.
        layers: "auto" (every layer, without dropout, flatten and identity), a name, a list of
            names, a regular
            expression searched for in the names, or a function (name, module or None) -> bool.
            Names are those of
            ``model.named_modules()``, with "#2" for a second call and "fc1/relu" for ``F.relu``
            after fc1. "input" and "output" are always there.
        max_features: features per layer aimed at; a layer wider than that uses all its activations.
        probe: None; "network" is not available in this version.
        batch_size: samples per batch, for data that are not batched already.
        seed: of the random lift. The global random state is neither used nor changed.
        progress: show a progress bar (needs tqdm).
        ridge: noise variance added to each feature, relative to its own.
        folds: number of folds, even.

    Returns:
        `FisherFlow`: J, stderr, lower, ... of each layer, float64 [P, P] in 1/theta^2.

    Raises:
        ValueError: NaN or infinite activations (names the layer and the batch), too few samples
            (says how many
            are needed), an empty source, an unknown layer (names the nearest) or one that never
            runs.
        TypeError: integer or complex data.

    Warns:
        FisherWarning: the finite step is too wide for a derivative: dtheta sqrt(J) / 2 > 0.3.

    Cost: one forward pass over the data plus n k^2 operations and 16 k^2 bytes per layer; memory
        does not
    grow with the number of samples.

    Reference: Weimar et al., Phys. Rev. X 15, 031072 (2025); corrections derived in docs/theory.md.

    Example:
        >>> import torch, fisherfast as ff
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4,
        1))
        >>> x = torch.randn(2, 5000, 8)
        >>> flow = ff.fisher_flow(model, ff.FiniteDifference(x[0] - 0.05, x[1] + 0.05, dtheta=0.1))
        >>> flow.names
        ['input', '0', '1', 'output']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    settings = _check_settings(data, max_features, probe, batch_size, seed, ridge, folds)
    return Measurement(model, data, layers, settings).run(progress)


def fisher_information(
    data: FiniteDifference,
    *,
    max_features: int = MAX_FEATURES,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: bool = False,
    ridge: float = RIDGE,
    folds: int = FOLDS,
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
    settings = _check_settings(data, max_features, None, batch_size, seed, ridge, folds)
    return Measurement(None, data, "auto", settings).run(progress).layers[0]


class LayerMeter:
    """Everything kept of one layer while samples stream by."""

    dictionary: FeatureDictionary
    moments: FoldMoments

    def __init__(self, site: taps.Site) -> None:
        self.site = site
        self.pilot = PilotMoments()
        self._pending: list[torch.Tensor] = []
        self._dtype = torch.float32

    def observe_pilot(self, activations: torch.Tensor) -> None:
        """Add [n, ...] to the pilot statistics."""
        if activations.dtype == torch.float64:
            self._dtype = torch.float64
        self.pilot.update(activations.flatten(1) if activations.ndim > 1 else activations[:, None])

    def prepare(self, data: FiniteDifference, settings: dict[str, Any]) -> None:
        """Fix the dictionary from the pilot; from here on `observe` counts."""
        standardisation = self.pilot.standardisation()
        self.dictionary = FeatureDictionary(
            standardisation, settings["max_features"], dtype=self._dtype, seed=settings["seed"]
        )
        self.moments = FoldMoments(
            self.dictionary.size,
            data.conditions,
            folds=settings["folds"],
            paired=data.paired,
            device=standardisation.mean.device,
        )

    def observe(self, condition: int, activations: torch.Tensor) -> torch.Tensor:
        """Add activations [n, ...] of a condition. Returns whether all were finite, as a 0-d
        tensor."""
        flat = activations.flatten(1) if activations.ndim > 1 else activations[:, None]
        features, fold_sums = self.dictionary(
            flat, folds=self.moments.folds, first=self.moments.seen[condition]
        )
        self.moments.update(condition, features, fold_sums)
        if self.moments.paired:
            self._pending.append(features)
            if len(self._pending) == len(self.moments.seen):
                self.moments.update_products(self._pending)
                self._pending = []
        return torch.isfinite(fold_sums).all()


class Measurement:
    """One measurement of a model (or of the data alone) on given data."""

    def __init__(
        self,
        model: nn.Module | None,
        data: FiniteDifference,
        layers: taps.Layers,
        settings: dict[str, Any],
    ) -> None:
        self._model = model
        self._data = data
        self._layers = layers
        self._settings = settings
        self._meters: dict[str, LayerMeter] = {}
        self._finite: list[tuple[str, int, int, torch.Tensor]] = []
        self._condition = 0
        self._batch = 0
        self._pilot = True

    def run(self, progress: bool = False) -> FisherFlow:
        """Stream all samples and estimate."""
        if self._model is None:
            with torch.no_grad():
                self._stream(progress)
        else:
            with taps.evaluation(self._model, self._settings["seed"]):
                self._stream(progress)
        with torch.no_grad():
            contrast = self._data.contrast()
            meters = list(dict.fromkeys(self._meters.values()))
            layers = tuple(
                estimate_layer(m, self._data, contrast, self._settings["ridge"]) for m in meters
            )
        warn_of(layers)
        return FisherFlow(layers, self._settings)

    def _stream(self, progress: bool) -> None:
        device = _device_of(self._model)
        streams = _Streams(self._data, self._settings["batch_size"], device)
        pilot = streams.pilot()
        first = torch.cat([batches[0][:SURVEY_SAMPLES] for batches in pilot])
        self._survey(first)
        with self._forward() as forward:
            for self._condition, batches in enumerate(pilot):
                for self._batch, batch in enumerate(batches):
                    forward.run(batch)
            for meter in dict.fromkeys(self._meters.values()):
                meter.prepare(self._data, self._settings)
            self._pilot = False
            counts = [self._data.samples(c) for c in range(self._data.conditions)]
            total = None if None in counts else sum(n for n in counts if n is not None)
            with progress_bar(progress, total=total, title="Fisher flow") as bar:
                for self._condition, self._batch, batch in streams:
                    forward.run(batch)
                    if batch.device.type == "cpu":
                        self._raise_if_not_finite()
                    bar.update(len(batch))
        self._raise_if_not_finite()

    def _survey(self, batch: torch.Tensor) -> None:
        if self._model is None:
            sites = [taps.Site(taps.INPUT, "data", tuple(batch.shape[1:]))]
        else:
            sites = taps.select(taps.survey(self._model, batch), self._layers, self._model)
        for site in sites:
            meter = LayerMeter(site)
            self._meters.update(dict.fromkeys(site.names, meter))

    def _forward(self) -> Any:
        if self._model is None:
            return _NoModel(self._consume)
        return taps.Forward(self._model, self._consume)

    def _consume(
        self, name: str, kind: str, module: nn.Module | None, output: torch.Tensor
    ) -> None:
        meter = self._meters.get(name)
        if meter is None or name != meter.site.event:
            return
        if tuple(output.shape[1:]) != meter.site.shape:
            raise ValueError(
                f"layer {name!r} must have the same shape for all samples,"
                f" got {tuple(output.shape[1:])} after {meter.site.shape}"
            )
        if self._pilot:
            meter.observe_pilot(output)
            finite = torch.isfinite(output).all()
        else:
            finite = meter.observe(self._condition, output)
        self._finite.append((meter.site.name, self._condition, self._batch, finite))
        if self._pilot and output.device.type == "cpu":
            self._raise_if_not_finite()

    def _raise_if_not_finite(self) -> None:
        flags, self._finite = self._finite, []
        if not flags or bool(torch.stack([flag for *_, flag in flags]).all()):
            return
        name, condition, batch, _ = next(entry for entry in flags if not bool(entry[-1]))
        raise ValueError(
            f"activations of layer {name!r} must be finite, got NaN or infinity in batch {batch} of"
            f" condition {self._data.condition_name(condition)!r}"
        )


class _NoModel:
    """Stands in for a forward pass when only the data are measured."""

    def __init__(self, consume: taps.Consumer) -> None:
        self._consume = consume

    def __enter__(self) -> _NoModel:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, batch: torch.Tensor) -> None:
        self._consume(taps.INPUT, taps.INPUT, None, batch)


class _Streams:
    """Batches of all conditions: one condition after the other, or in lockstep when paired.

    The first batches are read for the pilot and kept, so that a stream is read only once.
    """

    def __init__(
        self, data: FiniteDifference, batch_size: int, device: torch.device | None
    ) -> None:
        self._device = device
        self._paired = data.paired
        self._conditions = data.conditions
        if data.paired:
            self._rounds = lockstep(data, batch_size)
            self._kept_rounds: list[tuple[torch.Tensor, ...]] = []
        else:
            self._streams = [data.batches(c, batch_size) for c in range(data.conditions)]
            self._kept: list[list[torch.Tensor]] = []

    def pilot(self) -> list[list[torch.Tensor]]:
        """The first batches of each condition, at most `PILOT_SAMPLES` samples in all."""
        rows = -(-PILOT_SAMPLES // self._conditions)
        if self._paired:
            self._kept_rounds = _head(self._rounds, rows, lambda batches: len(batches[0]))
            kept = [[batches[c] for batches in self._kept_rounds] for c in range(self._conditions)]
        else:
            self._kept = [_head(stream, rows, len) for stream in self._streams]
            kept = self._kept
        return [self._trim(batches, rows) for batches in kept]

    def __iter__(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield (condition, number of the batch, batch)."""
        if self._paired:
            rounds = itertools.chain(_release(self._kept_rounds), self._rounds)
            for number, batches in enumerate(rounds):
                for condition, batch in enumerate(batches):
                    yield condition, number, self._move(batch)
            return
        for condition, stream in enumerate(self._streams):
            batches = itertools.chain(_release(self._kept[condition]), stream)
            for number, batch in enumerate(batches):
                yield condition, number, self._move(batch)

    def _trim(self, batches: list[torch.Tensor], rows: int) -> list[torch.Tensor]:
        trimmed = []
        for batch in batches:
            if rows > 0:
                trimmed.append(self._move(batch[:rows]))
                rows -= len(batch)
        return trimmed

    def _move(self, batch: torch.Tensor) -> torch.Tensor:
        return batch if self._device is None else batch.to(self._device, non_blocking=True)


def _head(stream: Iterator[Any], rows: int, length: Any) -> list[Any]:
    """Read batches until there are enough rows, or `PILOT_BATCHES` of them."""
    head: list[Any] = []
    while rows > 0 and len(head) < PILOT_BATCHES:
        item = next(stream, None)
        if item is None:
            break
        head.append(item)
        rows -= length(item)
    return head


def _release(kept: list[Any]) -> Iterator[Any]:
    """Yield what was kept and let go of it."""
    while kept:
        yield kept.pop(0)


def estimate_layer(
    meter: LayerMeter, data: FiniteDifference, contrast: torch.Tensor, ridge: float
) -> LayerFisher:
    """J, its errors and bounds from the fold moments of one layer."""
    site, dictionary, moments = meter.site, meter.dictionary, meter.moments
    _check_samples(site.name, moments)
    floor = (ROUNDING * dictionary.offset).square()
    alive = (moments.variances() > floor).nonzero()[:, 0]
    raw = int((alive < dictionary.raw).sum())
    dropped = dictionary.size - len(alive)
    base = _no_information(site, data, samples=sum(moments.seen), dropped=dropped)
    if raw == 0:
        return replace(base, notes=(f"all {site.dim} activations are constant: J = 0",))
    whole = moments.statistics(contrast)
    _check_freedom(site.name, raw, whole, moments)
    size, notes = _affordable(len(alive), raw, whole.dof)
    if dropped:
        notes.append(f"{dropped} constant features dropped")
    index = alive[:size]
    try:
        curve = fisher_curve(whole.select(index), ridge)
    except ValueError as error:
        raise ValueError(f"layer {site.name!r}: {error}") from None
    chosen, converged = choose_features(curve, raw)
    halves = [moments.statistics(contrast, half).select(index[:chosen]) for half in (0, 1)]
    lower, lower_stderr = cross_fitted_bound(halves[0], halves[1])
    points = _curve_points(raw, size)
    kind = "sketch" if dictionary.kind == "sketch" else "raw" if chosen == raw else "lift"
    layer = replace(
        base,
        J=curve.J[chosen - 1].cpu(),
        stderr=curve.stderr[chosen - 1].cpu(),
        lower=lower.cpu(),
        lower_stderr=lower_stderr.cpu(),
        linear=curve.J[raw - 1].cpu(),
        linear_stderr=curve.stderr[raw - 1].cpu(),
        naive=curve.naive[chosen - 1].cpu(),
        curve_k=points,
        curve_J=curve.J[points - 1].cpu(),
        curve_stderr=curve.stderr[points - 1].cpu(),
        features=chosen,
        feature_kind=kind,
        effective_dim=float(curve.effective_dim[chosen - 1]),
        converged=converged,
    )
    warning = finite_step_note(layer)
    return replace(layer, notes=(*notes, *([warning] if warning else [])))


def _no_information(
    site: taps.Site, data: FiniteDifference, *, samples: int, dropped: int
) -> LayerFisher:
    """J = 0 and an empty curve: what a layer shows when none of its activations varies."""
    P = data.parameters
    zero = torch.zeros(P, P, dtype=torch.float64)
    empty = torch.zeros(0, P, P, dtype=torch.float64)
    return LayerFisher(
        name=site.name,
        kind=site.kind,
        shape=site.shape,
        J=zero,
        stderr=zero,
        lower=zero,
        lower_stderr=zero,
        linear=zero,
        linear_stderr=zero,
        naive=zero,
        curve_k=torch.zeros(0, dtype=torch.int64),
        curve_J=empty,
        curve_stderr=empty,
        features=0,
        feature_kind="none",
        effective_dim=0.0,
        samples=samples,
        dropped=dropped,
        converged=True,
        dtheta=data.dtheta,
        aliases=tuple(site.aliases),
        descendants=tuple(sorted(site.descendants)),
    )


def _check_samples(name: str, moments: FoldMoments) -> None:
    if int(moments.counts.min()) < 2:
        raise ValueError(
            f"layer {name!r} must see at least {2 * moments.folds} samples per condition"
            f" (two per fold), got {min(moments.seen)}"
        )


def _check_freedom(name: str, raw: int, whole: FoldStatistics, moments: FoldMoments) -> None:
    needed = raw + SPARE_DOF
    if whole.dof >= needed:
        return
    conditions = len(moments.seen)
    inflation = (sum(moments.seen) - moments.counts.numel()) / whole.dof
    per_condition = int(-(-(needed * inflation + moments.counts.numel()) // conditions))
    raise ValueError(
        f"layer {name!r} must see at least {per_condition} samples per condition for its {raw}"
        f" activations, got {min(moments.seen)}"
    )


def _affordable(size: int, raw: int, dof: float) -> tuple[int, list[str]]:
    """Features that the samples can carry: lifted ones only up to half the degrees of freedom."""
    limit = max(raw, int(dof / 2))
    if size <= limit:
        return size, []
    return limit, [f"features limited to {limit} of {size} by the number of samples"]


def _curve_points(raw: int, size: int) -> torch.Tensor:
    """The raw dimension, and about `CURVE_POINTS` sizes evenly up to all features."""
    steps = torch.linspace(raw, size, min(CURVE_POINTS, size - raw + 1), dtype=torch.float64)
    return steps.round().long().unique()


def _device_of(model: nn.Module | None) -> torch.device | None:
    """Where the model's first parameter or buffer lies; None leaves batches where they are."""
    if model is None:
        return None
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if tensor is None else tensor.device


def _check_settings(
    data: FiniteDifference,
    max_features: int,
    probe: None,
    batch_size: int,
    seed: int,
    ridge: float,
    folds: int,
) -> dict[str, Any]:
    if not isinstance(data, FiniteDifference):
        raise TypeError(f"data must be a FiniteDifference, got {type(data).__name__}")
    if probe is not None:
        raise NotImplementedError(f"probe must be None in this version, got {probe!r}")
    for name, value in (("max_features", max_features), ("batch_size", batch_size)):
        if int(value) < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if not 0 <= ridge < 1:
        raise ValueError(f"ridge must be in [0, 1), got {ridge}")
    if folds < 4 or folds % 2:
        raise ValueError(f"folds must be even and at least 4, got {folds}")
    return {
        "max_features": int(max_features),
        "batch_size": int(batch_size),
        "seed": int(seed),
        "ridge": float(ridge),
        "folds": int(folds),
        "paired": data.paired,
        "dtheta": list(data.dtheta),
    }
