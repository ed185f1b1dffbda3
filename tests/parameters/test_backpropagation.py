"""Which parameters are measured by the rule of their layer, which by per-sample gradients, and what
a batch that has gone forward keeps."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support.parameters_zoo import NETWORKS, Network, linear
from torch import Tensor, nn

from fisherfast.parameters.backward.backpropagation import Backpropagation
from fisherfast.parameters.backward.layer_check import samples_apart
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layout import ParameterLayout

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # of torch, on copies

ROWS = {
    "transformer": ["0.self_attn"],
    "LSTM": ["rnn"],
    "windows mixed": ["layers"],
    "called twice": ["layer"],
    "tied head": ["embedding", "head"],
    "expression": ["scale", "gate"],
    "weights in an expression": ["layer"],
    "weight norm": ["0.parametrizations", "0.bias"],
}
"""Parts of the networks that no rule answers for, or not rightly."""


def forward(model: nn.Module, x: Tensor) -> tuple[Backpropagation, ParameterLayout]:
    """A batch that has gone forward, after the examination."""
    layout = ParameterLayout.of(model)
    return Backpropagation(model, layout, x, samples_apart(model, layout, x)), layout


@pytest.mark.parametrize("name", NETWORKS)
def test_ways(name: str) -> None:
    """A layer that is measured by its rule where that mixes samples; or, slowly, sample by
    sample where the rule would do: behind in-place operations, folded windows, checkpoints."""
    network = NETWORKS[name]
    parts = ROWS.get(name, [])
    for dtype in (torch.float64, torch.float32):
        batch, layout = forward(network.make(dtype), network.inputs(6, dtype))
        for parameter in layout.names:
            by_rows = any(parameter.startswith(part) for part in parts)
            expected = "unused" if "idle" in parameter else "rows" if by_rows else "rule"
            assert batch.layers[parameter] == expected, parameter


def test_rules_that_stay() -> None:
    """A tap behind the user's hook instead of before, and a layer that has no gradient at the
    samples that are examined, taken for one that is wrong: right, and slow."""
    model = NETWORKS["linear"].make()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    nn.init.zeros_(model[2].weight)  # as the last layer of a fresh network is
    batch, _ = forward(model, NETWORKS["linear"].inputs())
    assert set(batch.layers.values()) == {"rule"}


@pytest.mark.parametrize("sent", [0, 3])
def test_freed(sent: int) -> None:
    """A batch that refers to itself, and holds its activations until the garbage collector comes:
    then there are those of two batches; inputs that a tap keeps after the last vector."""
    network = Network(linear, (4,))
    kept: list[weakref.ref[Tensor]] = []

    def visitor(rule: Rule, x: Tensor, g: Tensor) -> None:
        kept.append(weakref.ref(x))

    gc.collect()
    gc.disable()
    try:
        batch, _ = forward(network.make(), network.inputs())
        references = weakref.ref(batch.calls[-1].rule), weakref.ref(batch._graph.grad_fn)
        vector = torch.ones_like(batch.outputs)
        for number in range(sent):
            batch.visit(vector, visitor, last=number == 2)
            assert all((reference() is None) == (number == 2) for reference in kept)
        if sent:
            with pytest.raises(RuntimeError, match="last must be set for the last vector only"):
                batch.visit(vector, visitor)
        del batch
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()
