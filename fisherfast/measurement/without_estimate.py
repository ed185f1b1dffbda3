"""Results that no features are fitted for: constant layers, layers with too few samples, and the
input of a score source."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from fisherfast.data import Data
from fisherfast.estimation.derivatives import ScoreMoments
from fisherfast.estimation.variance import jackknife_covariance, standard_errors
from fisherfast.measurement.cross_fit import replicates_of_mean
from fisherfast.measurement.meter import Meter
from fisherfast.model.sites import Site
from fisherfast.results.layer import UNMEASURED, LayerFisher
from fisherfast.results.marginal import pack_covariance
from fisherfast.results.mean import MATRICES

SCORE_ERRORS = 5.0
"""Warn if the mean of a score is beyond this many standard errors from zero (p = 6e-7)."""


def no_information(site: Site, data: Data, *, samples: int, dropped: int) -> LayerFisher:
    """Return J = 0 with an empty curve, the result of a layer without activations that vary."""
    P = data.parameters
    matrices: dict[str, Any] = dict.fromkeys(MATRICES, torch.zeros(P, P, dtype=torch.float64))
    empty = torch.zeros(0, P, P, dtype=torch.float64)
    return LayerFisher(
        name=site.name,
        kind=site.kind,
        shape=site.shape,
        **matrices,
        curve_k=torch.zeros(0, dtype=torch.int64),
        curve_J=empty,
        curve_stderr=empty,
        features=0,
        feature_kind="none",
        effective_dim=0.0,
        samples=samples,
        dropped=dropped,
        plateau=True,
        dtheta=data.dtheta,
        error_covariance=pack_covariance(torch.zeros(P, P, P, P, dtype=torch.float64)),
        replicates=empty,
        aliases=tuple(site.aliases),
        descendants=tuple(sorted(site.descendants)),
        parameter_names=data.names,
        cut=site.cut,
        copies=tuple(site.copies),
        label=site.label,
    )


def not_measured(site: Site, data: Data, *, samples: int, reason: str) -> LayerFisher:
    """Return NaN, the result of a layer that cannot be measured, so that the others do not fail."""
    layer, P = no_information(site, data, samples=samples, dropped=0), data.parameters
    nan: dict[str, Any] = dict.fromkeys(MATRICES, torch.full_like(layer.J, math.nan))
    covariance = torch.full((P, P, P, P), math.nan, dtype=torch.float64)
    return replace(
        layer,
        **nan,
        error_covariance=pack_covariance(covariance),
        plateau=False,
        notes=(f"{UNMEASURED}{reason}",),
    )


def score_note(meter: Meter) -> str | None:
    """Return a warning if the mean of what was given as score is not zero."""
    errors = [
        moments.carried.mean_error(moments.counts[0].to(moments.sums.device, torch.float64))
        * math.sqrt(moments.units / min(moments.seen))
        for moments in meter.parts
        if isinstance(moments.carried, ScoreMoments)
    ]
    if not errors:
        return None
    off = torch.stack(errors).sum(0) / math.sqrt(len(errors))
    worst = float(off.abs().nan_to_num().max())
    if worst <= SCORE_ERRORS:
        return None
    return (
        f"mean of the score is {worst:.1f} standard errors from zero: it is no score of these"
        " samples, or one at another theta; J is wrong then"
    )


def of_input(layer: LayerFisher, meter: Meter, data: Data, unseen: str | None) -> LayerFisher:
    """Complete the result for the input: V of a score, or what no density is known of.

    Args:
        layer: as its features show it.
        meter: of the input.
        data: the samples.
        unseen: which of their entries are not floating; None for none.
    """
    blind = unseen is not None and layer.feature_kind == "none"
    if unseen is not None and blind:
        layer = not_measured(meter.site, data, samples=layer.samples, reason=unseen)
    if data.source == "score":
        layer = score_information(layer, meter)
        return replace(layer, notes=()) if blind else layer
    return layer if blind or unseen is None else replace(layer, notes=(*layer.notes, unseen))


def score_information(layer: LayerFisher, meter: Meter) -> LayerFisher:
    """Put V = Cov(score), the Fisher information itself, in place of what the features of the input
    show."""
    scores = [
        moments.carried.score(slice(None), moments.counts[0].to(moments.sums))
        for moments in meter.parts
        if moments.carried is not None
    ]
    folds = torch.cat([score.folds for score in scores if score is not None])
    V = folds.mean(0)
    errors = jackknife_covariance(V - (folds - V) / (len(folds) - 1)).cpu()
    stderr = standard_errors(errors)
    replicates = [
        held.replicates_of_score(V, moments.units)
        for held, moments in zip(meter.held, meter.parts, strict=True)
    ]
    V = V.cpu()
    return replace(
        layer,
        J=V,
        stderr=stderr,
        lower=V,
        lower_stderr=stderr,
        naive=V,
        plateau=True,
        carried=True,
        replicates=replicates_of_mean(replicates) if len(replicates) > 1 else replicates[0].cpu(),
        error_covariance=pack_covariance(errors),
    )
