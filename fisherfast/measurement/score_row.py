"""Layers read with a score: V of the input, and a warning where its mean is not zero."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fisherfast.estimation.derivatives import ScoreMoments
from fisherfast.estimation.variance import jackknife_covariance, standard_errors
from fisherfast.measurement.meter import Meter
from fisherfast.results.layer import LayerFisher
from fisherfast.results.marginal import pack_covariance

__all__ = ["score_note"]

SCORE_ERRORS = 5.0
"""Standard errors from zero beyond which the mean of a score is no chance: 6e-7."""


def score_note(meter: Meter) -> str | None:
    """A warning where the mean of what was given as score is not zero."""
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


def score_information(layer: LayerFisher, meter: Meter) -> LayerFisher:
    """The input of a score source: V = Cov(score), the Fisher information itself, in place of what
    its features show."""
    scores = [
        moments.carried.score(slice(None), moments.counts[0].to(moments.sums))
        for moments in meter.parts
        if moments.carried is not None
    ]
    folds = torch.cat([score.folds for score in scores if score is not None])
    V = folds.mean(0)
    errors = jackknife_covariance(V - (folds - V) / (len(folds) - 1)).cpu()
    stderr = standard_errors(errors)
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
        replicates=meter.replicates_of_score(V),
        error_covariance=pack_covariance(errors),
    )
