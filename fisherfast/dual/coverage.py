"""A report of the operations of a model that used a rule, used the fallback, or failed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

MAX_LAYERS_SHOWN = 3


@dataclass
class Coverage:
    """Operations that a model executed on dual tensors, by how they were differentiated.

    Attributes:
        rules: name of the operation -> how often a rule was used.
        fallbacks: the same for PyTorch's forward mode of that one operation.
        failures: the same for operations without a derivative.
        layers: name of the operation -> layers it was executed in.
        stopped: whether the model raised an error, which is then the last of the failures.
    """

    rules: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    layers: dict[str, list[str]] = field(default_factory=dict)
    stopped: bool = False

    def add(self, operation: str, how: str, layer: str) -> None:
        """Count one execution: how is "rule", "fallback" or "failed"."""
        self._tables[how][operation] += 1
        seen = self.layers.setdefault(operation, [])
        if layer not in seen:
            seen.append(layer)

    def stop(self, reason: str, layer: str) -> None:
        """Count an error that the model raised as a failure of that layer."""
        self.add(reason, "failed", layer)
        self.stopped = True

    @property
    def _tables(self) -> dict[str, Counter[str]]:
        return {"failed": self.failures, "fallback": self.fallbacks, "rule": self.rules}

    @property
    def executed(self) -> int:
        """Number of operations executed."""
        return sum(sum(table.values()) for table in self._tables.values())

    @property
    def share(self) -> float:
        """Fraction of the executed operations that used a rule, 0 to 1."""
        return sum(self.rules.values()) / max(self.executed, 1)

    def __str__(self) -> str:
        rows = [
            (operation, how, str(count), self._layers_of(operation))
            for how, table in self._tables.items()
            for operation, count in sorted(table.items())
        ]
        header = ("operation", "served by", "times", "layers")
        width = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip()
            for row in [header, *rows]
        ]
        verdict = (
            f"{self.executed} operations: {100 * self.share:.1f} % by rule,"
            f" {sum(self.fallbacks.values())} by forward mode, {sum(self.failures.values())} failed"
        )
        if self.stopped:
            verdict += "; the model stopped with an error"
        return "\n".join([*lines, verdict])

    def _layers_of(self, operation: str) -> str:
        layers = self.layers.get(operation, [])
        more = len(layers) - MAX_LAYERS_SHOWN
        shown = ", ".join(layers[:MAX_LAYERS_SHOWN])
        return f"{shown} and {more} more" if more > 0 else shown
