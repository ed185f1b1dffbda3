"""The information in several independent data sets together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

import torch

from fisherfast.results.flow import FisherFlow
from fisherfast.results.layer import LayerFisher
from fisherfast.results.profile import Profile
from fisherfast.results.status import is_judgement, with_status

SUMS = ("J", "lower", "linear", "naive", "features", "effective_dim", "samples", "dropped")
ERRORS = ("stderr", "lower_stderr", "linear_stderr")
SHARED = ("plateau", "carried", "independent", "sensitive")
KINDS = ("kind", "feature_kind")

SAME_THETA = 1e-9
"""Difference of theta relative to its range within which two profiles have the same bins."""


@overload
def combine(*measured: FisherFlow) -> FisherFlow: ...
@overload
def combine(*measured: LayerFisher) -> LayerFisher: ...
def combine(*measured: Any) -> Any:
    """Add the Fisher information of independent data sets about the same parameters.

    The result is that of one network that reads all data sets side by side: J, lower, linear and
    naive add up, as do the covariances of their errors. Layers are matched by name, and those that
    are not in all flows are left out. Two instruments, two runs of an experiment, or two networks
    with different inputs may be combined. Samples of one data set in two flows are not independent.

    Args:
        measured: two or more flows, or results of `fisher_information`.

    Returns:
        `FisherFlow`, or `LayerFisher`, without curves and maps. A profile is kept if all have one
        at the same theta.

    Raises:
        ValueError: the parameters or their names differ, no layer is in all of them, one is given
            twice, or one has a prior already, which would count twice.
        TypeError: something else than flows, or than layers, is given.

    Cost: negligible.

    Example:
        >>> import torch, fisherfast as ff
        >>> a, b = torch.randn(1000, 4), torch.randn(1000, 2)
        >>> one = ff.fisher_information(ff.Pathwise(a, torch.ones(1000, 4)))
        >>> other = ff.fisher_information(ff.Pathwise(b, torch.ones(1000, 2)))
        >>> abs(ff.combine(one, other).value - 6) < 1
        True
    """
    kind = FisherFlow if isinstance(next(iter(measured), None), FisherFlow) else LayerFisher
    if not all(isinstance(part, kind) for part in measured):
        got = ", ".join(type(part).__name__ for part in measured)
        raise TypeError(f"combine must be given flows, or layers, got {got}")
    if len(measured) < 2:
        raise ValueError(f"combine must be given at least two data sets, got {len(measured)}")
    if any(a is b for a, b in itertools.combinations(measured, 2)):
        raise ValueError("data sets must be independent, got the same result twice")
    if kind is LayerFisher:
        return with_status([_combined(measured)], score=False)[0]
    common = [name for name in measured[0].names if all(name in flow for flow in measured)]
    if not common:
        raise ValueError(
            f"flows must have layers of the same name, got {[flow.names for flow in measured]}"
        )
    layers = [_combined([flow[name] for flow in measured]) for name in common]
    settings = {"source": "combined", "parts": [flow.settings for flow in measured]}
    return FisherFlow(with_status(layers, score=False), settings)


def _combined(parts: Sequence[LayerFisher]) -> LayerFisher:
    """Add up one layer of all data sets."""
    first = parts[0]
    _check(parts)
    names = dict.fromkeys(part.name for part in parts)
    covariances = [part.error_covariance for part in parts if part.error_covariance is not None]
    readouts = [part.readout for part in parts if part.readout is not None]
    remarks = [
        f"data set {number}: {note}"
        for number, part in enumerate(parts, 1)
        for note in part.notes
        if not is_judgement(note)
    ]
    joined: dict[str, Any] = {
        **{name: sum(getattr(part, name) for part in parts) for name in SUMS},
        **{name: sum(getattr(part, name) ** 2 for part in parts) ** 0.5 for name in ERRORS},
        **{name: all(getattr(part, name) for part in parts) for name in SHARED},
        **{name: _same([getattr(part, name) for part in parts], "mixed") for name in KINDS},
    }
    whole = len(covariances) == len(parts)
    joined["error_covariance"] = torch.stack(covariances).sum(0) if whole else None
    return replace(
        first,
        **joined,
        name=" + ".join(names),
        shape=(sum(part.dim for part in parts),),
        curve_k=first.curve_k[:0],
        curve_J=first.curve_J[:0],
        curve_stderr=first.curve_stderr[:0],
        dtheta=(),
        aliases=_in_all([part.aliases for part in parts]),
        descendants=_in_all([part.descendants for part in parts]),
        notes=tuple(remarks),
        response=None,
        compressed=any(part.compressed for part in parts),
        rounding=max(part.rounding for part in parts),
        replicates=_replicates(parts),
        cut=_same([part.cut for part in parts], None),
        profile=_profile([part.profile for part in parts]),
        readout=torch.cat(readouts) if len(readouts) == len(parts) else None,
    )


def _same(values: Sequence[Any], otherwise: Any) -> Any:
    """Return the value of all parts, or something else if they differ."""
    return values[0] if all(value == values[0] for value in values) else otherwise


def _in_all(names: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(name for name in names[0] if all(name in other for other in names))


def _check(parts: Sequence[LayerFisher]) -> None:
    facts: dict[str, list[Any]] = {
        "have the same number of parameters": [part.parameters for part in parts],
        "have the same names of parameters": [list(part.parameter_names) for part in parts],
    }
    for what, found in facts.items():
        if any(entry != found[0] for entry in found):
            raise ValueError(f"data sets must {what}, got {' and '.join(map(str, found))}")
    if any(part.prior is not None for part in parts):
        raise ValueError(
            "data sets must have no prior, which would count once for each of them, got one:"
            " combine first, then combined.with_prior(precision)"
        )


def _replicates(parts: Sequence[LayerFisher]) -> torch.Tensor:
    """Leave out one fold of one data set at a time: their errors are independent of each other, and
    all layers of a flow leave out the same samples. Empty if a data set has none."""
    counts = [len(part.replicates) for part in parts]
    total = sum(counts)
    if not all(counts):
        return parts[0].replicates[:0]
    J = sum((part.J for part in parts), torch.zeros_like(parts[0].J))
    return J + torch.cat(
        [
            (part.replicates - part.replicates.mean(0))
            * math.sqrt((count - 1) / count * total / (total - 1))
            for part, count in zip(parts, counts, strict=True)
        ]
    )


def _profile(profiles: Sequence[Profile | None]) -> Profile | None:
    """Add up profiles at the same theta; None if there are none, or at other theta."""
    found = [profile for profile in profiles if profile is not None]
    if len(found) < len(profiles):
        return None
    theta = found[0].theta
    near = SAME_THETA * (theta.amax(0) - theta.amin(0))
    for profile in found[1:]:
        if profile.theta.shape != theta.shape or bool(((profile.theta - theta).abs() > near).any()):
            return None
    J = torch.stack([profile.J for profile in found]).sum(0)
    variance = torch.stack([profile.stderr.square() for profile in found]).sum(0)
    samples = torch.stack([profile.samples for profile in found]).sum(0)
    return Profile(theta, J, variance.sqrt(), samples, max(profile.rounding for profile in found))
