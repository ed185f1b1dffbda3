"""The arguments of a measurement: their defaults and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fisherfast._validation import check_seed, check_whole
from fisherfast.data import Data
from fisherfast.estimation.ridge import RidgeSetting, check_ridge

__all__ = [
    "BATCH_SIZE",
    "FOLDS",
    "MAX_FEATURES",
    "check_output",
    "check_passes",
    "check_settings",
]

FOLDS = 16
"""Folds of the U-statistic: 15 degrees of freedom for its jackknife error."""

LEAST_FOLDS = {"independent": 4, "score": 4, "paired": 6, "pathwise": 6}
"""Folds that each half needs two of; three where its error is a jackknife of pairs of folds."""

MAX_FEATURES = 512
"""Default number of features: raw activations and lift together."""

PROBES = (None, "network")
"""What may be trained to read a layer."""

BATCH_SIZE = 4096
"""Default number of samples in a batch; fewer for large samples or networks."""


def check_passes(data: Data, grow: bool, maps: bool | Sequence[str]) -> dict[str, Any]:
    """Settings of what may take more passes over the data.

    Raises:
        TypeError: one is neither True nor False, nor maps a list of names.
        ValueError: data that do not repeat, for grow.
    """
    if not isinstance(grow, bool):
        raise TypeError(f"grow must be True or False, got {grow!r}")
    if not isinstance(maps, bool):
        named = isinstance(maps, list | tuple) and all(isinstance(name, str) for name in maps)
        if not named:
            raise TypeError(f"maps must be True or False or a list of layers, got {maps!r}")
        maps = list(maps)
    if grow:
        _check_repeats(data, "grow=True")
    return {"grow": grow, "maps": maps}


def check_output(output: str | None) -> dict[str, str | None]:
    """The setting output, the name of a head; whether the model has it shows when it has run.

    Raises:
        TypeError: neither a name nor None.
    """
    if output is not None and not isinstance(output, str):
        raise TypeError(f'output must be a name like "output[0]" or None, got {output!r}')
    return {"output": output}


def _check_repeats(data: Data, purpose: str) -> None:
    if not data.repeatable:
        raise ValueError(
            f"data must come in the same order at every pass for {purpose} (tensors, arrays,"
            f" Datasets, DataLoaders that do not shuffle), got {data!r}"
        )


def check_settings(
    data: Data,
    max_features: int,
    probe: str | None,
    batch_size: int,
    seed: int,
    ridge: RidgeSetting,
    folds: int,
) -> dict[str, Any]:
    """Settings of a measurement as plain numbers, with what they depend on of the data.

    Raises:
        TypeError: data are no source, a setting is no number.
        ValueError: a setting is out of its range, or data that do not repeat, for a probe.
    """
    if not isinstance(data, Data):
        raise TypeError(
            "data must be a FiniteDifference, Pathwise, Score or Simulator,"
            f" got {type(data).__name__}"
        )
    if probe not in PROBES:
        choices = " or ".join(map(repr, PROBES))
        raise ValueError(f"probe must be {choices}, got {probe!r}")
    if probe is not None:
        _check_repeats(data, f"probe={probe!r}")
    max_features = check_whole("max_features", max_features, least=1)
    batch_size = check_whole("batch_size", batch_size, least=1)
    folds, seed = check_whole("folds", folds), check_seed(seed)
    ridge = check_ridge(ridge)
    least = LEAST_FOLDS[data.source]
    if folds < least or folds % 2:
        raise ValueError(f"folds must be even and at least {least}, got {folds}")
    if data.groups is not None and len(data.groups) < folds and not data.sharded:
        raise ValueError(
            f"groups must be at least {folds}, one per fold, got {len(data.groups)}: use fewer"
            " folds or smaller groups"
        )
    return {
        "max_features": max_features,
        "probe": probe,
        "batch_size": batch_size,
        "seed": seed,
        "ridge": ridge,
        "folds": folds,
        "source": data.source,
        "paired": data.paired,
        "dtheta": list(data.dtheta),
    }
