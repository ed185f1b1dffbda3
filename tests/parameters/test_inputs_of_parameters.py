"""`ff.parameters` of networks with several inputs, or with objects as outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.networks_zoo import untouched
from support.several_inputs import (
    KEEP,
    Answering,
    ByHand,
    Items,
    MapAnswer,
    N,
    Reader,
    ReaderByHand,
    as_floats,
    drawn,
    join,
    named,
    seeded,
    stream,
    tokens,
    words,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fisherfast as ff


def labels(n: int = N) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(2))


def answers() -> nn.Module:
    return Answering(MapAnswer)


PARAMETER_DATA: dict[str, Callable[[Any, Any], Any]] = {
    "pair": lambda x, y: (x, y),
    "loader": lambda x, y: DataLoader(Items((x, y)), batch_size=64),
    "stream": lambda x, y: stream((x, y))(),
}


@pytest.mark.parametrize("kind", PARAMETER_DATA)
@pytest.mark.parametrize("pack", [KEEP, named])
def test_parameters_of_several_inputs(kind, pack):
    """Catches inputs that are taken for labels, or that are cut at other rows; rows of single
    samples by torch.func; logits in an object."""
    x = pack(*drawn())
    model, by_hand = (seeded(build).double() for build in (answers, ByHand))
    model.scale = by_hand.scale = nn.Parameter(torch.ones(()).double())  # no rule: rows
    for net in (model, by_hand):
        net.conv.register_forward_hook(lambda m, args, out, net=net: out * net.scale)
    with untouched(model):
        fisher = ff.parameters.fisher(
            model, "gaussian", PARAMETER_DATA[kind](x, labels()), fisher_type="empirical"
        )
    expected = ff.parameters.fisher(
        by_hand, "gaussian", (join(*drawn()), labels()), fisher_type="empirical"
    )
    torch.testing.assert_close(fisher.diag(), expected.diag(), rtol=1e-12, atol=0)  # sums
    if kind == "pair":
        scores = ff.parameters.score(model, "gaussian", x, labels()).matrix()
        other = ff.parameters.score(by_hand, "gaussian", join(*drawn()), labels()).matrix()
        assert torch.equal(scores, other)


def test_parameters_of_tokens():
    exact = ff.parameters.fisher(seeded(Reader), "gaussian", tokens(*words(0)))
    expected = ff.parameters.fisher(seeded(ReaderByHand), "gaussian", as_floats(*words(0)))
    assert torch.equal(exact.diag(), expected.diag())
