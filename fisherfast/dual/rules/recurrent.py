"""Rules of recurrent layers: the inputs of all steps at once, the states step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fisherfast.dual.dispatch import Operator, rule
from fisherfast.dual.errors import no_derivative

State = tuple[Any, ...]
Step = Callable[[Any, State, Sequence[Any]], State]
"""(input part of the gates, states, recurrent weights) -> new states."""


def _lstm_step(gates: Any, state: State, weights: Sequence[Any]) -> State:
    hidden, cell = state
    i, f, g, o = (gates + linear(hidden, *weights[:2])).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    return (linear(hidden, weights[2]) if len(weights) > 2 else hidden), cell


def _gru_step(gates: Any, state: State, weights: Sequence[Any]) -> State:
    (hidden,) = state
    r, z, n = gates.chunk(3, -1)
    r_hidden, z_hidden, n_hidden = linear(hidden, *weights[:2]).chunk(3, -1)
    r, z = (r + r_hidden).sigmoid(), (z + z_hidden).sigmoid()
    n = (n + r * n_hidden).tanh()
    return (n + z * (hidden - n),)


def _tanh_step(gates: Any, state: State, weights: Sequence[Any]) -> State:
    return ((gates + linear(state[0], *weights[:2])).tanh(),)


def _relu_step(gates: Any, state: State, weights: Sequence[Any]) -> State:
    return ((gates + linear(state[0], *weights[:2])).relu(),)


STEPS: dict[str, Step] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _tanh_step,
    "rnn_relu": _relu_step,
}


@rule("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def _recurrent(
    func: Operator,
    x: Any,
    start: Any,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    if dropout > 0 and train:
        return NotImplemented
    name = func._schema.name.removeprefix("aten::")
    states = list(start) if isinstance(start, list | tuple) else [start]
    if batch_first:
        x = x.transpose(0, 1)
    directions = 2 if bidirectional else 1
    per_cell = len(params) // (num_layers * directions)
    last: list[State] = []
    for layer in range(num_layers):
        outputs = []
        for way in range(directions):
            cell = layer * directions + way
            weights = params[cell * per_cell : (cell + 1) * per_cell]
            state = tuple(s[cell] for s in states)
            sequence, state = _run(STEPS[name], x, state, weights, has_biases, backwards=way == 1)
            outputs.append(sequence)
            last.append(state)
        x = torch.cat(outputs, -1) if directions > 1 else outputs[0]
    final = tuple(torch.stack([state[i] for state in last]) for i in range(len(states)))
    return (x.transpose(0, 1) if batch_first else x, *final)


def _run(
    step: Step,
    x: Any,
    state: State,
    params: Sequence[Tensor],
    has_biases: bool,
    *,
    backwards: bool,
) -> tuple[Any, State]:
    """Run all steps [L, n, d] of one cell; outputs are in the order of the input."""
    w_input, w_hidden = params[:2]
    b_input, b_hidden = params[2:4] if has_biases else (None, None)
    weights = [w_hidden, b_hidden, *params[4 if has_biases else 2 :]]
    gates = linear(x, w_input, b_input)
    outputs = []
    for t in reversed(range(len(x))) if backwards else range(len(x)):
        state = step(gates[t], state, weights)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _cell(
    func: Operator,
    x: Any,
    start: Any,
    w_input: Tensor,
    w_hidden: Tensor,
    b_input: Tensor | None = None,
    b_hidden: Tensor | None = None,
) -> Any:
    name = func._schema.name.removeprefix("aten::").removesuffix("_cell")
    state = tuple(start) if isinstance(start, list | tuple) else (start,)
    state = STEPS[name](linear(x, w_input, b_input), state, [w_hidden, b_hidden])
    return state if name == "lstm" else state[0]


@rule("lstm.data", "gru.data", "rnn_tanh.data", "rnn_relu.data")
def _packed(func: Operator, *args: Any, **kwargs: Any) -> Any:
    raise no_derivative(
        str(func), "a packed sequence: give padded sequences [n, L, d], or one length at a time"
    )
