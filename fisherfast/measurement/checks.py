"""Are there enough samples for a layer, and how many features do they carry?"""

from __future__ import annotations

import math
from typing import Any

from fisherfast.data import Data
from fisherfast.data.dealing import Tally
from fisherfast.estimation.curve import (
    SPARE_DOF,
)
from fisherfast.estimation.features import MAX_WIDTH
from fisherfast.estimation.fold_moments import FoldMoments
from fisherfast.measurement.fit import UnmeasuredError

__all__ = ["carried_by", "streams_of"]


def worst_dof(data: Data, folds: int) -> float | None:
    """Fewest degrees of freedom of a covariance of these samples within folds; None where their
    number is not known."""
    counts = [data.units(c) for c in range(data.conditions)]
    if None in counts:
        return None
    if data.groups is not None:
        return float(len(data.groups) - folds)
    dof = float(sum(n for n in counts if n is not None) - folds * data.conditions)
    return dof / data.conditions if data.paired else dof  # the same noise in all conditions


def sketch_groups(dim: int, data: Data, max_features: int, folds: int) -> int | None:
    """Groups that a layer of dim activations is sketched in, where it cannot be measured as a whole
    nor compressed; None otherwise."""
    dof = None if data.sharded else worst_dof(data, folds)
    if dof is None or dof >= dim + SPARE_DOF:
        return max_features if dim > MAX_WIDTH else None
    return max(min(max_features, int(dof / 2) - SPARE_DOF), 1)


def streams_of(data: Data, folds: int) -> dict[str, Any]:
    """Arguments of the moments of a source's samples."""
    groups = None if data.groups is None else Tally.of_groups(len(data.groups), folds)
    return {
        "folds": folds,
        "paired": data.paired,
        "groups": None if groups is None else groups.by_fold(folds),
        **carried_by(data),
    }


def carried_by(data: Data) -> dict[str, int]:
    """Numbers of tangents and scores per sample, as arguments of the moments."""
    return {
        "tangents": data.parameters if data.source == "pathwise" else 0,
        "score": data.parameters if data.source == "score" else 0,
    }


def check_samples(name: str, raw: int, moments: FoldMoments) -> None:
    """Raise UnmeasuredError unless every fold has two samples; the message also counts what
    `check_freedom` needs."""
    if moments.fewest >= 2:
        return
    least = 2 * moments.folds
    needed = max(least, _needed(raw, 1.0, moments))
    reason = "(two per fold)" if needed == least else f"for its {raw} activations"
    raise UnmeasuredError(
        f"layer {name!r} must see at least {needed} {_units(moments)} per condition {reason},"
        f" got {moments.units}"
    )


def _units(moments: FoldMoments) -> str:
    return "samples" if moments.groups is None else "groups of samples"


def check_freedom(name: str, raw: int, moments: FoldMoments) -> None:
    dof = moments.degrees_of_freedom
    if dof >= raw + SPARE_DOF:
        return
    inflation = (sum(moments.seen) - moments.counts.numel()) / dof
    raise UnmeasuredError(
        f"layer {name!r} must see at least {_needed(raw, inflation, moments)} {_units(moments)} per"
        f" condition for its {raw} activations, got {moments.units}"
    )


def _needed(raw: int, inflation: float, moments: FoldMoments) -> int:
    """Samples per condition whose degrees of freedom carry the raw activations."""
    if moments.groups is not None:
        return raw + SPARE_DOF + moments.folds
    cells = moments.counts.numel()
    return math.ceil(((raw + SPARE_DOF) * inflation + cells) / len(moments.seen))


def affordable(size: int, raw: int, dof: float) -> tuple[int, list[str]]:
    """Features that the samples can carry: lifted ones only up to half the degrees of freedom."""
    limit = max(raw, int(dof / 2))
    if size <= limit:
        return size, []
    return limit, [f"features limited to {limit} of {size} by the number of samples"]
