"""`StoppingRule`: the base class of rules.

A rule is a function of the history of a monitor alone, so a resumed run decides like an
uninterrupted one.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fisherfast._validation import check_whole
from fisherfast.training.record import EpochRecord

__all__ = ["History", "StoppingRule", "Verdict"]

History = Sequence[EpochRecord]


@dataclass(frozen=True)
class Verdict:
    """The decision of a rule after the last record of a history.

    Attributes:
        best: index of the record whose weights to keep; None while this is unknown.
        reason: why to stop, a sentence; None to continue.
    """

    best: int | None
    reason: str | None = None


class StoppingRule(ABC):
    """Base class of stopping rules.

    Args:
        patience: measured epochs for which the stopping condition must last after it is first met.
        min_delta: margin of the condition, at least 0, in a unit that depends on the rule.
        min_epochs: epoch number before which there is no stop.
    """

    name: ClassVar[str]
    default_patience: ClassVar[int]
    reads_input = True  # whether the rule uses the measured information in the input

    def __init__(
        self, *, patience: int | None = None, min_delta: float = 0.0, min_epochs: int = 0
    ) -> None:
        patience = self.default_patience if patience is None else patience
        self.patience = check_whole("patience", patience, least=0)
        self.min_epochs = check_whole("min_epochs", min_epochs, least=0)
        if not (isinstance(min_delta, numbers.Real) and 0 <= min_delta < math.inf):
            raise ValueError(f"min_delta must be at least 0 and finite, got {min_delta!r}")
        self.min_delta: float = float(min_delta)
        self._values: list[tuple[EpochRecord, float]] = []

    @abstractmethod
    def judge(self, history: History) -> Verdict:
        """Decide whether to stop after the last record, and which one was the best."""

    def _each(self, history: History, value: Callable[[EpochRecord], float]) -> list[float]:
        """Return the value of every record; for a growing history each is computed once."""
        known = self._values
        if known and (len(known) > len(history) or history[len(known) - 1] is not known[-1][0]):
            known.clear()
        known += [(record, value(record)) for record in history[len(known) :]]
        return [number for _, number in known]
