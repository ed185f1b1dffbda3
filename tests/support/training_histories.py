"""Histories as a monitor would have made them, of numbers that a test chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

import fisherfast as ff
from fisherfast.training.record import EpochRecord


def layer(name: str, J: torch.Tensor, *, stderr: float, lifted: float = 0.0) -> ff.LayerFisher:
    """A layer with linear information J; that of a lift of it is larger by `lifted`."""
    error = torch.full_like(J, stderr)
    return ff.LayerFisher(
        name=name,
        kind="Linear",
        shape=(len(J),),
        J=J + lifted * torch.eye(len(J), dtype=torch.float64),
        stderr=error,
        lower=J,
        lower_stderr=error,
        linear=J,
        linear_stderr=error,
        naive=J,
        curve_k=torch.tensor([1]),
        curve_J=J[None],
        curve_stderr=error[None],
        features=1,
        feature_kind="raw",
        effective_dim=1.0,
        samples=100,
        dropped=0,
        plateau=True,
        dtheta=(),
    )


def flow(
    inputs: torch.Tensor, outputs: torch.Tensor, *, stderr: float = 1e-3, lifted: float = 0.0
) -> ff.FisherFlow:
    """Input and output."""
    layers = (
        layer("input", inputs, stderr=stderr),
        layer("output", outputs, stderr=stderr, lifted=lifted),
    )
    return ff.FisherFlow(layers, {})


def flow_of(
    model: object,
    data: object,
    *,
    layers: Sequence[str],
    J: float = 2.0,
    stderr: float = 0.1,
    **_: Any,
) -> ff.FisherFlow:
    """Stands in for `fisher_flow`: the same J in the input, these layers and the output."""
    names = ("input", *layers, "output")
    return ff.FisherFlow(tuple(layer(name, number(J), stderr=stderr) for name in names), {})


def number(J: float) -> torch.Tensor:
    """J of one parameter."""
    return torch.tensor([[J]], dtype=torch.float64)


def by_errors(
    errors: Sequence[float | None], *, J: float = 4.0, first: int = 0
) -> list[EpochRecord]:
    """Epochs with these training errors; the monitor has measured at the first one only."""
    return [
        EpochRecord(
            epoch=first + index,
            flow=None,
            train_mse=None if error is None else (error,),
            val_mse=None,
            input_J=number(J),
        )
        for index, error in enumerate(errors)
    ]


def by_shares(
    shares: Sequence[float], *, J: float = 4.0, stderr: float = 1e-3, lifted: Sequence[float] = ()
) -> list[EpochRecord]:
    """Epochs with these J_output / J_input; NaN for an epoch that was not measured."""
    extra = list(lifted) or [0.0] * len(shares)
    return [
        EpochRecord(
            epoch=index,
            flow=None
            if math.isnan(share)
            else flow(number(J), number(J * share), stderr=stderr, lifted=J * more),
            train_mse=None,
            val_mse=None,
            input_J=number(J),
        )
        for index, (share, more) in enumerate(zip(shares, extra, strict=True))
    ]
