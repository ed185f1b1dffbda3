"""`FisherEarlyStopping` applies a rule after each epoch and restores the best weights."""

from __future__ import annotations

import copy
import logging
import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fisherfast._errors import FisherWarning
from fisherfast._fields import Count, read_fields, wrong
from fisherfast._validation import check_whole
from fisherfast.results.comparison import unresolved_note
from fisherfast.results.layer import UNMEASURED
from fisherfast.training.monitor import FisherMonitor
from fisherfast.training.record import NOT_MEASURED, EpochRecord, Stop
from fisherfast.training.rules import RULES, Transmission
from fisherfast.training.stopping_rule import StoppingRule, Verdict

LOG = logging.getLogger("fisherfast")
"""A stop is logged as a warning: the least level that Python shows where no logging is configured,
on stderr."""

STATE_VERSION = 1
STATE = {
    "version": int,
    "rule": str,
    "stopped_epoch": int | None,
    "best_epoch": int | None,
    "best_record": Count | None,
    "reason": str,
    "weights": dict[str, object] | None,
}

PLAIN = (type(None), bool, int, float, str, list, dict)

EXTRA_STATE = "_extra_state"
"""End of the names under which PyTorch stores what `nn.Module.get_extra_state` returns."""


class FisherEarlyStopping:
    """Stop training by the information in the network instead of the validation loss.

    Args:
        rule: "transmission" stops when J_output / J_input on the held-out samples of the monitor
            stops rising; it needs no error and works with any loss. "crlb" stops when the training
            error falls below 1 / J_input, the least error of an unbiased estimate: from there on
            the network memorises its training samples; it needs ``train_mse`` at each step of the
            monitor. `Transmission` and `CramerRao` are the same rules with options.
        patience: measured epochs for which the stopping condition must last after it is first met.
        min_delta: margin of the condition. "crlb": the level to stop at is 1 - min_delta.
            "transmission": the smallest rise that counts, in standard errors of the difference.
        restore_best: at the stop, load the weights of `best_epoch` into the model. A copy of the
            weights is kept for this.

    Attributes:
        stopped_epoch: number of the epoch after which training was stopped; None before.
        best_epoch: number of the best epoch so far; None while this is unknown.
        reason: where and why training was stopped, a line; empty before. It is logged as well, as a
            warning of the logger "fisherfast", which plain scripts show on stderr.

    Raises:
        ValueError: an unknown rule, or a setting out of its range.
        TypeError: patience is not a whole number.

    Reference: Weimar et al., Phys. Rev. X 15, 031072 (2025), for "crlb".

    Example:
        >>> import fisherfast as ff
        >>> stopping = ff.FisherEarlyStopping(rule="transmission", patience=3)
        >>> stopping
        FisherEarlyStopping(rule='transmission', patience=3, best_epoch=None, stopped_epoch=None)

        In a training loop, after ``monitor.step(...)``:
        ``if stopping.step(monitor): break``.
    """

    def __init__(
        self,
        rule: str | StoppingRule = Transmission.name,
        *,
        patience: int = 0,
        min_delta: float = 0.0,
        restore_best: bool = True,
    ) -> None:
        chosen = RULES[rule]() if isinstance(rule, str) and rule in RULES else rule
        if not isinstance(chosen, StoppingRule):
            raise ValueError(
                f"rule must be one of {', '.join(sorted(RULES))}, or a rule with options such as"
                f" fisherfast.Transmission(plateau=3), got {rule!r}"
            )
        margin = float(min_delta) if isinstance(min_delta, numbers.Real) else math.nan
        if not 0 <= margin < math.inf:
            raise ValueError(f"min_delta must be at least 0 and finite, got {min_delta!r}")
        if margin >= chosen.largest_delta:
            raise ValueError(f"min_delta must be below 1, the level to stop at, got {margin}")
        self.rule: StoppingRule = chosen
        self.patience = check_whole("patience", patience, least=0)
        self.min_delta = margin
        self.restore_best = restore_best
        self.stopped_epoch: int | None = None
        self.best_epoch: int | None = None
        self.reason = ""
        self._weights: dict[str, Any] | None = None
        self._warned = False
        self._best_record: int | None = None  # in the history: an epoch may have several records

    def step(self, monitor: FisherMonitor) -> bool:
        """Judge the last epoch of the monitor. Call it once after each ``monitor.step``.

        Returns:
            Whether to stop training now. Once true it stays true; the weights are restored only the
            first time.

        Raises:
            ValueError: "crlb" without ``train_mse`` or with an error below 0, the monitor has no
                epoch yet, or J_input cannot be measured (integers alone without a score).

        Warns:
            FisherWarning: the best epoch was before the first step, so its weights are unknown;
                J_input is within three errors of zero, so the rule waits; each at most once.

        Cost: a copy of the weights in each epoch that is the best so far; nothing is measured.
        """
        if self.stopped_epoch is not None:
            self._show_on(monitor)
            return True
        history = monitor.history
        if not history:
            raise ValueError("monitor must have made a step before stopping.step, got none")
        self._warn_of_input(history[-1])
        verdict = self._judge(history)
        if verdict.best is not None:
            best_epoch = history[verdict.best].epoch
            is_new = (best_epoch, verdict.best) != (self.best_epoch, self._best_record)
            self.best_epoch, self._best_record = best_epoch, verdict.best
            if self.restore_best and is_new:
                seen = verdict.best == len(history) - 1
                self._weights = copy.deepcopy(monitor.model.state_dict()) if seen else None
        if verdict.reason is None:
            return False
        self.stopped_epoch = history[-1].epoch
        kept = "" if self.best_epoch is None else f", best epoch {self.best_epoch}"
        self.reason = f"stopped after epoch {self.stopped_epoch}{kept}: {verdict.reason}"
        if self.restore_best and self.best_epoch is not None:
            self._restore(monitor.model)
        self._show_on(monitor)
        if monitor.leads:
            LOG.warning(self.reason)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs in addition to that of the monitor: numbers,
        strings and tensors, for ``torch.save`` and ``torch.load(weights_only=True)``."""
        return {
            "version": STATE_VERSION,
            "rule": self.rule.name,
            "stopped_epoch": self.stopped_epoch,
            "best_epoch": self.best_epoch,
            "best_record": self._best_record,
            "reason": self.reason,
            "weights": copy.deepcopy(self._weights),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, with a monitor that is resumed as well.

        Raises:
            ValueError: the state is of another rule, or not a state.
        """
        values = read_fields(STATE, state, "state")
        if values["version"] != STATE_VERSION:
            raise ValueError(f"state must be of version {STATE_VERSION}, got {values['version']}")
        if values["rule"] != self.rule.name:
            raise ValueError(f"state must be of rule {self.rule.name!r}, got {values['rule']!r}")
        if (values["best_epoch"] is None) != (values["best_record"] is None):
            raise ValueError(
                f"state.best_record must belong to best_epoch {values['best_epoch']}, got"
                f" {values['best_record']}"
            )
        if (values["stopped_epoch"] is None) == bool(values["reason"]):
            raise ValueError(
                f"state.reason must belong to stopped_epoch {values['stopped_epoch']}, got"
                f" {values['reason']!r}"
            )
        if values["weights"] is not None:
            _check_weights(values["weights"])
            if values["best_record"] is None:
                raise ValueError("state.weights must belong to a best_record, got None")
        weights = copy.deepcopy(state["weights"])  # with the versions of its modules
        self.stopped_epoch, self.best_epoch = values["stopped_epoch"], values["best_epoch"]
        self._best_record, self.reason = values["best_record"], values["reason"]
        self._weights = weights

    def __repr__(self) -> str:
        return (
            f"FisherEarlyStopping(rule={self.rule.name!r}, patience={self.patience},"
            f" best_epoch={self.best_epoch}, stopped_epoch={self.stopped_epoch})"
        )

    def _show_on(self, monitor: FisherMonitor) -> None:
        """Make the stop known to the monitor, for its table and figures; also of a resumed run."""
        if self.stopped_epoch is not None:
            monitor.stop = Stop(self.rule.name, self.stopped_epoch, self.best_epoch, self.reason)

    def _restore(self, model: nn.Module) -> None:
        """Restore the weights of the best epoch."""
        if self._weights is None:
            warnings.warn(
                f"weights of the best epoch {self.best_epoch} were not seen by stopping.step, the"
                f" model keeps those of epoch {self.stopped_epoch}: step it in every epoch, and"
                " resume it with load_state_dict",
                FisherWarning,
                stacklevel=3,
            )
            return
        here = model.state_dict()
        for name in dict(model.named_parameters()).keys() & here.keys() & self._weights.keys():
            if self._weights[name].shape != here[name].shape:
                raise ValueError(
                    f"model must have the {name!r} of its best epoch,"
                    f" {list(self._weights[name].shape)}, got {list(here[name].shape)}"
                )
        model.load_state_dict(self._weights)
        self._weights = None

    def _warn_of_input(self, record: EpochRecord) -> None:
        """Warn once that the rule waits for a J_input that is significantly above zero.

        Raises:
            ValueError: J_input cannot be measured: the rule would wait for ever.
        """
        if self._warned or record.flow is None or not self.rule.reads_input:
            return
        source = record.flow.layers[0]
        if reasons := [note for note in source.notes if note.startswith(UNMEASURED)]:
            raise ValueError(
                f"J of the input must be known for rule {self.rule.name!r}, got none in epoch"
                f" {record.epoch}, {reasons[0]}"
            )
        if bool(torch.isnan(record.input_J).any()):
            self._warned = True
            warnings.warn(
                f"epoch {record.epoch}: {unresolved_note(source)}, and rule {self.rule.name!r} does"
                " not act on it: measure with more samples",
                FisherWarning,
                stacklevel=3,
            )

    def _judge(self, history: Sequence[EpochRecord]) -> Verdict:
        """Apply the rule; if errors are not finite, stop with the best of the other epochs."""
        if self.rule.check_finite and (problem := _not_finite(history[-1])):
            return Verdict(self._best_record, problem)
        return self.rule.judge(history, patience=self.patience, min_delta=self.min_delta)


def _check_weights(weights: Mapping[str, Any]) -> None:
    """Raise ValueError unless the values of a model's state are tensors; objects of a module's own
    kind are left to the module."""
    for name, value in weights.items():
        if isinstance(value, PLAIN) and not name.endswith(EXTRA_STATE):
            raise wrong(f"state.weights[{name!r}]", "be a tensor", value)
        if isinstance(value, torch.Tensor) and value.device.type == "meta":
            raise wrong(f"state.weights[{name!r}]", "be a tensor with numbers", value)


def _not_finite(record: EpochRecord) -> str:
    """Describe errors or activations of an epoch that are not finite; empty if all are finite."""
    for name, errors in (("training", record.train_mse), ("validation", record.val_mse)):
        for value in errors or ():
            if not math.isfinite(value):
                return f"{name} error became {value} in epoch {record.epoch}"
    for note in record.notes:
        if note.startswith(NOT_MEASURED):
            return f"epoch {record.epoch}: {note.removeprefix(NOT_MEASURED)}"
    return ""
