"""Results of layers without an estimate of their own: constant activations, too few samples."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fisherfast.data import Data
from fisherfast.model.sites import Site
from fisherfast.results.layer import LayerFisher
from fisherfast.results.marginal import pack_covariance

__all__ = ["no_information"]


def no_information(site: Site, data: Data, *, samples: int, dropped: int) -> LayerFisher:
    """J = 0 and an empty curve: what a layer shows when none of its activations varies."""
    P = data.parameters
    zero = torch.zeros(P, P, dtype=torch.float64)
    empty = torch.zeros(0, P, P, dtype=torch.float64)
    return LayerFisher(
        name=site.name,
        kind=site.kind,
        shape=site.shape,
        J=zero,
        stderr=zero,
        lower=zero,
        lower_stderr=zero,
        linear=zero,
        linear_stderr=zero,
        naive=zero,
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
    )


def not_measured(site: Site, data: Data, *, samples: int, reason: str) -> LayerFisher:
    """NaN: what a layer shows that cannot be measured, so that the others need not fail."""
    layer = no_information(site, data, samples=samples, dropped=0)
    nan, entries = torch.full_like(layer.J, math.nan), layer.error_covariance
    return replace(
        layer,
        J=nan,
        stderr=nan,
        lower=nan,
        lower_stderr=nan,
        linear=nan,
        linear_stderr=nan,
        naive=nan,
        error_covariance=None if entries is None else torch.full_like(entries, math.nan),
        plateau=False,
        notes=(f"not measured: {reason}",),
    )
