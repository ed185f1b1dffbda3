"""A small network, data for it, and its flow, to compare with what is wrapped around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fisherfast as ff

DIM, DTHETA = 6, 0.1
OPTIONS: dict[str, Any] = {"max_features": 16}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DIM, 5)
        self.fc2 = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def network() -> Net:
    torch.manual_seed(1)
    return Net()


X = torch.randn(2, 400, DIM, generator=torch.Generator().manual_seed(0))
DATA = ff.FiniteDifference(X[0] - DTHETA / 2, X[1] + DTHETA / 2, DTHETA)


def plain_flow() -> ff.FisherFlow:
    return ff.fisher_flow(network(), DATA, **OPTIONS)


def assert_same(flow: ff.FisherFlow, expected: ff.FisherFlow) -> None:
    assert flow.names == expected.names
    for layer, other in zip(flow, expected, strict=True):
        assert torch.equal(layer.J, other.J), layer.name


def hooks(model: nn.Module) -> int:
    """Hooks of all modules."""
    return sum(
        len(found)
        for module in model.modules()
        for found in (module._forward_hooks, module._forward_pre_hooks)
    )
