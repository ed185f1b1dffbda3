"""The Fisher matrix of a network's parameters: one function for every structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from fisherfast.parameters.batches import Data
from fisherfast.parameters.block import BlockAccumulator, BlockFisher
from fisherfast.parameters.diagonal import DiagonalAccumulator, DiagonalFisher
from fisherfast.parameters.full import FullAccumulator, FullFisher
from fisherfast.parameters.gram import GramAccumulator, GramFisher
from fisherfast.parameters.kfac import KroneckerAccumulator, KroneckerFisher
from fisherfast.parameters.layout import ParameterLayout, Selection
from fisherfast.parameters.likelihoods import Likelihood
from fisherfast.parameters.lowrank import LowRankAccumulator, LowRankFisher
from fisherfast.parameters.matrix import Accumulator, ParameterFisher
from fisherfast.parameters.sweeps import FisherType, sweeps
from fisherfast.unwrap import unwrapped

__all__ = ["Structure", "fisher", "from_state_dict"]

Structure = Literal["diag", "block", "kfac", "full", "gram", "lowrank"]

ACCUMULATORS: dict[str, Callable[..., Accumulator]] = {
    "diag": DiagonalAccumulator,
    "block": BlockAccumulator,
    "full": FullAccumulator,
    "gram": GramAccumulator,
    "kfac": KroneckerAccumulator,
    "lowrank": LowRankAccumulator,
}
RESULTS: dict[str, type[ParameterFisher]] = {
    "diag": DiagonalFisher,
    "block": BlockFisher,
    "full": FullFisher,
    "gram": GramFisher,
    "kfac": KroneckerFisher,
    "lowrank": LowRankFisher,
}


def fisher(
    model: nn.Module,
    likelihood: Likelihood,
    data: Data,
    structure: Structure = "diag",
    fisher_type: FisherType = "exact",
    samples: int = 1,
    *,
    parameters: Selection = None,
    batch_size: int = 256,
    seed: int = 0,
    **settings: Any,
) -> ParameterFisher:
    """The Fisher matrix of the parameters w of p(y | x, w), averaged over the inputs of the data.

    F = 1/n sum_i E_{y ~ p(y | x_i, w)}[ s s^T ],   s = d log p(y | x_i, w) / dw
    """
    model = unwrapped(model)
    layout = ParameterLayout.of(model, parameters)
    accumulator = ACCUMULATORS[structure](layout, fisher_type, **settings)
    seen = 0
    for sweep in sweeps(
        model,
        likelihood,
        data,
        layout,
        fisher_type=fisher_type,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
    ):
        accumulator.add(sweep)
        seen += sweep.samples
    return accumulator.result(seen)


def from_state_dict(state: Mapping[str, Any]) -> ParameterFisher:
    """The matrix whose ``state_dict()`` this is."""
    layout = ParameterLayout.from_state_dict(state["layout"])
    return RESULTS[state["structure"]]._from_state(
        layout, state["samples"], state["fisher_type"], state
    )
