"""`EpochRecord`: the results of a monitor after one epoch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Annotated, Any

import torch

from fisherfast._fields import AtLeast, Count, Matrix, build
from fisherfast.model.sites import INPUT, OUTPUT
from fisherfast.results import table
from fisherfast.results.comparison import divides, ratio
from fisherfast.results.flow import FisherFlow
from fisherfast.results.text import number, with_error

NOT_MEASURED = "not measured: "
"""Start of the note of a record whose measurement found activations that are not finite."""

HEADER = ["epoch", "J_output / J_input", "most lost in", "train mse / bound", "val mse / bound"]

LAYER_COLUMNS = ("layer", "shape", "J", "+-", "J / J_input", "status")
"""Columns of the table of a flow that a record shows."""

Errors = tuple[Annotated[float, AtLeast(0)], ...] | None
"""Mean square errors of the P parameters in theta^2; None if unknown."""


@dataclass(frozen=True)
class Stop:
    """Where a rule has stopped a run.

    Attributes:
        rule: its name.
        epoch: number of the epoch after which training was stopped.
        best_epoch: number of the best epoch; None if it is unknown.
        reason: where and why, a line.
    """

    rule: str
    epoch: int
    best_epoch: int | None
    reason: str


@dataclass(frozen=True, repr=False)
class EpochRecord:
    """The result of one call of `FisherMonitor.step`. Print it for a table.

    Attributes:
        epoch: its number, given by the caller.
        flow: information in every layer on the monitor's samples; None if this epoch was not
            measured.
        train_mse: mean square errors of the P parameters on training samples, in theta^2; None if
            not given.
        val_mse: the same on samples that are not trained on.
        input_J: [P, P] Fisher information of the input in 1/theta^2, from the first measurement on;
            for labelled samples the one whose inverse is the mean of J(theta)^-1 over them. NaN
            before, and if it is within three errors of zero: rules then do not use it.
        training_flow: information in the output on *training* samples, if the monitor has these.
        live: J / J_input of layers from the training batches, see `FisherMonitor.observe`.
        live_age: training batches since the last one that `live` has read.
        attainable: for labelled samples, least mean square errors of the P parameters on unseen
            samples, in theta^2, for an estimate that knows the range of the labels; otherwise None.
        source: of the samples, as `Data.source`; empty if unknown.
        held_out: the network is not trained on these samples; None if unknown.
        seconds: wall time of the record.
        notes: remarks for the reader.
    """

    epoch: int
    flow: FisherFlow | None
    train_mse: Errors
    val_mse: Errors
    input_J: Matrix
    training_flow: FisherFlow | None = None
    live: Mapping[str, float] = field(default_factory=dict)
    live_age: Count = 0
    attainable: Errors = None
    source: str = ""
    held_out: bool | None = True
    seconds: Annotated[float, AtLeast(0)] = 0.0
    notes: tuple[str, ...] = ()

    @property
    def train_level(self) -> float:
        """Training error in units of the Cramer-Rao bound of the input: mse * J for one parameter,
        the mean of mse_p / (J^-1)_pp for several. NaN if unknown. Below 1 the network memorises."""
        return level_of(self.train_mse, self.input_J)

    @property
    def val_level(self) -> float:
        """Validation error in units of the Cramer-Rao bound of the input; NaN if unknown."""
        return level_of(self.val_mse, self.input_J)

    @property
    def samples(self) -> str:
        """The samples that were measured, such as "labelled (trained on)"; empty if unknown."""
        known = {True: " (held out)", False: " (trained on)", None: ""}
        return self.source and f"{self.source}{known[self.held_out]}"

    @property
    def transmission(self) -> float:
        """J_output / J_input on the monitor's samples; NaN if not measured, or if J_input is within
        three errors of zero."""
        return _share(self.flow)[0]

    @property
    def transmission_error(self) -> float:
        """Standard error of `transmission`."""
        return _share(self.flow)[1]

    @property
    def overfitting(self) -> float:
        """J_output / J_input on training samples minus that on held-out ones: zero within noise
        while the network generalises. NaN if one of them was not measured."""
        return _share(self.training_flow)[0] - self.transmission

    def __repr__(self) -> str:
        transmission = with_error(self.transmission, self.transmission_error)
        return f"EpochRecord(epoch={self.epoch}, transmission={transmission})"

    def __str__(self) -> str:
        parts = [table.as_text(rows) for rows in self._tables()]
        samples = [f"samples: {self.samples}"] if self.samples else []
        return "\n".join([*parts, *samples, *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return "".join(table.as_html(rows) for rows in self._tables())

    def _tables(self) -> list[list[list[str]]]:
        """Return the row of the epoch, and the layers if it was measured."""
        tables = [table_of([self])]
        if self.flow is not None:
            rows = self.flow.table()
            shown = [rows[0].index(name) for name in LAYER_COLUMNS]
            tables.append([[row[column] for column in shown] for row in rows])
        return tables

    def row(self) -> dict[str, Any]:
        """Return plain numbers by column, and what `samples` says; NaN if unknown. For several
        parameters the fractions are those of `FisherFlow.fractions`, and the diagonal of J is in
        "J/layer[p]"."""
        return dict(self._row)

    @cached_property
    def _row(self) -> dict[str, Any]:
        """Columns of `row`, computed once because a history of n records is written n times."""
        row: dict[str, Any] = {"epoch": self.epoch}
        parameters = len(self.input_J)
        row |= _by_parameter("train_mse", self.train_mse, parameters)
        row |= _by_parameter("val_mse", self.val_mse, parameters)
        row |= {
            "train_level": self.train_level,
            "val_level": self.val_level,
            "transmission": self.transmission,
            "transmission_stderr": self.transmission_error,
            "overfitting": self.overfitting,
            "seconds": self.seconds,
            "samples": self.samples,
        }
        if self.attainable is not None:
            row |= _by_parameter("attainable", self.attainable)
        if self.flow is not None:
            fractions, fraction_errors = self.flow.fractions(), self.flow.fraction_errors()
            for layer in self.flow:
                row |= _by_parameter(f"J/{layer.name}", layer.J.diagonal().tolist())
                row |= _by_parameter(f"stderr/{layer.name}", layer.stderr.diagonal().tolist())
                row |= _by_parameter(f"lower/{layer.name}", layer.lower.diagonal().tolist())
                row[f"fraction/{layer.name}"] = fractions[layer.name]
                row[f"fraction_stderr/{layer.name}"] = fraction_errors[layer.name]
        row |= {f"live/{name}": value for name, value in self.live.items()}
        if self.live:
            row["live_age"] = self.live_age
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and tensors; without the readouts of layers."""
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("flow", "training_flow"):
            state[name] = None if state[name] is None else state[name].to_dict()
            for layer in [] if state[name] is None else state[name]["layers"]:
                layer.pop("readout", None)  # two thirds of the state
        return state | {
            "input_J": self.input_J.clone(),
            "live": dict(self.live),
            "notes": list(self.notes),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> EpochRecord:
        """Rebuild a record from the result of `state_dict`.

        Raises:
            ValueError: an entry is missing or of the wrong kind.
        """
        record = build(cls, state, complete=True)
        return replace(record, input_J=record.input_J.to("cpu", copy=True))

    def check_fields(self) -> None:
        """Raise ValueError unless the fields of a rebuilt record have the same parameters."""
        P = len(self.input_J)
        for name in ("train_mse", "val_mse", "attainable"):
            errors = getattr(self, name)
            if errors is not None and len(errors) != P:
                raise ValueError(f"{name} must hold one number per parameter ({P}), got {errors}")
        for name in ("flow", "training_flow"):
            flow = getattr(self, name)
            if flow is not None and flow.parameters != P:
                raise ValueError(f"{name} must have {P} parameters, got {flow.parameters}")
            if flow is not None and output_of(flow) not in flow:
                raise ValueError(f"{name} must have a layer {output_of(flow)!r}, got {flow.names}")


def output_of(flow: FisherFlow) -> str:
    """Return the name of the output that monitor and rules read: the whole output, or the head
    chosen as `output`."""
    return flow.settings.get("output") or OUTPUT


def input_of(flow: FisherFlow) -> torch.Tensor:
    """Return J of the input; NaN if it is zero within its error."""
    source = flow.layers[0]
    return source.J if divides(source) else torch.full_like(source.J, math.nan)


def table_of(history: Sequence[EpochRecord]) -> list[list[str]]:
    """Return the header and one row of text per epoch, as printed."""
    return [HEADER] + [
        [
            str(record.epoch),
            with_error(record.transmission, record.transmission_error),
            "-" if record.flow is None else _most_lost(record.flow),
            number(record.train_level),
            number(record.val_level),
        ]
        for record in history
    ]


def _most_lost(flow: FisherFlow) -> str:
    """Return the layer that loses most of J_input, and how much, of the layers that everything
    passes on its way to the output; "-" if no loss is above the errors of both ratios."""
    output = flow[output_of(flow)]
    way = [layer.name for layer in flow if output.name in layer.descendants] + [output.name]
    shares, errors = flow.fractions(), flow.fraction_errors()
    losses = {
        after: shares[before] - shares[after]
        for before, after in itertools.pairwise(way)
        if shares[before] - shares[after] > math.hypot(errors[before], errors[after])
    }
    if not losses:
        return "-"
    name = max(losses, key=lambda after: losses[after])
    return f"{flow[name].label or name} ({number(losses[name])})"


def level_of(errors: Errors, input_J: torch.Tensor) -> float:
    """Compute the mean over parameters of mse_p / (J^-1)_pp; NaN if unknown, or if J is not
    positive definite."""
    if errors is None:
        return math.nan
    inverse, failed = torch.linalg.inv_ex(input_J)
    if int(failed) or bool((inverse.diagonal() <= 0).any()):
        return math.nan
    levels = input_J.new_tensor(errors) / inverse.diagonal()
    return float(levels.mean())


def _share(flow: FisherFlow | None) -> tuple[float, float]:
    """Return J_output / J_input and its standard error."""
    if flow is None:
        return math.nan, math.nan
    return ratio(flow[output_of(flow)], flow[INPUT])


def _by_parameter(name: str, values: Any, parameters: int | None = None) -> dict[str, float]:
    """Make one column, or one per parameter if there are several."""
    if values is None:
        values = [math.nan] * (parameters or 1)
    if len(values) == 1:
        return {name: float(values[0])}
    return {f"{name}[{p}]": float(value) for p, value in enumerate(values)}
