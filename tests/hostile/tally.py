"""Measurements of problems of one kind, judged together: means, and how often a bound fails."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

SIGMAS = 4.0
SHORT = 0.03  # least share of the information that users are promised, 0.97
BEYOND = 0.02  # share of the information by which a mean may lie above it
# So many of J and of the bounds may lie above the information by three errors and `BEYOND`.
ERRORS = 3.0
ABOVE = 0.01
FEWEST = 20  # readings of which a mean is judged
MEANS = ("linear", "J", "lower")
COUNTS = ("J", "lower")
# No fourth moment: intervals are known to cover about 85 % only, so means alone are judged.
MEANS_ALONE = "Student t(3)"


@dataclass(frozen=True)
class Reading:
    """The first parameter of the last layer of one measurement.

    Attributes:
        kind: of the problem.
        shares: "linear" over what must be found, "J" and "lower" over what they must not exceed;
            NaN where nothing is known.
        beyond: "J" and "lower" above that and `BEYOND` of it, in errors.
        precise: known well before anything is measured, so that its mean means something.
        resolved: called so.
    """

    kind: str
    shares: dict[str, float]
    beyond: dict[str, float]
    precise: bool
    resolved: bool


@dataclass
class Tally:
    """Sums over the readings of one kind: numbers that JSON holds."""

    kind: str
    count: int = 0
    precise: int = 0
    resolved: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEANS, 0.0))
    squares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEANS, 0.0))
    above: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))

    def add(self, reading: Reading) -> None:
        self.count += 1
        self.resolved += reading.resolved
        for name in COUNTS:
            self.above[name] += reading.beyond[name] > ERRORS
        if reading.precise:
            self.precise += 1
            for name in MEANS:
                self.sums[name] += reading.shares[name]
                self.squares[name] += reading.shares[name] ** 2

    def mean(self, name: str) -> tuple[float, float]:
        """Of a share and its error; NaN for too few."""
        if self.precise < 2:
            return math.nan, math.nan
        mean = self.sums[name] / self.precise
        variance = self.squares[name] / self.precise - mean**2
        return mean, math.sqrt(max(variance, 0) / (self.precise - 1))

    def failures(self) -> list[str]:
        """Means, and counts of what lies above, that four of their own errors do not excuse."""
        found = []
        most = self.count * ABOVE
        for name in COUNTS:
            counted = not self.kind.startswith(MEANS_ALONE)
            if counted and self.above[name] > most + SIGMAS * math.sqrt(most):
                found.append(f"{name} above the information in {self.above[name]} of {self.count}")
        for name in MEANS if self.precise >= FEWEST else ():
            mean, error = self.mean(name)
            high = mean > 1 + BEYOND + SIGMAS * error
            low = name == "linear" and mean < 1 - SHORT - SIGMAS * error
            if high or low:
                found.append(f"{name} {mean:.3f} +- {error:.3f} of the information in the mean")
        return found
