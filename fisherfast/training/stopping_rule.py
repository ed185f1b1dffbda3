"""`StoppingRule`: the base class of rules.

A rule is a function of the history of a monitor alone, so a resumed run decides like an
uninterrupted one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fisherfast._validation import check_whole
from fisherfast.training.record import EpochRecord

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


@dataclass(frozen=True, kw_only=True, eq=False)
class StoppingRule(ABC):
    """Base class of stopping rules.

    Args:
        min_epochs: first epoch number at which training may stop.
        check_finite: stop if a training or validation error, or an activation on the held-out
            samples, is NaN or infinite.
    """

    min_epochs: int = 0
    check_finite: bool = True
    _values: list[tuple[EpochRecord, float]] = field(default_factory=list, init=False, repr=False)

    name: ClassVar[str]
    largest_delta: ClassVar[float] = math.inf  # min_delta must be below it

    def __post_init__(self) -> None:
        check_whole("min_epochs", self.min_epochs, least=0)

    @property
    def reads_input(self) -> bool:
        """True if the rule uses the measured information in the input."""
        return True

    @abstractmethod
    def judge(self, history: History, *, patience: int = 0, min_delta: float = 0.0) -> Verdict:
        """Decide whether to stop after the last record, and which one was the best.

        Args:
            history: the records so far.
            patience: measured epochs for which the stopping condition must last after it is first
                met.
            min_delta: margin of the condition, at least 0, in a unit that depends on the rule.
        """

    def _each(self, history: History, value: Callable[[EpochRecord], float]) -> list[float]:
        """Return the value of every record; for a growing history each is computed once."""
        known = self._values
        if known and (len(known) > len(history) or history[len(known) - 1] is not known[-1][0]):
            known.clear()
        known += [(record, value(record)) for record in history[len(known) :]]
        return [number for _, number in known]
