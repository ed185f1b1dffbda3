"""The settings of a measurement, checked once."""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fisherfast._validation import check_seed, check_whole
from fisherfast.data import Data
from fisherfast.estimation.ridge import AUTO, RidgeSetting, check_ridge

FOLDS = 16
"""Folds of the U-statistic: 15 degrees of freedom for its jackknife error."""

LEAST_FOLDS = {"independent": 4, "score": 4, "labelled": 4, "paired": 6, "pathwise": 6}
"""Each half needs two folds; three where its error is a jackknife of pairs of folds."""

MAX_FEATURES = 512
"""Default number of features: raw activations and lift together."""

PROBES = (None, "network")
"""Kinds of networks that can be trained to read a layer."""

BATCH_SIZE = 4096
"""Default number of samples in a batch; fewer for large samples or networks."""

UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
"""Bytes of "kB", "MiB", ..., in lower case."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a measurement that few users change, for `fisher_flow`, `fisher_information` and
    `FisherMonitor`.

    Args:
        batch_size: samples per batch, for data that are not batched already.
        folds: number of folds, even, at least 4 (6 for paired conditions and tangents).
        grow: start with 64 lifted features and double their number, up to max_features, for layers
            whose curve still rises at its end. Each doubling is another pass over the data that
            computes only the new features. The data must repeat: tensors, arrays, Datasets, loaders
            that do not shuffle. Not for a monitor.
        maps: also measure the information of the channels at each position of layers [C, H, W], for
            all such layers or those in a list of names, see `FisherFlow.map`. Not for
            `fisher_information`.

    Raises:
        ValueError: batch_size is below 1, or folds odd or below 4.
        TypeError: a setting of another type.

    Example:
        >>> import fisherfast as ff
        >>> ff.Settings(folds=8)
        Settings(batch_size=4096, folds=8, grow=False, maps=False)
    """

    batch_size: int = BATCH_SIZE
    folds: int = FOLDS
    grow: bool = False
    maps: bool | Sequence[str] = False

    def __post_init__(self) -> None:
        self._set("batch_size", check_whole("batch_size", self.batch_size, least=1))
        self._set("folds", check_whole("folds", self.folds))
        _check_even(self.folds, min(LEAST_FOLDS.values()))
        if not isinstance(self.grow, bool):
            raise TypeError(f"grow must be True or False, got {self.grow!r}")
        names = isinstance(self.maps, list | tuple) and all(isinstance(m, str) for m in self.maps)
        if not (isinstance(self.maps, bool) or names):
            raise TypeError(f"maps must be True or False or a list of layers, got {self.maps!r}")
        if not isinstance(self.maps, bool):
            self._set("maps", tuple(self.maps))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the way of frozen dataclasses


@dataclass(frozen=True, kw_only=True)
class MeasurementSettings(Settings):
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
    seed: int = 0
    ridge: RidgeSetting = AUTO
    memory_budget: int | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe not in PROBES:
            choices = " or ".join(map(repr, PROBES))
            raise ValueError(f"probe must be {choices}, got {self.probe!r}")
        if self.output is not None and not isinstance(self.output, str):
            raise TypeError(f'output must be a name like "output[0]" or None, got {self.output!r}')
        self._set("max_features", check_whole("max_features", self.max_features, least=1))
        self._set("seed", check_seed(self.seed))
        self._set("ridge", check_ridge(self.ridge))

    @classmethod
    def of(
        cls,
        data: Data,
        settings: Settings | None = None,
        *,
        memory_budget: int | str | None = None,
        **asked: Any,
    ) -> MeasurementSettings:
        """Check settings for a measurement of these data.

        Raises:
            TypeError: data is not a source of samples, or a setting has the wrong type.
            ValueError: a setting is out of range, or data that do not repeat with a probe or grow.
        """
        if not isinstance(data, Data):
            raise TypeError(
                "data must be a FiniteDifference, Pathwise, Score, Labelled or Simulator,"
                f" got {type(data).__name__}"
            )
        rare = Settings() if settings is None else settings
        if not isinstance(rare, Settings):
            raise TypeError(f"settings must be a fisherfast.Settings, got {settings!r}")
        given = cls(
            source=data.source,
            paired=data.paired,
            dtheta=tuple(data.dtheta),
            memory_budget=bytes_of(memory_budget),
            **vars(rare),
            **asked,
        )
        _check_folds(given.folds, data)
        if given.probe is not None and data.source == "labelled":
            raise ValueError(f"probe must be None for labelled data, got {given.probe!r}")
        if given.maps and data.points:
            raise ValueError(
                f"maps must be False for data at several theta, got {given.maps}: measure the map"
                " at one theta"
            )
        if given.probe is not None:
            _check_repeats(data, f"probe={given.probe!r}")
        if given.grow:
            _check_repeats(data, "grow=True")
        return given

    def to_dict(self) -> dict[str, Any]:
        """Plain values and lists, as `FisherFlow.settings` keeps them."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _check_even(folds: int, least: int) -> None:
    if folds < least or folds % 2:
        raise ValueError(f"folds must be even and at least {least}, got {folds}")


def _check_folds(folds: int, data: Data) -> None:
    _check_even(folds, LEAST_FOLDS[data.source])
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
