"""Layers whose rules are trusted, and networks that are refused: a few samples tried alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.parameters_oracle import brute_force
from support.parameters_small import CATEGORICAL, difference, inputs, measure, rows
from support.parameters_zoo import NETWORKS, Network, Written
from torch import Tensor, nn

import fisherfast as ff


def assert_right(model: nn.Module, x: Tensor, data: object = None, structure: str = "diag") -> None:
    """The diagonal equals the brute force."""
    found = measure(structure, x if data is None else data, model=model).diag()
    # measured: below 1e-15, and for rows of low rank 1e-13
    assert difference(found, brute_force(model, "categorical", x).diag()) < 1e-11


MIXED = "must treat every sample by itself"


def switch(from_samples: float = float("inf")) -> nn.Module:
    """Mixes the samples of a batch of at least `from_samples`."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.layer(x))
        return m.head(h - 0.5 * h.mean(0) if len(x) >= from_samples else h)

    return made(forward)


@pytest.mark.parametrize("from_samples", [1, 2, 4])
def test_mixed_samples_are_refused(from_samples: int) -> None:
    """At 4: catches a check of the three samples alone, without the batch itself."""
    with pytest.raises(ValueError, match=MIXED):
        ff.parameters.fisher(switch(from_samples), CATEGORICAL, rows(5))


def test_every_call_checks_the_network() -> None:
    """Catches what a call keeps of a network for the next: a hook that mixes."""
    model, x = switch(), rows(5)
    assert_right(model, x)
    model.layer.register_forward_hook(lambda module, args, output: output - output.mean(0))
    with pytest.raises(ValueError, match=MIXED):
        ff.parameters.fisher(model, CATEGORICAL, x)


@pytest.mark.parametrize("name", ["windows mixed", "windows"])
def test_a_head_that_was_zero(name: str) -> None:
    """Catches layers that are trusted because their gradients were all zero when they were looked
    at, as they are before the first step of a network whose last layer begins at zero."""
    network = NETWORKS[name]
    model, x = network.make(), network.inputs(5)
    head = [parameter for part, parameter in model.named_parameters() if part.startswith("head")]
    before = copy.deepcopy(head)
    for parameter in head:
        parameter.data.zero_()
    assert_right(model, x)
    for parameter, value in zip(head, before, strict=True):
        parameter.data.copy_(value)
    assert_right(model, x)


def gated(m: Any, x: Tensor) -> Tensor:
    """Windows of all samples mixed, of samples that a gate lets pass."""
    every = x.unfold(1, 4, 2).transpose(0, 1).reshape(-1, 4)
    windows = torch.tanh(m.layer(every)).reshape(-1, len(x), 4).mean(0)
    return m.head(windows * (x[:, :1] > 0))


def in_order(m: Any, x: Tensor) -> Tensor:
    """Sorts the samples of its batch, as those of different lengths are, and back."""
    order = x[:, 0].argsort(descending=True)
    return m.head(torch.tanh(m.layer(x[order]))[order.argsort()])


def made(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return Network(
        lambda: Written(forward, layer=nn.Linear(4, 4), head=nn.Linear(4, 3)), (4,)
    ).make()


@pytest.mark.parametrize("structure", ["diag", "block", "gram"])
def test_gradients_that_begin_in_a_later_batch(structure: str) -> None:
    """Catches layers that are trusted because the first batch has shown nothing of them."""
    model, x = made(gated), inputs(8).flatten(1)[:, :8]
    x[:4, 0], x[4:, 0] = -1, 1
    assert_right(model, x, iter([x[:4], x[4:]]), structure)


@pytest.mark.parametrize("first", [1, 4], ids=["one sample", "samples alike"])
def test_first_batches_that_tell_nothing(first: int) -> None:
    """Catches samples that mix and are alike in the first batch."""
    model, x = switch(1), rows(9)
    x[:4] = x[0]
    with pytest.raises(ValueError, match=MIXED):
        ff.parameters.fisher(model, CATEGORICAL, iter([x[:first], x[first:]]))


@pytest.mark.parametrize("descending", [True, False])
def test_samples_in_an_order_of_the_networks_own(descending: bool) -> None:
    """Catches an order that is that of the samples looked at, and of no others."""
    model, x = made(in_order), rows(8)
    x[:3, 0] = x[:3, 0].sort(descending=descending).values
    assert_right(model, x)
