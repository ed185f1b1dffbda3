"""The table of a run, one line per epoch: on the terminal while it runs, and in the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TextIO

from fisherfast.demos.training import DemoEpoch

__all__ = ["LiveTable", "epoch_cells", "epoch_header"]


def epoch_header(layers: Sequence[str]) -> list[str]:
    """Names of the columns; those of layers hold J / J_input."""
    return ["epoch", "train x J", "val x J", *layers, "output +- error", "seconds"]


def epoch_cells(record: DemoEpoch, layers: Sequence[str]) -> list[str]:
    """One row of text: errors in units of 1 / J_input, then J / J_input of each layer; "-" where
    J_input cannot be told from zero."""
    fractions, errors = record.flow.fractions(), record.flow.fraction_errors()
    output = f"{fractions['output']:.3f} +- {errors['output']:.3f}"
    levels = record.train_level, record.val_level, *(fractions[name] for name in layers)
    return [
        str(record.epoch),
        *("-" if math.isnan(level) else f"{level:.3f}" for level in levels),
        "-" if math.isnan(fractions["output"]) else output,
        f"{record.seconds:.1f}",
    ]


class LiveTable:
    """Writes header and rows to a stream as they come."""

    def __init__(self, layers: Sequence[str], stream: TextIO) -> None:
        self._layers = layers
        self._stream = stream
        self._header = epoch_header(layers)

    def begin(self) -> None:
        """Write the header."""
        self._write(self._header)

    def add(self, record: DemoEpoch) -> None:
        """Write the row of an epoch."""
        self._write(epoch_cells(record, self._layers))

    def _write(self, cells: Sequence[str]) -> None:
        widths = [max(len(name), 7) for name in self._header]
        line = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        self._stream.write(line + "\n")
        self._stream.flush()
