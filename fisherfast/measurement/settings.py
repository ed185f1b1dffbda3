"""The settings of a measurement, checked once."""

from __future__ import annotations

import dataclasses
import numbers
import re
from dataclasses import dataclass
from typing import Any

from fisherfast._validation import check_seed, check_whole
from fisherfast.data import Data
from fisherfast.estimation.ridge import AUTO, RidgeSetting, check_ridge

__all__ = ["BATCH_SIZE", "FOLDS", "MAX_FEATURES", "Settings", "bytes_of"]

FOLDS = 16
"""Folds of the U-statistic: 15 degrees of freedom for its jackknife error."""

LEAST_FOLDS = {"independent": 4, "score": 4, "paired": 6, "pathwise": 6}
"""Each half needs two folds; three where its error is a jackknife of pairs of folds."""

MAX_FEATURES = 512
"""Default number of features: raw activations and lift together."""

PROBES = (None, "network")
"""What may be trained to read a layer."""

BATCH_SIZE = 4096
"""Default number of samples in a batch; fewer for large samples or networks."""

UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
"""Bytes of "kB", "MiB", ..., in lower case."""


@dataclass(frozen=True)
class Settings:
    """How a measurement is made; see `fisherfast.fisher_flow` for each argument.

    Attributes:
        memory_budget: in bytes; None for no bound.
        source, paired, dtheta: of the data.
    """

    source: str
    paired: bool
    dtheta: tuple[float, ...]
    max_features: int = MAX_FEATURES
    probe: str | None = None
    batch_size: int = BATCH_SIZE
    seed: int = 0
    ridge: RidgeSetting = AUTO
    folds: int = FOLDS
    grow: bool = False
    maps: bool | tuple[str, ...] = False
    memory_budget: int | None = None
    output: str | None = None

    @classmethod
    def of(cls, data: Data, **asked: Any) -> Settings:
        """Check settings for a measurement of these data.

        Raises:
            TypeError: data is not a source of samples, or a setting has the wrong type.
            ValueError: a setting is out of range, or data that do not repeat with a probe or grow.
        """
        if not isinstance(data, Data):
            raise TypeError(
                "data must be a FiniteDifference, Pathwise, Score or Simulator,"
                f" got {type(data).__name__}"
            )
        given = cls(data.source, data.paired, tuple(data.dtheta), **asked)
        given = dataclasses.replace(
            given,
            max_features=check_whole("max_features", given.max_features, least=1),
            batch_size=check_whole("batch_size", given.batch_size, least=1),
            folds=check_whole("folds", given.folds),
            seed=check_seed(given.seed),
        )
        _check_choices(given)
        _check_folds(given.folds, data)
        if given.probe is not None:
            _check_repeats(data, f"probe={given.probe!r}")
        if given.grow:
            _check_repeats(data, "grow=True")
        return dataclasses.replace(
            given,
            ridge=check_ridge(given.ridge),
            maps=given.maps if isinstance(given.maps, bool) else tuple(given.maps),
            memory_budget=bytes_of(given.memory_budget),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values and lists, as `FisherFlow.settings` keeps them."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _check_choices(given: Settings) -> None:
    if given.probe not in PROBES:
        choices = " or ".join(map(repr, PROBES))
        raise ValueError(f"probe must be {choices}, got {given.probe!r}")
    if not isinstance(given.grow, bool):
        raise TypeError(f"grow must be True or False, got {given.grow!r}")
    names = isinstance(given.maps, list | tuple) and all(isinstance(m, str) for m in given.maps)
    if not (isinstance(given.maps, bool) or names):
        raise TypeError(f"maps must be True or False or a list of layers, got {given.maps!r}")
    if given.output is not None and not isinstance(given.output, str):
        raise TypeError(f'output must be a name like "output[0]" or None, got {given.output!r}')


def _check_folds(folds: int, data: Data) -> None:
    least = LEAST_FOLDS[data.source]
    if folds < least or folds % 2:
        raise ValueError(f"folds must be even and at least {least}, got {folds}")
    if data.groups is not None and len(data.groups) < folds and not data.sharded:
        raise ValueError(
            f"groups must be at least {folds}, one per fold, got {len(data.groups)}: use fewer"
            " folds or smaller groups"
        )


def _check_repeats(data: Data, purpose: str) -> None:
    if not data.repeatable:
        raise ValueError(
            f"data must come in the same order at every pass for {purpose} (tensors, arrays,"
            f" Datasets, DataLoaders that do not shuffle), got {data!r}"
        )


def bytes_of(memory_budget: int | str | None) -> int | None:
    """Bytes of a budget like "2 GB" or a whole number; None for no bound.

    Raises:
        TypeError: neither a whole number, nor a string, nor None.
        ValueError: not positive, or a string that is not a number with a unit of bytes.

    Example:
        >>> bytes_of("1.5 GB"), bytes_of("512 MiB")
        (1500000000, 536870912)
    """
    if memory_budget is None:
        return None
    if isinstance(memory_budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", memory_budget)
        if match is None or match[2].lower() not in UNITS:
            raise ValueError(
                f'memory_budget must be like "2 GB" or "512 MiB", got {memory_budget!r}'
            )
        size = int(float(match[1]) * UNITS[match[2].lower()])
    elif isinstance(memory_budget, numbers.Integral) and not isinstance(memory_budget, bool):
        size = int(memory_budget)
    else:
        raise TypeError(
            'memory_budget must be a whole number of bytes, a string like "2 GB", or None, got'
            f" {memory_budget!r}"
        )
    if size < 1:
        raise ValueError(f"memory_budget must be positive, got {memory_budget!r}")
    return size
