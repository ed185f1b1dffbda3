"""`FisherMonitor`: Fisher information of every layer while a network trains."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fisherfast._errors import FisherWarning
from fisherfast._files import replacing
from fisherfast._validation import check_same_network, check_whole
from fisherfast._version import __version__
from fisherfast.data import Data, KeptData
from fisherfast.estimation.ridge import AUTO, RidgeSetting
from fisherfast.measurement.run import Measurement, NotFiniteError, Recall
from fisherfast.measurement.settings import MeasurementSettings, Settings
from fisherfast.model.sites import INPUT, Layers
from fisherfast.model.unwrap import check_model, unwrapped
from fisherfast.parallel.ranks import OtherRankError, Ranks, find_ranks, ranks_of
from fisherfast.results import table
from fisherfast.results.comparison import DIVIDES, uncorrelated, weakest_direction
from fisherfast.results.flow import FisherFlow
from fisherfast.results.layer import finite_step_note
from fisherfast.results.profile import Profile
from fisherfast.training.checks import FORMAT_VERSION, check_errors, check_scale, read_state
from fisherfast.training.history import HistoryFile, as_csv, columns_of
from fisherfast.training.labels import Bound, bound_along_theta
from fisherfast.training.observe import Observer, leaves
from fisherfast.training.plots import plot_training
from fisherfast.training.record import (
    NOT_MEASURED,
    EpochRecord,
    Errors,
    Stop,
    input_of,
    output_of,
    table_of,
)
from fisherfast.training.regression import LiveEstimate
from fisherfast.training.units import unit_note

MONITOR_FEATURES = 128
"""Default number of features: enough for a trend, at an eighth of the cost of 512 features."""

OBSERVE_EVERY = 256
"""`observe` reads every so many batches: under 2 % of the shortest training steps."""

KEPT_BYTES = 2**29
"""Bytes of samples of simulators, files and loaders kept between measurements, 512 MB."""

SHOWN_EPOCHS = 12
"""Most rows of a printed history."""

ON_HOST: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


class FisherMonitor:
    r"""Measure a network repeatedly while it trains, and keep the history.

    Results that do not change between measurements are computed once: samples, the information in
    the input, layers and their chains; layers too wide for a covariance start from their last
    Krylov space (3 passes instead of 17). All measurements use the same samples and the same lift,
    so epochs differ because of the network only. The model's parameters, mode and hooks and the
    random state are restored. Print the monitor for a table.

    Args:
        model: the network in training, also compiled or inside DistributedDataParallel.
        data: held-out samples at theta, as for `fisher_flow`; or a `Labelled` regression data set,
            which may be the training set itself.
        held_out: whether the network is not trained on `data`. None: yes, but unknown for labelled
            samples. Only rule "crlb", which reads the information in the input, stops on samples
            that are, or may be, trained on.
        every: measure at every so many calls of `step`, starting with the first.
        layers: as for `fisher_flow`.
        max_features: number of features to use per layer.
        output: name of a head that records and rules read instead of the joint "output", as for
            `fisher_flow`.
        training_data: *training* samples at theta, in the same form: J of the output is also
            measured on them, and `EpochRecord.overfitting` is the difference.
        target_scale: theta per unit of the network's targets; errors given to `step` are multiplied
            by its square. 1 for targets in the unit of theta.
        observe_every: `observe` reads every so many batches, at most those of an epoch.
        path: CSV file that is updated with every record.
        keep: bytes of samples to keep between measurements if the source is a simulator, a loader
            or files; samples that do not fit are read again each time.
        process_group: the processes that measure together, as for `fisher_flow`. Each of them calls
            `step`; errors are averaged over them, and the first one warns and writes the file.
            `live` is that of each process's own batches.
        ridge, seed, memory_budget, settings: as for `fisher_flow`. Memory kept between
            measurements is not part of the budget.

    Attributes:
        history: records in the order of the calls.
        model: the module without its wrappers.
        data: the samples.
        stop: where a `FisherEarlyStopping` has stopped the run; None before.
        leads: this process reports the run: it warns, logs the stop and writes the file.

    Raises:
        TypeError, ValueError: an argument is out of its range (as `fisher_flow`).

    Cost: a measurement is a `fisher_flow` without input and survey; benchmarks/speed/monitor.py
        compares it with the time of an epoch.

    Example:
        >>> import torch, fisherfast as ff
        >>> model = torch.nn.Linear(4, 1)
        >>> x = torch.randn(2, 1000, 4)
        >>> data = ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2)
        >>> monitor = ff.FisherMonitor(model, data)
        >>> for epoch in range(2):
        ...     record = monitor.step(epoch=epoch, train_mse=0.3)  # after an epoch of training
        >>> len(monitor.history), record.flow.names
        (2, ['input', 'output'])
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        *,
        held_out: bool | None = None,
        every: int = 1,
        layers: Layers = "auto",
        max_features: int = MONITOR_FEATURES,
        ridge: RidgeSetting = AUTO,
        output: str | None = None,
        seed: int = 0,
        training_data: Data | None = None,
        target_scale: float = 1.0,
        observe_every: int = OBSERVE_EVERY,
        path: str | Path | None = None,
        keep: int = KEPT_BYTES,
        memory_budget: int | str | None = None,
        process_group: Any = None,
        settings: Settings | None = None,
    ) -> None:
        check_model(model)
        self.model = unwrapped(model)
        self._every = check_whole("every", every, least=1)
        self._observe_every = check_whole("observe_every", observe_every, least=1)
        self._keep = check_whole("keep", keep, least=0)
        self._target_scale = check_scale(target_scale)
        asked: dict[str, Any] = {
            "settings": settings,
            "max_features": max_features,
            "ridge": ridge,
            "output": output,
            "seed": seed,
            "memory_budget": memory_budget,
        }
        self._settings = MeasurementSettings.of(data, **asked)
        if self._settings.grow:
            raise ValueError("grow must be False for a monitor, which compares the same features")
        self._layers = layers
        self.data = self._kept(data)
        self._given = data
        self._held_out = _check_held_out(held_out, data)
        self._bound: Bound = torch.full((data.parameters,) * 2, math.nan, **ON_HOST), None
        self._training_data: Data | None = None
        if training_data is not None:
            MeasurementSettings.of(training_data, **asked)
            if training_data.parameters != data.parameters:
                raise ValueError(
                    f"training_data must have {data.parameters} parameters like data,"
                    f" got {training_data.parameters}"
                )
            self._training_data = self._kept(training_data)
        ranks = find_ranks(process_group)
        self.leads = ranks is None or ranks.rank == 0
        self._group = process_group
        self._file = None if path is None or not self.leads else HistoryFile(path)
        self._recall, self._training_recall = Recall(), Recall()
        self._observer: Observer | None = None
        self._outer = model
        self._calls = 0
        self._warned: set[str] = set()
        self.history: list[EpochRecord] = []
        self.stop: Stop | None = None

    def step(
        self,
        *,
        epoch: int | None = None,
        train_mse: float | Sequence[float] | torch.Tensor | None = None,
        val_mse: float | Sequence[float] | torch.Tensor | None = None,
    ) -> EpochRecord | None:
        """Record an epoch, and measure in every `every`-th call. Call it when an epoch ends, or
        after a fixed number of training steps.

        Call it inside your autocast context to measure the network as it runs there. Samples with
        tangents are measured in float32: rounded values have no derivative.

        Args:
            epoch: its number; None for the one after the last record.
            train_mse: mean square error on training samples, in the square of the targets' unit; P
                of them for P parameters.
            val_mse: the same on samples that are not trained on.

        Returns:
            The record, which is the last of `history`; None if there is nothing to record, neither
            a measurement nor an error.

        Raises:
            TypeError, ValueError: an error is not a number, negative, or not one per parameter.
            ValueError: the model does not return a floating tensor with one row per sample, or not
                the head that `output` names.

        Warns:
            FisherWarning: activations or the training error are NaN or infinite (the record then
                has no flow); the targets seem to be in another unit than theta; observe_every
                exceeds the batches between two measurements; the history file cannot be written;
                each at most once.
        """
        due = self._calls % self._every == 0
        if not due and train_mse is None and val_mse is None:
            self._calls += 1
            return None
        start = time.perf_counter()
        flow = training_flow = None
        notes: list[str] = []
        try:
            with ranks_of(self._group) as ranks:
                number = self.history[-1].epoch + 1 if self.history else 0
                if epoch is not None:
                    number = check_whole("epoch", epoch)
                own = {
                    name: check_errors(name, value, self.data.parameters, self._target_scale)
                    for name, value in (("train_mse", train_mse), ("val_mse", val_mse))
                }
                errors = _mean_over(ranks, own)
                if due:
                    flow, training_flow = self._measure(ranks)
                    self._bound = self._bound_of(flow, ranks)
        except (NotFiniteError, OtherRankError) as error:
            if isinstance(error, OtherRankError) and NotFiniteError.__name__ not in str(error):
                raise
            notes.append(f"{NOT_MEASURED}{error}")
            flow = training_flow = None
        self._calls += 1
        notes += self._notes_on(flow, errors)
        if due and self._observer is not None:
            notes += self._observer.note()
        input_J, attainable = self._bound
        live = self.live()
        record = EpochRecord(
            epoch=number,
            flow=flow,
            train_mse=errors["train_mse"],
            val_mse=errors["val_mse"],
            input_J=input_J,
            training_flow=training_flow,
            live=self._live_fractions(live, input_J),
            live_age=next((estimate.age for estimate in live.values()), 0),
            attainable=attainable,
            source=self.data.source,
            held_out=self._held_out,
            seconds=time.perf_counter() - start,
            notes=tuple(notes),
        )
        self.history.append(record)
        self._warn(record)
        if self._file is not None:
            self._file.write(self.rows())
        return record

    def adopt(self, record: EpochRecord) -> None:
        """Add a record of the same network that another process has measured, which also reports
        the run, instead of calling `step`.

        Args:
            record: the result of `step` there.
        """
        self._calls += 1
        self.leads = False
        self.history.append(record)

    def observe(self, theta: torch.Tensor) -> None:
        """Read the last training batch of the model, without another forward pass.

        Call it after every forward pass of the training. One batch in `observe_every` is read, by
        hooks that are on the model for that batch only. Passes in eval mode without gradients
        (validation, measurements) are ignored; of several training passes the last is read. See
        `live`.

        Args:
            theta: [n] or [n, P], the parameters of the samples, in the unit of theta.

        Raises:
            ValueError: theta does not have one row per sample.
            TypeError: theta does not hold real numbers.

        Cost: under 2 % of a training step on average. Layers of up to 256 activations are read,
            including input and output (only these two for a compiled model).
        """
        if self._observer is None:
            self._observer = self._new_observer()
        self._observer.observe(theta)

    def live(self) -> dict[str, LiveEstimate]:
        """Return J of the layers that `observe` reads, over its last few thousand samples: a trend
        between measurements, averaged over the values of theta in the batches. `age` says how many
        batches ago the last one was read."""
        return {} if self._observer is None else self._observer.estimates()

    def __repr__(self) -> str:
        parts = [self._title()] + [table.as_text(self._table())] * bool(self.history)
        return "\n".join([*parts, *([self.stop.reason] if self.stop else [])])

    def _repr_html_(self) -> str:
        return table.as_html(self._table(), [self._title()])

    def _title(self) -> str:
        measured = [record.flow for record in self.history if record.flow is not None]
        shape = f" [{', '.join(map(str, measured[0][INPUT].shape))}]" if measured else ""
        samples = f" on samples {s}" if measured and (s := self.history[-1].samples) else ""
        return (
            f"FisherMonitor of {type(self.model).__name__}{shape}: {len(self.history)} epochs,"
            f" {len(measured)} measured{samples}"
        )

    def _table(self) -> list[list[str]]:
        """Return the header and the rows of the last epochs; of a long history the first as
        well."""
        rows = table_of(self.history)
        if len(self.history) <= SHOWN_EPOCHS:
            return rows
        return [*rows[:2], ["..."] * len(rows[0]), *rows[2 - SHOWN_EPOCHS :]]

    def rows(self) -> list[dict[str, Any]]:
        """Return the history as plain numbers by column, and the kind of samples, for any logger or
        data frame."""
        return [record.row() for record in self.history]

    def to_csv(self, path: str | Path) -> None:
        """Write the history, one line per record, with empty cells for unknown values; after an
        error an earlier file is as it was."""
        rows = self.rows()
        with replacing(Path(path)) as file:
            file.write(as_csv(rows, columns_of(rows)).encode())

    def plot(self, ax: Any = None) -> Any:
        """Plot transmission and the errors in units of the bound over epochs, with the stop of the
        rule that ran, and return the matplotlib axes."""
        return plot_training(self.history, ax, stop=self.stop)

    def close(self) -> None:
        """Remove the hooks of `observe` from the model at the end of the training."""
        if self._observer is not None:
            self._observer.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which a resumed run continues bit for bit, as tensors, numbers,
        strings and lists: ``torch.save`` it together with the model."""
        observer = None if self._observer is None else self._observer.state_dict()
        return {
            "format_version": FORMAT_VERSION,
            "version": __version__,
            "network": self._signature(),
            "settings": self._compared(),
            "calls": self._calls,
            "history": [record.state_dict() for record in self.history],
            "observer": observer,
            "spaces": {n: [w.cpu() for w in s] for n, s in self._recall.spaces.items()},
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run that `state_dict` was taken from.

        Raises:
            ValueError: the state is of another network (says what differs), of other settings or of
                another version of the format. Nothing is changed then.
        """
        values = read_state(state)
        check_same_network("state", self._signature(), values["network"])
        ours, theirs = self._compared(), values["settings"]
        for name in sorted(set(ours) | set(theirs)):
            here, there = ours.get(name), theirs.get(name)
            if type(here) is not type(there) or here != there:
                raise ValueError(
                    f"state must be of the same settings, got {name} = {there!r} for {here!r}"
                )
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        spaces = {
            name: [weights.to(device, copy=True) for weights in halves]
            for name, halves in values["spaces"].items()
        }
        observer = None
        if values["observer"] is not None:
            observer = self._new_observer()
            observer.load_state_dict(values["observer"])
        self.close()
        if self._file is not None:
            self._file.restart()
        self.history, self._observer = values["history"], observer
        if self.history:
            self._bound = self.history[-1].input_J, self.history[-1].attainable
        self._calls, self._warned = values["calls"], set(values["warned"])
        self._recall.spaces = spaces

    def _notes_on(self, flow: FisherFlow | None, errors: Mapping[str, Errors]) -> list[str]:
        """Make the notes of a record."""
        notes: list[str] = []
        if flow is not None:
            notes += [note for layer in flow if (note := finite_step_note(layer)) is not None][:1]
            known = errors["train_mse"] if errors["val_mse"] is None else errors["val_mse"]
            notes += unit_note(flow, known, self._target_scale)
        if any(not math.isfinite(e) for values in errors.values() for e in values or ()):
            notes.append(f"mean square errors must be finite, got {dict(errors)}")
        return notes

    def _measure(self, ranks: Ranks | None) -> tuple[FisherFlow, FisherFlow | None]:
        def measured(
            data: Data, layers: Layers, settings: MeasurementSettings, recall: Recall
        ) -> FisherFlow:
            return Measurement(
                self.model, data, layers, settings, recall=recall, quiet=True, ranks=ranks
            ).run()

        settings = self._settings
        paused = contextlib.nullcontext() if self._observer is None else self._observer.paused()
        with paused, _own_stream(self.model):
            flow = measured(self.data, self._layers, settings, self._recall)
            output = output_of(flow)
            if output not in flow:
                raise ValueError(
                    "model must return a floating tensor with one row per sample, got none: use"
                    " fisher_flow to measure its layers alone"
                )
            if self._training_data is None:
                return flow, None
            settings = replace(settings, maps=False)
            training = measured(self._training_data, [output], settings, self._training_recall)
        # with the held-out input, for the ratio; no replicates, because the samples differ
        own = [replace(layer, replicates=layer.replicates[:0]) for layer in training.layers[1:]]
        return flow, FisherFlow((flow.layers[0], *own), training.settings)

    def _kept(self, data: Data) -> Data:
        return data if data.resident() or self._keep == 0 else KeptData(data, self._keep)

    def _bound_of(self, flow: FisherFlow, ranks: Ranks | None) -> Bound:
        """Return J of the input, and for labelled samples the attainable error, which both belong
        to the samples and are determined once."""
        source = flow.layers[0]
        if source.profile is None:
            return input_of(flow), None
        if not bool(torch.isnan(self._bound[0]).any()):
            return self._bound
        settings = replace(self._settings, maps=False, output=None)

        def profile(data: Data) -> Profile | None:
            found = Measurement(None, data, "auto", settings, quiet=True, ranks=ranks).run()
            return found.layers[0].profile

        J, errors = bound_along_theta(source.profile, self._given, profile)
        return J, _mean_over(ranks, {"attainable": errors})["attainable"]

    def _live_fractions(
        self, estimates: Mapping[str, LiveEstimate], input_J: torch.Tensor
    ) -> dict[str, float]:
        """Compute tr(J_input^-1 J) / P of the layers read by `observe`."""
        source = estimates.get(INPUT)
        J = input_J if source is None else source.J
        errors = torch.zeros_like(J) if source is None else source.stderr
        if not weakest_direction(J, uncorrelated(errors))[1] >= DIVIDES:
            return {}
        return {
            name: float(torch.linalg.solve(J, estimate.J).trace()) / len(J)
            for name, estimate in estimates.items()
            if name != INPUT
        }

    def _new_observer(self) -> Observer:
        model, modules = self.model, leaves(self.model)
        inside = set(model.modules())
        wrappers = [module for module in self._outer.modules() if module not in inside]
        if any(hasattr(w, "_orig_mod") or isinstance(w, nn.DataParallel) for w in wrappers):
            model, modules = self._outer, {}  # hooks inside would be compiled, or copied to threads
        return Observer(model, self.data.parameters, every=self._observe_every, modules=modules)

    def _warn(self, record: EpochRecord) -> None:
        """Warn of each kind of note once per run, on one rank."""
        for note in record.notes:
            kind = note.partition(":")[0].partition("=")[0]
            if kind not in self._warned:
                self._warned.add(kind)
                if self.leads:
                    warnings.warn(f"epoch {record.epoch}: {note}", FisherWarning, stacklevel=3)

    def _compared(self) -> dict[str, Any]:
        """Return the settings that two runs must share to continue one history."""
        return self._settings.to_dict() | {
            "parameters": self.data.parameters,
            "target_scale": self._target_scale,
            "held_out": self._held_out,
            # a state cannot hold functions and patterns
            "layers": self._layers if isinstance(self._layers, str | Sequence) else None,
        }

    def _signature(self) -> dict[str, list[int]]:
        """Return names and shapes of the parameters."""
        return {name: list(p.shape) for name, p in self.model.named_parameters()}


def _check_held_out(held_out: Any, data: Data) -> bool | None:
    """Return whether the samples are held out; None if unknown.

    Raises:
        TypeError: held_out is neither a boolean nor None.
    """
    if held_out is not None and not isinstance(held_out, bool):
        raise TypeError(f"held_out must be True, False or None, got {held_out!r}")
    return True if held_out is None and data.source != "labelled" else held_out


@contextlib.contextmanager
def _own_stream(model: nn.Module) -> Iterator[None]:
    """Run on a separate CUDA stream if the model is on a GPU. It waits for the caller's earlier
    kernels, and the caller's next kernels wait for it."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        yield
        return
    callers = torch.cuda.current_stream(device)
    own = torch.cuda.Stream(device)
    own.wait_stream(callers)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        callers.wait_stream(own)


def _mean_over(ranks: Ranks | None, own: dict[str, Errors]) -> dict[str, Errors]:
    """Average the known errors over ranks, by name; the result is the same on all of them."""
    if ranks is None:
        return own
    everywhere = ranks.exchange("averaging errors", own)
    means: dict[str, Errors] = {}
    for name in own:
        known = [errors[name] for errors in everywhere if errors[name] is not None]
        means[name] = (
            tuple(math.fsum(each) / len(known) for each in zip(*known, strict=True)) or None
        )
    return means
